"""Euler's method on the flow, with classifier-free guidance and the prompts in a KV cache."""

import torch
from torch import Tensor

from reca.data.batch import Batch
from reca.models.common.images import to_uint8
from reca.models.common.inference import warn_of_cut
from reca.models.common.planned import CachedPrompts
from reca.models.janus.prompt import caption
from reca.models.janusflow import prompt
from reca.models.janusflow.modules import Network
from reca.models.janusflow.prompt import Segment
from reca.rng import RandomStream, seeded_normal


def generate(
    net: Network, prompts: list[str], seeds: list[int], *, steps: int = 30, guidance: float = 2.0, batch: int = 16
) -> list[Tensor]:
    """Generate images with Euler's method (`denoise`), `batch` at a time. Seeds are in [0, 2**56)."""
    given, images = [net.caption(text) for text in prompts], []
    warn_of_cut((len(caption(net.tokens, text, net.vocabulary)) for text in prompts), net.longest_prompt)
    for i in range(0, len(prompts), batch):
        part = slice(i, i + batch)
        images += draw(net, given[part], None, seeds[part], steps=steps, guidance=guidance)
    return images


def reconstruct(net: Network, batch: Batch, h_v: Tensor, seeds: list[int], *, steps: int = 30) -> list[Tensor]:
    """Reconstruct images with Euler's method (`denoise`), without guidance. Seeds are in [0, 2**56)."""
    return draw(net, [net.template(text) for text in batch.text], h_v, seeds, steps=steps, guidance=1.0)


def draw(
    net: Network, prompts: list[list[Segment]], h_v: Tensor | None, seeds: list[int], *, steps: int, guidance: float
) -> list[Tensor]:
    """Generate an image per prompt, uint8 [3, S, S]. The initial noise of an image depends on its seed only."""
    shape = (net.codec.channels, net.side, net.side)
    start = torch.stack([seeded_normal(seed, RandomStream.NOISE, shape, net.device) for seed in seeds])
    latents = denoise(net, prompts, h_v, start, steps=steps, guidance=guidance)
    return list(to_uint8(net.codec.decode(latents), floor=True))  # as in the release


@torch.no_grad()
def denoise(
    net: Network,
    prompts: list[list[Segment]],
    h_v: Tensor | None,  # [B, n, H]
    start: Tensor,  # fp32 [B, C, H, W], standard normal
    *,
    steps: int,
    guidance: float,
    on_step=None,  # called with the guided velocity [B, C, H, W] of each step
) -> Tensor:  # fp32 [B, C, H, W]
    """Integrate the velocity from noise to latents in equal steps.

    guidance g combines velocities as uncond + g (cond - uncond); with g = 1 the unconditional branch does not run.
    """
    b, v, branches = len(prompts), net.vocabulary, 1 if guidance == 1 else 2
    given = prompt.image_layout([*prompts] * branches, [False] * b + [True] * (b * (branches - 1)), v).to(net.device)
    seen = None if h_v is None else h_v.repeat(branches, 1, 1)
    after_prompts = CachedPrompts(
        net.language_model.model, net.embed(given.src, seen), given.position_ids, given.spans()
    )
    z = start
    for step in range(steps):
        time = torch.full((b * branches,), step / steps, dtype=torch.float32, device=net.device)
        image, *beside = net.image_rows(z.repeat(branches, 1, 1, 1), time)
        velocity = net.velocity(after_prompts(image)[:, 1:], *beside).float()
        if branches == 2:
            cond, uncond = velocity.chunk(2)
            velocity = uncond + guidance * (cond - uncond)
        if on_step:
            on_step(velocity)
        z = z + velocity / steps
    return z
