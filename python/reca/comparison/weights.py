"""Tensors that training changed, and whether understanding uses any of them."""

from dataclasses import replace
from typing import Any

import torch

from reca import checkpoint
from reca.comparison.sides import Side
from reca.config.recipe import LoraConfig
from reca.estimate.meta_model import build_meta
from reca.models import umm_package
from reca.runs.published import published_model
from reca.training.lora import is_lora, weight_beside

SHOWN = 40  # maximum number of changed tensors to list


def understanding(before: Side, after: Side) -> dict[str, Any] | None:
    """Tell whether understanding is bit-identical on both sides, and which of its tensors differ.

    Compares the tensors of the checkpoints; tensors in neither are as published. Return None if a side has no weights,
    if the models were loaded from different files or with different settings, or if they cannot answer.
    """
    if before.recipe is None or after.recipe is None or published_model(before.recipe) != published_model(after.recipe):
        return None
    if before.lacks_weights or after.lacks_weights or "answer" not in umm_package(after.recipe.umm).Adapter.abilities:
        return None
    changed = sorted(_changed(before, after))
    adapter, _ = build_meta(replace(after.recipe, lora=LoraConfig()))
    role_of = adapter.roles()
    owner = {name: weight_beside(name) if is_lora(name) else name for name in changed}
    touched = [name for name in changed if role_of.get(owner[name], "") in adapter.understanding_roles]
    if not changed:
        text = "No tensor differs: the two models are bit-identical."
    elif not touched:
        text = (
            f"Understanding is bit-identical: none of the {len(changed)} tensors that differ is used for answers, so "
            "all answers are the same."
        )
    else:
        text = (
            f"{len(touched)} of the {len(changed)} tensors that differ are used for understanding: measure it, for "
            "example with reca eval mme or pope."
        )
    return {"identical": not touched, "changed": len(changed), "tensors": touched[:SHOWN], "text": text}


def _changed(before: Side, after: Side) -> set[str]:
    """Return the names of tensors that differ: those in only one checkpoint, and those in both with other bits."""
    folders = [side.weights for side in (before, after)]
    names = [set(checkpoint.list_weights(folder)) if folder else set() for folder in folders]
    changed = names[0] ^ names[1]
    if folders[0] is not None and folders[1] is not None:
        for name in names[0] & names[1]:
            a, b = (checkpoint.read_weight(folder, name) for folder in folders if folder is not None)
            if a.shape != b.shape or a.dtype != b.dtype or not torch.equal(_bits(a), _bits(b)):
                changed.add(name)
    return changed


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)
