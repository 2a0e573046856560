"""A tiny Janus-Pro that understands more than it can generate.

Its understanding side is trained on every colour-shape pair; its captions lack the held-out ones. Beside Janus' own
losses, three terms stand for what a large model brings along: h_v aligned with the word embeddings of its image (slot
by slot), questions answered about words in h_v's place, and images generated from captions in h_v's place.
"""

from pathlib import Path

import torch
from torch import Tensor

from reca import toy_world
from reca.config import Recipe
from reca.data.batch import Batch
from reca.data.tasks import Turn
from reca.demo.captions import QUESTIONS, TEMPLATES, caption, phrase
from reca.demo.pretrain import DemoSetup, Progress, scaled
from reca.demo.pretrain.alignment import alignment, pad_tokens
from reca.demo.pretrain.codebook import CodebookTask
from reca.demo.pretrain.optimize import matrices, optimize, unit
from reca.models.janus import Adapter

STEPS = 800
GENERATION_BATCH, CAPTION_BATCH = 64, 32  # images in one step
COLOUR_PROBABILITY = 0.8  # of a caption to name the colour of a thing


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


class _Task(CodebookTask):
    """Losses of one pre-training step."""

    def __init__(self, model: Adapter, seed: int, scale: float):
        super().__init__(model, model.gen_vision_model, toy_world.WORLD, seed, scale)
        self.words = self.slots([caption(self.caption_split.scene(i)) for i in range(len(self.images))])

    def slots(self, texts: list[str]) -> Tensor:
        """Tokenize captions for the slots of h_v, padded with the end of text: int64 [B, n]."""
        model = self.model
        rows = [pad_tokens(model.tokens(text), model.hv_tokens, model.vocabulary.eos) for text in texts]
        return torch.tensor(rows)

    def embedded(self, words: Tensor) -> Tensor:
        """Embed words to stand in h_v's place, with a graph."""
        return self.model.language_model.model.embed_tokens(words)

    def generation_loss(self, step: int) -> Tensor:
        """Compute the loss of generating: half from text prompts, half from captions in h_v's place."""
        half, index = GENERATION_BATCH // 2, torch.randint(len(self.codes), (GENERATION_BATCH,))
        ids = torch.arange(step * GENERATION_BATCH, (step + 1) * GENERATION_BATCH)
        texts = [caption(self.generation_split.scene(i), None, self.rng, COLOUR_PROBABILITY) for i in index.tolist()]
        codes = self.codes[index]
        phrases, templates = (
            [phrase(text, self.rng) for text in texts[:half]],
            [self.rng.choice(TEMPLATES) for _ in texts[half:]],
        )
        from_text = Batch("t2i", ids[:half], phrases, features={"codes": codes[:half]})
        slots = {"codes": codes[half:], "h_v": self.embedded(self.slots(texts[half:]))}
        from_slots = Batch("reca", ids[half:], templates, features=slots)
        return 0.5 * self.mean(from_text) + 0.5 * self.mean(from_slots)

    def caption_loss(self) -> Tensor:
        """Compute the loss of captioning images, of captioning words in h_v's place, and of aligning h_v with words."""
        model, index = self.model, torch.randint(len(self.images), (CAPTION_BATCH,))
        view = model.views("i2t").und
        assert view is not None
        pixels = torch.nn.functional.interpolate(
            unit(self.images[index]), [view.size] * 2, mode="bicubic", antialias=True
        ).clamp(-1, 1)
        h_v = model.aligner(model.vision_model.vision_tower(pixels))
        turns = [[Turn(self.rng.choice(QUESTIONS), caption(self.caption_split.scene(i)))] for i in index.tolist()]
        words, half = self.words[index], CAPTION_BATCH // 2
        from_slots = Batch("i2t", index[:half], turns[:half], features={"h_v": self.embedded(words[:half])})
        answers = self.mean(Batch("i2t", index, turns, features={"h_v": h_v})) + self.mean(from_slots)
        return answers + alignment(h_v, words, model.language_model.model.embed_tokens.weight)

    def mean(self, batch: Batch) -> Tensor:
        term = self.model(batch, self.noise_rng)
        return term.sum / term.weight


SETUPS = {
    "shapes": DemoSetup(
        recipe="janus_tiny",
        steps=STEPS,
        pretrain=pretrain,
        init_override="model.weights={folder}",
        sampling={"guidance": 1.0, "temperature": 0.5},
        description="A Janus-Pro of half a million parameters",
        assumptions=(
            "h_v is aligned with the text space: pre-training pulls every h_v token to the embedding of the word it "
            "stands for, reads words in h_v's place, and draws captions from there. Large models bring such alignment"
            " along; here it is made.",
            "Images are 20 pixels wide and their tokens come from a codebook of pixel patches, which stands in for "
            "VQ-16. Token embeddings stay frozen in every arm.",
        ),
        omitted_arms={
            "RECA with h_v from the generation side": (
                "which Janus-Pro would copy: the codes that it reads in drawing are those that it is to draw"
            )
        },
    )
}
