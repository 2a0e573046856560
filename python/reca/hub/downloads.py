"""Get published weights and datasets from the Hugging Face hub: `reca get weights` and `reca get data`."""

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from reca import catalog, units
from reca.config.recipe import Recipe
from reca.config.recipe_files import UnknownRecipe, load_recipe, recipe_names
from reca.data.errors import DataError
from reca.hub.files import Listing, bring, check_access, list_files, local_folder, missing_bytes
from reca.io.folders import ensure_writable
from reca.io.paths import exists
from reca.models import UMMS, umm_package
from reca.models.common.hub import cause_of, hub_name
from reca.options.fields import HUB, RecipeError
from reca.options.names import hint

SPARE = 2**28  # bytes to leave free on the disk: for the index of the cache, and for other processes


@dataclass
class Download:
    """Files of one repository, and the recipe keys that refer to them."""

    repository: str
    file: str = ""  # the only file to download; "": all files that match the patterns
    patterns: list[str] | None = None
    kind: str = "model"  # type of the repository: model or dataset
    settings: list[tuple[str, str]] = field(default_factory=list)  # recipe key, its value with {folder}
    facts: catalog.Facts = catalog.Facts()
    note: str = ""


def weights_of(name: str, overrides: Sequence[str] = ()) -> list[Download]:
    """List the downloads of a recipe, of all recipes of a model, or of a hub id.

    Raises RecipeError if the name is none of the three, or if there is nothing to download.
    """
    if name in UMMS:
        recipes = [load_recipe(recipe, overrides) for recipe in recipe_names()]
        recipes = [recipe for recipe in recipes if recipe.umm == name]
    elif "/" in name and not name.endswith((".yaml", ".yml")) and not exists(Path(name).expanduser()):
        repository, file = hub_name(name, "the name")
        return [Download(repository, file, facts=catalog.facts_of(repository, file))]
    else:
        try:
            recipes = [load_recipe(name, overrides)]
        except UnknownRecipe as error:
            raise RecipeError(f"{error}{hint(name, UMMS)}") from error
    wanted: dict[tuple[str, str], Download] = {}
    for recipe in recipes:
        for download in _of_recipe(recipe):
            known = wanted.setdefault((download.repository, download.file), download)
            known.settings = list(dict.fromkeys(known.settings + download.settings))
            if known.patterns is None or download.patterns is None:
                known.patterns = None
            else:
                known.patterns = list(dict.fromkeys(known.patterns + download.patterns))
    if not wanted:
        raise RecipeError(f"{name} names no files of the hub: all its model.* keys are null or local files")
    return list(wanted.values())


def _of_recipe(recipe: Recipe) -> Iterable[Download]:
    """Yield the hub ids in a recipe's model.* keys. The file patterns of each key are in the model's DOWNLOADS."""
    patterns = getattr(getattr(umm_package(recipe.umm), "weights", None), "DOWNLOADS", {})
    for one in fields(recipe.model):
        source = getattr(recipe.model, one.name)
        if one.metadata.get("path") != HUB or not source or exists(Path(source).expanduser()):
            continue
        key = f"model.{one.name}"
        repository, file = hub_name(source, key)
        value = f"{{folder}}/{file}" if file else "{folder}"
        yield Download(
            repository,
            file,
            None if file else patterns.get(one.name),
            settings=[(key, value)],
            facts=catalog.facts_of(repository, file),
        )


def data_of(name: str) -> list[Download]:
    """Return the download of a dataset, named as in the catalog or by its hub id, owner/name.

    Raises RecipeError for any other name, with the names in the catalog.
    """
    if (known := catalog.DATASETS.get(name)) is not None:
        files = list(known.files) if known.files else None
        return [Download(known.repository, "", files, "dataset", [(known.key, known.value)], known.facts, known.note)]
    if name.count("/") != 1:
        raise RecipeError(
            f"{name!r} is not one of {', '.join(catalog.DATASETS)}; give any other dataset of the hub as owner/name"
            f"{hint(name, catalog.DATASETS)}"
        )
    return [Download(name, kind="dataset")]


def get(downloads: list[Download], to: Path | None = None, dry_run: bool = False) -> None:
    """Print the list of downloads, and download the files.

    to: destination, with one subfolder per repository; None: the Hugging Face cache. dry_run: only print the list, from
    known facts if the hub cannot be reached.

    Raises DataError, before anything is downloaded, if the hub cannot be reached or refuses access, or if the disk has
    too little space. Files that exist already are not downloaded again, and interrupted downloads are resumed.
    """
    listings = []
    for download in downloads:
        listing = None
        try:
            listing = list_files(download.repository, download.kind, download.file, download.patterns)
            _print(download, listing, to)
            listings.append((download, listing))
            check_access(listing)
        except Exception as error:  # also of the HTTP libraries that huggingface_hub uses
            if listing is None:
                _print(download, None, to)
            if not dry_run:
                raise _refused(download, error) from error
            print(f"    the hub {cause_of(error)}" if not isinstance(error, DataError) else f"    {error}")
    missing = sum(missing_bytes(listing, to) for _, listing in listings)
    folder = to or local_folder(None)
    free = _free(folder)
    amount = units.size(missing) if len(listings) == len(downloads) else "an unknown amount"
    print(f"to fetch: {amount}, into {folder}, which has {units.size(free)} free")
    if dry_run:
        return
    if missing and missing + SPARE > free:
        raise DataError(
            f"{folder} has {units.size(free)} free, and {units.size(missing + SPARE)} are needed; free "
            f"{units.size(missing + SPARE - free)}, or give another folder ({'--to' if to else '--to, or HF_HOME'})"
        )
    if missing or to:  # a complete cache is only read; in a folder huggingface_hub locks even complete files
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
        print("recipes find weights in the cache without further settings")
    if any(download.repository == catalog.DATASETS["llava-665k"].repository for download in downloads):
        print(llava_images())


def llava_images() -> str:
    """List the sources of LLaVA-665K's images, and the folders that its rows refer to."""
    lines = ["its images are not on the hub; unpack them into subfolders of one folder, and set data.image_root to it:"]
    return "\n".join([*lines, *(f"    {one.folder:<22}{one.name:<14}{one.url}" for one in catalog.LLAVA_IMAGES)])


def _print(download: Download, listing: Listing | None, to: Path | None) -> None:
    """Print one entry of the list: recipe keys, size, licence and gating."""
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
            amount += f", of which {units.size(total - missing)} are downloaded"
    gate = {None: "unknown whether gated", False: "not gated", True: "gated"}[gated]
    print(f"    {amount}; licence: {licence or 'unknown'}; {gate}")
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
        f"{what} cannot be fetched: the hub {cause_of(error)}. Partial downloads are kept; repeat the command to resume"
    )


def _free(folder: Path) -> int:
    """Return the free bytes of the disk that a folder is on, or will be created on."""
    while not exists(folder):
        folder = folder.parent
    return shutil.disk_usage(folder).free
