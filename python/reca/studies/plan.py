"""The tasks of a study: recipe, overrides, start and folder of every variant and seed."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from reca.config.recipe_files import as_dict, load_recipe
from reca.studies import published, world
from reca.studies.study import BEFORE, START, Arm, Study, StudyError
from reca.studies.task import Asked, Task, digest, short


def plan(study: Study, asked: Asked) -> tuple[list[Task], dict[str, str]]:
    """List the tasks, dependencies first, and the reasons why the model lacks some variants.

    Folder names contain a hash of everything that determines the result, so studies share variants, and a changed
    study does not resume an old run.
    Raises StudyError for overrides of an unknown variant and for an unknown start, RecipeError for unknown keys.
    """
    arms, omitted = study.of(asked)
    known = (*arms, BEFORE, *([START] if asked.recipe is None else []))
    if unknown := [name for name in asked.of_arm if name not in known]:
        raise StudyError(f"{unknown[0]!r} is no variant of {study.name} with {asked.umm}; there are {', '.join(arms)}")
    for name, (arm, _) in arms.items():
        if arm.start and (asked.recipe or arm.start not in world.VARIANTS):
            there = ", ".join(world.VARIANTS)
            raise StudyError(f"start={arm.start} of {name}: only {there} exists, and only on toy datasets")
    tasks: list[Task] = []
    for seed in asked.seeds:
        tasks += _of_seed(arms, asked, seed)
    return tasks, omitted


def _of_seed(arms: Mapping[str, tuple[Arm, tuple[str, ...]]], asked: Asked, seed: int) -> list[Task]:
    setting = world if asked.recipe is None else published
    recipe = asked.recipe or world.recipe(asked)
    of_start = (*setting.start_overrides(asked), *asked.of_arm.get(START, ()))
    given: dict[str, Any] = {
        "setting": asked.setting, "world": asked.world, "umm": asked.umm, "seed": seed, "recipe": recipe,
        "scale": asked.scale, "evaluations": asked.evaluations, "of_start": of_start,
    }  # fmt: skip
    tasks: list[Task] = []
    starts: tuple[str, ...] = ()
    begin: Path | None = None
    if asked.recipe is None:
        begin = asked.out / "starts" / f"{asked.world}-{asked.umm}-seed{seed}-{digest(recipe, asked.scale, *of_start)}"
        variants = sorted({arm.start for arm, _ in arms.values() if arm.start})
        names = {None: f"{seed}/{START}"} | {variant: f"{seed}/{START}-{variant}" for variant in variants}
        tasks.append(Task(names[None], START, overrides=(), folder=begin, result=begin / "start.json", **given))
        starts = (names[None],)
        for variant in variants:
            folder = _variant(begin, variant)
            tasks.append(
                Task(names[variant], START, overrides=(), folder=folder, result=folder / "start.json",
                     variant=variant, after=starts, **given)
            )  # fmt: skip

    def add(name: str, arm: Arm, keys: tuple[str, ...], after: tuple[str, ...]) -> None:
        kind, variant, parent = BEFORE if name == BEFORE else "arm", arm.start, arm.after
        own = (*setting.overrides(asked, recipe, seed), *of_start, *asked.common, *keys)
        if (arm.longer, arm.rate) != (1, 1):
            usual = load_recipe(recipe, own)
            own = (*own, f"train.steps={arm.longer * usual.train.steps}", f"optim.lr={arm.rate * usual.optim.lr!r}")
        own = (*own, *asked.of_arm.get(name, ()))
        start = _variant(begin, variant) if begin and variant else begin
        starts_at: list[str] = []
        if start is not None:
            starts_at = [*world.cache_override(asked), world.init_override(asked, start)]
        if parent is not None:
            starts_at = [text for text in starts_at if not text.startswith("train.init_from=")]
            starts_at.append(f"train.init_from={folders[parent]}")
        load_recipe(recipe, [*own, *starts_at])  # raises RecipeError for invalid keys
        origins = [origin and origin.name for origin in (start, folders.get(parent or ""))]
        decides = [kind, as_dict(load_recipe(recipe, own)), asked.scale, *origins]
        folder = asked.out / "arms" / f"{short(recipe)}-seed{seed}-{digest(decides)}"
        twins = tuple(task.name for task in tasks if task.folder == folder)  # never run one folder twice at once
        result = folder / f"measured-{digest(asdict(asked.evaluations))}.json"
        tasks.append(
            Task(f"{seed}/{name}", kind, overrides=(*own, *starts_at), folder=folder, result=result,
                 after=(*after, *twins), **given)
        )  # fmt: skip
        folders[name] = folder

    folders: dict[str, Path] = {}
    for name, (arm, keys) in arms.items():
        after = (f"{seed}/{arm.after}",) if arm.after else (f"{seed}/{START}-{arm.start}",) if arm.start else starts
        filled = tuple(setting.filled(asked, key, seed) for key in keys)
        add(name, arm, filled, after)
    add(BEFORE, Arm(BEFORE, "not trained"), (), starts)
    return tasks


def _variant(start: Path, variant: str) -> Path:
    return start.with_name(f"{start.name}-{variant}")
