"""A tiny Show-o that understands more than it can draw.

Its understanding side sees and names every colour-shape pair; its captions lack the held-out ones. Beside Show-o's own
losses there are three terms that stand for what a large model brings along: h_v aligned with the word embeddings of
what it shows (slot by slot), text in h_v's place answered like h_v, and captions drawn from h_v's place too.
"""

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from reca.config import Recipe
from reca.data.batch import Batch, Turn
from reca.models.show_o import Adapter, prompt
from reca.rng import CounterRNG
from reca.toy_world.captions import QUESTIONS, TEMPLATES, caption, phrase
from reca.toy_world.pretrain import DemoSetup, Progress, scaled
from reca.toy_world.pretrain.alignment import alignment, filled
from reca.toy_world.pretrain.optimize import first_images, matrices, optimize, unit
from reca.toy_world.splits import Split, captioned, understood

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
        self.words = torch.stack([self.slots(caption(named.scene(i))) for i in range(len(images))])  # [n, slots]

    def slots(self, text: str) -> Tensor:
        """A caption's token ids on the slots of h_v, filled up with the end of text."""
        return torch.tensor(filled(self.model.tokens(text), self.model.clip_tokens, self.model.vocabulary.eos))

    def drawing(self, step: int) -> Tensor:
        """Captions drawn: half from text-to-image prompts, half from h_v's place in a reconstruction prompt."""
        model, v, half = self.model, self.model.vocabulary, DRAWN // 2
        index = torch.randint(len(self.codes), (DRAWN,))
        ids = torch.arange(step * DRAWN, (step + 1) * DRAWN)
        texts = [caption(self.drawn.scene(i), None, self.rng, COLOUR_PROBABILITY) for i in index.tolist()]
        batch = Batch("t2i", ids[:half], [phrase(text, self.rng) for text in texts[:half]])
        asked = model.loss(batch, {"codes": self.codes[index[:half]]}, self.draws)

        slots, templates = self.rng.randint(*SLOTS), [self.rng.choice(TEMPLATES) for _ in texts[half:]]
        samples = [
            prompt.reca_clip(model.template(t), v, slots, model.clip_tokens, model.image_tokens) for t in templates
        ]
        layout = self.with_words(prompt.layout(samples, v), torch.stack([self.slots(text) for text in texts[half:]]))
        model.hide(layout, self.codes[index[half:]], model.masked(self.draws, ids[half:]))
        placed = model.cross_entropy(model.hidden(layout), layout.labels)
        return 0.5 * asked.sum / asked.weight + 0.5 * placed.sum / placed.weight

    def naming(self) -> Tensor:
        """Images named; h_v aligned with the words; and words in h_v's place named."""
        model, index = self.model, torch.randint(len(self.images), (NAMED,))
        features = model.look(model.clip_view(unit(self.images[index])))
        turns = [[Turn(self.rng.choice(QUESTIONS), caption(self.named.scene(i)))] for i in index.tolist()]
        term = model.loss(Batch("i2t", index, turns), {"h_v": features}, self.draws)
        words = self.words[index]

        samples = [model.talk(*model.conversation(t), model.clip_tokens) for t in turns[: NAMED // 2]]
        layout = self.with_words(prompt.layout(samples, model.vocabulary), words[: NAMED // 2])
        text = model.cross_entropy(model.hidden(layout), layout.labels)
        table = model.showo.model.embed_tokens.weight[: model.vocabulary.offset]
        return term.sum / term.weight + text.sum / text.weight + alignment(model.visual(features), words, table)

    @staticmethod
    def with_words(layout: prompt.Layout, words: Tensor) -> prompt.Layout:  # int64 [B, n]
        """The layout with token ids where rows of h_v stood."""
        src = layout.src.long()
        layout.src = torch.where(src < 0, words.flatten()[(-1 - src).clamp(min=0)], src).int()
        return layout


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
