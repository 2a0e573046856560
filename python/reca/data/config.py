"""Recipe keys of the data."""

from dataclasses import dataclass
from typing import Optional

from reca.options.fields import GLOB, LOCAL, SPEC, config_field, share
from reca.options.values import Sources


@dataclass
class ColumnsConfig:
    """Keys that name the columns of a table."""

    image: Optional[str] = config_field(
        None, "column of a table that holds the images, or their paths or URLs; null finds it where it is clear"
    )
    caption: Optional[str] = config_field(None, "column of the captions; null finds it where it is clear")
    conversations: Optional[str] = config_field(None, "column of the conversations; null: conversations or messages")


@dataclass
class DataConfig:
    images: Optional[Sources] = config_field(
        None,
        "images to reconstruct: a folder of images or of parquet files; .tar (webdataset) or .parquet files, as a glob "
        "or as a complete {000..009} range; hf:NAME?split=train for Hugging Face datasets, or a folder written by "
        "save_to_disk; or package.module:FUNCTION?key=value for a function "
        "that returns a source. Mixtures as [{source: A, weight: 2}, {source: B}]: weight is the share of samples",
        path=GLOB,
    )
    conversations: Optional[Sources] = config_field(
        None,
        "questions and answers about images (i2t): a LLaVA-style .json or .jsonl with data.image_root, parquet files, "
        "hf:NAME, or package.module:FUNCTION",
        path=GLOB,
    )
    captions: Optional[Sources] = config_field(
        None,
        "captioned images (t2i): a folder or tars with a .txt next to every image, parquet files, hf:NAME, or "
        "package.module:FUNCTION",
        path=GLOB,
    )
    scored: Optional[Sources] = config_field(
        None,
        "generated images with scores of their regions (srum): a .json or .jsonl, see docs/self_training.md, "
        "or package.module:FUNCTION",
        path=GLOB,
    )
    image_root: Optional[str] = config_field(
        None,
        "root folder of the image names in conversation files, scored images or tables; null: the "
        "folder of that file, for hf:NAME the working directory",
        path=LOCAL,
    )
    columns: ColumnsConfig = config_field(ColumnsConfig, "columns of tables")
    limit: Optional[int] = config_field(
        None,
        "use only this many samples of each task, the first of the shuffled order, which depends on "
        "train.seed; null uses all",
        least=1,
    )
    shuffle: bool = config_field(True, "shuffle the samples; false: stored order")
    templates: Optional[str] = config_field(
        None,
        "text file of template sentences, one per line, or package.module:LIST; null: the package's 360 templates",
        path=SPEC,
    )
    template_count: Optional[int] = config_field(
        None, "use this many of the templates, evenly spread; null uses all", least=1
    )
    decoder: str = config_field(
        "auto", "auto (dali if it is installed and a GPU is available), pillow or dali", ("auto", "pillow", "dali")
    )
    workers: int = config_field(
        2, "threads that read and decode ahead; 0 decodes in the main thread", least=0, most=2**12
    )
    prefetch: int = config_field(
        2, "batches decoded ahead, and at least those of the next step; 0: none", least=0, most=2**12
    )
    max_bad_fraction: float = share(
        0.01, "largest fraction of unreadable samples, over all ranks, before the run stops"
    )
    cache: Optional[str] = config_field(
        None,
        "folder for cached features of the frozen encoders: in shards by `reca cache`, one file per image during "
        "training; null caches none",
        path=LOCAL,
    )
