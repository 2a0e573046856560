"""Text (and image) to image by Euler steps with two kinds of guidance, and greedy answers."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from reca.data.pixels import make_view
from reca.data.views import View
from reca.models.bagel import modules, prompt
from reca.models.bagel.mot import Context
from reca.models.common.inference import check_multiple, check_pairs
from reca.rng import CounterRNG, RandomStream

if TYPE_CHECKING:
    from reca.models.bagel.adapter import Bagel

RENORMS = ("global", "channel", "text_channel")
EPSILON = 1e-8


@torch.no_grad()
def generate(
    model: "Bagel",
    prompts: list[str],
    seeds: list[int],
    *,
    steps: int = 50,
    guidance: float = 4.0,
    interval: tuple[float, float] = (0.4, 1.0),
    renorm: str = "global",
    renorm_min: float = 0.0,
    shift: float = 3.0,
    height: int | None = None,
    width: int | None = None,
    batch: int = 8,
) -> list[Tensor]:
    """uint8 [3, height, width] per prompt, `batch` at a time; see `denoise`."""
    check_pairs(prompts=prompts, seeds=seeds)
    side, largest = model.token_side, model.config.image_size
    height, width = height or largest, width or largest
    check_multiple(side, height, width)
    size, images = (height // side, width // side), []  # in tokens
    for i in range(0, len(prompts), batch):
        samples = [[model.text(text)] for text in prompts[i : i + batch]]
        sizes = [size] * len(samples)
        _, full = model.read(samples)
        tokens = denoise(
            model, start(model, sizes, seeds[i : i + batch]), sizes, full, model.context(len(samples)), None,
            steps=steps, guidance=guidance, interval=interval, renorm=renorm, renorm_min=renorm_min, shift=shift,
        )  # fmt: skip
        images += pixels(model, tokens, sizes)
    return images


@torch.no_grad()
def edit(
    model: "Bagel",
    images: list[Tensor],
    instructions: list[str],
    seeds: list[int],
    *,
    steps: int = 50,
    guidance: float = 4.0,
    image_guidance: float = 2.0,
    interval: tuple[float, float] = (0.0, 1.0),
    renorm: str = "text_channel",
    renorm_min: float = 0.0,
    shift: float = 3.0,
    batch: int = 4,
) -> list[Tensor]:
    """uint8 [3, H, W] per image, as large as the image after it is fitted to the codec; see `denoise`.

    The model gets the image as latents and as h_v, the latter made of the fitted image as the release does.
    """
    check_pairs(images=images, instructions=instructions, seeds=seeds)
    edited = []
    for i in range(0, len(images), batch):
        sources = [fitted(image, model.edit_views().gen) for image in images[i : i + batch]]
        posterior = posterior_noise(model, sources, seeds[i : i + batch])
        full, textless, imageless, sizes = edit_contexts(model, sources, instructions[i : i + batch], posterior)
        tokens = denoise(
            model, start(model, sizes, seeds[i : i + batch]), sizes, full, textless, imageless,
            steps=steps, guidance=guidance, image_guidance=image_guidance, interval=interval, renorm=renorm,
            renorm_min=renorm_min, shift=shift,
        )  # fmt: skip
        edited += pixels(model, tokens, sizes)
    return edited


def edit_contexts(
    model: "Bagel",
    sources: list[Tensor],  # uint8 [3, H, W], fitted to the codec
    instructions: list[str],
    noise: list[Tensor],  # [C, h, w] of each source's posterior
) -> tuple[Context, Context, Context, list[tuple[int, int]]]:
    """What an image is drawn from: everything, all but the text, all but the image; and sizes in tokens."""
    moments = model.moments([source.to(model.device) for source in sources])
    clean = [model.codec.latents(m, e) for m, e in zip(moments, noise, strict=True)]
    h_v = model.look([fitted(source, model.edit_views().und).to(model.device) for source in sources])
    side = model.token_side
    sizes = [(source.shape[1] // side, source.shape[2] // side) for source in sources]
    depicted = [[prompt.Clean(*size), prompt.Seen(*rows.shape[:2])] for size, rows in zip(sizes, h_v, strict=True)]
    _, textless = model.read(depicted, h_v, clean)
    texts, n = [[model.text(text)] for text in instructions], len(sources)
    # The text alone stands at position 0, though training leaves the places of dropped images free: as released.
    _, both = model.read(texts * 2, context=textless + model.context(n))
    full, imageless = _halves(both)
    return full, textless, imageless, sizes


def denoise(
    model: "Bagel",
    x: Tensor,  # [sum of h w, numbers], standard normal
    sizes: list[tuple[int, int]],  # per sample, in tokens
    full: Context,
    textless: Context | None,
    imageless: Context | None,
    *,
    steps: int,
    guidance: float,
    image_guidance: float = 1.0,
    interval: tuple[float, float],
    renorm: str,
    renorm_min: float,
    shift: float,
    on_step=None,  # called with (t, x, guided velocity)
) -> Tensor:
    """Latents in tokens, by Euler's method.

    steps     points of the time grid from noise to image, as the release counts: there is one Euler step less
    guidance  of the text; at 1 or below none, neither by the image
    image_guidance  of the image; at 1 or below none
    interval  guided where interval[0] < t <= interval[1]; t runs from 1 (noise) to 0, after the shift
    renorm    how a guided velocity is kept from growing beyond the one without guidance: by its norm over the whole
              image (global), over every token (channel), or every token's before guidance by the image (text_channel)
    renorm_min  the least factor
    """
    if steps < 2:
        raise ValueError(f"steps={steps}: the time grid needs 2 points at least")
    if renorm not in RENORMS:
        raise ValueError(f"renorm={renorm!r} is not one of {', '.join(RENORMS)}")
    grid = modules.shifted(torch.linspace(1, 0, steps, dtype=torch.float32, device=x.device), shift)
    lengths = [height * width for height, width in sizes]
    branches = [c for c, scale in ((textless, guidance), (imageless, image_guidance)) if c is not None and scale > 1]
    for step, level in enumerate(grid.tolist()[:-1]):
        t, guided = grid[step], guidance > 1 and interval[0] < level <= interval[1]
        contexts = [full, *branches] if guided else [full]
        n = len(contexts)
        together = sum(contexts[1:], contexts[0])
        v = model.velocity(together, sizes * n, x.repeat(n, 1), t[None]).float()
        if guided:
            parts = [branch.split(lengths) for branch in v.chunk(n)]
            v = torch.cat(
                [
                    guide(own, others, guidance, image_guidance, renorm, renorm_min)
                    for own, *others in zip(*parts, strict=True)
                ]
            )
        if on_step:
            on_step(t, x, v)
        x = x - v * (t - grid[step + 1])
    return x


def guide(v: Tensor, others: list[Tensor], text: float, image: float, renorm: str, least: float) -> Tensor:
    """The guided velocity of one image, [h w, numbers]; others: without the text and, perhaps, without the image."""
    out = others[0] + text * (v - others[0])
    if renorm == "text_channel":
        out = _renormed(out, v, least, dim=-1)
    if len(others) > 1:
        out = others[1] + image * (out - others[1])
    if renorm == "text_channel":
        return out
    return _renormed(out, v, least, dim=-1 if renorm == "channel" else (0, 1))


def _renormed(out: Tensor, v: Tensor, least: float, dim) -> Tensor:
    norms = (torch.linalg.vector_norm(y, dim=dim, keepdim=True) for y in (v, out))
    return out * (next(norms) / (next(norms) + EPSILON)).clamp(min=least, max=1.0)


def start(model: "Bagel", sizes: list[tuple[int, int]], seeds: list[int]) -> Tensor:
    """Standard normal tokens; each image's are a function of its seed alone."""
    numbers, one = model.vae2llm.in_features, torch.zeros(1, dtype=torch.int64, device=model.device)
    return torch.cat(
        [
            CounterRNG(seed).normal(RandomStream.NOISE, one, height * width * numbers).view(-1, numbers)
            for (height, width), seed in zip(sizes, seeds, strict=True)
        ]
    )


def posterior_noise(model: "Bagel", images: list[Tensor], seeds: list[int]) -> list[Tensor]:
    one, made = torch.zeros(1, dtype=torch.int64, device=model.device), []
    for image, seed in zip(images, seeds, strict=True):
        h, w = (size // model.codec.factor for size in image.shape[1:])
        made.append(CounterRNG(seed).normal(RandomStream.POSTERIOR, one, model.codec.channels * h * w).view(-1, h, w))
    return made


def pixels(model: "Bagel", tokens: Tensor, sizes: list[tuple[int, int]]) -> list[Tensor]:
    """uint8 [3, H, W] per image."""
    patch, images = model.config.latent_patch_size, []
    for rows, (height, width) in zip(tokens.split([h * w for h, w in sizes]), sizes, strict=True):
        decoded = model.codec.decode(modules.unpatchify(rows, height, width, patch)[None])[0]
        images.append(((decoded * 0.5 + 0.5).clamp(0, 1) * 255).to(torch.uint8))
    return images


def fitted(image: Tensor, view: View) -> Tensor:  # uint8 [3, H, W]
    """The image as a view makes it, on the CPU."""
    return make_view(Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy())), view)


@torch.no_grad()
def answer(model: "Bagel", images: list[Tensor], questions: list[str], max_new_tokens: int) -> list[str]:
    """Greedy answers to a batch of questions."""
    check_pairs(images=images, questions=questions)
    view = model.views("i2t").und
    h_v = model.look([fitted(image, view).to(model.device) for image in images])
    samples = [[prompt.Seen(*rows.shape[:2]), model.text(text)] for rows, text in zip(h_v, questions, strict=True)]
    _, context = model.read(samples, h_v)
    tokens, _ = greedy(model, context, max_new_tokens)
    eos, replies = model.vocabulary.eos, []
    for row in tokens.tolist():
        row = row[: row.index(eos)] if eos in row else row
        replies.append(model.tokenizer.decode(row, skip_special_tokens=True).strip())
    return replies


def greedy(model: "Bagel", context: Context, max_new_tokens: int) -> tuple[Tensor, list[Tensor]]:
    """The likeliest reply, int64 [B, n], n <= max_new_tokens, and the logits [B, V] of each step; ends when every row
    has met eos."""
    head, eos = model.language_model.lm_head, model.vocabulary.eos
    last, tokens, logits = [model.vocabulary.bos] * len(context), [], []
    for _ in range(max_new_tokens):
        out, context = model.read([[prompt.Text([token])] for token in last], context=context)
        logits.append(head(out.to(head.weight.dtype)))
        tokens.append(logits[-1].argmax(-1))
        last = tokens[-1].tolist()
        if bool((torch.stack(tokens, 1) == eos).any(1).all()):
            break
    empty = torch.empty(len(context), 0, dtype=torch.int64)
    return (torch.stack(tokens, 1) if tokens else empty), logits


def _halves(context: Context) -> tuple[Context, Context]:
    n = len(context) // 2
    first = Context([layer[:n] for layer in context.layers], context.cursors[:n])
    return first, Context([layer[n:] for layer in context.layers], context.cursors[n:])
