"""The model card of an export: base model, training, scores, sample images, and how to load it.

It contains no paths, no names of datasets and no training images.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCardData

from reca import catalog
from reca.comparison.build import compare_each, suite_of
from reca.comparison.sides import Side, find_sides
from reca.comparison.weights import understanding
from reca.config.recipe import Recipe
from reca.config.recipe_files import walk
from reca.data.sources.factory import DATA_KEYS
from reca.eval import figures
from reca.eval.generate import weights_hash
from reca.eval.suites import SUITES
from reca.io import html
from reca.io.folders import write_atomically
from reca.io.paths import exists, is_file
from reca.models import umm_package
from reca.models.base import Adapter
from reca.models.common.hub import hub_name
from reca.options.values import override_text
from reca.runs.lineage import loaded_checkpoint, trained_source

CARD = "README.md"
IMAGES = "images"  # folder of the images, below the export
SAMPLES = f"{IMAGES}/samples.png"
MARK = "<!-- Written by reca export, which writes it anew each time. Without this line it is left as it is. -->"
ARXIV = "2509.07295"
WORDS = {"reca": "reconstruction (RECA)", "i2t": "image to text", "t2i": "text to image", "srum": "SRUM"}  # task names
HUB_TASKS = {"generate": "text-to-image", "edit": "image-to-image", "answer": "visual-question-answering"}


def write(source: str | Path, recipe: Recipe, model: Adapter, ema: bool, folder: Path, name: str) -> list[str]:
    """Write README.md and its images into an export folder. Return their names, relative to it.

    source: the run folder or recipe that `model` was loaded from. name: title of the card.
    An existing README.md without the line MARK is kept unchanged.
    Raises EvaluationError if results of the run cannot be read, OSError if the files cannot be written.
    """
    card = folder / CARD
    if is_file(card) and not is_generated(folder):
        return [CARD, *sorted(path.relative_to(folder).as_posix() for path in (folder / IMAGES).glob("*.png"))]
    trained = trained_source(source)
    run = trained[0] if trained else None
    loaded = loaded_checkpoint(source, model)
    sides = find_sides("base", str(loaded)) if loaded else None
    scores = _scores(*sides, weights_hash(model)) if sides else Scores([], [], [])
    state = model.state if run else None
    images = _images(run, state["step"], recipe, folder) if run and state else []
    base = base_model(recipe)
    values = {
        "mark": MARK,
        "name": name,
        "arxiv": ARXIV,
        "umm": recipe.umm,
        "base": base,
        "licence": catalog.facts_of(*base).licence if base else None,
        "step": state and state["step"],
        "ema": ema,
        "scores": [_row(score) for score in scores.results],
        "not_compared": scores.not_compared,
        "left_out": scores.left_out,
        "images": images,
        "training": _training(state, recipe) if state else {},
        "keys": _keys(recipe) if run else [],
        "understanding": ((sides and understanding(*sides)) or {}).get("text"),
        "random": not _weights_of(recipe),
        "loading": _loading(recipe),
    }
    header = _metadata(name, recipe, base, scores.results)
    write_atomically(
        card, f"---\n{header.to_yaml()}\n---\n{html.render(Path(__file__).with_name('card.md'), **values)}"
    )
    return [CARD, *(image["file"] for image in images)]


def is_generated(folder: Path) -> bool:
    """Tell whether a folder has a card with the line MARK, which describes the export that it was written for."""
    card = folder / CARD
    return is_file(card) and MARK in card.read_text(encoding="utf-8", errors="replace")


def base_model(recipe: Recipe) -> tuple[str, str] | None:
    """Return the hub repository of model.weights and the file or subfolder in it; None if unknown.

    A local folder is identified with the catalog's repository of the same name, because `reca get` names folders so.
    """
    source = _weights_of(recipe)
    if not source:
        return None
    path = Path(source).expanduser()
    if not exists(path):
        return hub_name(source, "model.weights")
    for folder in (path, *path.parents):
        for repository in catalog.WEIGHTS:
            if folder.name == repository.split("/")[1]:
                return repository, path.relative_to(folder).as_posix() if path != folder else ""
    return None


def _weights_of(recipe: Recipe) -> str | None:
    """Return model.weights, a key that a model outside of reca may lack."""
    return getattr(recipe.model, "weights", None)


def _loading(recipe: Recipe) -> str | None:
    """Return the sentence on how the model's own code loads an export; None for a model that has none."""
    loading = getattr(getattr(umm_package(recipe.umm), "weights", None), "loading", None)
    return loading and loading(recipe.model)


def _metadata(name: str, recipe: Recipe, base: tuple[str, str] | None, scores: list[dict[str, Any]]) -> ModelCardData:
    """Return the card's metadata for the hub: licence, base model, tags, and scores."""
    abilities = umm_package(recipe.umm).Adapter.abilities
    licence = catalog.hub_licence(catalog.facts_of(*base).licence) if base else {}
    results = [
        EvalResult(
            task_type=HUB_TASKS[SUITES[score["suite"]].ability],
            dataset_type=score["suite"],
            dataset_name=score["protocol"],
            metric_type="score",
            metric_name=f"overall, {'%' if figures.percentages(score['overall']['unit']) else 'points'}",
            metric_value=round(figures.scale(score["overall"]["unit"]) * score["overall"]["value"], 2),
            metric_args={"interval_95": [b if b is None else round(figures.scale(score["overall"]["unit"]) * b, 2)
                                         for b in score["overall"]["interval"]]},
        )
        for score in scores
    ]  # fmt: skip
    return ModelCardData(
        base_model=base[0] if base else None,
        library_name="reca",
        pipeline_tag="any-to-any" if "answer" in abilities else "text-to-image",
        tags=["reca", "reconstruction-alignment", "unified-multimodal-model", recipe.umm, f"arxiv:{ARXIV}"],
        eval_results=results or None,
        model_name=name if results else None,
        **licence,
    )


class Scores(NamedTuple):
    """Results of a run for the weights of the card, one per suite, compared with the base model where possible.

    not_compared  protocols of results that cannot be compared with those of the base model
    left_out      protocols of results of the run for other weights or settings
    """

    results: list[dict[str, Any]]
    not_compared: list[str]
    left_out: list[str]


def _scores(base: Side, run: Side, weights: str) -> Scores:
    """Read the results of a run and of its base model. weights: hash of the exported weights."""
    results, before = run.results(), base.results()
    same = {
        folder: score for folder, score in results.items() if (score["model"] or {}).get("weights_sha256") == weights
    }
    compared = sorted(compare_each(same, before), key=lambda one: suite_of(one.result))
    not_compared = [one.result["protocol"] for one in compared if one.reason]
    shown = {one.folder for one in compared}
    left_out = {score["protocol"] for folder, score in results.items() if folder not in shown}
    return Scores([one.result for one in compared], not_compared, sorted(left_out))


def _row(score: Mapping[str, Any]) -> dict[str, str]:
    unit, against = score["overall"]["unit"], score["against"]
    judge, after = score["judge"], score["overall"]
    row = {
        "suite": score["protocol"],
        "after": f"{figures.score(after['value'], unit)} {figures.bounds(after['interval'], unit)}",
        "before": "",
        "change": "",
        "measured": f"{score['counts']['items']} prompts x {score['images_per_item']}, judge {_without_place(judge)}"
        + (" (approximate)" if judge.get("exact") is False else ""),
    }
    if against:
        change = against["overall"]
        row["before"] = figures.score(change["value"], unit)
        interval = figures.bounds(change["difference_interval"], unit, sign=True)
        row["change"] = f"{figures.difference(change['difference'], unit)} {interval}"
        if not against["identical_settings"]:
            row["change"] += f", with different {', '.join(against['differs'])}"
    return row


def _without_place(judge: Mapping[str, Any]) -> str:
    """Return the name of a judge, KIND or KIND:MODEL, with only the last part of the model's path."""
    kind, colon, model = str(judge.get("name")).partition(":")
    return f"{kind}{colon}{Path(model).name}"


def _training(state: dict[str, Any], recipe: Recipe) -> dict[str, str]:
    """Describe the training by topic. state: state of the checkpoint."""
    optim = recipe.optim
    found = {"steps": str(state["step"])}
    for task in recipe.active_tasks():
        config, key = getattr(recipe.objective, task), DATA_KEYS[task]
        count = state["fingerprint"].get(f"data.{key}", [None])[0]
        found[WORDS[task]] = (
            f"weight {config.weight:g}, {config.batch_size} samples per step, {state['samples'].get(task, 0)} in total"
            + (f", from {count} {key}" if count is not None else "")
        )
    found["optimizer"] = (
        f"{optim.name}, learning rate {optim.lr:g}, betas {optim.betas[0]:g} and {optim.betas[1]:g}, weight decay "
        f"{optim.weight_decay:g}, schedule {optim.schedule} with {optim.warmup_steps} warm-up steps"
    )
    found["precision"] = recipe.train.precision
    found["seed"] = str(recipe.train.seed)
    if recipe.lora.rank:
        found["LoRA"] = f"rank {recipe.lora.rank}, merged into the weights"
    return found


def _keys(recipe: Recipe) -> list[str]:
    """List the recipe keys that differ from their defaults, except for paths, data, logging, judges and idle tasks."""
    usual = Recipe(umm=recipe.umm, model=type(recipe.model)())
    values = {key: getattr(config, f.name) for config, f, key in walk(usual)}
    idle = [f"objective.{task}." for task in WORDS if task not in recipe.active_tasks()]
    hidden = ("run_dir", "data.", "log.", "checkpoint.", "eval.judge", "model.words", *idle)
    return [
        f"{key}={override_text(getattr(config, f.name))}"
        for config, f, key in walk(recipe)
        if not f.metadata.get("path") and not key.startswith(hidden) and getattr(config, f.name) != values.get(key)
    ]


def _images(run: Path, step: int, recipe: Recipe, folder: Path) -> list[dict[str, str]]:
    """Copy a run's newest samples up to `step` into the export. Return file, title and text of each.

    Reconstructions are left out: they show training images, which may be private or under a licence of their own.
    """
    drawn = (path for path in (run / "samples").glob("*.png") if path.stem.isdigit() and int(path.stem) <= step)
    newest = max(drawn, key=lambda path: int(path.stem), default=None)
    if newest is None:
        return []
    (folder / IMAGES).mkdir(exist_ok=True)
    shutil.copyfile(newest, folder / SAMPLES)
    title = f"Samples at step {int(newest.stem)}"
    return [{"file": SAMPLES, "title": title, "text": _plain("; ".join(recipe.log.prompts))}]


def _plain(text: str) -> str:
    """Replace characters that would break the alt text of a Markdown image."""
    return " ".join(text.translate(str.maketrans("[]|`", "()/'")).split())
