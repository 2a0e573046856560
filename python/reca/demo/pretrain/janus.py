"""A tiny Janus-Pro that understands more than it can generate.

Its understanding side is trained on all colour-shape pairs; its captions lack the held-out ones. In addition to Janus'
own losses, three terms provide what large models already have: alignment of h_v with the words of a caption (slot by
slot), answers about words in place of h_v, and images generated from words in place of h_v.
"""

from pathlib import Path

import torch
from torch import Tensor

from reca.config.recipe import Recipe
from reca.demo.pretrain import ALIGNED_JOINTLY, DemoSetup, Progress, scaled
from reca.demo.pretrain.codebook import CodebookTask
from reca.demo.pretrain.optimize import matrices, optimize
from reca.demo.pretrain.shared_llama import SharedLlamaTask
from reca.models.janus import Adapter
from reca.toy_datasets import shapes
from reca.toy_datasets.captions import caption

STEPS = 800


def pretrain(recipe: Recipe, seed: int, folder: Path, scale: float, progress: Progress) -> Adapter:
    """Train from scratch and export to `folder`."""
    torch.manual_seed(seed)
    recipe.model.seed = seed
    model = Adapter.load(recipe.model)
    task = _Task(model, seed, scale)

    steps = scaled(STEPS, scale)
    layers = matrices(model.language_model.model.layers, model.vision_model.vision_tower.blocks)
    optimize(model.parameters(), layers, lambda step: task.generation_loss(step) + task.caption_loss(), steps, progress)
    model.export(folder)
    return model


class _Task(CodebookTask, SharedLlamaTask):
    """Losses of one pre-training step."""

    def __init__(self, model: Adapter, seed: int, scale: float):
        super().__init__(model, model.gen_vision_model, shapes.DATASET, seed, scale)
        self.drawn = len(self.codes)
        self.words = self.slots([caption(self.caption_split.scene(i)) for i in range(len(self.images))])

    def targets(self, index: Tensor) -> dict[str, Tensor]:
        return {"codes": self.codes[index]}

    def see(self, pixels: Tensor) -> Tensor:
        return self.model.aligner(self.model.vision_model.vision_tower(pixels))


SETUPS = {
    "shapes": DemoSetup(
        recipe="janus_tiny",
        steps=STEPS,
        pretrain=pretrain,
        init_override="model.weights={folder}",
        sampling={"guidance": 1.0, "temperature": 0.5},
        description="A Janus-Pro of half a million parameters",
        assumptions=(
            ALIGNED_JOINTLY.format(how=""),
            "Images are 20 pixels wide. Instead of VQ-16, image tokens come from a codebook of pixel patches. Token "
            "embeddings are frozen in all variants.",
        ),
        omitted_variants={
            "RECA with h_v from the generation side": (
                "Janus-Pro would copy it, as the codes that it reads are those that it has to generate"
            )
        },
    )
}
