"""Generation and editing of images with Euler steps and two kinds of guidance, and greedy decoding of answers."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from reca.data.batch import Batch
from reca.models.bagel import loss, modules, prompt
from reca.models.bagel.decoding import Continuation
from reca.models.bagel.modules import Network
from reca.models.bagel.prompt import CleanImage, Item, Layout, NoisyImage, Prompt, Text, VitImage
from reca.models.bagel.transformer import KVCache
from reca.models.bagel.views import edit_views, task_views
from reca.models.common.greedy import decode_replies, greedy_tokens
from reca.models.common.images import fit_to_view, to_uint8
from reca.models.common.inference import check_multiple, warn_of_cut
from reca.rng import RandomStream, seeded_normal

RENORMS = ("global", "channel", "text_channel")
EPSILON = 1e-8


@torch.no_grad()
def generate(
    net: Network,
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
    """Generate an image per prompt, uint8 [3, height, width], `batch` at a time; for options see `denoise`."""
    side, largest = net.token_side, net.config.image_size
    height, width = height or largest, width or largest
    check_multiple(side, height, width)
    size, images = (height // side, width // side), []  # in tokens
    for i in range(0, len(prompts), batch):
        sizes = [size] * len(prompts[i : i + batch])
        items = texts(net, prompts[i : i + batch], [[NoisyImage(*size)] for size in sizes])
        _, full = net.prefill(Prompt(items))
        tokens = denoise(
            net, start_noise(net, sizes, seeds[i : i + batch]), sizes, full, net.empty_cache(len(items)), None,
            steps=steps, guidance=guidance, interval=interval, renorm=renorm, renorm_min=renorm_min, shift=shift,
        )  # fmt: skip
        images += pixels(net, tokens, sizes)
    return images


@torch.no_grad()
def reconstruct(
    net: Network, batch: Batch, h_v: Sequence[Tensor], seeds: list[int], *, steps: int = 50, shift: float = 3.0
) -> list[Tensor]:
    """Reconstruct images at their own sizes, uint8 [3, H, W], without guidance; see `denoise`."""
    items, sizes = loss.with_images(net, batch, [[]] * len(batch)), loss.image_sizes(net, batch)
    for sample, size, text in zip(items, sizes, batch.text, strict=True):
        sample.append(loss.template(net, text, prompt.image_tokens([*sample, NoisyImage(*size)])))
    _, full = net.prefill(loss.given_images(net, items, h_v))
    tokens = denoise(
        net, start_noise(net, sizes, seeds), sizes, full, None, None,
        steps=steps, guidance=1.0, interval=(0.0, 1.0), renorm="global", renorm_min=0.0, shift=shift,
    )  # fmt: skip
    return pixels(net, tokens, sizes)


@torch.no_grad()
def edit(
    net: Network,
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
    """Edit images, uint8 [3, H, W], at the sizes of the images after resizing for the codec; for options see `denoise`.

    The model's input is the image as latents and as h_v, which is computed from the resized image, as in the release.
    """
    edited, view = [], edit_views(net).gen
    assert view is not None
    for i in range(0, len(images), batch):
        sources = [fit_to_view(image, view) for image in images[i : i + batch]]
        posterior = posterior_noise(net, sources, seeds[i : i + batch])
        full, textless, imageless, sizes = edit_caches(net, sources, instructions[i : i + batch], posterior)
        tokens = denoise(
            net, start_noise(net, sizes, seeds[i : i + batch]), sizes, full, textless, imageless,
            steps=steps, guidance=guidance, image_guidance=image_guidance, interval=interval, renorm=renorm,
            renorm_min=renorm_min, shift=shift,
        )  # fmt: skip
        edited += pixels(net, tokens, sizes)
    return edited


def texts(net: Network, said: Sequence[str], images: Sequence[Sequence[Item]]) -> list[list[Text]]:
    """Tokenise the text of each sample, and warn if it is too long to be read together with the sample's images."""
    beside = [prompt.image_tokens(items) for items in images]
    pairs = list(zip(map(net.text, said), beside, strict=True))
    warn_of_cut((len(text.ids) + n for text, n in pairs), prompt.MAX_LENGTH)
    return [[prompt.truncated(text, n)] for text, n in pairs]


def edit_caches(
    net: Network,
    sources: list[Tensor],  # uint8 [3, H, W], resized for the codec
    instructions: list[str],
    noise: list[Tensor],  # [C, h, w], for each source's posterior
) -> tuple[KVCache, KVCache, KVCache, list[tuple[int, int]]]:
    """Prefill the caches of three branches: all inputs, without the text, and without the image.

    Returns these caches, and the image sizes in tokens.
    """
    moments = net.moments([source.to(net.device) for source in sources])
    clean = [net.codec.latents(m, e) for m, e in zip(moments, noise, strict=True)]
    view = edit_views(net).und
    assert view is not None
    h_v = net.encode_understanding([fit_to_view(source, view).to(net.device) for source in sources])
    side = net.token_side
    sizes = [(source.shape[1] // side, source.shape[2] // side) for source in sources]
    items: list[list[Item]] = [
        [CleanImage(*size), VitImage(*one.shape[:2])] for size, one in zip(sizes, h_v, strict=True)
    ]
    _, textless = net.prefill(Prompt(items, h_v, clean))
    shown = [[*given, NoisyImage(*size)] for given, size in zip(items, sizes, strict=True)]
    asked, n = texts(net, instructions, shown), len(sources)
    # Without the image, the text starts at position 0, as in the release, although in training dropped images keep
    # their positions.
    _, both = net.prefill(Prompt(asked * 2), textless + net.empty_cache(n))
    full, imageless = both.split(n)
    return full, textless, imageless, sizes


def denoise(
    net: Network,
    x: Tensor,  # [sum of h w, channels], standard normal
    sizes: list[tuple[int, int]],  # per sample, in tokens
    full: KVCache,
    textless: KVCache | None,
    imageless: KVCache | None,
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
    """Integrate the guided velocity with Euler's method. Returns latents as tokens.

    steps           points of the time grid, as in the release; there is one Euler step fewer
    guidance        text guidance scale; at 1 or below there is no guidance at all
    image_guidance  image guidance scale; at 1 or below there is no image guidance
    interval        guidance applies where interval[0] < t <= interval[1]; t runs from 1 (noise) to 0, after the shift
    renorm          rescale the guided velocity to the norm of the unguided one: global per image, channel per token,
                    text_channel per token and before image guidance
    renorm_min      minimum factor of that; the maximum is 1
    """
    if steps < 2:
        raise ValueError(f"steps={steps}: the time grid needs at least 2 points")
    if shift <= 0:
        raise ValueError(f"shift={shift:g} must be above 0; 1 is no shift")
    if renorm not in RENORMS:
        raise ValueError(f"renorm={renorm!r} is not one of {', '.join(RENORMS)}")
    grid = modules.shift_timesteps(torch.linspace(1, 0, steps, dtype=torch.float32, device=x.device), shift)
    lengths = [height * width for height, width in sizes]
    branches = [c for c, scale in ((textless, guidance), (imageless, image_guidance)) if c is not None and scale > 1]
    alone, together = (_Condition.of(net, caches, sizes) for caches in ([full], [full, *branches]))
    for step, level in enumerate(grid.tolist()[:-1]):
        t, guided = grid[step], guidance > 1 and interval[0] < level <= interval[1]
        given = together if guided else alone
        n = given.branches
        v = net.predict_velocity(given.cache, given.layout, x.repeat(n, 1), t[None]).float()
        if guided:
            own, *others = v.chunk(n)
            v = guide(own, others, guidance, image_guidance, renorm, renorm_min, lengths)
        if on_step:
            on_step(t, x, v)
        x = x - v * (t - grid[step + 1])
    return x


class _Condition(NamedTuple):
    """Guidance branches as one batch: their cache, and the layout of the noisy images that follow it."""

    branches: int
    cache: KVCache
    layout: Layout

    @classmethod
    def of(cls, net: Network, caches: list[KVCache], sizes: list[tuple[int, int]]) -> "_Condition":
        cache = sum(caches[1:], caches[0])
        items = [[NoisyImage(*size)] for size in sizes * len(caches)]
        return cls(len(caches), cache, net.layout(items, cache.positions).to(net.device))


def guide(
    v: Tensor, others: list[Tensor], text: float, image: float, renorm: str, least: float, lengths: list[int]
) -> Tensor:
    """Apply guidance to the velocity of packed images, [sum of h w, channels].

    others: the velocities without the text and, with image guidance, without the image. lengths: tokens per image.
    """
    out = others[0] + text * (v - others[0])
    if renorm == "text_channel":
        out = _renormalise(out, v, least, token_norms)
    if len(others) > 1:
        out = others[1] + image * (out - others[1])
    if renorm == "text_channel":
        return out
    return _renormalise(out, v, least, token_norms if renorm == "channel" else partial(image_norms, lengths=lengths))


def _renormalise(out: Tensor, v: Tensor, least: float, norms: Callable[[Tensor], Tensor]) -> Tensor:
    return out * (norms(v) / (norms(out) + EPSILON)).clamp(min=least, max=1.0)


def token_norms(x: Tensor) -> Tensor:  # [tokens, C] -> [tokens, 1]
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def image_norms(x: Tensor, lengths: list[int]) -> Tensor:  # [tokens, C] -> [tokens, 1]
    """Return the norm of each token's image."""
    norms = [torch.linalg.vector_norm(image, dim=(0, 1), keepdim=True) for image in x.split(lengths)]
    return torch.cat([norm.expand(n, 1) for norm, n in zip(norms, lengths, strict=True)])


def start_noise(net: Network, sizes: list[tuple[int, int]], seeds: list[int]) -> Tensor:
    """Draw standard normal tokens. Those of an image depend on its seed only."""
    shapes = [(height * width, net.vae2llm.in_features) for height, width in sizes]
    pairs = zip(seeds, shapes, strict=True)
    return torch.cat([seeded_normal(seed, RandomStream.NOISE, shape, net.device) for seed, shape in pairs])


def posterior_noise(net: Network, images: list[Tensor], seeds: list[int]) -> list[Tensor]:
    channels, factor = net.codec.channels, net.codec.factor
    shapes = [(channels, *(side // factor for side in image.shape[1:])) for image in images]
    pairs = zip(seeds, shapes, strict=True)
    return [seeded_normal(seed, RandomStream.POSTERIOR, shape, net.device) for seed, shape in pairs]


def pixels(net: Network, tokens: Tensor, sizes: list[tuple[int, int]]) -> list[Tensor]:
    """Decode tokens to uint8 [3, H, W] per image."""
    patch, images = net.config.latent_patch_size, []
    for rows, (height, width) in zip(tokens.split([h * w for h, w in sizes]), sizes, strict=True):
        decoded = net.codec.decode(modules.unpatchify(rows, height, width, patch)[None])[0]
        images.append(to_uint8(decoded, floor=True))  # as in the release
    return images


@torch.no_grad()
def answer(net: Network, images: list[Tensor], questions: list[str], max_new_tokens: int, batch: int = 8) -> list[str]:
    """Answer questions about images by greedy decoding, `batch` at a time."""
    view, replies = task_views(net, "i2t").und, []
    assert view is not None
    for i in range(0, len(images), batch):
        h_v = net.encode_understanding([fit_to_view(image, view).to(net.device) for image in images[i : i + batch]])
        shown: list[list[Item]] = [[VitImage(*one.shape[:2])] for one in h_v]
        said = texts(net, questions[i : i + batch], shown)
        _, cache = net.prefill(Prompt([[*image, *text] for image, text in zip(shown, said, strict=True)], h_v))
        replies += decode_replies(net.tokenizer, greedy(net, cache, max_new_tokens), net.vocabulary.eos)
    return replies


def greedy(
    net: Network,
    cache: KVCache,
    max_new_tokens: int,
    on_step=None,  # called with the logits [B, V] of each step
) -> Tensor:  # int64 [B, n], n <= max_new_tokens
    """Decode replies greedily; stop when every sample has generated eos."""
    head, advance = net.language_model.lm_head, Continuation(net, cache)
    start = torch.full((len(cache),), net.vocabulary.bos, device=net.device)

    def next_logits(last: Tensor | None) -> Tensor:
        hidden = advance(start if last is None else last)
        logits = head(hidden.to(head.weight.dtype))
        if on_step:
            on_step(logits)
        return logits

    return greedy_tokens(next_logits, max_new_tokens, net.vocabulary.eos)
