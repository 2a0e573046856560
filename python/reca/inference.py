"""Inference in batches that fit into memory: after an out-of-memory error the batch size is halved from then on.

An image depends only on its prompt and seed, and an answer only on its image and question, so the batch size does not
change the results.
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

from reca import distributed, exits
from reca.errors import first_line
from reca.hardware import full_memory
from reca.hardware.full_memory import is_memory_full

log = logging.getLogger("reca")
T = TypeVar("T")

# Largest batch size to try after a larger one did not fit, by model and method.
_largest: WeakKeyDictionary[Any, dict[str, int]] = WeakKeyDictionary()


class MemoryFull(RuntimeError):
    """Not even a single image fits into memory."""

    exit_code = exits.RECIPE


class RanksWait(RuntimeError):
    """A rank is out of memory while others wait for it inside a model with sharded weights, so none can go on."""

    exit_code = exits.RECIPE


def generate(model: Any, prompts: Sequence[str], seeds: Sequence[int], **sampling: Any) -> list[Tensor]:
    """Generate images like the model's `generate`, in batches that fit. Raises MemoryFull or RanksWait."""
    return _in_batches(model, "generate", sampling, prompts, seeds)


def edit(
    model: Any, images: Sequence[Tensor], instructions: Sequence[str], seeds: Sequence[int], **sampling: Any
) -> list[Tensor]:
    """Edit images like the model's `edit`, in batches that fit. Raises MemoryFull or RanksWait."""
    return _in_batches(model, "edit", sampling, images, instructions, seeds)


def answer(model: Any, images: Sequence[Tensor], questions: Sequence[str], **options: Any) -> list[str]:
    """Answer questions like the model's `answer`, in batches that fit. Raises MemoryFull or RanksWait."""
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
    """Call `call` on batches of the columns' rows that fit into memory, and return the results of all rows.

    method: name under which the largest batch size is remembered. most: rows per batch; None: all.
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
                f"memory is full with a single image ({found}). End other processes on the device, generate smaller "
                "images if the model can (sampling options height and width), or use a larger device"
            )
        first, reason, size = first or len(part[0]), found, len(part[0]) // 2
        known[method] = size
    if first:
        log.warning(
            "%s: memory was full with %d images at once (%s); from now on the batch size is %d, with the same seeds",
            method, first, reason, size,
        )  # fmt: skip
    return made


def _attempt(call: Callable[..., Sequence[T]], rows: Sequence[Any]) -> Sequence[T] | str:
    """Return the results of a call, or the message of its out-of-memory error. Its tensors are freed by then."""
    try:
        return call(*rows)
    except full_memory.KINDS as error:
        if not is_memory_full(error):
            raise
        return first_line(error)


def shares_weights(model: Any) -> bool:
    """Tell whether the ranks hold shards of the model, so that a pass on one rank waits for all others."""
    parallel = isinstance(model, FSDPModule)
    return parallel and distributed.world_size() > 1 and not model.has_whole_replicas


def release(model: Any) -> None:
    """Free the memory that a failed call has left allocated."""
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, FSDPModule):
            module.reshard()
    if torch.cuda.is_available():
        gc.collect()  # an error and the frames of its traceback are a reference cycle
        torch.cuda.empty_cache()


# ---- in training ----


@contextlib.contextmanager
def fail_together(model: Any) -> Iterator[None]:
    """Run the body on every rank: if it fails on one, it fails on all.

    Raises RanksWait if memory is exhausted while ranks share the weights: the others wait inside the model, not here.
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


def try_on_all_ranks(model: Any, make: Callable[[], T]) -> tuple[T | None, str]:
    """Return the result of `make` and an empty text or, if it fails on any rank, None and the reason.

    All ranks must call it. Raises RanksWait.
    """
    try:
        with fail_together(model):
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
        f"memory is full while a model with sharded weights generates or is evaluated ({reason}). Other ranks wait for "
        "this one, so a smaller batch cannot be tried: set the sampling option batch=1 (eval.sampling=[batch=1]), use "
        "more GPUs, or set eval.every=0. The same command resumes from the last checkpoint"
    )
