"""The four steps of an evaluation, for a model and for the one it is compared with."""

import contextlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from reca import distributed
from reca.eval import records as recorded
from reca.eval import report
from reca.eval.checks import check
from reca.eval.errors import EvaluationError, OptionError
from reca.eval.files import write
from reca.eval.generate import generate_answers, generate_images, is_complete, method_of, read_answers
from reca.eval.inputs import count_unjudged, images_of
from reca.eval.judge import judge_images, valid
from reca.eval.judges import open_judge
from reca.eval.judges.base import Judge
from reca.eval.records import Record
from reca.eval.settings import Settings
from reca.eval.suites import Item, Key
from reca.eval.suites.base import image_hash
from reca.eval.targets import (
    Target,
    check_prompts,
    check_suite,
    describe,
    opponent,
    read_generation,
    target,
    write_generation,
)
from reca.hardware.devices import usable_device
from reca.io.folders import EVALUATION, NotWritable, ensure_writable
from reca.io.paths import is_file
from reca.launcher import is_main_process
from reca.models import umm_package
from reca.options.names import option
from reca.options.sampling import defaults
from reca.runs import folder_lock

log = logging.getLogger("reca")
RULE = {"name": "rule", "version": "1", "dtype": None, "exact": True}


def evaluate(
    settings: Settings,
    source: str | Path,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    against: str | Path | None = None,
    images: Path | None = None,
    records: Path | None = None,
    out: Path | None = None,
    device: torch.device | str | None = None,
    ema: bool = False,
) -> dict[str, Any] | None:
    """Run the selected steps. See `reca.evaluate`. Returns the results on rank 0, None if no step produced them."""
    suite, device = settings.suite, None if device is None else usable_device(device)
    mine = target(source, overrides, suite.folder, out, ema)
    sides = [mine] if against is None else [mine, opponent(against, mine, overrides, suite.folder)]
    if len({side.folder.resolve() for side in sides}) < len(sides):
        raise OptionError(
            f"{source} and {against} are the same model, or two that would be evaluated in the same folder, "
            f"{mine.folder}: compare with another model"
        )
    for side in sides:
        if side.recipe is not None:
            _open_folder(side, option("out") if side is mine else "the other model's folder")
            check_suite(side.folder, suite)
    given = check(settings, sides, images, records)
    if "generate" in settings.steps:
        wanted = [s for s in sides if s.recipe is not None and (s is not mine or not (images or records))]
        device = _generate_on_all_ranks(settings, wanted, device)
    if not is_main_process():
        return None
    judge_device = usable_device(device)
    found = []
    for side in sides:
        own = (images, given) if side is mine else (None, None)
        with _one_judge(settings, side):
            found.append(judge_and_score(settings, side, *own, judge_device))
    if "report" not in settings.steps:  # which alone prints anything
        for side in sides:
            log.info("%s: the results of %s are in %s", suite.name, ", ".join(settings.steps), side.folder)
    if found[0] is None:
        return None
    if len(sides) == 2 and found[1] is not None:
        if sides[1].recipe is not None:
            save(settings, sides[1].folder, found[1])
        found[0] = report.compare(found[0], found[1], sides[1].folder)
    save(settings, mine.folder, found[0])
    return found[0]


def _open_folder(side: Target, name: str) -> None:
    """Create a side's folder. Raises NotWritable, with the way to keep the evaluation elsewhere, if that fails."""
    try:
        ensure_writable(side.folder, name, EVALUATION)
    except NotWritable as error:
        if name == option("out"):
            raise
        alone = side.run / "recipe.yaml" if side.run else side.source
        raise NotWritable(
            f"{error}: evaluate {alone} alone with {option('out')}, then set {option('against')} to its folder"
        ) from error


def _one_judge(settings: Settings, side: Target) -> contextlib.AbstractContextManager:
    """Return a context that waits for another process that judges this side, so that no image is judged by both."""
    if "judge" not in settings.steps or side.recipe is None:
        return contextlib.nullcontext()
    return folder_lock.alone(side.folder / folder_lock.FILE, str(side.folder))


def _generate_on_all_ranks(settings: Settings, sides: Sequence[Target], device: torch.device | None) -> torch.device:
    """Generate for these sides on all ranks, and return this rank's device.

    A run may save a checkpoint while the ranks start, so all take the one that is the newest on rank 0.
    The process group is destroyed afterwards unless the caller had created it: rank 0 alone runs the other steps.
    """
    joined = distributed.is_joined()
    place = distributed.initialize(60 * distributed.HOURS) if device is None else device
    first = distributed.all_gather([(side.folder, side.checkpoint) for side in sides])[0]
    sides = [replace(side, folder=f, checkpoint=c) for side, (f, c) in zip(sides, first, strict=True)]
    with distributed.fail_together():
        for side in sides:
            _generate(settings, side, place)
    if not joined:
        distributed.shut_down()
    return place


def save(settings: Settings, folder: Path, found: Mapping[str, Any]) -> None:
    if "score" in settings.steps:
        write(folder / report.RESULTS, json.dumps(found, indent=1, ensure_ascii=False))
    if "report" in settings.steps:
        write(folder / "report.txt", report.text(found) + "\n")


def sampling_of(settings: Settings, side: Target) -> dict[str, Any]:
    """Return all sampling options: the model's defaults, overridden by the suite's, then by the user's."""
    assert side.recipe is not None
    suite, adapter = settings.suite, umm_package(side.recipe.umm).Adapter
    return defaults(method_of(adapter, suite)) | suite.sampling(side.recipe.umm) | dict(settings.sampling)


def generation_of(settings: Settings, sampling: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the contents of generation.json, except for the model. fingerprint: identifies its state."""
    suite = settings.suite
    options = json.loads(json.dumps(sampling))  # as they are read again
    return {"suite": suite.name, "protocol": suite.protocol, "sampling": options, "seed": settings.seed,
            "fingerprint": fingerprint}  # fmt: skip


def _generate(settings: Settings, side: Target, device: torch.device) -> None:
    """Generate the images, or answers, that a side lacks. Load its model only if something is missing."""
    suite, items, folder = settings.suite, settings.items(), side.folder
    check_prompts(folder, items)
    sampling, before = sampling_of(settings, side), read_generation(folder)
    made = generation_of(settings, sampling, side.fingerprint())
    same = before and all(before.get(key) == value for key, value in made.items())
    if same and _complete(settings, items, folder):
        return
    model = side.load(device)
    made |= {"model": describe(model, side), "fingerprint": side.fingerprint(model)}
    with distributed.fail_together():
        if distributed.rank() == 0:
            write_generation(folder, made, items)
    if suite.ability == "answer":
        generate_answers(model, suite, items, folder / "answers.jsonl", **sampling)
        return
    images = folder / "images"
    images.mkdir(exist_ok=True)
    generate_images(model, suite, items, images, settings.count, sampling, settings.seed)


def _complete(settings: Settings, items: Sequence[Item], folder: Path) -> bool:
    if settings.suite.ability == "answer":
        known = read_answers(folder / "answers.jsonl", items)
        return all((item.id, 0) in known for item in items)
    paths = (settings.suite.path(item, k) for item in items for k in range(settings.count))
    return all(is_complete(folder / "images" / path) for path in paths)


def judge_and_score(
    settings: Settings, side: Target, images: Path | None, given: recorded.Imported | None, device: Any
) -> dict[str, Any] | None:
    """Judge and score one side. given: records from elsewhere. Return None if no selected step makes or reads results.

    The results of an earlier evaluation are read as they are if neither step is selected, or if the side is a folder.
    """
    if not {"judge", "score", "report"} & set(settings.steps):
        return None
    folder, steps = side.folder, settings.steps
    done = folder / report.RESULTS
    if not {"judge", "score"} & set(steps) or (side.recipe is None and is_file(done)):
        return report.read(done)
    items, found, missing = images_of(settings, side, images, given)
    place, generation = images or folder / "images", {} if images else read_generation(folder)
    path = folder / "records.jsonl"
    if given is not None:
        known, judge = _imported(found, given)
    elif settings.suite.judge_kind == "rule":
        answers = read_answers(folder / "answers.jsonl", items)
        asked = [(item, (item.id, 0)) for item in items if (item.id, 0) in answers]
        known = [Record(*key, None, RULE, answers[key], digest=item.digest) for item, key in asked]
        judge = RULE
        write(path, "".join(record.line() + "\n" for record in known))
    else:
        opened = _open(settings, items, device)
        if "judge" in steps and opened is not None:
            judge_images(opened, settings.suite, items, found, path, settings.partial)
        known, judge = _known(path, items, found, opened.describe() if opened else None)
    if "score" not in steps:
        return None
    wanted = {item.id for item in items}
    relative = {key: str(p.relative_to(place) if p.is_relative_to(place) else p.absolute()) for key, p in found.items()}
    found_records = [record for record in known if record.item in wanted]
    from_path = given.path if given else path
    missing += count_unjudged(settings, items, found, found_records, from_path, imported=given is not None)
    results = report.results(settings.suite, items, relative, found_records, judge, generation, missing)
    return results | {"images": str(place) if found else None}


def _open(settings: Settings, items: Sequence[Item], device: Any) -> Judge | None:
    """Open the judge if one is named or the step judge is selected."""
    if settings.judge is None and "judge" not in settings.steps:
        return None
    return open_judge(settings.judge, settings.judge_options, settings.suite, items, device)


def _imported(found: Mapping[Key, Path], given: recorded.Imported) -> tuple[list[Record], Mapping[str, Any]]:
    """Return imported records and their judge, without records whose hash differs from that of the image found."""
    known = list(given.records.values())
    judge = known[-1].judge
    pictured = {record.key: record.picture for record in known if record.picture is not None}
    others = {key for key, picture in pictured.items() if key in found and image_hash(found[key]) != picture}
    return [record for record in known if record.key not in others], judge


def _known(
    path: Path, items: Sequence[Item], found: Mapping[Key, Path], judge: Mapping[str, Any] | None
) -> tuple[list[Record], Mapping[str, Any]]:
    """Read the records of these images by the given judge; None: the judge of the last record."""
    everything = recorded.read(path)
    if not everything:
        raise EvaluationError(f"{path} contains no records; add the step judge, or set {option('records', 'FILE')}")
    judge = judge or everything[-1].judge
    return valid(everything, items, {key: image_hash(p) for key, p in found.items()}, judge), judge
