"""The order in which impls are preferred on a device: as measured there, else a default order.

attention/order.json is written by `python -m benchmarks.dispatch` from the rows of
`python -m benchmarks --ops attention`.
"""

import functools
import json
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("order.json")

# The impls that "auto" considers, best first where nothing was measured. The other three run only on request: cuDNN
# makes a plan and FlexAttention compiles a kernel for every new layout, which a benchmark of one layout does not show,
# and dense materialises a mask.
DEFAULT = {"cuda": ("fa4", "fa3", "fa2", "varlen", "sdpa"), "cpu": ("sdpa",)}


@functools.cache
def measured() -> dict[str, dict[str, Any]]:
    """Return the table: name of a device -> its order and the details of the measurement."""
    return {entry["device"]: entry for entry in json.loads(TABLE.read_text())["devices"]}


def order(device: torch.device) -> tuple[str, ...]:
    """Return the impls that "auto" considers on a device, best first. Impls that were not measured come last."""
    default = DEFAULT.get(device.type, ("sdpa",))
    if device.type != "cuda" or (entry := measured().get(torch.cuda.get_device_name(device))) is None:
        return default
    known = tuple(impl for impl in entry["order"] if impl in default)
    return known + tuple(impl for impl in default if impl not in known)


def basis(device: torch.device) -> str:
    """Return the measurement behind the order."""
    if device.type == "cuda" and (entry := measured().get(torch.cuda.get_device_name(device))):
        return f"order measured on {entry['device']} on {entry['date']}: {', '.join(entry['order'])}"
    return "default order, nothing measured on this device"
