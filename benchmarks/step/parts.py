"""Timing of the parts of a step. Exactly one part is active at any time, so the parts add up to the step.

Functions and layers of the trainer and the model are wrapped in place; the step itself is the trainer's own.
"""

import functools
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.step.rows import PARTS
from reca.trainer import Trainer

# Layers that count as "blocks" in addition to `Adapter.blocks`, and modules that count as "head and loss".
MORE_BLOCKS = {"open_uni": "mllm.model.language_model.layers"}
HEADS = {"harmon": "mar.diffloss.net"}


class Parts:
    """Accumulates time by part.

    mark: records a timestamp. between: returns the seconds between two timestamps; called after the step.
    """

    def __init__(self, mark: Callable[[], Any], between: Callable[[Any, Any], float]) -> None:
        self.mark, self.between = mark, between
        self.thread = threading.get_ident()
        self.stack: list[str] = []
        self.marks: list[tuple[str, Any]] = []  # (part that ran until the mark, mark)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Enter a part within the current one. Recomputation counts as part of the backward pass."""
        if not self.stack or self.stack[-1] in ("backward", name) or threading.get_ident() != self.thread:
            yield
            return
        with torch.profiler.record_function(f"part: {name}"):
            self._turn()
            self.stack.append(name)
            try:
                yield
            finally:
                self._turn()
                self.stack.pop()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Begin and end a step. Time outside of all parts is "other", and after the backward passes "optimizer"."""
        self.marks, self.stack = [("", self.mark())], ["other"]
        try:
            yield
        finally:
            self._turn()
            self.stack = []

    def seconds(self) -> dict[str, float]:
        """Return the seconds of every part of the last step."""
        found: defaultdict[str, float] = defaultdict(float)
        last = max((i for i, (name, _) in enumerate(self.marks) if name == "backward"), default=len(self.marks))
        for i, ((_, before), (name, after)) in enumerate(zip(self.marks, self.marks[1:], strict=False), start=1):
            found["optimizer" if name == "other" and i > last else name] += self.between(before, after)
        return {name: found[name] for name in PARTS}

    def _turn(self) -> None:
        self.marks.append((self.stack[-1], self.mark()))

    def timed_loss(self, loss: Callable) -> Callable:
        """Return a loss that is timed by part: "prompt" before the last layer, "head and loss" after it."""

        @functools.wraps(loss)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.part("prompt"):
                result = loss(*args, **kwargs)
            parts = [name for name, _ in self.marks]
            for i in reversed(range(len(parts))):
                if parts[i] == "blocks":
                    break
                if parts[i] == "prompt":
                    self.marks[i] = ("head and loss", self.marks[i][1])
            return result

        return run

    def timed(self, function: Callable, name: str) -> Callable:
        """Return the function, timed as a part."""

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return run


def instrument(adapter: nn.Module, parts: Parts) -> None:
    """Instrument the functions and layers of a model, before it is passed to the trainer."""
    adapter.prepare = parts.timed(adapter.prepare, "prepare")
    adapter.encode = parts.timed(adapter.encode, "encoders")
    adapter.loss = parts.timed_loss(adapter.loss)
    layers = list(adapter.blocks())
    if name := MORE_BLOCKS.get(adapter.name):
        layers += adapter.get_submodule(name)
    heads = [adapter.get_submodule(HEADS[adapter.name])] if adapter.name in HEADS else []
    inside = {id(module) for head in heads for module in head.modules()}
    for module, part in (*((m, "head and loss") for m in heads), *((m, "blocks") for m in layers)):
        if part == "head and loss" or id(module) not in inside:
            _as_part(module, part, parts)


def _as_part(module: nn.Module, name: str, parts: Parts) -> None:
    """Time the forward pass of a module as a part."""
    open_: list[Any] = []

    def enter(*_: Any) -> None:
        open_.append(parts.part(name))
        open_[-1].__enter__()

    def leave(*_: Any) -> None:
        open_.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


@contextmanager
def timed_trainer(trainer: Trainer, parts: Parts) -> Iterator[None]:
    """Instrument the functions of the trainer."""
    for loader in trainer.loaders.values():
        loader.decode = parts.timed(loader.decode, "decode")
    backward = parts.timed(Tensor.backward, "backward")
    with mock.patch.object(Tensor, "backward", lambda self, *args, **options: backward(self, *args, **options)):
        yield
