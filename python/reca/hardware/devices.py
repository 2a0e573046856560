"""The device that a model is loaded onto."""

import torch

from reca.options.fields import RecipeError


def usable_device(device: torch.device | str | None) -> torch.device:
    """Return the given device; for None a GPU if there is one, otherwise the CPU.

    Raises RecipeError for a device other than the CPU and the GPUs of this machine.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise RecipeError(f"device={str(device)!r} cannot be used: expected cpu, cuda or cuda:NUMBER; pass one of them")
    if found.type == "cuda" and (found.index or 0) >= count:
        there = f"this machine has {count}, numbered from 0" if count else "torch finds none here"
        raise RecipeError(
            f"device={str(device)!r} is not a usable GPU: {there}. Pass another device, such as cpu; `reca doctor` "
            "shows what torch finds"
        )
    return found
