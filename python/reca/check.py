"""Parameters, FLOPs and memory of a recipe, from a model without weights: nothing is downloaded."""

import math
import textwrap
from collections import Counter
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from reca import units
from reca.config import Recipe
from reca.data.batch import Batch
from reca.lora import choose_trained
from reca.micro_batches import accumulation_steps, describe_split, size_warning
from reca.models import umm_package
from reca.models.base import ROLES, Adapter
from reca.optim import state_bytes
from reca.parallelize import checkpoint_activations, memory_per_rank, replicas_fit, shard_size
from reca.rng import CounterRNG
from reca.runs import published_files
from reca_kernels import dispatch

IMAGES = 8  # at most: what is masked or dropped is drawn, so the FLOPs are a mean over a micro-batch
CARD = 80 << 30  # bytes of a GPU where there is none to ask
TEXT = "Describe the image in detail."


class Parameters(NamedTuple):
    total: int
    trained: int


class Flops(NamedTuple):
    """FLOPs of one image in a RECA step. A multiply-add counts as two; attention counts every pair of tokens."""

    encode: float  # frozen encoders, which a feature cache runs once
    forward: float
    backward: float  # with the blocks' second forward pass under activation checkpointing


class Memory(NamedTuple):
    """Bytes on the GPU that holds most, without activations, images and allocator fragmentation."""

    weights: int  # the fp32 masters of what is trained, and what is frozen
    gradients: int
    moments: int  # of AdamW
    ema: int  # fp32 averages of what is trained, with ema.half_life
    copies: int  # weights gathered from other GPUs, or cast by autocast, while they are used

    @property
    def total(self) -> int:
        return sum(self)


def build_meta(recipe: Recipe) -> tuple[Adapter, FakeTensorMode]:
    """Build the recipe's model without memory, frozen as in training. Returns it with the mode its tensors belong to.

    Raises ValueError for roles and patterns that the model does not have.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        adapter = umm_package(recipe.umm).Adapter.build_meta(recipe.model)
    choose_trained(adapter, recipe)
    return adapter, fake


def parameters(adapter: Adapter) -> dict[str, Parameters]:
    """Count the parameters by role, in the order of ROLES."""
    total: Counter[str] = Counter()
    trained: Counter[str] = Counter()
    role_of = adapter.roles()
    for name, parameter in adapter.named_parameters():
        total[role_of[name]] += parameter.numel()
        trained[role_of[name]] += parameter.numel() * parameter.requires_grad
    return {role: Parameters(total[role], trained[role]) for role in ROLES if role in total}


def flops(adapter: Adapter, fake: FakeTensorMode, images: int) -> Flops:
    """Count the FLOPs of an image in RECA, as a mean over so many of the views' size."""
    views = adapter.views("reca")

    def blank(view) -> list[Tensor] | None:
        return view and [torch.empty(3, view.size, view.size, dtype=torch.uint8) for _ in range(images)]

    with fake:
        gen, und = blank(views.gen), blank(views.und)
    return batch_flops(adapter, Batch("reca", torch.arange(images), [TEXT] * images, gen, und))


def without_memory(batch: Batch, fake: FakeTensorMode) -> Batch:
    """Return a batch of the same samples whose pixels or features have sizes and no values."""

    def blank(value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.empty(value.shape, dtype=value.dtype)
        return [blank(item) for item in value] if isinstance(value, list) else value

    with fake:
        gen, und = blank(batch.gen), blank(batch.und)
        features = batch.features and {key: blank(value) for key, value in batch.features.items()}
    return Batch(batch.task, batch.host_ids, batch.text, gen, und, features)


def batch_flops(adapter: Adapter, batch: Batch) -> Flops:
    """Count FLOPs of a sample by running a batch's loss on tensors without memory.

    Only ids, masks and random numbers are real. Features that the batch has are not encoded.
    """
    counter = FlopCounterMode(display=False, custom_mapping=CONVOLUTIONS)
    with dispatch.use("reference"), sdpa_kernel(SDPBackend.MATH), counter:
        made = adapter.encode(batch) if batch.features is None else batch.features
        features = {key: _indices(value) for key, value in made.items()}
        encoded = counter.get_total_flops()
        loss = adapter(replace(batch, features=features), CounterRNG(0)).sum
        forward = counter.get_total_flops()
        loss.backward()
        backward = counter.get_total_flops()
    adapter.zero_grad(set_to_none=True)
    return Flops(*(n / len(batch) for n in (encoded, forward - encoded, backward - forward)))


def _convolution_backward(grad, x, weight, *others, **_) -> int:  # shapes, and the last but one of them output_mask
    """Count a convolution's backward pass with its groups, which torch's formula ignores: SANA's have one channel."""
    transposed, wanted = others[4], others[7]
    return 2 * math.prod(x if transposed else grad) * math.prod(weight[1:]) * (wanted[0] + wanted[1])


CONVOLUTIONS = {torch.ops.aten.convolution_backward: _convolution_backward}


def _indices(feature: Tensor | list) -> Tensor | list:
    """Give integer features values: they are codes, which losses index with."""
    if not isinstance(feature, Tensor) or feature.is_floating_point():
        return feature
    return torch.zeros(feature.shape, dtype=feature.dtype)


def memory(adapter: Adapter, recipe: Recipe, gpus: int, node: int, card: int = 0) -> Memory:
    """Compute the memory of the GPU that holds most, of `gpus` GPUs with `node` in a machine.

    card: bytes of a GPU; with room for it, parallel.strategy=auto gives each all weights.

    weights     FSDP2 splits each parameter's first dimension into `shard` parts, the last ones smaller or empty
    gradients   like weights; where a step has several backward passes and only the last reduces, whole and in fp32
    moments     two per trained weight, in the type that optim asks for; none with optim.offload
    ema         one fp32 number per trained weight
    copies      FSDP2: what is in no block stays gathered from forward to backward, and two blocks at a time, in the
                type of computation; of replicas only what is trained; one GPU: bf16 copies of trained matrices, at most
    """
    for task in recipe.active_tasks():
        if task not in adapter.tasks:
            raise ValueError(f"{recipe.umm} has no {task} loss: set objective.{task}.weight=0")
    several = sum(accumulation_steps(getattr(recipe.objective, task), gpus) for task in recipe.active_tasks()) > 1
    whole = gpus > 1 and several and not recipe.parallel.reduce_every_pass
    shard = shard_size(recipe.parallel, gpus, min(node, gpus), replicas_fit(adapter, card)) if gpus > 1 else 1
    half = recipe.train.precision == "bf16"
    weights = sum(_bytes(buffer) for buffer in adapter.buffers())
    gradients = moments = ema = copies = 0
    for parameter in adapter.parameters():
        own = part(parameter, shard) * parameter.itemsize
        weights += own
        if parameter.requires_grad:
            gradients += 4 * parameter.numel() if whole else own
            moments += 0 if recipe.optim.offload else state_bytes(parameter, recipe.optim, shard)
            ema += 4 * part(parameter, shard) if recipe.ema.half_life else 0
            if gpus == 1 and half and parameter.ndim > 1 and parameter.dtype == torch.float32:
                copies += 2 * parameter.numel()
    if gpus > 1:
        managed = [p for p in adapter.parameters() if shard > 1 or p.requires_grad]  # replicas leave frozen ones alone
        ids = set(map(id, managed))
        blocks = [[p for p in block.parameters() if id(p) in ids] for block in adapter.blocks()]
        inside = {id(parameter) for block in blocks for parameter in block}
        copies = sum(_bytes(parameter) for parameter in managed if id(parameter) not in inside)
        sizes = sorted(sum(p.numel() * 2 if half else _bytes(p) for p in block) for block in blocks)
        copies += sum(sizes[-2:])
    return Memory(weights, gradients, moments, ema, copies)


def host_memory(adapter: Adapter, recipe: Recipe, gpus: int, node: int, card: int = 0) -> int:
    """Count the bytes of a machine's memory that loading weights on `gpus` GPUs takes, with `node` in a machine.

    Files are mapped, and each process copies its part of one parameter at a time to its GPU; what the system keeps of
    the files beside that it gives back when it must. A model without files is made on one machine as a whole.
    """
    ranks = min(node, gpus)
    shard = shard_size(recipe.parallel, gpus, ranks, replicas_fit(adapter, card)) if gpus > 1 else 1
    copied = max(part(parameter, shard) * parameter.itemsize for parameter in adapter.parameters())
    need = ranks * (copied + sum(_bytes(buffer) for buffer in adapter.buffers()))
    if not published_files(recipe):
        need += sum(_bytes(parameter) for parameter in adapter.parameters())
    return need


def part(parameter: nn.Parameter, shard: int) -> int:
    """Count the elements of the largest of `shard` parts along the first dimension."""
    if parameter.ndim == 0:
        return 1
    return -(-parameter.shape[0] // shard) * parameter[:1].numel()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def report(recipe: Recipe, gpus: int = 1, node: int = 8) -> str:
    """Write the report. Raises ValueError for what `reca train` on this number of GPUs would refuse."""
    if gpus < 1 or node < 1:
        raise ValueError(f"--gpus and --node must be at least 1, got {gpus} and {node}")
    adapter, fake = build_meta(recipe)
    card = memory_per_rank(torch.device("cuda")) if torch.cuda.is_available() else CARD
    need = memory(adapter, recipe, gpus, node, card)
    if recipe.train.activation_checkpointing:
        checkpoint_activations(adapter)
    count, rows = parameters(adapter), adapter.sequence()
    work = flops(adapter, fake, min(IMAGES, recipe.objective.reca.micro_batch))
    every = Parameters(*(sum(numbers) for numbers in zip(*count.values(), strict=True)))
    lines = [f"{'parameters':<24}{'total':>18}{'trained':>18}"]
    lines += [f"  {role:<22}{n.total:>18,}{n.trained:>18,}" for role, n in (*count.items(), ("all", every))]
    lines += ["", "one image of a RECA step, attention counted as dense"]
    lines += [f"  {name + ' tokens':<22}{n:>18,}" for name, n in rows.items()]
    steps = {"encoders": work.encode, "forward": work.forward, "backward": work.backward, "all": sum(work)}
    if recipe.objective.reca.weight:
        images = recipe.objective.reca.batch_size
        steps[f"step of {images} images"] = images * sum(work)
    lines += [_line(name, n, units.FLOPS) for name, n in steps.items()]
    lines += ["", f"samples of a step on {gpus} GPU{'s' * (gpus > 1)}"]
    for task in recipe.active_tasks():
        config = getattr(recipe.objective, task)
        split = describe_split(config.batch_size, config.micro_batch, gpus)
        lines.append(f"  {task:<22}{config.batch_size:>18}   {split}")
    if text := size_warning(recipe.objective, recipe.active_tasks(), gpus):
        lines += textwrap.wrap(text, 100, initial_indent="  ", subsequent_indent="  ")
    lines += ["", f"memory per GPU, {gpus} GPU{'s' * (gpus > 1)}, without activations"]
    if gpus > 1:
        shard = shard_size(recipe.parallel, gpus, min(node, gpus), replicas_fit(adapter, card))
        held = "all weights (ddp)" if shard == 1 else f"1/{shard} of the weights"
        lines.append(f"  each GPU of {units.size(card)} holds {held}")
    lines += [_line(name, n, units.BYTES) for name, n in (*need._asdict().items(), ("all", need.total))]
    lines += [_line("host memory", host_memory(adapter, recipe, gpus, node, card), units.BYTES) + " a machine, loading"]
    return "\n".join(lines)


def _line(name: str, amount: float, table: tuple[tuple[float, str], ...]) -> str:
    unit, word = units.largest(amount, table)
    return f"  {name:<22}{amount / unit:>18.2f} {word}"
