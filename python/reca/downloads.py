"""Get published weights and datasets from the Hugging Face hub: `reca get weights` and `reca get data`."""

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from reca import catalog, units
from reca.config import Recipe
from reca.data.errors import DataError
from reca.folders import ensure_writable
from reca.hub_files import Listing, bring, check_access, list_files, local_folder, missing_bytes
from reca.models import UMMS, umm_package
from reca.models.common.hub import TOKENIZER, cause_of, hub_name
from reca.options import HUB, RecipeError
from reca.recipe_files import load_recipe, recipe_names

SPARE = 2**28  # bytes that a disk keeps free: for the index of the cache, and whatever else writes


@dataclass
class Download:
    """Files of one repository, and the recipe keys that name them."""

    repository: str
    file: str = ""  # the only file that is wanted; "" for those that match the patterns
    patterns: list[str] | None = None
    kind: str = "model"  # what the hub calls it: model or dataset
    settings: list[tuple[str, str]] = field(default_factory=list)  # recipe key, its value with {folder}
    facts: catalog.Facts = catalog.Facts()
    note: str = ""


def weights_of(name: str, overrides: Sequence[str] = ()) -> list[Download]:
    """List what a recipe, every recipe of a model, or a name of the hub asks for.

    Raises RecipeError for a name that is none of the three, and where nothing is to be fetched.
    """
    if name in UMMS:
        recipes = [load_recipe(recipe, overrides) for recipe in recipe_names()]
        recipes = [recipe for recipe in recipes if recipe.umm == name]
    elif "/" in name and not name.endswith((".yaml", ".yml")) and not Path(name).expanduser().exists():
        repository, file = hub_name(name, "the name")
        return [Download(repository, file, facts=catalog.facts_of(repository, file))]
    else:
        recipes = [load_recipe(name, overrides)]
    wanted: dict[tuple[str, str], Download] = {}
    for recipe in recipes:
        for download in _of_recipe(recipe):
            known = wanted.setdefault((download.repository, download.file), download)
            known.settings = list(dict.fromkeys(known.settings + download.settings))
    if not wanted:
        raise RecipeError(f"{name} names no files of the hub: all its model.* keys are null, or files of this machine")
    return list(wanted.values())


def _of_recipe(recipe: Recipe) -> Iterable[Download]:
    """Read the hub names out of a recipe's model.* keys. The model's weights.DOWNLOADS has the patterns of each."""
    patterns = getattr(getattr(umm_package(recipe.umm), "weights", None), "DOWNLOADS", {})
    for one in fields(recipe.model):
        source = getattr(recipe.model, one.name)
        if one.metadata.get("path") != HUB or not source or Path(source).expanduser().exists():
            continue
        key = f"model.{one.name}"
        repository, file = hub_name(source, key)
        usual = TOKENIZER if one.name == "tokenizer" else None
        value = f"{{folder}}/{file}" if file else "{folder}"
        yield Download(
            repository,
            file,
            None if file else patterns.get(one.name, usual),
            settings=[(key, value)],
            facts=catalog.facts_of(repository, file),
        )


def data_of(name: str) -> list[Download]:
    """Look up a dataset by its name here, or take owner/name of any dataset of the hub.

    Raises RecipeError for a name that is neither, with those there are.
    """
    if (known := catalog.DATASETS.get(name)) is not None:
        files = list(known.files) if known.files else None
        return [Download(known.repository, "", files, "dataset", [(known.key, known.value)], known.facts, known.note)]
    if name.count("/") != 1:
        raise RecipeError(
            f"{name!r} is not one of {', '.join(catalog.DATASETS)}; any other dataset of the hub is named owner/name"
        )
    return [Download(name, kind="dataset")]


def get(downloads: list[Download], to: Path | None = None, dry_run: bool = False) -> None:
    """Print what there is to fetch, and fetch it.

    to: the folder that holds a folder of each repository; None: the cache. dry_run: print the list only, as far as it
    is known without the hub where that cannot be reached.

    Raises DataError when the hub cannot be reached or refuses, or when the disk has too little room. Nothing is
    fetched then. What was fetched before is kept, and an interrupted file goes on from where it stopped.
    """
    listings = []
    for download in downloads:
        listing = None
        try:
            listing = list_files(download.repository, download.kind, download.file, download.patterns)
            _print(download, listing, to)
            listings.append((download, listing))
            check_access(listing)
        except Exception as error:  # of the libraries below the hub's, too
            if listing is None:
                _print(download, None, to)
            if not dry_run:
                raise _refused(download, error) from error
            print(f"    the hub {cause_of(error)}" if not isinstance(error, DataError) else f"    {error}")
    missing = sum(missing_bytes(listing, to) for _, listing in listings)
    folder = to or local_folder(None)
    free = _free(folder)
    amount = units.size(missing) if len(listings) == len(downloads) else "what the hub will tell"
    print(f"to fetch: {amount}, into {folder}, where {units.size(free)} are free")
    if dry_run:
        return
    if missing + SPARE > free:
        raise DataError(
            f"{folder} has {units.size(free)} free, and {units.size(missing + SPARE)} are needed; free "
            f"{units.size(missing + SPARE - free)}, or give another folder ({'--to' if to else '--to, or HF_HOME'})"
        )
    ensure_writable(folder, "--to" if to else "the cache of the hub (HF_HOME)")
    for download, listing in listings:
        try:
            place = bring(listing, download.file, download.patterns, to)
        except Exception as error:
            raise _refused(download, error) from error
        print(f"{download.repository} is in {place}")
        if to or download.kind == "dataset":
            for key, value in download.settings:
                print(f"    {key}={value.format(folder=place)}")
    if to is None and any(download.kind == "model" for download in downloads):
        print("recipes find weights of the cache by themselves")
    if any(download.repository == catalog.DATASETS["llava-665k"].repository for download in downloads):
        print(llava_images())


def llava_images() -> str:
    """Describe where the images of LLaVA-665K come from, and the folders that its rows name."""
    lines = ["its images are not on the hub; unpack them below one folder, and name that as data.image_root:"]
    return "\n".join([*lines, *(f"    {one.folder:<22}{one.name:<14}{one.url}" for one in catalog.LLAVA_IMAGES)])


def _print(download: Download, listing: Listing | None, to: Path | None) -> None:
    """Print one entry of the list: what it is for, its size, its terms."""
    what = f"{download.repository}/{download.file}" if download.file else download.repository
    keys = ", ".join(key for key, _ in download.settings)
    print(f"{what}  {keys}".rstrip())
    facts, gated = download.facts, None if listing is None else listing.gated
    licence = facts.licence
    if listing is None:
        amount = f"about {units.size(facts.size)}" if facts.size else "size unknown"
    else:
        licence = listing.licence or licence
        total, missing = sum(file.size for file in listing.files), missing_bytes(listing, to)
        amount = f"{units.size(total)} in {units.counted(len(listing.files), 'file')}"
        if missing < total:
            amount += f", of which {units.size(total - missing)} are here"
    gate = {None: "not known whether gated", False: "not gated", True: "gated"}[gated]
    print(f"    {amount}; licence: {licence or 'not known'}; {gate}")
    if gated:
        folder = "datasets/" if download.kind == "dataset" else ""
        print(f"    accept its terms on huggingface.co/{folder}{download.repository}, then `hf auth login`")
    if download.note:
        print(f"    {download.note}")


def _refused(download: Download, error: Exception) -> DataError:
    if isinstance(error, DataError):
        return error
    what = f"{download.repository}/{download.file}" if download.file else download.repository
    return DataError(
        f"{what} cannot be fetched: the hub {cause_of(error)}. What is here is kept; the same command goes on"
    )


def _free(folder: Path) -> int:
    """Read the free bytes of the disk that a folder is on, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
