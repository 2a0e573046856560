"""What the conformance suite runs over: every model at its tiny size, variants of it, and batches of every task."""

import functools
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from reca.config.recipe_files import load_recipe
from reca.data.batch import Batch
from reca.data.tasks import Scored, ScoredBox, Turn
from reca.data.transforms import make_view
from reca.models import UMMS, umm_package
from reca.models.base import Adapter
from reca.optim import freeze
from reca.options.sampling import defaults
from reca.rng import CounterRNG

# model or variant -> the tiny recipe's overrides. A variant is there because it has code of its own in the loss.
VARIANTS = {
    "show_o parity": ["model.parity=true"],
    "show_o vq": ["model.understanding=vq", "model.hv_down_scale=1"],
    "show_o blur": ["model.understanding=vq", "model.hv_down_scale=2", "model.hv_resize_back=true"],
    "show_o codes as h_v": ["model.hv_source=vq", "model.hv_down_scale=1"],
    "harmon parity": ["model.parity=true"],
    "open_uni parity": ["model.parity=true"],
    "bagel flux": ["model.codec=flux", "model.autoencoder.block_out_channels=[32, 32]",
                   "model.autoencoder.layers_per_block=1", "model.autoencoder.latent_channels=4",
                   "model.max_latent_size=10"],
    "janus dropped": ["model.reca_drop=0.5", "model.caption_drop=0.5", "model.reca_system_prompt=see this picture"],
    "janus vq": ["model.codec=vq", "model.vq.channels=32", "model.vq.multipliers=[1, 1, 1]", "model.vq.blocks=1",
                 "model.vq.z_channels=32", "model.vq.entries=145"],
    "janusflow vae": ["model.codec=sdxl", "model.autoencoder.block_out_channels=[32, 32]", "model.reca_drop=0.5",
                      "model.autoencoder.layers_per_block=1", "model.caption_drop=0.5",
                      "model.reca_system_prompt=see this picture"],
    "bagel parity": ["model.parity=true"],
    "bagel vae": ["model.hv_source=vae", "model.understanding_size=18"],
    "bagel shift": ["model.timestep_shift=3"],
}  # fmt: skip
RECIPES: dict[str, str | Path] = {name: f"{name}_tiny" for name in UMMS}
CASES: dict[str, list[str]] = {**{name: [] for name in UMMS}, **VARIANTS}
# The ops that each model's loss of images runs, and no others.
OPS = {
    "show_o": {"template_concat", "masked_linear_cross_entropy", "philox"},
    "harmon": {"template_concat", "diffusion_loss", "philox"},
    "open_uni": {"template_concat", "flow_matching", "philox"},
    "bagel": {"template_concat", "flow_matching", "philox"},
    "janus": {"template_concat", "masked_linear_cross_entropy", "philox"},
    "janusflow": {"template_concat", "flow_matching", "philox"},
}
# Draws that belong to a micro-batch instead of to its samples, as in the release.
DRAWN_BY_BATCH = {"harmon parity"}


def adapter(name: str) -> type[Adapter]:
    """The class of a model or variant."""
    return umm_package(load_recipe(RECIPES[name.split()[0]]).umm).Adapter


def quick(name: str, steps: int = 4) -> dict[str, int]:
    """Sampling options that draw an image in few steps; none where it takes as many steps as it has tokens."""
    return {"steps": steps} if "steps" in defaults(adapter(name).generate) else {}


TEXTS = {
    "reca": ["describe the picture", "what is this", "describe this with care", "a picture"],
    "t2i": ["a red square", "a blue circle drawn with care", "a square", ""],
    "i2t": [
        [Turn("what is this", "a red square")],
        [Turn("what is this", "a circle"), Turn("describe the picture", "a red circle drawn with care")],
        [Turn("this", "a square")],
        [Turn("describe", "a blue square")],
    ],
    "srum": [
        Scored("a red square", (ScoredBox(0, 0, 0.5, 1, 1.0), ScoredBox(0.25, 0, 1, 0.5, 0.5)), 0.25),
        Scored("a blue circle drawn with care", (ScoredBox(0.5, 0.5, 1, 1, -0.05),), 0.5),
        Scored("a square", (), 1.0),
        Scored("a", (ScoredBox(0.1, 0.1, 0.2, 0.2, 1.0),), 0.0),
    ],
}
# Every case with every task that its model has.
CASE_TASKS = [(case, task) for case in CASES for task in TEXTS if task in adapter(case).tasks]
SIZES = [(20, 20), (20, 20), (12, 20), (20, 8)]


def hold_to_it(recipe: Path) -> None:
    """Replace all cases by one, the model of a recipe."""
    model = umm_package(load_recipe(recipe).umm).Adapter
    RECIPES[model.name] = recipe
    CASES.clear()
    CASES[model.name] = []
    CASE_TASKS[:] = [(model.name, task) for task in TEXTS if task in model.tasks]


def load(case: str, *overrides: str) -> Adapter:
    """The model of a case, with what RECA trains, in eval mode; no parameter that learns is zero."""
    recipe = load_recipe(RECIPES[case.split()[0]], [*CASES[case], *overrides])
    model = umm_package(recipe.umm).Adapter.load(recipe.model)
    freeze(model, None)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@functools.cache
def shared(case: str) -> Adapter:
    """`load`, once for all tests that change nothing."""
    return load(case)


def images(sizes=SIZES, seed: int = 0) -> list[torch.Tensor]:
    """Noise, uint8 [3, H, W] per size."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes]


def batch(model: Adapter, task: str, rows=(0, 1, 2, 3), sizes=SIZES) -> Batch:
    """Samples of different sizes, as the model's views make them."""
    shown = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images(sizes)]
    views = model.views(task)
    gen, und = (view and [make_view(shown[row], view) for row in rows] for view in (views.gen, views.und))
    return Batch(task, torch.tensor(rows) + 7, [TEXTS[task][row] for row in rows], gen=gen, und=und)


def loss(model: Adapter, sample: Batch, seed: int = 0) -> torch.Tensor:
    """The mean loss of a batch."""
    term = model(sample, CounterRNG(seed))
    return term.sum / term.weight


def learnable(model: nn.Module, task: str) -> None:
    """Train what RECA trains; for a task that this cannot lower, or whose head it keeps, everything."""
    freeze(model, None)
    frozen_head = task == "i2t" and "embed" in set(model.roles().values()) - model.trainable_roles
    if frozen_head or not model(batch(model, task), CounterRNG(0)).sum.requires_grad:
        freeze(model, sorted(set(model.roles().values()) - {"codec", "und_encoder"}))


def cached(sample: Batch, features: dict) -> Batch:
    return replace(sample, gen=None, und=None, features=features)
