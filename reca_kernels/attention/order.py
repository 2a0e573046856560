"""Which impl is taken first on a device: what was measured there, else a default order.

attention/order.json is made by `python -m benchmarks.dispatch` from the rows of `python -m benchmarks --ops attention`.
"""

import functools
import json
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("order.json")

# What the automatic choice considers, best first where nothing was measured. cuDNN makes a plan and FlexAttention a
# kernel for every new layout, which no timing of one layout shows, and dense keeps a mask: these three run where they
# are asked for.
DEFAULT = {"cuda": ("fa4", "fa3", "fa2", "varlen", "sdpa"), "cpu": ("sdpa",)}


@functools.cache
def measured() -> dict[str, dict[str, Any]]:
    """Return the table: name of a device -> its order, and the facts of the measurement."""
    return {entry["device"]: entry for entry in json.loads(TABLE.read_text())["devices"]}


def order(device: torch.device) -> tuple[str, ...]:
    """Return the impls that may be taken on a device, best first. What was not measured comes last."""
    default = DEFAULT.get(device.type, ("sdpa",))
    if device.type != "cuda" or (entry := measured().get(torch.cuda.get_device_name(device))) is None:
        return default
    known = tuple(impl for impl in entry["order"] if impl in default)
    return known + tuple(impl for impl in default if impl not in known)


def basis(device: torch.device) -> str:
    """Return what the order rests on."""
    if device.type == "cuda" and (entry := measured().get(torch.cuda.get_device_name(device))):
        return f"order measured on {entry['device']} on {entry['date']}: {', '.join(entry['order'])}"
    return "default order, nothing measured on this device"
