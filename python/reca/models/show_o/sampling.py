"""MaskGIT sampling of image codes (Chang et al., arXiv 2202.04200), and greedy answers."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reca.models.common import planned
from reca.models.show_o import prompt
from reca.rng import CounterRNG, RandomStream

if TYPE_CHECKING:
    from reca.models.show_o.adapter import ShowO

TINY = 1e-20


def cosine(t: Tensor) -> Tensor:
    """Share of the codes that are hidden at time t in [0, 1], in fp32 as the release computes it."""
    return torch.cos(t * math.pi * 0.5)


class Chance:
    """The random choices of a sampler: functions of (seed of the image, step)."""

    def __init__(self, seeds: Tensor):  # int64 [B]
        self.seeds, self.rng = seeds, CounterRNG(0)

    def codes(self, step: int, probabilities: Tensor) -> Tensor:  # [B, N, K]
        """A code per position, int64 [B, N]."""
        u = self.rng.fold_in(step).uniform(RandomStream.TOKEN, self.seeds, probabilities.shape[1])
        sums = probabilities.cumsum(-1)
        index = torch.searchsorted(sums, (u * sums[..., -1])[..., None], right=True)[..., 0]
        return index.clamp(max=probabilities.shape[-1] - 1)

    def gumbel(self, step: int, n: int) -> Tensor:
        """Standard Gumbel noise, fp32 [B, n]."""
        u = self.rng.fold_in(step).uniform(RandomStream.CONFIDENCE, self.seeds, n)
        return -(-u.clamp(min=TINY).log()).clamp(min=TINY).log()


@torch.no_grad()
def draw_codes(
    model: "ShowO",
    texts: list[list[int]],  # token ids per prompt
    chance: Chance,
    *,
    steps: int = 50,
    guidance: float = 5.0,
    temperature: float = 1.0,
) -> Tensor:  # int64 [B, N]
    """All codes hidden at first; each step rng every hidden code and hides the least certain ones again.

    guidance g mixes logits as (1 + g) * cond - g * uncond. temperature scales the Gumbel noise on the certainty: it is
    multiplied by what is left of the way at every step, so it vanishes at the last.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: at least one step is needed")
    v, n, b = model.vocabulary, model.image_tokens, len(texts)
    both = [*texts, *[[] for _ in texts]] if guidance else texts
    layout = prompt.layout([prompt.t2i(text, v, model.config.sampling_slots, n) for text in both], v)
    layout = layout.to(model.device)
    codes = torch.full((b, n), v.codes, device=model.device)  # one past the codebook is the mask
    for step in range(steps):
        logits = model.code_logits(layout, codes.repeat(len(both) // b, 1)).float()
        if guidance:
            cond, uncond = logits.chunk(2)
            logits = (1 + guidance) * cond - guidance * uncond
        probabilities = logits.softmax(-1)
        unknown = codes == v.codes
        drawn = torch.where(unknown, chance.codes(step, probabilities), codes)

        done = (step + 1) / steps
        temperature *= 1 - done
        hide = (
            (unknown.sum(1) - 1)
            .clamp(max=int((n * cosine(torch.tensor(done, dtype=torch.float32))).floor()))
            .clamp(min=1)
        )
        certainty = probabilities.gather(2, drawn[..., None])[..., 0].clamp(min=TINY).log()
        certainty = certainty + temperature * chance.gumbel(step, n)
        certainty = certainty.masked_fill(~unknown, math.inf)
        cut = certainty.sort(1).values.gather(1, hide[:, None])
        codes = torch.where(certainty < cut, v.codes, drawn)
    return drawn


@torch.no_grad()
def answer(model: "ShowO", h_v: Tensor, questions: list[str], max_new_tokens: int) -> list[str]:
    """Greedy answers to a batch of questions about images with features h_v [B, n, C] or codes [B, n]."""
    v, understanding = model.vocabulary, model.config.understanding
    ids = [prompt.question(model.tokens, text, understanding, v) for text in questions]
    layout = prompt.layout([model.talk(row, [prompt.IGNORE] * len(row), h_v.shape[1]) for row in ids], v)
    layout = layout.to(model.device)
    tokens = greedy(model, model.embed(layout.src, h_v), layout, max_new_tokens)
    replies = []
    for row in tokens.tolist():
        row = row[: row.index(v.eos)] if v.eos in row else row
        replies.append(model.tokenizer.decode(row, skip_special_tokens=True).strip())
    return replies


def greedy(model: "ShowO", embeddings: Tensor, layout: prompt.Layout, max_new_tokens: int) -> Tensor:
    """The likeliest continuation of prompts, int64 [B, n]."""
    return planned.greedy(
        model.showo.model,
        model.showo.lm_head,
        embeddings,
        layout.position_ids,
        layout.runs,
        max_new_tokens,
        model.vocabulary.eos,
    )
