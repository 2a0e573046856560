"""A tiny Show-o that understands more than it can draw.

Its understanding side sees and names every colour-shape pair; its captions lack the held-out ones. Beside Show-o's own
losses there are three terms that stand for what a large model brings along: h_v aligned with the word embeddings of
what it shows (slot by slot), text in h_v's place answered like h_v, and captions drawn from h_v's place too.
"""

import random
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from reca.config import Recipe
from reca.data.batch import Batch, Turn
from reca.models.show_o import Adapter, prompt
from reca.models.show_o.conditioner import conditioner
from reca.models.show_o.loss import conversation, cross_entropy
from reca.models.show_o.masking import sample_mask
from reca.rng import CounterRNG
from reca.toy_world.captions import QUESTIONS, TEMPLATES, caption, phrase
from reca.toy_world.pretrain import DemoSetup, Progress, scaled
from reca.toy_world.pretrain.alignment import alignment, filled
from reca.toy_world.pretrain.optimize import first_images, matrices, optimize, unit
from reca.toy_world.splits import Split, captioned, understood
from reca_kernels import IGNORE_INDEX

STEPS = 800
DRAWN, NAMED = 64, 32  # captioned and understood images in one step
COLOUR_PROBABILITY = 0.8  # of a caption to name the colour of a thing
SLOTS = (20, 36)  # lengths of the prompt when captions stand in h_v's place


def pretrain(recipe: Recipe, seed: int, folder: Path, scale: float, progress: Progress) -> Adapter:
    """Train from scratch and export to `folder`."""
    torch.manual_seed(seed)
    rng, draws = random.Random(seed), CounterRNG(seed)
    recipe.model.seed = seed
    model = Adapter.load(recipe.model)
    drawn, named = (first_images(split, scale) for split in (captioned(seed), understood(seed)))
    fit_codebook(model, named[:3000])
    codes = torch.cat([model.codec.encode(unit(part)) for part in drawn.split(500)])
    task = _Task(model, rng, draws, captioned(seed), understood(seed), codes, named)

    steps, layers = scaled(STEPS, scale), matrices(model.showo.model.layers, model.clip.encoder.layers)
    optimize(model.parameters(), layers, lambda step: task.drawing(step) + task.naming(), steps, progress)
    model.export(folder)
    return model


class _Task:
    """The losses of one step."""

    def __init__(
        self,
        model: Adapter,
        rng: random.Random,
        draws: CounterRNG,
        drawn: Split,
        named: Split,
        codes: Tensor,
        images: Tensor,
    ):
        self.model, self.rng, self.draws, self.drawn, self.named = model, rng, draws, drawn, named
        self.codes, self.images = codes, images
        self.clip = conditioner(model, "reca")
        self.words = torch.stack([self.slots(caption(named.scene(i))) for i in range(len(images))])  # [n, slots]

    def slots(self, text: str) -> Tensor:
        """A caption's token ids on the slots of h_v, filled up with the end of text."""
        return torch.tensor(filled(self.model.tokens(text), self.clip.tokens(), self.model.vocabulary.eos))

    def drawing(self, step: int) -> Tensor:
        """Compute the loss of generating: half from text prompts, half from captions in h_v's place."""
        model, v, half = self.model, self.model.vocabulary, DRAWN // 2
        index = torch.randint(len(self.codes), (DRAWN,))
        ids = torch.arange(step * DRAWN, (step + 1) * DRAWN)
        texts = [caption(self.drawn.scene(i), None, self.rng, COLOUR_PROBABILITY) for i in index.tolist()]
        phrases, codes = [phrase(text, self.rng) for text in texts[:half]], self.codes[index[:half]]
        asked = model(Batch("t2i", ids[:half], phrases, features={"codes": codes}), self.draws)

        slots, templates = self.rng.randint(*SLOTS), [self.rng.choice(TEMPLATES) for _ in texts[half:]]
        templates = [model.tokens(prompt.TEMPLATE.format(text)) for text in templates]
        samples = [prompt.reca_clip(t, v, slots, self.clip.tokens(), model.image_tokens) for t in templates]
        layout = self.with_words(prompt.layout(samples, v), torch.stack([self.slots(text) for text in texts[half:]]))
        masked = sample_mask(self.draws, ids[half:], model.image_tokens)
        layout = prompt.apply_mask(layout, self.codes[index[half:]], masked, v)
        return 0.5 * asked.sum / asked.weight + 0.5 * self.cross_entropy(layout)

    def naming(self) -> Tensor:
        """Compute the loss of captioning images, of captioning words in h_v's place, and of aligning h_v with words."""
        model, index = self.model, torch.randint(len(self.images), (NAMED,))
        features = self.clip.encode_reca(unit(self.images[index]))
        turns = [[Turn(self.rng.choice(QUESTIONS), caption(self.named.scene(i)))] for i in index.tolist()]
        term = model(Batch("i2t", index, turns, features={"h_v": features}), self.draws)
        words = self.words[index]

        v, system = model.vocabulary, model.tokens(model.config.system_prompt)
        talks = [conversation(model, self.clip, t) for t in turns[: NAMED // 2]]
        layout = prompt.layout([self.clip.conversation_sample(*talk, v, system) for talk in talks], v)
        text = self.cross_entropy(self.with_words(layout, words[: NAMED // 2]))
        table = model.showo.model.embed_tokens.weight[: model.vocabulary.offset]
        return term.sum / term.weight + text + alignment(model.visual(features), words, table)

    def cross_entropy(self, layout: prompt.Layout) -> Tensor:
        """Mean cross-entropy of the labelled rows."""
        total = cross_entropy(self.model, self.model.hidden(layout), layout.labels)
        return total / (layout.labels != IGNORE_INDEX).sum().float()

    @staticmethod
    def with_words(layout: prompt.Layout, words: Tensor) -> prompt.Layout:  # int64 [B, n]
        """Put token ids where tokens of h_v stood."""
        src = layout.src.long()
        return replace(layout, src=torch.where(src < 0, words.flatten()[(-1 - src).clamp(min=0)], src).int())


def fit_codebook(model: Adapter, images: Tensor, rounds: int = 5) -> None:
    """k-means over the pixel patches of images, started from patches far apart."""
    codec = model.codec
    size = model.config.patches.size
    patches = F.unfold(unit(images), size, stride=size).transpose(1, 2).flatten(0, 1)
    chosen = [patches[0]]
    distance = (patches - chosen[0]).square().sum(1)
    while len(chosen) < codec.entries:
        chosen.append(patches[distance.argmax()])
        distance = torch.minimum(distance, (patches - chosen[-1]).square().sum(1))
    centres = torch.stack(chosen)
    for _ in range(rounds):
        nearest = torch.cdist(patches, centres).argmin(1)
        counts = torch.bincount(nearest, minlength=len(centres)).clamp(min=1)
        centres = torch.zeros_like(centres).index_add_(0, nearest, patches) / counts[:, None]
    codec.codebook.copy_(centres)


SETUP = DemoSetup(
    recipe="show_o_tiny",
    steps=STEPS,
    pretrain=pretrain,
    init_override="model.weights={folder}",
    sampling={"steps": 18, "guidance": 0.0, "temperature": 0.5},
    description="A Show-o of half a million parameters",
    assumptions=(
        "h_v is aligned with the text space: pre-training pulls every h_v token to the embedding of the word it "
        "stands for, reads words in h_v's place, and draws captions from there. Large models bring such alignment"
        " along; here it is made.",
        "Images are 20 pixels wide and their tokens come from a codebook of pixel patches, which stands in for "
        "MAGVITv2. Token embeddings and projector stay frozen in every arm.",
    ),
    generation_arm=(
        "RECA-codebook",
        "h_v from the generation codebook",
        ("model.hv_source=vq", "model.hv_down_scale=1"),
    ),
)
