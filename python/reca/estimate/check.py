"""Report of a recipe's parameters, FLOPs, memory and decoding (`reca check`): nothing is downloaded."""

import math
import textwrap
from typing import NamedTuple

import torch

from reca import units
from reca.config.recipe import Recipe
from reca.config.recipe_files import by_key
from reca.data import decode_speed
from reca.data.micro_batches import describe_split, size_warning
from reca.data.templates import load_templates
from reca.estimate import cards, counts, memory
from reca.estimate.held import host_loading, host_moments
from reca.estimate.meta_model import build_meta, check_templates
from reca.hardware.peaks import known_peak
from reca.models import umm_package
from reca.models.base import Adapter
from reca.training.parallelize import predicted_shard_size
from reca.training.recompute import checkpoint_activations

IMAGES = 8  # at most; masks and dropped text are random, so FLOPs are averaged over several images
ASSUMED_GPU, ASSUMED_SHARE = "NVIDIA H100", 0.5  # GPU and fraction of its peak that a step's time is estimated with
SPARE = 1.25  # safety factor for decoding threads, because images differ
MOST_THREADS = 256  # largest recommendation; a model that needs more is too small to be limited by the GPU


def report(recipe: Recipe, gpus: int = 1, node: int = 8, card: int | None = None) -> str:
    """Return the report as text.

    card: memory of a GPU in bytes; with it, also report which settings fit.
    Raises ValueError for a recipe that `reca train` would reject on this number of GPUs.
    """
    if gpus < 1 or node < 1:
        raise ValueError(f"--gpus and --gpus-per-node must be at least 1, got {gpus} and {node}")
    adapter, fake = build_meta(recipe)
    room = memory.own_card() if card is None else card
    shard = predicted_shard_size(adapter, recipe, gpus, node, room)
    checkpoint_activations(adapter, recipe.train)
    count, rows = counts.parameters(adapter), adapter.sequence()
    work = counts.flops(adapter, fake, min(IMAGES, recipe.objective.reca.micro_batch))
    every = counts.Parameters(*(sum(numbers) for numbers in zip(*count.values(), strict=True)))
    lines = [f"{'parameters':<24}{'total':>18}{'trained':>18}"]
    lines += [f"  {role:<22}{n.total:>18,}{n.trained:>18,}" for role, n in (*count.items(), ("all", every))]
    lines += ["", "one image of a RECA step, attention counted as dense"]
    lines += [f"  {name + ' tokens':<22}{n:>18,}" for name, n in rows.items()]
    steps = {"encoders": work.encode, "forward": work.forward, "backward": work.backward, "all": sum(work)}
    if recipe.objective.reca.weight:
        images = recipe.objective.reca.batch_size
        steps[f"step of {images} images"] = images * sum(work)
    lines += [_line(name, n, units.FLOPS) for name, n in steps.items()]
    lines += ["", f"samples per step on {units.counted(gpus, 'GPU')}"]
    for task in recipe.active_tasks():
        config = getattr(recipe.objective, task)
        split = describe_split(config, gpus)
        if config.max_tokens is not None:
            most = memory.largest_sample(adapter, recipe, task, fake)
            split += f"; the largest sample has {most}" + ", a micro-batch by itself" * (most > config.max_tokens)
        lines.append(f"  {task:<22}{config.batch_size:>18}   {split}")
    notes = size_warning(recipe.objective, recipe.active_tasks(), gpus), _check_templates(recipe)
    for text in filter(None, notes):
        lines += textwrap.wrap(text, 100, initial_indent="  ", subsequent_indent="  ", break_long_words=False)
    lines += ["", f"predicted peak memory per GPU in a step, {units.counted(gpus, 'GPU')}"]
    if gpus > 1:
        held = "all weights (ddp)" if shard == 1 else f"1/{shard} of the weights"
        lines.append(f"  each GPU of {units.size(room)} holds {held}")
    peak = memory.predict(recipe, gpus, node, room)
    lines += [_line(name, n, units.BYTES) for name, n in (*peak._asdict().items(), ("all", peak.total))]
    lines += [_line("with a reserve", memory.needed(peak.total), units.BYTES) + f" for {memory.NOT_COUNTED}"]
    values = by_key(recipe)
    if drawing := [key for key in ("eval.every", "log.sample_every", "log.reconstructions") if values[key]]:
        lines.append(f"  not predicted: generation and evaluation between steps ({', '.join(drawing)})")
    loading = host_loading(adapter, recipe, gpus, node, room)
    lines += [_line("host memory", loading, units.BYTES) + " per node, while weights are loaded"]
    if moments := host_moments(adapter, recipe, gpus, node, room):
        lines += [_line("moments on the host", moments, units.BYTES) + " per node, during the whole run"]
    lines += _decoding(recipe, adapter, sum(work))
    if card is not None:
        lines += ["", f"GPUs of {units.size(card)}", *cards.describe(recipe, peak, gpus, node, card)]
    return "\n".join(lines)


def _check_templates(recipe: Recipe) -> str | None:
    """Raise ValueError for a template that is too long. Describe why the lengths are unknown, if they are."""
    if not recipe.objective.reca.weight:
        return None
    try:
        tokenizer = umm_package(recipe.umm).Adapter.load_tokenizer(recipe.model, local=True)
    except ValueError as error:
        return f"the templates' lengths are not checked, which needs the tokenizer: {error}"
    check_templates(recipe, tokenizer, load_templates(recipe.data.templates, recipe.data.template_count))
    return None


class Decoding(NamedTuple):
    """Time to decode a step's images on the CPU, and time of the step on a GPU."""

    gpu: str
    peak: float  # of the GPU, in FLOP/s
    cpu_seconds: float  # of one core of this machine, for all images of a step
    step: float  # seconds, estimated from FLOPs

    @property
    def threads(self) -> int:
        """Return the number of threads that decode as fast as the GPU computes, times SPARE."""
        return max(1, math.ceil(SPARE * self.cpu_seconds / self.step))


def decoding(recipe: Recipe, adapter: Adapter, flops_of_image: float) -> Decoding:
    """Measure decoding on one core, and estimate the time of a step on this GPU.

    ASSUMED_GPU takes its place if there is none or its peak is unknown.
    """
    own = torch.cuda.get_device_name() if torch.cuda.is_available() else ASSUMED_GPU
    gpu = ASSUMED_GPU if known_peak(own) is None else own
    peak = known_peak(gpu)
    assert peak is not None
    step = recipe.objective.reca.batch_size * flops_of_image / (ASSUMED_SHARE * peak)
    decoded = sum(
        getattr(recipe.objective, task).batch_size * decode_speed.seconds(adapter.views(task))
        for task in recipe.active_tasks()
    )
    return Decoding(gpu, peak, decoded, step)


def _decoding(recipe: Recipe, adapter: Adapter, flops_of_image: float) -> list[str]:
    """Report how many CPU threads are needed so that no step waits for its images."""
    if not recipe.objective.reca.weight:
        return []
    found = decoding(recipe, adapter, flops_of_image)
    threads = found.threads
    few = ": TOO FEW, steps will wait" if recipe.data.workers < threads else ""
    asked = f"{threads:>18} per GPU, with a margin of {SPARE - 1:.0%}; the recipe has {recipe.data.workers}{few}"
    if threads > MOST_THREADS:
        asked = f"{'any':>18}: a model this small waits for images on such a GPU; data.cache decodes each only once"
    return [
        "",
        "CPU threads that decode the images of a step while a GPU computes",
        f"  {'decoding, measured':<22}{1e3 * found.cpu_seconds:>18.1f} ms of one core of this machine, JPEGs of "
        f"{decode_speed.SIDE} x {decode_speed.SIDE}",
        f"  {'computing, assumed':<22}{1e3 * found.step:>18.1f} ms: FLOPs of the RECA images at {ASSUMED_SHARE:.0%} "
        f"of one {found.gpu}'s {found.peak / 1e12:.4g} TFLOP/s",
        f"  {'data.workers':<22}{asked}",
    ]


def _line(name: str, amount: float, table: tuple[tuple[float, str], ...]) -> str:
    unit, word = units.largest(amount, table)
    return f"  {name:<22}{amount / unit:>18.2f} {word}"
