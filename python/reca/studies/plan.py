"""The tasks of a study: recipe, overrides, pre-trained model and folder of every variant and seed."""

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from reca.config.recipe_files import load_recipe
from reca.eval.suites import SUITES
from reca.options.fields import RecipeError
from reca.options.names import hint
from reca.studies import toy
from reca.studies.study import BEFORE, LOSS, PRETRAINED, SETTINGS, Study, StudyError, Variant
from reca.studies.task import Asked, Task, digest, short


def plan(study: Study, asked: Asked) -> tuple[list[Task], dict[str, str]]:
    """List the tasks, dependencies first, and the reasons why the model lacks some variants.

    Folder names contain a hash of everything that determines the result, so studies share variants, and a changed
    study does not resume an old run.
    Raises StudyError for overrides of an unknown variant and for an unknown modification, RecipeError for unknown keys.
    """
    variants, omitted = study.of(asked)
    _check_measures(study)
    for text in (*asked.common, *(key for keys in asked.of_variant.values() for key in keys)):
        _reject_chosen(text, "the overrides")
    for name, (_, keys) in variants.items():
        for text in keys:
            _reject_chosen(text, name)
    known = (*variants, BEFORE, *([PRETRAINED] if asked.recipe is None else []))
    if unknown := [name for name in asked.of_variant if name not in known]:
        there = ", ".join(variants)
        raise StudyError(
            f"{unknown[0]!r} is no variant of {study.name} with {asked.umm}; there are {there}{hint(unknown[0], known)}"
        )
    for name, (variant, _) in variants.items():
        if variant.pretrained and (asked.recipe or variant.pretrained not in toy.MODIFICATIONS):
            there = ", ".join(toy.MODIFICATIONS)
            raise StudyError(
                f"pretrained={variant.pretrained} of {name}: only {there} exists, and only on toy datasets"
            )
    tasks: list[Task] = []
    for seed in asked.seeds:
        tasks += _of_seed(variants, asked, seed)
    return tasks, omitted


def _of_seed(variants: Mapping[str, tuple[Variant, tuple[str, ...]]], asked: Asked, seed: int) -> list[Task]:
    on_toys, recipe = asked.recipe is None, asked.recipe or toy.recipe(asked)
    common = toy.overrides(asked, recipe, seed) if on_toys else (f"train.seed={seed}",)
    of_pretraining = (*toy.pretraining_overrides(asked), *asked.of_variant.get(PRETRAINED, ())) if on_toys else ()
    given: dict[str, Any] = {
        "setting": asked.setting, "dataset": asked.dataset, "umm": asked.umm, "seed": seed, "recipe": recipe,
        "scale": asked.scale, "evaluations": asked.evaluations, "of_pretraining": of_pretraining,
    }  # fmt: skip
    tasks: list[Task] = []
    ready: tuple[str, ...] = ()
    pretrained: Path | None = None
    if on_toys:
        chosen, done = digest(recipe, asked.scale, *of_pretraining), "pretrained.json"
        pretrained = asked.out / "pretrained" / f"{asked.dataset}-{asked.umm}-seed{seed}-{chosen}"
        modifications = sorted({variant.pretrained for variant, _ in variants.values() if variant.pretrained})
        names = {None: f"{seed}/{PRETRAINED}"} | {name: f"{seed}/{PRETRAINED}-{name}" for name in modifications}
        tasks.append(Task(names[None], PRETRAINED, overrides=(), folder=pretrained, result=pretrained / done, **given))
        ready = (names[None],)
        for name in modifications:
            folder = _modified(pretrained, name)
            tasks.append(
                Task(names[name], PRETRAINED, overrides=(), folder=folder, result=folder / done,
                     modification=name, after=ready, **given)
            )  # fmt: skip

    def add(name: str, variant: Variant, keys: tuple[str, ...], after: tuple[str, ...]) -> None:
        kind, modification, parent = BEFORE if name == BEFORE else "variant", variant.pretrained, variant.after
        own = (*common, *of_pretraining, *asked.common, *keys)
        if (variant.longer, variant.rate) != (1, 1):
            usual = load_recipe(recipe, own)
            steps, rate = variant.longer * usual.train.steps, variant.rate * usual.optim.lr
            own = (*own, f"train.steps={steps}", f"optim.lr={rate!r}")
        own = (*own, *asked.of_variant.get(name, ()))
        origin = _modified(pretrained, modification) if pretrained and modification else pretrained
        initial: list[str] = []
        if origin is not None:
            initial = [*toy.cache_override(asked), toy.init_override(asked, origin)]
        if parent is not None:
            initial = [text for text in initial if not text.startswith("train.init_from=")]
            initial.append(f"train.init_from={folders[parent]}")
        load_recipe(recipe, [*own, *initial])  # raises RecipeError for invalid keys
        origins = [folder and folder.name for folder in (origin, folders.get(parent or ""))]
        decides = [kind, asdict(load_recipe(recipe, own)), asked.scale, *origins]
        folder = asked.out / "variants" / f"{short(recipe)}-seed{seed}-{digest(decides)}"
        twins = tuple(task.name for task in tasks if task.folder == folder)  # never run one folder twice at once
        result = folder / f"measured-{digest(asdict(asked.evaluations))}.json"
        tasks.append(
            Task(f"{seed}/{name}", kind, overrides=(*own, *initial), folder=folder, result=result,
                 after=(*after, *twins), **given)
        )  # fmt: skip
        folders[name] = folder

    folders: dict[str, Path] = {}
    before = BEFORE, (Variant(BEFORE, "not trained"), ())
    for name, (variant, keys) in (*variants.items(), before):
        after = ready
        if variant.after or variant.pretrained:
            after = (f"{seed}/{variant.after or f'{PRETRAINED}-{variant.pretrained}'}",)
        try:
            if on_toys:
                keys = tuple(toy.filled(asked, key, seed) for key in keys)
            add(name, variant, keys, after)
        except RecipeError as error:
            raise RecipeError(f"variant {name}: {error}") from error
    return tasks


def _check_measures(study: Study) -> None:
    """Raise StudyError for a claim whose measure does not exist: in its setting or, without one, in any."""
    known = {"toy": (*toy.MEASURES, LOSS), "published": (*SUITES, LOSS)}
    for claim in study.claims:
        by_setting = isinstance(claim.measure, Mapping)
        names = {setting: str(claim.measured(setting)) for setting in (claim.measure if by_setting else SETTINGS)}
        names |= {"published": re.split("[/?]", names["published"])[0]} if "published" in names else {}
        wrong = [setting for setting, name in names.items() if name not in known[setting]]
        if wrong and (by_setting or len(wrong) == len(SETTINGS)):
            there = "; ".join(f"{setting}: {', '.join(known[setting])}" for setting in wrong)
            raise StudyError(f"the measure {names[wrong[0]]!r} of {claim.says!r} does not exist; there are {there}")


def _reject_chosen(override: str, where: str) -> None:
    """Raise StudyError for keys that the study itself sets in every run."""
    ways = {"run_dir": "--out names the folder of all runs", "train.seed": "--seeds names the seeds"}
    key = override.partition("=")[0]
    if key in ways:
        raise StudyError(f"{override} in {where}: a study sets {key} itself; {ways[key]}")


def _modified(pretrained: Path, modification: str) -> Path:
    return pretrained.with_name(f"{pretrained.name}-{modification}")
