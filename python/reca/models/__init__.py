"""The four UMMs. Each folder has the same files: config, modules, prompt, adapter, sampling, convert."""

from importlib import import_module

UMMS = ("show_o", "harmon", "open_uni", "bagel")


def umm_package(name: str):
    """The package of a UMM; it exports `Config` (a dataclass of recipe keys) and `Adapter`."""
    if name not in UMMS:
        raise ValueError(f"umm={name!r} is unknown; it must be one of {', '.join(UMMS)}")
    return import_module(f"reca.models.{name}")
