"""MAR sampling (Li et al., arXiv 2406.11838) behind the language model, and greedy answers."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

from reca.models.harmon import modules
from reca.models.harmon.masking import Masking
from reca.models.harmon.prompt import Prompt
from reca.rng import CounterRNG, RandomStream
from reca_kernels import diffusion_schedule, space_timesteps

if TYPE_CHECKING:
    from reca.models.harmon.adapter import Harmon

SCHEDULES = ("constant", "linear")


class Chance:
    """The random choices of a sampler: functions of (seed of the image, step)."""

    def __init__(self, seeds: Tensor):  # int64 [B]
        self.seeds, self.rng = seeds, CounterRNG(0)

    def order(self, size: int) -> Tensor:
        """A permutation of the tokens per image, int64 [B, size]; its head is drawn last."""
        return self.rng.uniform(RandomStream.MASK_ORDER, self.seeds, size).argsort(dim=1, stable=True)

    def start(self, step: int, n: int, channels: int) -> Tensor:
        """Where the n tokens of a step begin, fp32 [B, n, C]."""
        return self._normal(self.rng.fold_in(step), RandomStream.NOISE, n, channels)

    def noise(self, step: int, inner: int, n: int, channels: int) -> Tensor:
        """What diffusion step number `inner` adds to them, fp32 [B, n, C]."""
        return self._normal(self.rng.fold_in(step).fold_in(inner), RandomStream.POSTERIOR, n, channels)

    def _normal(self, rng: CounterRNG, purpose: RandomStream, n: int, channels: int) -> Tensor:
        return rng.normal(purpose, self.seeds, n * channels).view(-1, n, channels)


@torch.no_grad()
def draw_latents(
    model: "Harmon",
    cond: list[Prompt],
    uncond: list[Prompt],
    chance: Chance,
    grid: tuple[int, int],
    *,
    steps: int = 64,
    guidance: float = 3.0,
    guidance_schedule: str = "constant",
    diffusion: int = 100,
    temperature: float = 1.0,
    clip_sample_range: float | None = None,
) -> Tensor:  # [B, m, n, C], scaled latents
    """All tokens hidden at first; each step rng some of those left, fewer at first, with `diffusion` steps.

    guidance s mixes noise as uncond + s (cond - uncond); "linear" lets s grow from 1 with the share that is drawn.
    clip_sample_range: limit of the x0 that a diffusion step predicts, as in diffusers; None, as released, is none.
    Raises ValueError for options out of range.
    """
    if steps < 1 or guidance_schedule not in SCHEDULES:
        known = " or ".join(SCHEDULES)
        raise ValueError(f"steps={steps} must be at least 1, and guidance_schedule={guidance_schedule!r} {known}")
    if clip_sample_range is not None and clip_sample_range <= 0:
        raise ValueError(f"clip_sample_range={clip_sample_range} must be above 0; null limits nothing")
    size, channels = grid[0] * grid[1], modules.channels(model.config)
    order = chance.order(size)
    latents = torch.zeros(len(cond), size, channels, dtype=torch.float32, device=order.device)
    prompts, hidden = cond if guidance == 1 else cond + uncond, size
    branches = len(prompts) // len(cond)
    for step in range(steps):
        left = min(hidden - 1, math.floor(size * math.cos(math.pi / 2 * (step + 1) / steps)))
        left = 0 if step + 1 == steps else max(1, left)
        if left == hidden:
            continue
        visible = order[:, hidden:].sort(dim=1).values
        drawn = order[:, left:hidden].sort(dim=1).values
        scale = guidance if guidance_schedule == "constant" else 1 + (guidance - 1) * (size - left) / size
        encoded = model.mar.encode(latents.unflatten(1, grid), visible)  # the same for both branches
        encoded, seen = encoded.repeat(branches, 1, 1), visible.repeat(branches, 1)
        z = model.condition(prompts, encoded, Masking.equal(seen), grid).unflatten(0, (branches, -1))
        rows = z.gather(2, drawn[None, ..., None].expand(branches, -1, -1, z.shape[-1]))
        new = denoise(model.mar.diffloss.net, rows, chance, step, scale, diffusion, temperature, clip_sample_range)
        latents.scatter_(1, drawn[..., None].expand(-1, -1, channels), new)
        hidden = left
    return latents.unflatten(1, grid)


def denoise(
    head: modules.DiffusionHead,
    z: Tensor,  # [1 or 2, B, n, D]: conditions, without text second
    chance: Chance,
    step: int,
    guidance: float,
    diffusion: int,
    temperature: float,
    clip_sample_range: float | None,
) -> Tensor:  # fp32 [B, n, C]
    """Ancestral sampling over `diffusion` of the 1000 steps. What depends on z or t alone is computed once."""
    device, (_, _, n, _) = z.device, z.shape
    channels = head.input_proj.in_features
    table = diffusion_schedule(modules.STEPS, keep=diffusion, device=device)
    times = head.time(space_timesteps(modules.STEPS, diffusion).to(device))
    conditions = head.cond_embed(z.flatten(0, -2))
    x = chance.start(step, n, channels)
    for t in reversed(range(diffusion)):
        out = head.denoise(x.flatten(0, 1).repeat(len(z), 1), times[t] + conditions).float()
        eps, v = out.unflatten(0, z.shape[:3]).chunk(2, dim=-1)
        eps = eps[0] if len(z) == 1 else eps[1] + guidance * (eps[0] - eps[1])
        _, _, recip, recip_m1, c1, c2, log_posterior, log_beta = table[t]
        x0 = recip * x - recip_m1 * eps
        if clip_sample_range is not None:
            x0 = x0.clamp(-clip_sample_range, clip_sample_range)
        x = c1 * x0 + c2 * x
        if t:
            log_variance = log_posterior + (v[0] + 1) / 2 * (log_beta - log_posterior)
            x = x + torch.exp(0.5 * log_variance) * temperature * chance.noise(step, t, n, channels)
    return x


@torch.no_grad()
def greedy(model: "Harmon", embeddings: Tensor, max_new_tokens: int, end: int | None) -> Tensor:  # [B, L, H]
    """The likeliest continuation of sequences without padding, int64 [B, n], n <= max_new_tokens.

    Ends when every row has met `end`; K/V of earlier rows are kept.
    """
    language, head = model.llm.model, model.llm.lm_head
    cache = DynamicCache(config=model.llm.config)
    tokens: list[Tensor] = []
    for _ in range(max_new_tokens):
        hidden = language(inputs_embeds=embeddings, past_key_values=cache, use_cache=True).last_hidden_state[:, -1:]
        tokens.append(head(hidden)[:, 0].argmax(-1, keepdim=True))
        if end is not None and bool((torch.cat(tokens, 1) == end).any(1).all()):
            break
        embeddings = language.embed_tokens(tokens[-1])
    return torch.cat(tokens, 1) if tokens else torch.empty(len(embeddings), 0, dtype=torch.int64)
