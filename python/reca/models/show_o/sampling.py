"""MaskGIT sampling of image codes, and greedy answers."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

from reca.draws import Draws, Purpose
from reca.models.show_o import prompt

if TYPE_CHECKING:
    from reca.models.show_o.adapter import ShowO

TINY = 1e-20


@torch.no_grad()
def draw_codes(
    model: "ShowO",
    texts: list[list[int]],  # token ids per prompt
    seeds: list[int],
    *,
    steps: int = 50,
    guidance: float = 5.0,
    temperature: float = 1.0,
    draws: list[Draws] | None = None,
) -> Tensor:  # int64 [B, N]
    """All codes hidden at first; each step draws every hidden code and hides the least certain ones again.

    guidance g mixes logits as (1 + g) * cond - g * uncond. temperature scales the Gumbel noise on the certainty, which
    fades to nothing. A picture is a function of its prompt and its seed.
    """
    v, config, n = model.vocabulary, model.config, model.image_tokens
    device = model.showo.device
    draws = draws or [Draws(seed) for seed in seeds]
    both = texts + [[] for _ in texts] if guidance else texts
    sequence = prompt.t2i(both, v, config.sampling_slots, n)
    src = sequence.src.to(device)
    start, stop = sequence.image.start, sequence.image.stop
    for step in range(steps):
        hidden = model.hidden(sequence, src, None)[:, start:stop]
        head = model.showo.lm_head
        logits = torch.nn.functional.linear(
            hidden, head.weight[v.offset : v.mask], head.bias[v.offset : v.mask]
        ).float()
        if guidance:
            cond, uncond = logits.chunk(2)
            logits = (1 + guidance) * cond - guidance * uncond
        probabilities = logits.softmax(-1)
        at = [d.at(step) for d in draws]
        drawn = categorical(probabilities, _each(at, Purpose.TOKEN, n, device))
        ids = src[: len(texts), start:stop]
        unknown = ids == v.mask
        codes = torch.where(unknown, drawn, ids - v.offset)

        ratio = (step + 1) / steps
        temperature *= 1 - ratio
        floor = math.floor(n * math.cos(math.pi / 2 * ratio))
        keep_hidden = torch.minimum(unknown.sum(1) - 1, torch.tensor(floor, device=device)).clamp(min=1)
        certainty = probabilities.gather(2, codes[..., None])[..., 0]
        certainty = torch.where(unknown, certainty, torch.finfo(certainty.dtype).max)
        gumbel = -(-_each(at, Purpose.CONFIDENCE, n, device).clamp(min=TINY).log()).clamp(min=TINY).log()
        confidence = certainty.clamp(min=TINY).log() + temperature * gumbel
        cut = confidence.sort(1).values.gather(1, keep_hidden[:, None])
        image = torch.where(confidence < cut, v.mask, codes + v.offset)
        src[:, start:stop] = image.repeat(2, 1) if guidance else image
    return codes.clamp(0, v.codes - 1)


def categorical(probabilities: Tensor, u: Tensor) -> Tensor:  # [B, N, K], [B, N] in [0, 1)
    """The entry where the running sum of probabilities passes u, int64 [B, N]."""
    sums = probabilities.cumsum(-1)
    return torch.searchsorted(sums, (u * sums[..., -1])[..., None], right=True)[..., 0].clamp(max=sums.shape[-1] - 1)


def _each(draws: list[Draws], purpose: Purpose, n: int, device: torch.device) -> Tensor:
    """Uniform numbers [B, n], a row from each picture's own draws."""
    one = torch.zeros(1, dtype=torch.int64, device=device)
    return torch.cat([d.uniform(purpose, one, n) for d in draws])


@torch.no_grad()
def answer(model: "ShowO", h_v: Tensor, questions: list[str], max_new_tokens: int) -> list[str]:
    """Greedy answers. Questions of equal length run as one batch with kept K/V."""
    ids = [prompt.question(model.tokenizer, q) for q in questions]
    if not h_v.is_floating_point():
        ids = [[model.vocabulary.bos, *row] for row in ids]
    replies = [""] * len(ids)
    for length in sorted(set(map(len, ids))):
        members = [i for i, row in enumerate(ids) if len(row) == length]
        for i, reply in zip(members, _answer(model, h_v[members], [ids[i] for i in members], max_new_tokens), strict=True):
            replies[i] = reply
    return replies


def _answer(model: "ShowO", h_v: Tensor, ids: list[list[int]], max_new_tokens: int) -> list[str]:
    eos, head = model.vocabulary.eos, model.showo.lm_head
    sequence = model.question_sequence(ids, ids, h_v)
    embeddings = model.embed(sequence.src.to(h_v.device), h_v)
    cache = DynamicCache(config=model.showo.config)
    allowed = sequence.allowed.to(h_v.device)
    tokens = torch.empty(len(ids), 0, dtype=torch.int64, device=h_v.device)
    for _ in range(max_new_tokens):
        hidden = model.showo.model(
            inputs_embeds=embeddings, attention_mask=allowed, past_key_values=cache, use_cache=True
        ).last_hidden_state
        token = head(hidden[:, -1]).argmax(-1, keepdim=True)
        tokens = torch.cat((tokens, token), dim=1)
        if bool((tokens == eos).any(1).all()):
            break
        embeddings, allowed = model.showo.model.embed_tokens(token), None
    texts = []
    for row in tokens.tolist():
        texts.append(model.tokenizer.decode(row[: row.index(eos)] if eos in row else row).strip())
    return texts
