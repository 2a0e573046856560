"""Generation and editing of images with diffusers' SANA pipeline, and greedy decoding of replies."""

import torch
from diffusers import DPMSolverMultistepScheduler, SanaPipeline
from torch import Tensor

from reca.data.views import View
from reca.models.common.chat import Prompt, reply_start, truncated
from reca.models.common.greedy import decode_replies
from reca.models.common.images import fit_to_view, to_uint8, to_unit
from reca.models.common.inference import check_multiple
from reca.models.common.planned import greedy
from reca.models.common.text import control
from reca.models.open_uni import modules, prompt
from reca.models.open_uni.modules import Network
from reca.precision import fp32_by_default
from reca.rng import RandomStream, seeded_normal

PIPELINE_FACTOR = 32  # pixels per latent that the pipeline assumes when it checks sizes


def generate(
    net: Network,
    prompts: list[str],
    seeds: list[int],
    *,
    steps: int = 20,
    guidance: float = 4.5,
    height: int | None = None,
    width: int | None = None,
    batch: int = 16,
) -> list[Tensor]:
    """Generate images with DPM-Solver++ (`sample`), `batch` at a time. Seeds are in [0, 2**56)."""
    asked = truncated([prompt.whole_caption(net.tokenizer, text) for text in prompts], prompt.MAX_TEXT)
    size, images, uncond = {"height": height, "width": width}, [], [prompt.caption(net.tokenizer, None)]
    for i in range(0, len(prompts), batch):
        cond, own = asked[i : i + batch], seeds[i : i + batch]
        images += sample(net, cond, uncond, None, own, steps=steps, guidance=guidance, **size)
    return images


def edit(
    net: Network,
    images: list[Tensor],
    instructions: list[str],
    seeds: list[int],
    *,
    steps: int = 20,
    guidance: float = 4.5,
    height: int | None = None,
    width: int | None = None,
    batch: int = 16,
) -> list[Tensor]:
    """Edit images, `batch` at a time.

    Both guidance branches see the image; the unconditional one has the instruction to keep it.
    """
    size, view, edited = {"height": height, "width": width}, View(net.config.image_size), []
    most, end = prompt.MAX_LENGTH - modules.hv_tokens(net.config), len(reply_start(net.tokenizer)) + 1
    asked = truncated([prompt.with_image(net.tokenizer, text) for text in instructions], most, end)
    for i in range(0, len(images), batch):
        cond, own = asked[i : i + batch], seeds[i : i + batch]
        uncond = [prompt.with_image(net.tokenizer, prompt.KEEP)] * len(cond)
        h_v = encode_input(net, images[i : i + batch], view)
        edited += sample(net, cond, uncond, h_v, own, steps=steps, guidance=guidance, **size)
    return edited


@torch.no_grad()
def answer(
    net: Network, images: list[Tensor], questions: list[str], max_new_tokens: int = 100, batch: int = 64
) -> list[str]:
    """Answer questions about images by greedy decoding, `batch` at a time."""
    most, replies = prompt.MAX_LENGTH - modules.hv_tokens(net.config), []
    prompts = [prompt.question(net.tokenizer, text) for text in questions]
    prompts = truncated(prompts, most, len(reply_start(net.tokenizer)))
    eos, view = control(net.tokenizer, prompt.END), View(modules.understanding_size(net.config))
    for i in range(0, len(images), batch):
        layout = prompt.layout(prompts[i : i + batch], modules.hv_tokens(net.config), "left").to(net.device)
        tokens = greedy(
            net.mllm.model.language_model,
            net.mllm.lm_head,
            net.embed(layout.src, encode_input(net, images[i : i + batch], view)),
            layout.positions,
            layout.spans(),
            max_new_tokens,
            eos,
        )
        replies += decode_replies(net.tokenizer, tokens, eos)
    return replies


def encode_input(net: Network, images: list[Tensor], view: View) -> Tensor:
    """Compute the h_v of images at inference."""
    return net.encode_understanding(to_unit([fit_to_view(image, view) for image in images]).to(net.device))


def scheduler() -> DPMSolverMultistepScheduler:
    """Return DPM-Solver++ 2M on flow sigmas with shift 3, as configured in the SANA repositories."""
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
    net: Network,
    cond: list[Prompt],
    uncond: list[Prompt],  # one per prompt, or one for all
    h_v: Tensor | None,  # [B, n, H], used by both branches
    seeds: list[int],
    *,
    steps: int,
    guidance: float,
    height: int | None = None,
    width: int | None = None,
) -> list[Tensor]:
    """Generate an image per prompt, uint8 [3, height, width]. The initial noise of an image depends on its seed only.

    With guidance of 1 or below the unconditional branch does not run.
    Raises ValueError unless height and width are multiples of a latent's pixels: 32 with the published autoencoder.
    """
    height, width = height or net.config.image_size, width or net.config.image_size
    latents = modules.codec_sizes(net.config)
    check_multiple(latents.size, height, width)
    shape = (latents.channels, height // latents.size, width // latents.size)
    start = torch.stack([seeded_normal(seed, RandomStream.NOISE, shape, net.device) for seed in seeds])
    wanted = condition(net, cond, h_v)
    unwanted = condition(net, uncond, h_v).expand_as(wanted) if guidance > 1 else wanted
    return list(to_uint8(denoise(net, wanted, unwanted, start, steps, guidance)))


def condition(net: Network, prompts: list[Prompt], h_v: Tensor | None) -> Tensor:
    """Compute SANA's condition from prompts, [B, queries, caption_channels]."""
    layout = prompt.layout(prompts, modules.hv_tokens(net.config), "right", net.config.queries)
    return net.condition(layout.to(net.device), h_v)


@fp32_by_default()  # the solver creates tensors from Python numbers
@torch.no_grad()
def denoise(
    net: Network,
    cond: Tensor,  # [B, queries, caption_channels]
    uncond: Tensor,  # same
    start: Tensor,  # [B, C, h, w] standard normal
    steps: int,
    guidance: float,
    on_step=None,  # diffusers' callback_on_step_end
) -> Tensor:  # [B, 3, H, W], about [-1, 1]
    """Run diffusers' SANA pipeline from noise to pixels."""
    pipeline = SanaPipeline(None, None, None, net.transformer, scheduler())
    pipeline.set_progress_bar_config(disable=True)
    mask = torch.ones(cond.shape[:2], dtype=torch.long, device=cond.device)
    latents = pipeline(
        prompt_embeds=cond,
        prompt_attention_mask=mask,
        negative_prompt_embeds=uncond,
        negative_prompt_attention_mask=mask,
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
    return net.pixels(latents)
