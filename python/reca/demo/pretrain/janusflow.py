"""A tiny JanusFlow that understands more than it can generate.

Its understanding side is trained on all colour-shape pairs; its captions lack the held-out ones. In addition to its own
losses, three terms provide what large models already have (`shared_llama`): alignment of h_v with the words of a
caption (slot by slot), answers about words in place of h_v, and images generated from words in place of h_v.
"""

import random
from pathlib import Path

import torch
from torch import Tensor

from reca.config.recipe import Recipe
from reca.demo.pretrain import ALIGNED_JOINTLY, LINEAR_LATENTS, DemoSetup, Progress, scaled
from reca.demo.pretrain.optimize import first_images, matrices, optimize, unit
from reca.demo.pretrain.shared_llama import SharedLlamaTask
from reca.models.common.kl_codec import PatchMoments
from reca.models.janusflow import Adapter
from reca.rng import CounterRNG
from reca.toy_datasets.captions import caption
from reca.toy_datasets.shapes.splits import captioned, understood

STEPS = 1000


def pretrain(recipe: Recipe, seed: int, folder: Path, scale: float, progress: Progress) -> Adapter:
    """Train from scratch and export to `folder`."""
    torch.manual_seed(seed)
    recipe.model.seed = seed
    model = Adapter.load(recipe.model)
    task = _Task(model, seed, scale)

    layers = matrices(model.language_model.model.layers, model.vision_und_enc_model.vision_tower.blocks)
    trained = [p for name, p in model.named_parameters() if not name.startswith("codec.")]
    optimize(
        trained, layers, lambda step: task.generation_loss(step) + task.caption_loss(), scaled(STEPS, scale), progress
    )
    model.export(folder)
    return model


class _Task(SharedLlamaTask):
    """Losses of one pre-training step."""

    def __init__(self, model: Adapter, seed: int, scale: float):
        self.model, self.rng, self.noise_rng = model, random.Random(seed), CounterRNG(seed)
        self.generation_split, self.caption_split = captioned(seed), understood(seed)
        to_generate, self.images = (first_images(split, scale) for split in (self.generation_split, self.caption_split))
        assert isinstance(model.codec, PatchMoments), "the codec of toy datasets"
        model.codec.fit(unit(self.images[: max(64, len(self.images) // 4)]))
        self.moments = torch.cat([model.codec.encode(unit(part)) for part in to_generate.split(500)])
        self.drawn = len(self.moments)
        self.words = self.slots([caption(self.caption_split.scene(i)) for i in range(len(self.images))])

    def targets(self, index: Tensor) -> dict[str, Tensor]:
        return {"moments": self.moments[index]}

    def see(self, pixels: Tensor) -> Tensor:
        return self.model.vision_und_enc_aligner(self.model.vision_und_enc_model.vision_tower(pixels))


SETUPS = {
    "shapes": DemoSetup(
        recipe="janusflow_tiny",
        steps=STEPS,
        pretrain=pretrain,
        init_override="model.weights={folder}",
        sampling={"steps": 20, "guidance": 1.0},
        description="A JanusFlow of half a million parameters",
        assumptions=(
            ALIGNED_JOINTLY.format(how=""),
            "Images are 20 pixels wide. Instead of SDXL's autoencoder, latents are principal components of patches of "
            "two pixels, fitted to images of all pairs. Token embeddings are frozen in all variants.",
            LINEAR_LATENTS,
        ),
        omitted_variants={
            "RECA with h_v from the generation side": (
                "JanusFlow would copy it, as the latents that it reads are those that it has to generate"
            )
        },
    )
}
