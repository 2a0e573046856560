"""Text (and image) to image: diffusers' SANA pipeline over OpenUni's conditions."""

from typing import TYPE_CHECKING

import torch
from diffusers import DPMSolverMultistepScheduler, SanaPipeline
from torch import Tensor

from reca.models.base import in_fp32
from reca.models.common.inference import check_multiple
from reca.models.open_uni import modules
from reca.models.open_uni.prompt import Prompt
from reca.rng import CounterRNG, RandomStream

if TYPE_CHECKING:
    from reca.models.open_uni.adapter import OpenUni

PIPELINE_FACTOR = 32  # pixels on the side of a latent as the pipeline counts; it only checks sizes by it


def scheduler() -> DPMSolverMultistepScheduler:
    """DPM-Solver++ 2M over flow sigmas with shift 3, as the SANA repositories configure it."""
    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=3.0,
        final_sigmas_type="zero",
    )


@torch.no_grad()
def sample(
    model: "OpenUni",
    cond: list[Prompt],
    uncond: list[Prompt],
    h_v: Tensor | None,  # [B, n, H], seen by both branches
    seeds: list[int],
    *,
    steps: int,
    guidance: float,
    height: int | None = None,
    width: int | None = None,
) -> list[Tensor]:
    """uint8 [3, height, width] per prompt. Each image's start noise is a function of its seed alone.

    Raises ValueError when height or width is no multiple of a latent's side: 32 pixels with the published autoencoder.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: at least one step is needed")
    height, width = height or model.config.image_size, width or model.config.image_size
    factor = modules.factor(model.config)
    check_multiple(factor, height, width)
    device = model.meta_queries.device
    shape = (modules.latent_channels(model.config), height // factor, width // factor)
    one = torch.zeros(1, dtype=torch.int64, device=device)
    n = shape[0] * shape[1] * shape[2]
    start = torch.cat([CounterRNG(seed).normal(RandomStream.NOISE, one, n).view(1, *shape) for seed in seeds])
    pixels = denoise(
        model, model.condition(cond, h_v, "right"), model.condition(uncond, h_v, "right"), start, steps, guidance
    )
    return list((127.5 * pixels + 128).clamp(0, 255).to(torch.uint8))


@in_fp32  # the solver makes tensors of numbers
@torch.no_grad()
def denoise(
    model: "OpenUni",
    cond: Tensor,  # [B, queries, caption_channels]
    uncond: Tensor,  # same
    start: Tensor,  # [B, C, h, w] standard normal
    steps: int,
    guidance: float,
    on_step=None,  # diffusers' callback_on_step_end
) -> Tensor:  # [B, 3, H, W], about [-1, 1]
    pipeline = SanaPipeline(None, None, None, model.transformer, scheduler())
    pipeline.set_progress_bar_config(disable=True)
    seen = torch.ones(cond.shape[:2], dtype=torch.long, device=cond.device)
    latents = pipeline(
        prompt_embeds=cond,
        prompt_attention_mask=seen,
        negative_prompt_embeds=uncond,
        negative_prompt_attention_mask=seen,
        negative_prompt=None,
        latents=start,
        height=start.shape[2] * PIPELINE_FACTOR,
        width=start.shape[3] * PIPELINE_FACTOR,
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="latent",
        use_resolution_binning=False,
        complex_human_instruction=None,
        callback_on_step_end=on_step,
    ).images
    return model.pixels(latents)
