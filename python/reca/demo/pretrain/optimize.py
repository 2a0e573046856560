"""Optimisation shared by all pre-training: Muon for the matrices of layers, AdamW for all other parameters."""

import random
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from reca import checkpoint
from reca.config.recipe import Recipe
from reca.config.recipe_files import absolute_paths, save_recipe
from reca.demo.pretrain import Progress, scaled
from reca.hardware.host_memory import FreedMemory
from reca.models.base import Adapter
from reca.toy_datasets.captions import caption, phrase
from reca.toy_datasets.split import Split

WARMUP_STEPS, STABLE_FRACTION, MIN_LR_RATIO = 60, 0.6, 0.05
GENERATION_BATCH, CAPTION_BATCH = 64, 32  # images per step
COLOUR_PROBABILITY = 0.8  # probability that a caption names the colour of a thing


def optimize(
    parameters: Iterable[nn.Parameter],
    muon: Iterable[nn.Parameter],
    loss: Callable[[int], Tensor],
    steps: int,
    progress: Progress,
    done: int = 0,
) -> None:
    """Minimise loss(step). muon: the `parameters` that Muon optimises. done: number of earlier steps, for progress."""
    freed = FreedMemory()
    freed.keep()
    parameters, muon = list(parameters), list(muon)
    known = {id(p) for p in muon}
    rest = [p for p in parameters if id(p) not in known]
    optimizers = [
        torch.optim.Muon(muon, lr=0.01, momentum=0.95, ns_steps=4, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    for step in range(steps):
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * _shape(step, steps)
        value = loss(step)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        freed.after_step(step + 1)
        progress(done + step + 1, float(value.detach()))


def matrices(*parts: nn.Module) -> list[nn.Parameter]:
    """List all matrices in these modules."""
    return [p for part in parts for p in part.parameters() if p.ndim == 2]


def save_as_run(model: Adapter, recipe: Recipe, folder: Path, steps: int) -> None:
    """Save all parameters as the checkpoint of a run, for `train.init_from`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_recipe(absolute_paths(recipe), folder / "recipe.yaml")
    model.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    saved = checkpoint.save(folder, {"step": steps}, model, optimizer, checkpoint.Keep(1))
    if saved is None:
        raise checkpoint.CheckpointError(f"the pre-trained model was not saved in {folder}; the log above says why")


def first_images(split: Split, scale: float) -> Tensor:
    """Stack the first images of a split: the fraction `scale`, at least 64 if it has as many: uint8 [n, 3, H, W]."""
    count = min(len(split), scaled(len(split), scale, least=64))
    return torch.stack([split.image(i) for i in range(count)])


def draw_batch(split: Split, images: int, step: int, rng: random.Random) -> tuple[Tensor, Tensor, list[str], list[str]]:
    """Draw the batch of a generation step: one half from text prompts, the other from captions in place of h_v.

    images: number of the split's images to use. Returns image indices [B], sample ids [B], the text prompts of the
    first half and the captions of the second.
    """
    index, half = torch.randint(images, (GENERATION_BATCH,)), GENERATION_BATCH // 2
    texts = [caption(split.scene(i), None, rng, COLOUR_PROBABILITY) for i in index.tolist()]
    sample_ids = torch.arange(step * GENERATION_BATCH, (step + 1) * GENERATION_BATCH)
    return index, sample_ids, [phrase(text, rng) for text in texts[:half]], texts[half:]


def unit(pixels: Tensor) -> Tensor:  # uint8
    """Scale pixels to fp32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def _shape(step: int, steps: int) -> float:
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return max(MIN_LR_RATIO, 1 - max(0.0, step / steps - STABLE_FRACTION) / (1 - STABLE_FRACTION) * (1 - MIN_LR_RATIO))
