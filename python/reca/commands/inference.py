"""Commands that use a model: generate, edit, answer and export."""

import argparse
import re
from collections.abc import Sequence
from typing import Any

from reca.launcher import is_main_process


def generate(options: argparse.Namespace) -> None:
    from reca import inference

    seeds = [options.seed + i for i in range(len(options.prompt))]
    sampling = _sampling(options, _adapter(options, "generate").generate, seeds, options.prompt)
    model = _model(options, options.prompt)
    _write(inference.generate(model, options.prompt, seeds, **sampling), options, seeds, options.prompt)


def edit(options: argparse.Namespace) -> None:
    from reca import inference
    from reca.data.pixels import read_image

    seeds, instructions = [options.seed], [options.instruction]
    sampling = _sampling(options, _adapter(options, "edit").edit, seeds, instructions)
    image = read_image(options.image)
    model = _model(options, instructions)
    _write(inference.edit(model, [image], instructions, seeds, **sampling), options, seeds, instructions)


def answer(options: argparse.Namespace) -> None:
    from reca import inference
    from reca.data.pixels import read_image

    _adapter(options, "answer")
    _reject_empty([options.question])
    image = read_image(options.image)
    model = _model(options, [options.question])
    print(inference.answer(model, [image], [options.question])[0])


def best_of(options: argparse.Namespace) -> None:
    """Run `reca best-of`. Under torchrun every rank takes a share of the prompts."""
    from dataclasses import replace

    from reca import distributed
    from reca.api import recipe_of
    from reca.commands import best_of
    from reca.data.sample import digest
    from reca.eval.targets import target
    from reca.io.folders import BEST_OF
    from reca.models.base import Adapter
    from reca.options.fields import RecipeError

    if options.candidates < 1:
        raise ValueError(f"--candidates must be at least 1, got {options.candidates}")
    recipe, prompts = recipe_of(options.recipe, options.overrides), best_of.read_prompts(options.prompts)
    choice = best_of.Choice(options.candidates, options.seed, options.question or best_of.QUESTION)
    ends = [options.seed, choice.seeds(len(prompts) - 1)[-1]]
    adapter = _adapter(options, "generate")
    choice.sampling = _sampling(options, adapter.generate, ends, [*prompts, choice.question], BEST_OF)
    if "i2t" not in adapter.tasks and adapter.log_likelihood is Adapter.log_likelihood:
        raise RecipeError(f"{recipe.umm} cannot score prompts: it has no i2t task, which computes their likelihood")
    source = target(options.recipe, options.overrides, "", options.out, options.ema)
    distributed.initialize(60 * distributed.HOURS)  # each rank works on its share alone
    # The run may save another checkpoint meanwhile, and this one may be damaged: no rank loads another.
    source = replace(source, checkpoint=distributed.all_gather(source.checkpoint)[0])
    options.recipe = str(source.checkpoint or options.recipe)

    def identify(model: Any = None) -> None:
        step, weights = source.checkpoint and int(source.checkpoint.name), digest([source.fingerprint(model)])
        choice.model = {"umm": recipe.umm, "step": step, "ema": options.ema, "weights": weights}

    def load() -> Any:
        model = _model(options, [*prompts, choice.question])
        identify(model)
        return model

    identify()
    records = best_of.choose(load, prompts, choice, options.out)
    if is_main_process():
        print(*best_of.report(records, options.out), sep="\n")
    distributed.shut_down()


def export(options: argparse.Namespace) -> None:
    from reca.api import recipe_of
    from reca.comparison.sides import find_sides
    from reca.comparison.weights import understanding
    from reca.io.folders import ensure_writable
    from reca.publishing import card, push
    from reca.runs.lineage import loaded_checkpoint

    recipe = recipe_of(options.recipe, options.overrides)
    if not options.push and (options.public or options.update):
        raise ValueError("--public and --update need --push OWNER/NAME")
    ensure_writable(options.out, "--out")
    if options.push:
        push.check(options.push)
    model = _model(options)
    written = model.export(options.out)
    if options.card or options.push or card.is_generated(options.out):
        name = options.push.split("/")[1] if options.push else options.out.absolute().name
        written += card.write(options.recipe, recipe, model, options.ema, options.out, name)
    print(f"wrote {', '.join(dict.fromkeys(name.split('/')[0] for name in written))} to {options.out}")
    loaded = loaded_checkpoint(options.recipe, model)
    if loaded and (found := understanding(*find_sides("base", str(loaded)))):
        print(f"against the model before training: {found['text']}")
    if options.push:
        del model  # frees the GPU during the upload, which takes hours
        print(push.push(options.out, written, options.push, options.public, options.update))


def _adapter(options: argparse.Namespace, ability: str) -> Any:
    """Return the adapter class of a recipe. Raises RecipeError if it lacks the ability."""
    from reca.api import recipe_of
    from reca.models import UMMS, umm_package
    from reca.options.fields import RecipeError

    umm = recipe_of(options.recipe, options.overrides).umm
    adapter = umm_package(umm).Adapter
    if ability not in adapter.abilities:
        able = [name for name in UMMS if ability in umm_package(name).Adapter.abilities]
        raise RecipeError(f"{umm} cannot {ability}; recipes of {' and '.join(able)} can")
    return adapter


def _model(options: argparse.Namespace, texts: Sequence[str] = ()) -> Any:
    """Load the model, and warn of words in texts that it does not know."""
    from reca.api import load
    from reca.models.common.inference import warn_of_unknown_words

    model = load(options.recipe, options.overrides, ema=options.ema)
    warn_of_unknown_words(model.tokenizer, texts)
    return model


def _sampling(options: argparse.Namespace, method, seeds: list[int], texts: list[str], kind: str | None = None) -> dict:
    """Parse --sampling into keyword arguments of `method`, and check all other arguments before anything is loaded.

    kind: that of the output folder, if it has one.
    """
    from reca.io.folders import ensure_writable
    from reca.models.common.inference import check_pairs
    from reca.options.sampling import check_sampling_options, read_pairs

    _reject_empty(texts)
    check_pairs(seeds=seeds)
    given = check_sampling_options(method, read_pairs(options.sampling, "--sampling"))
    ensure_writable(options.out, "--out", kind)
    return given


def _reject_empty(texts: list[str]) -> None:
    if not all(text.strip() for text in texts):
        raise ValueError("the text is empty; write what to generate, edit or answer")


def _write(images: list, options: argparse.Namespace, seeds: list[int], texts: list[str]) -> None:
    from reca.io.image_grid import to_pil

    # Numbers continue after earlier calls, whose images of the same name may be from another model or other options.
    taken = [int(found[1]) for path in options.out.iterdir() if (found := re.match(r"(\d+)_seed", path.name))]
    for i, (image, seed, text) in enumerate(zip(images, seeds, texts, strict=True), max(taken, default=-1) + 1):
        words = re.sub(r"\W+", "-", text).strip("-")[:40]
        path = options.out / f"{i:03d}_seed{seed}_{words}.png"
        try:
            to_pil(image).save(path)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise OSError(
                f"{path} cannot be written ({error.strerror or error}); give another folder as --out"
            ) from error
        print(path)
