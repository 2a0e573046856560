"""MAR sampling (Li et al., arXiv 2406.11838) conditioned on the language model, and greedy decoding of replies."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reca.data.views import View
from reca.models.common.chat import END, Prompt, reply_start, truncated
from reca.models.common.greedy import decode_replies
from reca.models.common.images import fit_to_view, to_uint8, to_unit
from reca.models.common.inference import check_multiple
from reca.models.common.planned import CachedPrompts, greedy
from reca.models.common.text import control
from reca.models.harmon import modules, prompt
from reca.models.harmon.modules import Network
from reca.rng import CounterRNG, RandomStream
from reca_kernels import diffusion_schedule, space_timesteps
from reca_kernels.host import on_device

SCHEDULES = ("constant", "linear")


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


def generate(
    net: Network,
    prompts: list[str],
    seeds: list[int],
    *,
    steps: int = 64,
    guidance: float = 3.0,
    guidance_schedule: str = "constant",
    diffusion_steps: int = 100,
    temperature: float = 1.0,
    clip_sample_range: float | None = None,
    height: int | None = None,
    width: int | None = None,
    batch: int = 32,
) -> list[Tensor]:
    """Generate images with MAR (`sample_latents`), `batch` at a time. Seeds are in [0, 2**56)."""
    side, factor, images = net.config.image_size, net.factor, []
    height, width = height or side, width or side
    check_multiple(factor, height, width)
    asked = truncated([prompt.whole_caption(net.tokenizer, text) for text in prompts], prompt.MAX_TEXT)
    for i in range(0, len(prompts), batch):
        cond = asked[i : i + batch]
        latents = sample_latents(
            net,
            cond,
            [prompt.caption(net.tokenizer, None)] * len(cond),
            SamplerNoise(torch.tensor(seeds[i : i + batch], device=net.device)),
            (height // factor, width // factor),
            steps=steps,
            guidance=guidance,
            guidance_schedule=guidance_schedule,
            diffusion=diffusion_steps,
            temperature=temperature,
            clip_sample_range=clip_sample_range,
        )
        images += list(to_uint8(net.pixels(latents)))
    return images


def reconstruct(
    net: Network, templates: list[str], features: dict[str, Tensor], seeds: list[int], **options: Any
) -> list[Tensor]:
    """Reconstruct images with MAR, without guidance. options: those of `sample_latents`."""
    prompts = [prompt.template(net.tokenizer, text) for text in templates]
    noise, (_, height, width, _) = SamplerNoise(torch.tensor(seeds, device=net.device)), features["latents"].shape
    h_v = net.mar.encode(features["h_v"])
    latents = sample_latents(net, prompts, [], noise, (height, width), h_v, guidance=1, **options)
    return list(to_uint8(net.pixels(latents)))


@torch.no_grad()
def sample_latents(
    net: Network,
    cond: list[Prompt],
    uncond: list[Prompt],
    noise: SamplerNoise,
    grid: tuple[int, int],
    h_v: Tensor | None = None,  # [B, buffers + S', D], the encoder's output for h_v's image; needs guidance 1
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
    size, channels = grid[0] * grid[1], modules.channels(net.config)
    order = noise.order(size)
    latents = torch.zeros(len(cond), size, channels, dtype=torch.float32, device=order.device)
    branches, hidden = 1 if guidance == 1 else 2, size
    after_prompts = cached_prompts(net, cond if guidance == 1 else cond + uncond, h_v)
    for step in range(steps):
        left = min(hidden - 1, math.floor(size * math.cos(math.pi / 2 * (step + 1) / steps)))
        left = 0 if step + 1 == steps else max(1, left)
        if left == hidden:
            continue
        visible = order[:, hidden:].sort(dim=1).values
        generated = order[:, left:hidden].sort(dim=1).values
        scale = guidance if guidance_schedule == "constant" else 1 + (guidance - 1) * (size - left) / size
        encoded = net.mar.encode(latents.unflatten(1, grid), visible)  # the same for both branches
        z = condition(net, after_prompts, encoded.repeat(branches, 1, 1), visible.repeat(branches, 1), grid)
        z = z.unflatten(0, (branches, -1))
        rows = z.gather(2, generated[None, ..., None].expand(branches, -1, -1, z.shape[-1]))
        new = denoise(net.mar.diffloss.net, rows, noise, step, scale, diffusion, temperature, clip_sample_range)
        latents.scatter_(1, generated[..., None].expand(-1, -1, channels), new)
        hidden = left
    return latents.unflatten(1, grid)


def cached_prompts(net: Network, prompts: Sequence[Prompt], h_v: Tensor | None) -> CachedPrompts:
    """Compute the KV cache of prompts. h_v: [B, buffers + S', D], the encoder's output for the images in them."""
    buffers = net.config.mar.buffers
    hv_tokens = 0 if h_v is None else h_v.shape[1] - buffers
    layout = prompt.layout(prompts, buffers, hv_tokens, side="left").to(net.device)
    embeddings = net.llm.model.embed_tokens(layout.src) if h_v is None else net.embed(layout, net.proj_in(h_v))
    return CachedPrompts(net.llm.model, embeddings, layout.position_ids(), layout.spans())


def condition(
    net: Network,
    after_prompts: CachedPrompts,
    encoded: Tensor,  # [B, buffers + V, D]
    visible: Tensor,  # int64 [B, V]
    grid: tuple[int, int],
) -> Tensor:  # [B, m n, D]
    """Compute what Network.condition does, with the prompts in a KV cache."""
    buffers = net.config.mar.buffers
    tokens = net.proj_in(encoded).roll(-buffers, dims=1)  # in the sequence, buffers come last
    answered = after_prompts(tokens).roll(buffers, dims=1)
    return net.mar.decode(encoded + net.proj_out(answered), visible, None, grid)


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
    times = head.time(on_device(space_timesteps(modules.STEPS, diffusion), device))
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
def answer(
    net: Network, view: View, images: list[Tensor], questions: list[str], max_new_tokens: int, batch: int = 32
) -> list[str]:
    """Answer questions about images by greedy decoding, `batch` at a time."""
    asked = [prompt.question(net.tokenizer, text) for text in questions]
    asked = truncated(asked, prompt.MAX_CONVERSATION, len(reply_start(net.tokenizer)))
    eos, replies, buffers = control(net.tokenizer, END), [], net.config.mar.buffers
    for i in range(0, len(asked), batch):
        pixels = to_unit([fit_to_view(image, view) for image in images[i : i + batch]]).to(net.device)
        encoded = net.mar.encode(net.latents(pixels))
        layout = prompt.layout(asked[i : i + batch], buffers, encoded.shape[1] - buffers, side="left").to(net.device)
        tokens = greedy(
            net.llm.model,
            net.llm.lm_head,
            net.embed(layout, net.encode_understanding(encoded)),
            layout.position_ids(),
            layout.spans(),
            max_new_tokens,
            eos,
        )
        replies += decode_replies(net.tokenizer, tokens, eos)
    return replies
