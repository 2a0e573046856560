"""Summary of a run in a few lines, logged at its start."""

import textwrap
from collections.abc import Mapping

import torch

from reca import distributed, units
from reca.config.recipe import Recipe
from reca.data import micro_batches
from reca.data.loader import Loader
from reca.data.sources.factory import DATA_KEYS
from reca.estimate.counts import parameters
from reca.hardware.host_memory import total as host_memory
from reca.models.base import Adapter
from reca.monitoring import speed
from reca.training import compiled_blocks
from reca_kernels import dispatch

WIDTH, INDENT = 118, " " * 11


def header(
    recipe: Recipe,
    adapter: Adapter,
    loaders: Mapping[str, Loader],
    device: torch.device,
    done: int,
    peak: tuple[float | None, str],
) -> list[str]:
    """Return the lines. done: steps that earlier starts have made. peak: result of speed.peak_flops."""
    rows = {
        "run": f"{recipe.run_dir}: {recipe.umm}, steps {done + 1} to {recipe.train.steps}",
        "data": "; ".join(_task(recipe, task, loader) for task, loader in loaders.items()),
        "trained": _parameters(adapter),
        "precision": _precision(recipe, device),
        "device": _device(device),
        "kernels": _kernels(device),
        "memory": _memory(device),
    }
    if peak[0]:
        rows["peak"] = f"{peak[0] / 1e12:.4g} TFLOP/s per GPU ({peak[1]}), the basis of MFU"
    lines: list[str] = []
    for name, text in rows.items():
        lines += textwrap.wrap(f"{name:<11}{text}", WIDTH, subsequent_indent=INDENT, break_long_words=False)
    return lines


def _task(recipe: Recipe, task: str, loader: Loader) -> str:
    config = getattr(recipe.objective, task)
    split = micro_batches.describe_split(config, distributed.world_size())
    source = getattr(recipe.data, DATA_KEYS[task])
    names = source if isinstance(source, str) else ", ".join(item["source"] for item in source)
    return (
        f"{task} (weight {config.weight:g}) {config.batch_size} samples per step of {len(loader.source)} in {names}: "
        f"{split}"
    )


def _parameters(adapter: Adapter) -> str:
    counts = parameters(adapter)
    parts = [f"{role} {_count(n.trained)} of {_count(n.total)}" for role, n in counts.items() if n.trained]
    trained, total = (sum(getattr(n, field) for n in counts.values()) for field in ("trained", "total"))
    frozen = [role for role, n in counts.items() if not n.trained]
    text = f"{_count(trained)} of {_count(total)} parameters: {', '.join(parts)}"
    return f"{text}; frozen: {', '.join(frozen)}" if frozen else text


def _count(number: int) -> str:
    unit, name = units.largest(number, ((1e9, "B"), (1e6, "M"), (1e3, "k"), (1, "")))
    return f"{number / unit:.3g}{name}"


def _precision(recipe: Recipe, device: torch.device) -> str:
    train, on = recipe.train, []
    states = {name: getattr(train, name) for name in ("activation_checkpointing", "deterministic")}
    for name, state in (states | {"compile": compiled_blocks.wanted(train, device)}).items():
        words = name.replace("_", " ")
        if state == "selective":
            on.append(f"selective {words}")
        elif state:
            on.append(words if state is True else f"{words} of one in {state} blocks")
    if recipe.ema.half_life:
        on.append(f"EMA with a half-life of {recipe.ema.half_life:g} steps")
    return ", ".join([train.precision, *on])


def _device(device: torch.device) -> str:
    ranks, threads = distributed.world_size(), torch.get_num_threads()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {units.counted(threads, 'thread')}"
    node = distributed.local_world_size()
    return f"{ranks} x {name}" + (f", {node} per node" if 1 < node < ranks else "") if ranks > 1 else name


def _kernels(device: torch.device) -> str:
    """List the ops on this device by backend."""
    found: dict[str, list[str]] = {}
    for op, choice in dispatch.choices(device.type).items():
        found.setdefault(choice.backend, []).append(op)
    return "; ".join(f"{backend}: {', '.join(ops)}" for backend, ops in found.items())


def _memory(device: torch.device) -> str:
    if device.type == "cuda":
        used, total = torch.cuda.memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
    else:
        used, total = speed.peak_memory(device), host_memory()
    return f"{units.size(used)} of {units.size(total)} before the first step"
