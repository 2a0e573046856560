"""The images of an evaluation, and those that are missing."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from reca import units
from reca.eval import records as recorded
from reca.eval.errors import EvaluationError
from reca.eval.generate import read_answers
from reca.eval.records import Record
from reca.eval.settings import Settings
from reca.eval.suites import Item, Key
from reca.eval.targets import Target, check_prompts
from reca.io.paths import is_dir
from reca.options.names import option


def images_of(
    settings: Settings, side: Target, images: Path | None, given: recorded.Imported | None
) -> tuple[list[Item], dict[Key, Path], int]:
    """Return the items of a side, the images to be scored, and the number of missing ones.

    Raises EvaluationError if images are missing, unless settings.partial, or if they are of other prompts.
    """
    place, foreign = images or side.folder / "images", images is not None or side.recipe is None
    items = settings.items(place if foreign else None)
    if images is None:
        check_prompts(side.folder, items)
    generated = "generate" in settings.steps and not foreign and given is None
    count = settings.count if generated else settings.images_per_item
    found = find(settings, items, place, count, given)
    return items, found, count_missing(settings, items, place, count, found, given)


def find(
    settings: Settings, items: Sequence[Item], place: Path, most: int | None, given: recorded.Imported | None
) -> dict[Key, Path]:
    """Find the images. most: maximum number per item; None: all."""
    if settings.suite.ability == "answer":
        return {}
    found = settings.suite.find(place, items) if is_dir(place) else {}
    if not found and given is None:
        raise EvaluationError(
            f"{place} contains no images of {settings.suite.name}; expected them as {settings.suite.layout()}"
        )
    return {key: path for key, path in found.items() if most is None or key[1] < most}


def count_missing(
    settings: Settings,
    items: Sequence[Item],
    place: Path,
    count: int | None,
    found: Mapping[Key, Path],
    given: recorded.Imported | None,
) -> int:
    """Count the missing images, or answers. Raises EvaluationError if there are any, unless settings.partial.

    count: expected images per item; None: the largest number that an item has.
    """
    if settings.suite.ability == "answer":
        answered = read_answers(place.parent / "answers.jsonl", items)
        missing = [item.id for item in items if given is None and (item.id, 0) not in answered]
    elif given is not None:
        missing = []
    else:
        wanted = count or max((k for _, k in found), default=0) + 1
        missing = [f"{i.id} ({k})" for i in items for k in range(wanted) if (i.id, k) not in found]
    if missing and not settings.partial:
        raise EvaluationError(
            f"{place}: {len(missing)} images of {settings.suite.name} are missing: {units.some(missing)}. Generate "
            f"them, or set {option('partial', True)} to score the others"
        )
    return len(missing)


def count_unjudged(
    settings: Settings,
    items: Sequence[Item],
    found: Mapping[Key, Path],
    known: Sequence[Record],
    path: Path,
    imported: bool,
) -> int:
    """Count the images without a record. Raises EvaluationError if there are any, unless settings.partial.

    Imported records are expected to cover the same number of images for each item.
    """
    judged = {record.key for record in known}
    most = max((k for _, k in judged), default=0) + 1
    wanted = [(item.id, k) for item in items for k in range(most)] if imported else list(found)
    missing = [f"{item} ({k})" for item, k in wanted if (item, k) not in judged]
    if missing and not settings.partial:
        raise EvaluationError(
            f"{path} has no record of {len(missing)} images of {settings.suite.name}: {units.some(missing)}. Judge "
            f"them ({option('steps', ['judge', 'score', 'report'])}), or set {option('partial', True)} to score the "
            "others"
        )
    return len(missing)
