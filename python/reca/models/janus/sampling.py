"""Autoregressive sampling of image codes with classifier-free guidance, and greedy decoding of replies."""

from collections.abc import Sequence

import torch
from torch import Tensor

from reca.data.batch import Batch
from reca.models.common.greedy import decode_replies
from reca.models.common.images import fit_to_view, to_uint8, to_unit
from reca.models.common.inference import warn_of_cut
from reca.models.common.planned import Continuation, greedy
from reca.models.janus import prompt
from reca.models.janus.modules import Network, SharedLlama
from reca.rng import CounterRNG, RandomStream
from reca_kernels import TextSegment


class SamplerNoise:
    """Random numbers of the sampler, functions of (image seed, step)."""

    def __init__(self, seeds: Tensor):  # int64 [B]
        self.seeds, self.rng = seeds, CounterRNG(0)

    def code(self, step: int, probabilities: Tensor) -> Tensor:  # [B, K]
        """Sample a code per image, int64 [B]."""
        return inverse_cdf(probabilities, self.rng.fold_in(step).uniform(RandomStream.TOKEN, self.seeds)[:, 0])


def inverse_cdf(probabilities: Tensor, u: Tensor) -> Tensor:  # [B, K], [B] in [0, 1)
    """Sample classes by inverting their cumulative probabilities, which are computed in fp64: int64 [B]."""
    sums = probabilities.double().cumsum(-1)
    index = torch.searchsorted(sums, (u.double() * sums[:, -1])[:, None], right=True)[:, 0]
    return index.clamp(max=probabilities.shape[-1] - 1)


def generate(
    net: Network,
    prompts: list[str],
    seeds: list[int],
    *,
    guidance: float = 5.0,
    temperature: float = 1.0,
    batch: int = 16,
) -> list[Tensor]:
    """Generate images code by code (`sample_codes`), `batch` at a time. Seeds are in [0, 2**56)."""
    v, most, images = net.vocabulary, net.longest_prompt, []
    ids = [[*prompt.caption(net.tokens, text, v, most), v.boi] for text in prompts]
    warn_of_cut((len(prompt.caption(net.tokens, text, v)) for text in prompts), most)
    for i in range(0, len(prompts), batch):
        noise = SamplerNoise(torch.tensor(seeds[i : i + batch], device=net.device))
        codes = sample_codes(net, ids[i : i + batch], noise, guidance=guidance, temperature=temperature)
        images += list(to_uint8(net.gen_vision_model.decode(codes), floor=True))  # as in the release
    return images


@torch.no_grad()
def reconstruct(net: Network, batch: Batch, h_v: Tensor, seeds: list[int], *, temperature: float = 1.0) -> list[Tensor]:
    """Reconstruct images code by code (`continue_codes`). Seeds are in [0, 2**56)."""
    noise, boi = SamplerNoise(torch.tensor(seeds, device=net.device)), TextSegment([net.vocabulary.boi])
    prompts = [[*net.template(text), boi] for text in batch.text]
    codes = continue_codes(net, prompts, noise, h_v, guidance=1, temperature=temperature)
    return list(to_uint8(net.gen_vision_model.decode(codes), floor=True))


@torch.no_grad()
def sample_codes(
    net: Network,
    prompts: list[list[int]],  # token ids, ending in boi
    noise: SamplerNoise,
    *,
    guidance: float = 5.0,
    temperature: float = 1.0,
    on_step=None,  # called with the guided logits [B, K] of each step
) -> Tensor:  # int64 [B, N]
    """Generate the codes of an image per prompt with `continue_codes`."""
    given = [[TextSegment(ids)] for ids in prompts]
    return continue_codes(net, given, noise, guidance=guidance, temperature=temperature, on_step=on_step)


@torch.no_grad()
def continue_codes(
    net: Network,
    prompts: Sequence[Sequence[prompt.Segment]],  # each ends in boi
    noise: SamplerNoise,
    h_v: Tensor | None = None,  # [B, n, H], used by both branches
    *,
    guidance: float,
    temperature: float,
    on_step=None,  # see sample_codes
) -> Tensor:  # int64 [B, N]
    """Sample codes one by one from the whole codebook, with a KV cache.

    guidance g combines logits as uncond + g (cond - uncond); with g = 1 the unconditional branch does not run.
    temperature divides the logits; 0 selects the most likely code.
    """
    b, v, branches = len(prompts), net.vocabulary, 1 if guidance == 1 else 2
    given = prompt.layout([*prompts] * branches, v)
    given = prompt.drop(given, [False] * b + [True] * (b * (branches - 1)), 0, v).to(net.device)
    visual = None if h_v is None else h_v.repeat(branches, 1, 1)
    advance = Continuation(net.language_model.model, net.embed(given.src, visual), given.position_ids, given.spans())
    codes: list[Tensor] = []
    for step in range(net.image_tokens):
        rows = net.embed_codes(codes[-1][:, None]).repeat(branches, 1, 1) if codes else None
        logits = net.gen_head(advance(rows)).float()
        if branches == 2:
            cond, uncond = logits.chunk(2)
            logits = uncond + guidance * (cond - uncond)
        if on_step:
            on_step(logits)
        codes.append(noise.code(step, (logits / temperature).softmax(-1)) if temperature else logits.argmax(-1))
    return torch.stack(codes, 1)


@torch.no_grad()
def answer(
    net: SharedLlama,
    images: list[Tensor],
    questions: list[str],
    max_new_tokens: int,
    batch: int = 64,
) -> list[str]:
    """Answer questions about images by greedy decoding, `batch` at a time."""
    v, view, replies = net.vocabulary, net.views("i2t").und, []
    assert view is not None
    system, most = net.config.system_prompt, net.config.max_length
    warn_of_cut(prompt.layout([net.with_image(text, system) for text in questions], v).lengths, most)
    asked = [net.with_image(text, system, most) for text in questions]
    for i in range(0, len(images), batch):
        layout = prompt.layout(asked[i : i + batch], v).to(net.device)
        pixels = to_unit([fit_to_view(image, view) for image in images[i : i + batch]]).to(net.device)
        tokens = continue_text(net, layout, net.encode_understanding(pixels), max_new_tokens)
        replies += decode_replies(net.tokenizer, tokens, v.eos)
    return replies


def continue_text(net: SharedLlama, layout: prompt.Layout, h_v: Tensor, max_new_tokens: int) -> Tensor:
    """Continue prompts by greedy decoding, int64 [B, n]."""
    language = net.language_model
    return greedy(
        language.model,
        language.lm_head,
        net.embed(layout.src, h_v),
        layout.position_ids,
        layout.spans(),
        max_new_tokens,
        net.vocabulary.eos,
    )
