"""Inference in batches that fit into memory: where one does not, half as many images are made at once from there on.

An image depends on its prompt and seed and an answer on its question, so the batch changes neither.
"""

import contextlib
import gc
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from reca import distributed, exits, full_memory
from reca.errors import first_line
from reca.full_memory import is_memory_full

log = logging.getLogger("reca")
T = TypeVar("T")

# The largest batch that is tried, where a larger one did not fit: of a model, by method.
_largest: WeakKeyDictionary[Any, dict[str, int]] = WeakKeyDictionary()


class MemoryFull(RuntimeError):
    """Not even a single image fits into memory."""

    exit_code = exits.RECIPE


class RanksWait(RuntimeError):
    """Memory is full on a rank for which others wait inside of a model whose weights they share: nothing can go on."""

    exit_code = exits.RECIPE


def generate(model: Any, prompts: Sequence[str], seeds: Sequence[int], **sampling: Any) -> list[Tensor]:
    """Generate as the model does. Raises MemoryFull, or RanksWait."""
    return _in_batches(model, "generate", sampling, prompts, seeds)


def edit(
    model: Any, images: Sequence[Tensor], instructions: Sequence[str], seeds: Sequence[int], **sampling: Any
) -> list[Tensor]:
    """Edit as the model does. Raises MemoryFull, or RanksWait."""
    return _in_batches(model, "edit", sampling, images, instructions, seeds)


def answer(model: Any, images: Sequence[Tensor], questions: Sequence[str], **options: Any) -> list[str]:
    """Answer as the model does. Raises MemoryFull, or RanksWait."""
    return _in_batches(model, "answer", options, images, questions)


def _in_batches(model: Any, method: str, options: Mapping[str, Any], *columns: Sequence[Any]) -> list[Any]:
    call = getattr(model, method)
    usual = inspect.signature(call).parameters.get("batch")
    given = options.get("batch", usual and usual.default)
    return in_batches(model, method, lambda *rows: call(*rows, **options), columns, given)


def in_batches(
    model: Any,
    method: str,
    call: Callable[..., Sequence[T]],
    columns: Sequence[Sequence[Any]],
    most: int | None = None,
) -> list[T]:
    """Return what `call` makes of the rows of columns, of as many rows at once as fit into memory.

    method: what is called, which has a largest batch of its own. most: rows at once, None for all.
    """
    known, made, first, reason = _largest.setdefault(model, {}), list[T](), 0, ""
    count = len(columns[0])
    size = max(1, min(count, most or count, known.get(method, count)))
    while len(made) < count:
        part = [list(column[len(made) : len(made) + size]) for column in columns]
        found = _attempt(call, part)
        if not isinstance(found, str):
            made += found
            continue
        release(model)
        if shares_weights(model):
            raise RanksWait(_ranks_wait(found))
        if len(part[0]) == 1:
            raise MemoryFull(
                f"memory is full with a single image ({found}). Free the device of what else uses it, make "
                "smaller images if the model can (sampling options height and width), or use a larger device"
            )
        first, reason, size = first or len(part[0]), found, len(part[0]) // 2
        known[method] = size
    if first:
        log.warning(
            "%s: memory was full with %d images at once (%s), so %d are made at once from here on, from the same seeds",
            method, first, reason, size,
        )  # fmt: skip
    return made


def _attempt(call: Callable[..., Sequence[T]], rows: Sequence[Any]) -> Sequence[T] | str:
    """Return what a call makes, or what it said of a full memory. Its tensors are free again by then."""
    try:
        return call(*rows)
    except full_memory.KINDS as error:
        if not is_memory_full(error):
            raise
        return first_line(error)


def shares_weights(model: Any) -> bool:
    """Tell whether ranks hold parts of the model, so that one that computes waits for all others."""
    parallel = isinstance(model, FSDPModule)
    return parallel and distributed.world_size() > 1 and not model.has_whole_replicas


def release(model: Any) -> None:
    """Give back what a call that failed has left behind."""
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, FSDPModule):
            module.reshard()
    if torch.cuda.is_available():
        gc.collect()  # an error and the frames that it came through refer to one another
        torch.cuda.empty_cache()


# ---- in training ----


@contextlib.contextmanager
def together(model: Any) -> Iterator[None]:
    """Run the body on every rank: where it fails on one, it fails on all of them.

    Raises RanksWait where memory is full and ranks share the weights: others wait inside of the model, not here.
    """
    if not shares_weights(model):
        with distributed.fail_together():
            yield
        return
    try:
        yield
    except full_memory.KINDS as error:
        if not is_memory_full(error):
            raise
        raise RanksWait(_ranks_wait(first_line(error))) from error


def spared(model: Any, make: Callable[[], T]) -> tuple[T | None, str]:
    """Return what `make` makes, and why there is nothing where it fails, which ends no training. On every rank.

    Raises RanksWait.
    """
    try:
        with together(model):
            return make(), ""
    except RanksWait:
        raise
    except Exception as error:
        known = exits.expected(error) is not None
        reason = first_line(error) if known else f"{type(error).__name__}: {first_line(error)}"
    release(model)
    return None, reason


def _ranks_wait(reason: str) -> str:
    return (
        f"memory is full while a model whose weights are sharded draws or is evaluated ({reason}). Other ranks wait "
        "for this one, so a smaller batch cannot be tried: give batch=1 as a sampling option "
        "(eval.sampling=[batch=1]), more GPUs, or eval.every=0. The same command goes on from the last checkpoint"
    )
