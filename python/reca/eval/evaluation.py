"""The four steps of an evaluation, for a model and for the one it is compared with."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from reca import distributed
from reca.eval import records as recorded
from reca.eval import report
from reca.eval.errors import EvaluationError
from reca.eval.files import write
from reca.eval.generate import generate_answers, generate_images, is_drawn, read_answers
from reca.eval.judge import judge_images, valid
from reca.eval.judges import check_judge, open_judge
from reca.eval.judges.base import Judge
from reca.eval.records import Record
from reca.eval.suites import Item, Key, Suite, open_suite
from reca.eval.suites.base import check_items, image_hash
from reca.eval.targets import (
    Target,
    check_prompts,
    describe,
    opponent,
    read_generation,
    target,
    write_generation,
)
from reca.io.folders import ensure_writable
from reca.models import UMMS, umm_package
from reca.options.fields import RecipeError
from reca.options.sampling import check_sampling_options, defaults

log = logging.getLogger("reca")
STEPS = ("generate", "judge", "score", "report")
RULE = {"name": "rule", "version": "1", "dtype": None, "exact": True}
SHOWN = 3  # maximum number of missing images in a message


@dataclass
class Settings:
    """Settings shared by both sides of an evaluation. See `reca.evaluate`."""

    suite: Suite
    steps: Sequence[str] = STEPS
    judge: str | None = None
    judge_options: Mapping[str, Any] = field(default_factory=dict)
    images_per_item: int | None = None
    limit: int | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    partial: bool = False

    def __post_init__(self) -> None:
        if unknown := [step for step in self.steps if step not in STEPS]:
            raise ValueError(f"--steps {','.join(unknown)}: unknown; the steps are {', '.join(STEPS)}")
        for name in ("images_per_item", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")

    @property
    def count(self) -> int:
        return self.images_per_item or self.suite.images_per_item

    def items(self, images: Path | None = None) -> list[Item]:
        """List the items, or `limit` evenly spaced groups of them.

        Without `--data`, items are read from the files next to the images if the suite's layout has them.
        """
        suite, found = self.suite, []
        if images is not None and images.is_dir() and suite.data is None and suite.data_help is not None:
            found = suite.items_of_images(images, self.partial)
        found = found or suite.items()
        check_items(suite, found)
        groups: dict[str, list[Item]] = {}
        for item in found:
            groups.setdefault(suite.group(item), []).append(item)
        if self.limit is None or self.limit >= len(groups):
            return found
        kept = list(groups.values())
        return [item for i in range(self.limit) for item in kept[i * len(kept) // self.limit]]


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
    suite = settings.suite
    mine = target(source, overrides, suite.name, out, ema)
    sides = [mine] if against is None else [mine, opponent(against, mine, overrides, suite.name)]
    for side in sides:
        if side.recipe is not None:
            ensure_writable(side.folder, "--out")
    given = check(settings, sides, images, records)
    if "generate" in settings.steps:
        wanted = [s for s in sides if s.recipe is not None and (s is not mine or not (images or records))]
        device = _generate_on_all_ranks(settings, wanted, device)
    if not distributed.is_main_process():
        return None
    judge_device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    found = [
        judge_and_score(settings, side, images if side is mine else None, given if side is mine else None, judge_device)
        for side in sides
    ]
    if found[0] is None:
        return None
    if len(sides) == 2 and found[1] is not None:
        if sides[1].recipe is not None:
            save(settings, sides[1].folder, found[1])
        found[0] = report.compare(found[0], found[1], sides[1].folder)
    save(settings, mine.folder, found[0])
    return found[0]


def _generate_on_all_ranks(
    settings: Settings, sides: Sequence[Target], device: torch.device | str | None
) -> torch.device:
    """Generate for these sides on all ranks, and return this rank's device.

    The process group is destroyed afterwards unless the caller had created it: rank 0 alone runs the other steps.
    """
    joined = distributed.is_joined()
    place = distributed.initialize(60 * distributed.HOURS) if device is None else torch.device(device)
    with distributed.fail_together():
        for side in sides:
            _generate(settings, side, place)
    if not joined:
        distributed.shut_down()
    return place


def save(settings: Settings, folder: Path, found: Mapping[str, Any]) -> None:
    if "score" in settings.steps:
        write(folder / "results.json", json.dumps(found, indent=1, ensure_ascii=False))
    if "report" in settings.steps:
        write(folder / "report.txt", report.text(found) + "\n")


def check(
    settings: Settings, sides: Sequence[Target], images: Path | None, records: Path | None
) -> recorded.Imported | None:
    """Raise on errors in the settings or inputs before anything is loaded. Returns the contents of `records`."""
    suite = settings.suite
    if images is not None and not images.is_dir():
        raise EvaluationError(f"--images {images} is not a folder; expected a folder of images as {suite.layout()}")
    if "generate" in settings.steps and not (images or records):
        for side in sides:
            if side.recipe is not None:
                adapter = umm_package(side.recipe.umm).Adapter
                if suite.ability not in adapter.abilities:
                    able = [name for name in UMMS if suite.ability in umm_package(name).Adapter.abilities]
                    raise RecipeError(
                        f"{suite.name} needs a model that can {suite.ability}: {side.recipe.umm} cannot; use a recipe "
                        f"of {' or '.join(able)}"
                    )
                method = generate_answers if suite.ability == "answer" else getattr(adapter, suite.ability)
                check_sampling_options(method, settings.sampling)
    if suite.judge_kind != "rule" and records is None and (settings.judge or "judge" in settings.steps):
        check_judge(settings.judge, settings.judge_options, suite)
    items = settings.items(images)
    given = None if records is None else recorded.Imported(records, recorded.import_answers(records, suite, items))
    if settings.count > 1 and suite.path(items[0], 0) == suite.path(items[0], 1):
        what = "answer" if suite.ability == "answer" else "image"
        raise EvaluationError(f"--images-per-item {settings.count}: {suite.name} has one {what} per item; set 1")
    if suite.ability != "generate" and not records and {"generate", "judge"} & set(settings.steps):
        check_sources(suite, items)
    name, _, path = (settings.judge or "").partition(":")
    if name == "recorded" and suite.judge_kind != "rule" and given is None and "judge" in settings.steps:
        check_recorded(settings, items, images, Path(path).expanduser())
    return given


def check_recorded(settings: Settings, items: Sequence[Item], images: Path | None, path: Path) -> None:
    """Raise EvaluationError if recorded answers do not cover all images, existing or still to be generated."""
    known = recorded.import_answers(path, settings.suite, items)
    if images is not None:
        wanted = list(_find(settings, items, images, settings.images_per_item, None))
    elif "generate" in settings.steps:
        wanted = [(item.id, k) for item in items for k in range(settings.count)]
    else:
        return
    missing = [f"{item} ({k})" for item, k in wanted if (item, k) not in known]
    if missing and not settings.partial:
        raise EvaluationError(
            f"--judge recorded:{path} has no answer about {len(missing)} of the {len(wanted)} images of "
            f"{settings.suite.name}: {_some(missing)}. Set --partial to score the others"
        )


def check_sources(suite: Suite, items: Sequence[Item]) -> None:
    """Raise EvaluationError if an image to edit or to ask about does not exist."""
    sources = list(dict.fromkeys(item.source for item in items))
    missing = [str(path) for path in sources if path is None or not path.is_file()]
    if missing:
        raise EvaluationError(
            f"{len(missing)} of the {len(sources)} input images of {suite.name} do not exist: {_some(missing)}."
            f" {suite.data_help or ''}"
        )


def sampling_of(settings: Settings, side: Target) -> dict[str, Any]:
    """Return all sampling options: the model's defaults, overridden by the suite's, then by the user's."""
    assert side.recipe is not None
    suite, adapter = settings.suite, umm_package(side.recipe.umm).Adapter
    method = generate_answers if suite.ability == "answer" else getattr(adapter, suite.ability)
    return defaults(method) | suite.sampling(side.recipe.umm) | dict(settings.sampling)


def _generate(settings: Settings, side: Target, device: torch.device) -> None:
    """Generate the images, or answers, that a side lacks. Load its model only if something is missing."""
    suite, items, folder = settings.suite, settings.items(), side.folder
    check_prompts(folder, items)
    sampling, before = sampling_of(settings, side), read_generation(folder)
    made: dict[str, Any] = {
        "suite": suite.name, "protocol": suite.protocol, "sampling": json.loads(json.dumps(sampling)),
        "seed": settings.seed, "fingerprint": side.fingerprint(),
    }  # fmt: skip
    same = before and all(before.get(key) == value for key, value in made.items())
    if same and _complete(settings, items, folder):
        return
    model = side.load(device)
    made["model"] = describe(model, side)
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
    return all(is_drawn(folder / "images" / path) for path in paths)


def judge_and_score(
    settings: Settings, side: Target, images: Path | None, given: recorded.Imported | None, device: Any
) -> dict[str, Any] | None:
    """Judge and score one side. given: records from elsewhere. Return None if no selected step makes or reads results.

    The results of an earlier evaluation are read as they are if neither step is selected, or if the side is a folder.
    """
    if not {"judge", "score", "report"} & set(settings.steps):
        return None
    folder, steps = side.folder, settings.steps
    done = folder / "results.json"
    if not {"judge", "score"} & set(steps) or (side.recipe is None and done.is_file()):
        return report.read(done)
    place = images or folder / "images"
    foreign = images is not None or side.recipe is None
    items = settings.items(place if foreign else None)
    if images is None:
        check_prompts(folder, items)
    generated = "generate" in steps and not foreign and given is None
    count = settings.count if generated else settings.images_per_item
    found, generation = _find(settings, items, place, count, given), {} if images else read_generation(folder)
    missing = _missing(settings, items, place, count, found, given)
    path = folder / "records.jsonl"
    if given is not None:
        known, judge = _imported(found, given)
    elif settings.suite.judge_kind == "rule":
        answers = read_answers(folder / "answers.jsonl", items)
        asked = [(item, (item.id, 0)) for item in items if (item.id, 0) in answers]
        known = [Record(*key, None, RULE, answers[key], digest=item.judged) for item, key in asked]
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
    missing += _unjudged(settings, items, found, found_records, from_path, imported=given is not None)
    results = report.results(settings.suite, items, relative, found_records, judge, generation, missing)
    return results | {"images": str(place) if found else None}


def _open(settings: Settings, items: Sequence[Item], device: Any) -> Judge | None:
    """Open the judge if one is named or the step judge is selected."""
    if settings.judge is None and "judge" not in settings.steps:
        return None
    return open_judge(settings.judge, settings.judge_options, settings.suite, items, device)


def _find(
    settings: Settings, items: Sequence[Item], place: Path, most: int | None, given: recorded.Imported | None
) -> dict[Key, Path]:
    """Find the images. most: maximum number per item; None: all."""
    if settings.suite.ability == "answer":
        return {}
    found = settings.suite.find(place, items) if place.is_dir() else {}
    if not found and given is None:
        raise EvaluationError(
            f"{place} contains no images of {settings.suite.name}; expected them as {settings.suite.layout()}"
        )
    return {key: path for key, path in found.items() if most is None or key[1] < most}


def _missing(
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
            f"{place}: {len(missing)} images of {settings.suite.name} are missing: {_some(missing)}. Generate them, or "
            "set --partial to score the others"
        )
    return len(missing)


def _unjudged(
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
            f"{path} has no record of {len(missing)} images of {settings.suite.name}: {_some(missing)}. Judge them "
            "(--steps judge,score,report), or set --partial to score the others"
        )
    return len(missing)


def _some(names: Sequence[str]) -> str:
    """List the first names and the number of others."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"


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
        raise EvaluationError(f"{path} contains no records; add the step judge, or set --records FILE")
    judge = judge or everything[-1].judge
    return valid(everything, items, {key: image_hash(p) for key, p in found.items()}, judge), judge


def open_settings(suite: str, data: str | Path | None, **others: Any) -> Settings:
    """Return Settings for a suite by name. data: the user's files of the benchmark. others: fields of Settings."""
    return Settings(open_suite(suite, None if data is None else Path(data)), **others)
