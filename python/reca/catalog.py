"""Facts about published files: what is known of their sizes, terms and places without asking the hub.

None says that a fact is not known here. `reca get` asks the hub then. Which repositories a recipe needs stands in the
recipe itself (its model.* keys), and not here.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Facts:
    """What is known of a repository of the hub, or of one file of it."""

    size: float | None = None  # bytes of what recipes ask for
    licence: str | None = None


S_LAB = "S-Lab License 1.0 (non-commercial)"
DEEPSEEK = "DeepSeek Model License 1.0 (use restrictions that go on with what is made of it)"

WEIGHTS = {
    "showlab/show-o": Facts(5.79e9),
    "showlab/show-o-512x512": Facts(5.79e9),
    "showlab/show-o-w-clip-vit": Facts(5.82e9),
    "showlab/show-o-w-clip-vit-512x512": Facts(5.82e9),
    "showlab/magvitv2": Facts(0.38e9),
    "wusize/harmon": Facts(licence=S_LAB),
    "wusize/openuni": Facts(licence=S_LAB),
    "Qwen/Qwen2.5-0.5B-Instruct": Facts(licence="Apache-2.0"),
    "Qwen/Qwen2.5-1.5B-Instruct": Facts(licence="Apache-2.0"),
    "ByteDance-Seed/BAGEL-7B-MoT": Facts(29.55e9, licence="Apache-2.0"),
    "deepseek-ai/Janus-Pro-1B": Facts(4.18e9, licence=DEEPSEEK),
    "deepseek-ai/Janus-Pro-7B": Facts(14.84e9, licence=DEEPSEEK),
    "deepseek-ai/JanusFlow-1.3B": Facts(4.09e9, licence=DEEPSEEK),
}


@dataclass(frozen=True)
class Dataset:
    """A dataset of the hub that the releases train on."""

    repository: str
    key: str  # the recipe key that it is for
    value: str  # what the key is set to; {folder}: where the files are
    files: tuple[str, ...] | None = None  # glob patterns of what is needed; None: all
    facts: Facts = Facts()
    note: str = ""


DATASETS = {
    "midjourney-v6-llava": Dataset(
        "brivangl/midjourney-v6-llava",
        "data.images",
        "{folder}",
        note="images of Show-o, Harmon and OpenUni in the release",
    ),
    "text-to-image-2m": Dataset(
        "jackyhate/text-to-image-2M",
        "data.images",
        "{folder}/data_1024_10K/*.tar",
        ("data_1024_10K/*",),
        Facts(licence="MIT"),
        "10000 images of 1024 px: images of BAGEL in the release",
    ),
    "blip3o-60k": Dataset(
        "BLIP3o/BLIP3o-60k",
        "data.images",
        "{folder}/**/*.tar",
        facts=Facts(licence="Apache-2.0"),
        note="images by GPT-4o; RECA on them tinted Harmon's images yellow (issue 13 of the release)",
    ),
    "llava-665k": Dataset(
        "liuhaotian/LLaVA-Instruct-150K",
        "data.conversations",
        "{folder}/llava_v1_5_mix665k.json",
        ("llava_v1_5_mix665k.json",),
        note="conversations of Show-o and Harmon in the release",
    ),
}


@dataclass(frozen=True)
class SuiteFiles:
    """Files of an evaluation suite in the benchmark's own repository on GitHub."""

    repository: str
    revision: str  # of which the suite's rules were tested, where one is known
    files: tuple[str, ...]  # glob patterns
    licence: str | None
    note: str = ""


# Those of imgedit, gedit and mme are on the Hugging Face hub, with images; docs/evaluation.md says where.
SUITES = {
    "geneval_long": SuiteFiles(
        "wishhyt/reconstruction-alignment", "b4ea7a1", ("*/evaluation_metadata_long.jsonl",), "Apache-2.0"
    ),
    "geneval2": SuiteFiles("facebookresearch/GenEval2", "a6e82d2", ("geneval2_data.jsonl",), "CC BY-NC 4.0"),
    "dpg": SuiteFiles(
        "TencentQQGYLab/ELLA", "3c228f1", ("dpg_bench/dpg_bench.csv", "dpg_bench/prompts/*.txt"), "Apache-2.0"
    ),
    "wise": SuiteFiles("PKU-YuanGroup/WISE", "eb51174", ("data_verified/*.json",), None),
    "wise_legacy": SuiteFiles("PKU-YuanGroup/WISE", "eb51174", ("WISE_legacy/data/*.json",), None),
    "pope": SuiteFiles(
        "RUCAIBox/POPE", "main", ("output/coco/coco_pope_*.json",), "MIT",
        "its images: http://images.cocodataset.org/zips/val2014.zip, unpacked beside the files",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class ImageSet:
    """Images that the conversations of LLaVA-665K speak of. The hub does not hold them."""

    name: str
    folder: str  # below data.image_root
    url: str


LLAVA_IMAGES = (
    ImageSet("COCO", "coco/train2017", "http://images.cocodataset.org/zips/train2017.zip"),
    ImageSet("GQA", "gqa/images", "https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip"),
    ImageSet("OCR-VQA", "ocr_vqa/images", "by its download script, all files saved as .jpg"),
    ImageSet("TextVQA", "textvqa/train_images", "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip"),
    ImageSet("VisualGenome", "vg/VG_100K", "https://cs.stanford.edu/people/rak248/VG_100K_2/images.zip"),
    ImageSet("", "vg/VG_100K_2", "https://cs.stanford.edu/people/rak248/VG_100K_2/images2.zip"),
)


def facts_of(repository: str, file: str = "") -> Facts:
    """Look up what is known of a repository, or of one file of it, whose terms are the repository's."""
    whole = WEIGHTS.get(repository, Facts())
    if not file:
        return whole
    return WEIGHTS.get(f"{repository}/{file}", Facts(licence=whole.licence))


# How the hub names terms: its own short name, or "other" with a name and a URL.
_HUB_LICENCES = {
    "Apache-2.0": {"license": "apache-2.0"},
    "MIT": {"license": "mit"},
    S_LAB: {
        "license": "other",
        "license_name": "s-lab-license-1.0",
        "license_link": "https://github.com/wusize/Harmon/blob/main/LICENSE",
    },
    DEEPSEEK: {
        "license": "other",
        "license_name": "deepseek-model-license-1.0",
        "license_link": "https://github.com/deepseek-ai/Janus/blob/main/LICENSE-MODEL",
    },
}


def hub_licence(licence: str | None) -> dict[str, str]:
    """Return the fields of a model card that name terms; {} where they are not known here."""
    return _HUB_LICENCES.get(licence or "", {})
