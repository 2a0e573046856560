"""Peak memory per GPU of a recipe's training step, predicted by running the step on fake tensors."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from reca import distributed, objective
from reca.config.recipe import Recipe, TaskConfig
from reca.data.batch import Batch, task_rng
from reca.data.micro_batches import accumulation_steps, micro_batch_sizes, passes_by_tokens
from reca.data.tasks import Scored, ScoredBox, Turn
from reca.data.templates import load_templates
from reca.estimate.allocations import OTHER, Allocations, on_gpu
from reca.estimate.meta_model import build_meta, empty_views
from reca.models.base import Adapter
from reca.optim import gradient_norm, make_optimizer
from reca.optim.adamw import PIECE, AdamW
from reca.precision import autocast
from reca.processes.environment import environment
from reca.training import half_weights
from reca.training.ema import EMA
from reca.training.parallelize import predicted_shard_size, shard
from reca.training.recompute import checkpoint_activations

CARD = 80 << 30  # default GPU memory in bytes
CONTEXT = 3 << 29  # bytes for the CUDA context, NCCL buffers and cuBLAS workspaces
FRAGMENTATION = 0.05  # memory that the allocator reserves beyond what is allocated, as a fraction of it
NOT_COUNTED = "CUDA context, NCCL, workspaces of torch's kernels, fragmentation"
PIECES = 8  # fp32 chunks of parameters, gradients and moments that reca's AdamW processes at a time
DRAWS = 8  # random draws of masks and dropped texts; those with the fewest and the most predicted tokens are run
SPREAD = 1.1  # ratio of most to fewest predicted tokens up to which only the draw with the most is run
WORDS = 2048  # words of conversations and captions; models truncate them to their limit


class Memory(NamedTuple):
    """Bytes by category on the most loaded GPU, at its peak."""

    weights: int  # this rank's shard, and buffers
    gradients: int
    moments: int  # optimizer state
    ema: int
    activations: int  # and everything else: gathered and cast copies of weights, temporaries, pixels

    @property
    def total(self) -> int:
        return sum(self)


def own_card() -> int:
    """Return the memory of this machine's GPU in bytes; CARD if there is none."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else CARD


def needed(predicted: int) -> int:
    """Return the GPU memory needed for a predicted peak, with a reserve for NOT_COUNTED."""
    return int(predicted * (1 + FRAGMENTATION)) + CONTEXT


def predict(recipe: Recipe, gpus: int = 1, node: int = 8, card: int = CARD, *, gpu: bool = True) -> Memory:
    """Predict the peak memory of a training step by running one on fake tensors.

    Texts and images have the largest size that the model accepts.

    Args:
        recipe: Recipe to train.
        gpus: Number of GPUs of the run.
        node: Number of GPUs per machine.
        card: Memory of a GPU in bytes. parallel.strategy=auto replicates the weights if they fit.
        gpu: Simulate CUDA's attention kernels, autocast and block sizes; False: those of a CPU.

    Raises:
        ValueError: `reca train` would reject the recipe.
    """
    return peak_of(recipe, list(recipe.active_tasks()), gpus, node, card, gpu=gpu)


def peak_of(recipe: Recipe, tasks: list[str], gpus: int, node: int, card: int = CARD, *, gpu: bool = True) -> Memory:
    """Predict the peak of a step that runs only `tasks` and the optimizer. Other arguments as in `predict`."""
    if dist.is_initialized():
        raise RuntimeError("memory cannot be predicted in a process with a process group: use own_process.call")
    with _ranks(gpus, node):
        adapter, fake = build_meta(recipe)
        batches = {task: _batches(adapter, recipe, task, gpus, fake) for task in tasks}
        checkpoint_activations(adapter, recipe.train)
        if gpus > 1:
            adapter.reduces_every_micro_batch = recipe.parallel.reduce_every_micro_batch
            size = predicted_shard_size(adapter, recipe, gpus, node, card)
            distributed.mesh(torch.device("cpu"), gpus // size, size)  # cached; built outside of fake mode
            with fake:
                shard(adapter, size, torch.device("cpu"), recipe.train.precision)
        return run_step(adapter, recipe, batches, Allocations(gpu, card), gpus, fake)


def run_step(
    adapter: Adapter,
    recipe: Recipe,
    batches: dict[str, list[Batch]],
    allocations: Allocations,
    gpus: int,
    mode: contextlib.AbstractContextManager,
) -> Memory:
    """Run the forward and backward passes of a training step and the optimizer, and return the peak.

    batches: draws of the largest micro-batch, by task. If the recipe's step has several passes, gradients of earlier
    passes are allocated.
    """
    passes = {
        task: _passes(getattr(recipe.objective, task), gpus, batches.get(task, [])) for task in recipe.active_tasks()
    }
    several = sum(passes.values()) > 1
    trained = [p for p in adapter.parameters() if p.requires_grad]
    context = autocast(recipe.train.precision, torch.device("cpu"))
    with mode, allocations:
        allocations.label((*adapter.parameters(), *adapter.buffers()), "weights")
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(lambda p: allocations.label([p.grad], "gradients"))
        ema = EMA(adapter, recipe.ema.half_life) if recipe.ema.half_life else None
        allocations.label(ema.averages.values() if ema else (), "ema")
        for task, mine in batches.items():
            for batch in mine:
                batch.prepared = batch.prepared.to("cpu")
            allocations.hold((passes[task] - 1) * sum(x.numel() for x in (*(mine[0].gen or ()), *(mine[0].und or ()))))
        config = recipe.optim
        if config.name == "apex":  # runs on GPUs only; its state has the size of AdamW's
            config = replace(config, name="adamw")
        optimizer = make_optimizer(adapter, config, recipe.train.seed)
        states = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
        allocations.label(states, "host" if recipe.optim.offload else "moments")  # "host" is not part of the peak
        own = isinstance(optimizer, AdamW)
        pieces = PIECES * 4 * min(PIECE, max(p.numel() for p in trained)) if own else 0
        if recipe.optim.fused_backward:
            allocations.hold(pieces)
            for parameter in trained:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        adapter.train()
        if several and gpus == 1:
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
            allocations.label([p.grad for p in trained], "gradients")
        allocations.reset_peak()
        holding = half_weights.held(adapter, context, sum(passes.values()), recipe.train.cast_once)
        with on_gpu() if allocations.machine.is_gpu else contextlib.nullcontext(), holding:
            for work in _steps(batches, passes, gpus):
                objective.backward(adapter, work, recipe.objective, recipe.train.seed, context)
                if not several:
                    optimizer.zero_grad()
        at_passes = allocations.at_peak
        if not recipe.optim.fused_backward:
            for parameter in trained:
                if parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter)
            allocations.label([p.grad for p in trained], "gradients")
        allocations.reset_peak()
        gradient_norm(adapter, recipe.optim.max_grad_norm)
        if not own:  # reca's AdamW needs real data pointers; `pieces` is its workspace
            optimizer.step()
        moments = allocations.now.get("moments", 0)
        at_step = allocations.at_peak
        if not recipe.optim.fused_backward:  # where they are held
            at_step[OTHER] += pieces
    peaks = [
        Memory(at["weights"], at.get("gradients", 0), moments, at.get("ema", 0), at[OTHER])
        for at in (at_passes, at_step)
    ]
    return max(peaks, key=lambda memory: memory.total)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None  # like optim.fused_backward after the parameter's update


def _steps(batches: dict[str, list[Batch]], passes: dict[str, int], gpus: int) -> Iterator[dict[str, list[Batch]]]:
    """Yield the micro-batches of each call of objective.backward.

    With several GPUs, each task with more than one pass runs two: FSDP2 accumulates unsharded gradients and reduces
    them in the last pass.
    """
    for number in range(max(map(len, batches.values()))):
        draws = {task: mine[min(number, len(mine) - 1)] for task, mine in batches.items()}
        if gpus > 1:
            yield {task: [batch] * min(passes[task], 2) for task, batch in draws.items()}
        else:
            yield {task: [batch] for task, batch in draws.items()}


def _passes(config: TaskConfig, gpus: int, batches: list[Batch]) -> int:
    """Count the passes of a task's step on a rank; with max_tokens, for samples like those of `batches`."""
    if config.max_tokens is None or not batches:
        return accumulation_steps(config, gpus)
    return -(-config.batch_size // (gpus * min(map(len, batches))))


def _batches(adapter: Adapter, recipe: Recipe, task: str, gpus: int, fake: FakeTensorMode) -> list[Batch]:
    """Make the largest micro-batch of a task, for the draws with the most and the fewest predicted tokens.

    With max_tokens, make one of the longest and one of the shortest texts: which needs more depends on the model.
    """
    config, found = getattr(recipe.objective, task), []
    fills: list[Fill] = [Fill(WORDS, micro_batch_sizes(config.batch_size, config.micro_batch, gpus)[0])]
    if config.max_tokens is not None:
        share = -(-config.batch_size // gpus)
        fills = [_fill(adapter, recipe, task, share, words, fake) for words in (WORDS, 1)]
    for fill in fills:
        drawn = [_batch(adapter, recipe, task, fill, draw, fake) for draw in range(DRAWS)]
        fewest, most = (pick(drawn, key=lambda batch: batch.prepared.weight) for pick in (min, max))
        found += [most, fewest] if most.prepared.weight > SPREAD * fewest.prepared.weight else [most]
    return found


def largest_sample(adapter: Adapter, recipe: Recipe, task: str, fake: FakeTensorMode) -> int:
    """Count the tokens of a task's longest sample: the largest image with the longest text that the model accepts."""
    return max(_batch(adapter, recipe, task, Fill(WORDS, DRAWS), 0, fake).prepared.tokens)


class Fill(NamedTuple):
    """Contents of a micro-batch: images of the largest size, with texts of `words` words."""

    words: int
    samples: int
    last: int | None = None  # height of the last image to generate, if it is smaller


def _fill(adapter: Adapter, recipe: Recipe, task: str, share: int, words: int, fake: FakeTensorMode) -> Fill:
    """Choose the samples of a pass of at most max_tokens tokens and `share` samples.

    If the model accepts images of any size, the remaining room is filled by one smaller image.
    """
    most, view = getattr(recipe.objective, task).max_tokens, adapter.views(task).gen
    few = _batch(adapter, recipe, task, Fill(words, min(share, DRAWS)), 0, fake).prepared
    fill = Fill(words, min(share, max(1, most // min(few.tokens))))
    tokens = _batch(adapter, recipe, task, fill, 0, fake).prepared.tokens
    fill = Fill(words, passes_by_tokens(tokens, most, few.packed)[0])
    if view is None or view.fit != "bound" or fill.samples == share:
        return fill
    for side in range(view.size - view.stride, 0, -view.stride):
        fuller = Fill(words, fill.samples + 1, side)
        if sum(_batch(adapter, recipe, task, fuller, 0, fake).prepared.tokens) <= most:
            return fuller
    return fill


def _batch(adapter: Adapter, recipe: Recipe, task: str, fill: Fill, draw: int, fake: FakeTensorMode) -> Batch:
    ids = torch.arange(fill.samples) + draw * fill.samples
    with fake:
        gen, und = empty_views(adapter.views(task), len(ids))
        if fill.last is not None and gen is not None:
            gen[-1] = torch.empty(3, fill.last, gen[-1].shape[2], dtype=torch.uint8)
    text: Any = " ".join(["a"] * fill.words)
    if task == "reca":
        pick = max if fill.words > 1 else min
        text = _accepted(adapter, pick(load_templates(recipe.data.templates, recipe.data.template_count), key=len))
    elif task == "i2t":
        text = [Turn("a", text)]
    elif task == "srum":
        text = Scored(text, (ScoredBox(0.0, 0.0, 1.0, 1.0, 1.0),))
    target = gen if task == "srum" else None  # upper bound: a target is optional
    batch = Batch(task, ids, [text] * len(ids), gen, und, target=target)
    batch.prepared = adapter.prepare(batch, task_rng(recipe.train.seed, task))
    return batch


def _accepted(adapter: Adapter, template: str) -> str:
    """Shorten a template until the model accepts it: its stand-in tokenizer may make more tokens than the real one."""
    while True:
        try:
            adapter.check_templates([template])
            return template
        except ValueError:
            if not template:
                raise
            template = template[: len(template) * 9 // 10]


@contextlib.contextmanager
def _ranks(gpus: int, node: int) -> Iterator[None]:
    """Simulate rank 0 of `gpus` ranks inside the context, with collectives that do nothing."""
    if gpus == 1:
        yield
        return
    with environment(LOCAL_WORLD_SIZE=str(min(node, gpus))):
        dist.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
        try:
            yield
        finally:
            distributed.shut_down()
