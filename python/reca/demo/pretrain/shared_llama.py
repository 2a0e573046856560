"""The Janus models: joint training of understanding and generation in a shared language model."""

import random
from typing import Any

import torch
from torch import Tensor

from reca.data.batch import Batch
from reca.data.tasks import Turn
from reca.demo.pretrain.alignment import alignment, pad_tokens
from reca.demo.pretrain.optimize import CAPTION_BATCH, draw_batch, unit
from reca.rng import CounterRNG
from reca.toy_datasets.captions import QUESTIONS, TEMPLATES, caption
from reca.toy_datasets.split import Split


class SharedLlamaTask:
    """Losses of a pre-training step. Each model subclasses it with its splits, images and generation targets."""

    model: Any
    rng: random.Random
    noise_rng: CounterRNG
    generation_split: Split
    caption_split: Split
    drawn: int  # number of images in the generation split to use
    images: Tensor  # of the caption split, uint8 [n, 3, H, W]
    words: Tensor  # their captions as token ids in place of h_v, int64 [n, tokens of h_v]

    def targets(self, index: Tensor) -> dict[str, Tensor]:
        """Return the features of the images to generate."""
        raise NotImplementedError

    def see(self, pixels: Tensor) -> Tensor:  # [B, 3, S, S] in [-1, 1]
        """Compute h_v with gradient, unlike the adapter."""
        raise NotImplementedError

    def slots(self, texts: list[str]) -> Tensor:
        """Tokenize captions for the slots of h_v, padded with the end of text: int64 [B, n]."""
        model = self.model
        rows = [pad_tokens(model.tokens(text), model.hv_tokens, model.vocabulary.eos) for text in texts]
        return torch.tensor(rows)

    def embedded(self, words: Tensor) -> Tensor:
        """Embed words in place of h_v, with gradient."""
        return self.model.language_model.model.embed_tokens(words)

    def generation_loss(self, step: int) -> Tensor:
        """Compute the generation loss, from text prompts and from words in place of h_v."""
        index, ids, phrases, texts = draw_batch(self.generation_split, self.drawn, step, self.rng)
        half, templates = len(phrases), [self.rng.choice(TEMPLATES) for _ in texts]
        from_text = Batch("t2i", ids[:half], phrases, features=self.targets(index[:half]))
        slots = self.targets(index[half:]) | {"h_v": self.embedded(self.slots(texts))}
        from_slots = Batch("reca", ids[half:], templates, features=slots)
        return 0.5 * self.mean(from_text) + 0.5 * self.mean(from_slots)

    def caption_loss(self) -> Tensor:
        """Compute the losses of captioning images and words in place of h_v, and of aligning h_v with words."""
        model, index = self.model, torch.randint(len(self.images), (CAPTION_BATCH,))
        view = model.views("i2t").und
        assert view is not None
        pixels = torch.nn.functional.interpolate(
            unit(self.images[index]), [view.size] * 2, mode="bicubic", antialias=True
        ).clamp(-1, 1)
        h_v = self.see(pixels)
        turns = [[Turn(self.rng.choice(QUESTIONS), caption(self.caption_split.scene(i)))] for i in index.tolist()]
        words, half = self.words[index], CAPTION_BATCH // 2
        from_slots = Batch("i2t", index[:half], turns[:half], features={"h_v": self.embedded(words[:half])})
        answers = self.mean(Batch("i2t", index, turns, features={"h_v": h_v})) + self.mean(from_slots)
        return answers + alignment(h_v, words, model.language_model.model.embed_tokens.weight)

    def mean(self, batch: Batch) -> Tensor:
        term = self.model(batch, self.noise_rng)
        return term.sum / term.weight
