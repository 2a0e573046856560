"""Checks of an evaluation's settings and inputs before anything is loaded."""

from collections.abc import Sequence
from pathlib import Path

from reca import units
from reca.eval import records as recorded
from reca.eval import report
from reca.eval.errors import EvaluationError, OptionError
from reca.eval.generate import method_of
from reca.eval.inputs import find, images_of
from reca.eval.judges import check_judge
from reca.eval.settings import Settings
from reca.eval.suites import Item, Key, Suite
from reca.eval.targets import Target
from reca.io.paths import is_dir, is_file
from reca.models import UMMS, umm_package
from reca.options.fields import RecipeError
from reca.options.names import option
from reca.options.sampling import check_sampling_options


def check(
    settings: Settings, sides: Sequence[Target], images: Path | None, records: Path | None
) -> recorded.Imported | None:
    """Raise on errors in the settings or inputs before anything is loaded. Returns the contents of `records`."""
    suite = settings.suite
    if images is not None and not is_dir(images):
        raise EvaluationError(
            f"{option('images', str(images))} is not a folder; expected a folder of images as {suite.layout()}"
        )
    if "generate" in settings.steps and not (images or records):
        for side in sides:
            if side.recipe is not None:
                _check_model(settings, side.recipe.umm)
    if suite.judge_kind != "rule" and records is None and (settings.judge or "judge" in settings.steps):
        check_judge(settings.judge, settings.judge_options, suite)
    items = settings.items(images)
    given = None if records is None else recorded.Imported(records, recorded.import_answers(records, suite, items))
    if settings.count > 1 and suite.path(items[0], 0) == suite.path(items[0], 1):
        what = "answer" if suite.ability == "answer" else "image"
        raise OptionError(f"{option('images_per_item', settings.count)}: {suite.name} has one {what} per item; set 1")
    if suite.ability != "generate" and not records and {"generate", "judge"} & set(settings.steps):
        check_sources(suite, items)
    to_judge = {} if given is not None else {sides[0].folder: _images_to_judge(settings, items, images)}
    for side in sides[1:]:
        if side.recipe is not None:
            to_judge[side.folder] = _images_to_judge(settings, items, None)
        elif {"generate", "judge"} & set(settings.steps):
            found = check_evaluation(settings, side, items)
            to_judge |= {} if found is None else {side.folder: found}
    name, _, path = (settings.judge or "").partition(":")
    if name == "recorded" and suite.judge_kind != "rule" and "judge" in settings.steps:
        check_recorded(settings, items, list(to_judge.values()), Path(path).expanduser())
    return given


def _check_model(settings: Settings, umm: str) -> None:
    """Raise RecipeError if a model lacks the suite's ability, and ValueError for invalid sampling options."""
    suite, adapter = settings.suite, umm_package(umm).Adapter
    if suite.ability not in adapter.abilities:
        able = [name for name in UMMS if suite.ability in umm_package(name).Adapter.abilities]
        raise RecipeError(
            f"{suite.name} needs a model that can {suite.ability}: {umm} cannot; use a recipe of {' or '.join(able)}"
        )
    check_sampling_options(method_of(adapter, suite), settings.sampling)


def check_evaluation(settings: Settings, side: Target, items: Sequence[Item]) -> list[Key] | None:
    """Return the images to judge of a folder to compare with; None: it has results, or nothing is judged.

    Raises EvaluationError if it has neither comparable results nor all images.
    """
    suite, done = settings.suite, side.folder / report.RESULTS
    if is_file(done):
        mine = {"suite": suite.name, "protocol": suite.protocol, "items": [report.identity(item) for item in items]}
        report.check_comparable(mine, report.read(done), side.folder)
    elif {"judge", "score"} & set(settings.steps):
        return list(images_of(settings, side, None, None)[1])
    return None


def _images_to_judge(settings: Settings, items: Sequence[Item], images: Path | None) -> list[Key]:
    """List the images of a side: those in a folder, or those to be generated; [] if they are not known yet."""
    if images is not None:
        return list(find(settings, items, images, settings.images_per_item, None))
    return [(i.id, k) for i in items for k in range(settings.count)] if "generate" in settings.steps else []


def check_recorded(settings: Settings, items: Sequence[Item], to_judge: Sequence[Sequence[Key]], path: Path) -> None:
    """Raise EvaluationError if recorded answers do not cover all images of each side, to_judge.

    Also if two sides would get the same answers: those without the hash of an image fit the images of any model.
    """
    if not to_judge:
        return
    known = recorded.import_answers(path, settings.suite, items)
    if len(to_judge) > 1 and any(record.picture is None for record in known.values()):
        raise EvaluationError(
            f"{option('judge', f'recorded:{path}')} does not say by which model the images were generated, and would "
            f"give both sides the same answers. Evaluate each side with its own file and {option('out')}, then set "
            f"{option('against')} to the other folder"
        )
    for wanted in to_judge:
        missing = [f"{item} ({k})" for item, k in wanted if (item, k) not in known]
        if missing and not settings.partial:
            raise EvaluationError(
                f"{option('judge', f'recorded:{path}')} has no answer about {len(missing)} of the {len(wanted)} images "
                f"of {settings.suite.name}: {units.some(missing)}. Set {option('partial', True)} to score the others"
            )


def check_sources(suite: Suite, items: Sequence[Item]) -> None:
    """Raise EvaluationError if an image to edit or to ask about does not exist."""
    sources = list(dict.fromkeys(item.source for item in items))
    missing = [str(path) for path in sources if path is None or not is_file(path)]
    if missing:
        raise EvaluationError(
            f"{len(missing)} of the {len(sources)} input images of {suite.name} do not exist: {units.some(missing)}."
            f" {suite.data_help or ''}"
        )
