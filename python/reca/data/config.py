"""Recipe keys of the data."""

from dataclasses import dataclass
from typing import Optional

from reca.options import option


@dataclass
class DataConfig:
    images: Optional[str] = option(
        None, "pictures to reconstruct: a folder, tar files (a glob or {000..009} range), or world:SPLIT?seed=N"
    )
    conversations: Optional[str] = option(
        None, "questions and answers about pictures (i2t): a LLaVA-style .json with data.image_root, or world:SPLIT"
    )
    captions: Optional[str] = option(
        None, "captioned pictures (t2i): a folder or tars with a .txt beside every picture, or world:SPLIT"
    )
    image_root: Optional[str] = option(None, "folder that the picture names of a conversations file start from")
    templates: Optional[str] = option(
        None, "text file of template sentences, one a line, or world:; null: the 360 of this package"
    )
    template_count: Optional[int] = option(None, "use this many of the templates, evenly spread; null uses all")
    decoder: str = option(
        "auto", "auto (dali if installed and a GPU is there), pillow or dali", ("auto", "pillow", "dali")
    )
    workers: int = option(2, "threads that read and decode ahead; 0 decodes when asked", least=0)
    prefetch: int = option(2, "batches decoded ahead", least=0)
    max_bad_fraction: float = option(0.01, "largest share of unreadable pictures before the run stops", least=0)
    cache: Optional[str] = option(None, "folder of features of the frozen encoders, made once and read afterwards")
