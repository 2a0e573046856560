"""MAR sampling (Li et al., arXiv 2406.11838) conditioned on the language model, and greedy decoding of replies."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from reca.models.common.chat import END, Prompt
from reca.models.common.greedy import decode_replies, greedy_tokens
from reca.models.common.images import to_unit
from reca.models.common.kv_cache import with_cache
from reca.models.common.text import control
from reca.models.harmon import modules, prompt
from reca.models.harmon.masking import Masking
from reca.models.harmon.modules import Network
from reca.rng import CounterRNG, RandomStream
from reca_kernels import diffusion_schedule, space_timesteps

SCHEDULES = ("constant", "linear")
QUESTIONS = 32  # maximum batch size of questions


class SamplerNoise:
    """Random numbers of the sampler, functions of (image seed, step)."""

    def __init__(self, seeds: Tensor):  # int64 [B]
        self.seeds, self.rng = seeds, CounterRNG(0)

    def order(self, size: int) -> Tensor:
        """Draw a permutation of the tokens per image, int64 [B, size]; its first tokens are generated last."""
        return self.rng.uniform(RandomStream.MASK_ORDER, self.seeds, size).argsort(dim=1, stable=True)

    def start(self, step: int, n: int, channels: int) -> Tensor:
        """Draw the initial noise of a step's n tokens, fp32 [B, n, C]."""
        return self._normal(self.rng.fold_in(step), RandomStream.NOISE, n, channels)

    def noise(self, step: int, inner: int, n: int, channels: int) -> Tensor:
        """Draw the noise added in diffusion step `inner`, fp32 [B, n, C]."""
        return self._normal(self.rng.fold_in(step).fold_in(inner), RandomStream.POSTERIOR, n, channels)

    def _normal(self, rng: CounterRNG, stream: RandomStream, n: int, channels: int) -> Tensor:
        return rng.normal(stream, self.seeds, n * channels).view(-1, n, channels)


@torch.no_grad()
def sample_latents(
    net: Network,
    cond: list[Prompt],
    uncond: list[Prompt],
    noise: SamplerNoise,
    grid: tuple[int, int],
    h_v: Tensor | None = None,  # [B, buffers + S', D], the encoder's output for h_v's image, used by both branches
    *,
    steps: int = 64,
    guidance: float = 3.0,
    guidance_schedule: str = "constant",
    diffusion: int = 100,
    temperature: float = 1.0,
    clip_sample_range: float | None = None,
) -> Tensor:  # [B, m, n, C], scaled latents
    """Generate latents. All tokens are masked at first; each step generates some, fewer at first, by diffusion.

    guidance s combines noise predictions as uncond + s (cond - uncond); with the schedule "linear", s grows from 1 with
    the generated share of tokens. diffusion: diffusion steps per token. clip_sample_range: clamps the x0 predicted in
    each diffusion step, as in diffusers; None, as released: no clamping. Raises ValueError for options out of range.
    """
    if steps < 1 or guidance_schedule not in SCHEDULES:
        known = " or ".join(SCHEDULES)
        raise ValueError(f"steps={steps} must be at least 1, and guidance_schedule={guidance_schedule!r} {known}")
    if clip_sample_range is not None and clip_sample_range <= 0:
        raise ValueError(f"clip_sample_range={clip_sample_range} must be above 0, or null for no limit")
    size, channels, buffers = grid[0] * grid[1], modules.channels(net.config), net.config.mar.buffers
    order = noise.order(size)
    latents = torch.zeros(len(cond), size, channels, dtype=torch.float32, device=order.device)
    prompts, hidden = cond if guidance == 1 else cond + uncond, size
    branches = len(prompts) // len(cond)
    hv_tokens = 0 if h_v is None else h_v.shape[1] - buffers
    h_v = None if h_v is None else h_v.repeat(branches, 1, 1)
    for step in range(steps):
        left = min(hidden - 1, math.floor(size * math.cos(math.pi / 2 * (step + 1) / steps)))
        left = 0 if step + 1 == steps else max(1, left)
        if left == hidden:
            continue
        visible = order[:, hidden:].sort(dim=1).values
        generated = order[:, left:hidden].sort(dim=1).values
        scale = guidance if guidance_schedule == "constant" else 1 + (guidance - 1) * (size - left) / size
        encoded = net.mar.encode(latents.unflatten(1, grid), visible)  # the same for both branches
        masking = Masking.equal(visible.repeat(branches, 1))
        layout = prompt.layout(prompts, buffers, hv_tokens, masking.lengths).to(net.device)
        z = net.condition(layout, encoded.repeat(branches, 1, 1), masking, grid, h_v).unflatten(0, (branches, -1))
        rows = z.gather(2, generated[None, ..., None].expand(branches, -1, -1, z.shape[-1]))
        new = denoise(net.mar.diffloss.net, rows, noise, step, scale, diffusion, temperature, clip_sample_range)
        latents.scatter_(1, generated[..., None].expand(-1, -1, channels), new)
        hidden = left
    return latents.unflatten(1, grid)


def denoise(
    head: modules.DiffusionHead,
    z: Tensor,  # [1 or 2, B, n, D]: conditions; the second, if given, is the unconditional one
    noise: SamplerNoise,
    step: int,
    guidance: float,
    diffusion: int,
    temperature: float,
    clip_sample_range: float | None,
) -> Tensor:  # fp32 [B, n, C]
    """Sample tokens with `diffusion` of the 1000 steps. Embeddings of z and of t are computed once."""
    device, (_, _, n, _) = z.device, z.shape
    channels = head.input_proj.in_features
    table = diffusion_schedule(modules.STEPS, keep=diffusion, device=device)
    times = head.time(space_timesteps(modules.STEPS, diffusion).to(device))
    conditions = head.cond_embed(z.flatten(0, -2))
    x = noise.start(step, n, channels)
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
            x = x + torch.exp(0.5 * log_variance) * temperature * noise.noise(step, t, n, channels)
    return x


@torch.no_grad()
def answer(net: Network, images: Sequence[Tensor], questions: Sequence[str], max_new_tokens: int) -> list[str]:
    """Answer questions about images, uint8 [3, S, S] each, by greedy decoding.

    Up to 32 questions of the same length share a batch, so that there is no padding.
    """
    asked = [prompt.question(net.tokenizer, text) for text in questions]
    eos, replies, buffers = control(net.tokenizer, END), [""] * len(asked), net.config.mar.buffers
    order = sorted(range(len(asked)), key=lambda i: len(asked[i].ids))
    groups = [list(group) for _, group in itertools.groupby(order, lambda i: len(asked[i].ids))]
    for numbers in (group[i : i + QUESTIONS] for group in groups for i in range(0, len(group), QUESTIONS)):
        encoded = net.mar.encode(net.latents(to_unit([images[i] for i in numbers]).to(net.device)))
        layout = prompt.layout([asked[i] for i in numbers], buffers, encoded.shape[1] - buffers).to(net.device)
        tokens = greedy(net, net.embed(layout, net.encode_understanding(encoded)), max_new_tokens, eos)
        for i, reply in zip(numbers, decode_replies(net.tokenizer, tokens, eos), strict=True):
            replies[i] = reply
    return replies


def greedy(net: Network, embeddings: Tensor, max_new_tokens: int, eos: int | None) -> Tensor:  # [B, L, H]
    """Continue sequences without padding by greedy decoding with a KV cache, int64 [B, n], n <= max_new_tokens.

    Stops when every sequence has generated `eos`.
    """
    language = net.llm.model
    cached = with_cache(language, DynamicCache(config=net.llm.config))

    def next_logits(tokens: Tensor | None) -> Tensor:
        rows = embeddings if tokens is None else language.embed_tokens(tokens[:, None])
        hidden = language(inputs_embeds=rows, **cached).last_hidden_state
        return net.llm.lm_head(hidden[:, -1])

    return greedy_tokens(next_logits, len(embeddings), max_new_tokens, eos)
