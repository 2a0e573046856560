"""Which tensors training changed, and whether understanding uses one of them."""

from dataclasses import replace
from typing import Any

import torch

from reca import checkpoint
from reca.comparison.sides import Side
from reca.config import LoraConfig, Recipe
from reca.lora import is_lora
from reca.meta_model import build_meta
from reca.recipe_files import as_dict
from reca.runs import published_fingerprints

SHOWN = 40  # names of changed tensors in the comparison


def understanding(before: Side, after: Side) -> dict[str, Any] | None:
    """Say whether understanding is bit-identical in both, or which of its tensors are not.

    Compares the tensors of checkpoints; what no checkpoint holds is as published. Returns None for sides without
    weights, or of models that were loaded from different files or with different settings.
    """
    if before.recipe is None or after.recipe is None or _published(before.recipe) != _published(after.recipe):
        return None
    if any(side.kind == "run" and side.weights is None for side in (before, after)):
        return None
    changed = sorted(_changed(before, after))
    adapter, _ = build_meta(replace(after.recipe, lora=LoraConfig()))
    role_of = adapter.roles()
    touched = [name for name in changed if role_of.get(_owner(name), "") in adapter.understanding_roles]
    if not changed:
        text = "No tensor differs: the two models are bit-identical."
    elif not touched:
        text = (
            f"Understanding is bit-identical: none of the {len(changed)} tensors that differ has a part in an answer, "
            "so all answers are the same."
        )
    else:
        text = (
            f"{len(touched)} of the {len(changed)} tensors that differ have a part in understanding: measure it, for "
            "example by reca eval mme or pope."
        )
    return {"identical": not touched, "changed": len(changed), "tensors": touched[:SHOWN], "text": text}


def _published(recipe: Recipe) -> tuple[str, dict[str, Any]]:
    """Return what a model is before any checkpoint: its settings, with contents of files in place of their paths."""
    return recipe.umm, as_dict(recipe)["model"] | published_fingerprints(recipe)


def _owner(name: str) -> str:
    """Return the weight that a tensor of LoRA changes; other tensors own themselves."""
    return name.partition(".lora_")[0] + ".weight" if is_lora(name) else name


def _changed(before: Side, after: Side) -> set[str]:
    """Name the tensors that differ: those of one checkpoint alone, and those whose bits differ in two."""
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
