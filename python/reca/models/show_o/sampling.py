"""MaskGIT sampling of image codes (Chang et al., arXiv 2202.04200), and greedy decoding of replies."""

import math

import torch
from torch import Tensor

from reca.models.common.greedy import decode_replies
from reca.models.common.images import fit_to_view, to_uint8, to_unit
from reca.models.common.inference import truncated, warn_of_cut
from reca.models.common.planned import CachedPrompts
from reca.models.common.planned import greedy as planned_greedy
from reca.models.show_o import prompt
from reca.models.show_o.conditioner import conditioner
from reca.models.show_o.loss import reca_samples
from reca.models.show_o.masking import cosine
from reca.models.show_o.modules import Network
from reca.rng import CounterRNG, RandomStream
from reca_kernels import IGNORE_INDEX

TINY = 1e-20


class SamplerNoise:
    """Random numbers of the sampler, functions of (image seed, step)."""

    def __init__(self, seeds: Tensor):  # int64 [B]
        self.seeds, self.rng = seeds, CounterRNG(0)

    def codes(self, step: int, probabilities: Tensor) -> Tensor:  # [B, N, K]
        """Sample a code per position, int64 [B, N]."""
        u = self.rng.fold_in(step).uniform(RandomStream.TOKEN, self.seeds, probabilities.shape[1])
        sums = probabilities.cumsum(-1)
        index = torch.searchsorted(sums, (u * sums[..., -1])[..., None], right=True)[..., 0]
        return index.clamp(max=probabilities.shape[-1] - 1)

    def gumbel(self, step: int, n: int) -> Tensor:
        """Draw standard Gumbel noise, fp32 [B, n]."""
        u = self.rng.fold_in(step).uniform(RandomStream.CONFIDENCE, self.seeds, n)
        return -(-u.clamp(min=TINY).log()).clamp(min=TINY).log()


def generate(
    net: Network,
    prompts: list[str],
    seeds: list[int],
    *,
    steps: int = 50,
    guidance: float = 5.0,
    temperature: float = 1.0,
    batch: int = 64,
) -> list[Tensor]:
    """Generate images with MaskGIT (`sample_codes`), `batch` at a time. Seeds are in [0, 2**56)."""
    images, ids = [], [net.tokens(text) for text in prompts]
    warn_of_cut(map(len, ids), net.config.max_prompt_tokens - 2)  # bos and eos count, too
    for i in range(0, len(prompts), batch):
        noise = SamplerNoise(torch.tensor(seeds[i : i + batch], device=net.device))
        codes = sample_codes(net, ids[i : i + batch], noise, steps=steps, guidance=guidance, temperature=temperature)
        images += list(to_uint8(net.codec.decode(codes)))
    return images


def reconstruct(
    net: Network, templates: list[str], h_v: Tensor, seeds: list[int], *, steps: int, temperature: float
) -> list[Tensor]:
    """Reconstruct images with MaskGIT (`fill_codes`), without guidance. h_v: as `encode` returns it."""
    noise, samples = SamplerNoise(torch.tensor(seeds, device=net.device)), reca_samples(net, templates)
    codes = fill_codes(net, samples, noise, h_v, steps=steps, guidance=0, temperature=temperature)
    return list(to_uint8(net.codec.decode(codes)))


@torch.no_grad()
def sample_codes(
    net: Network,
    texts: list[list[int]],  # token ids per prompt
    noise: SamplerNoise,
    *,
    steps: int = 50,
    guidance: float = 5.0,
    temperature: float = 1.0,
) -> Tensor:  # int64 [B, N]
    """Generate the codes of an image per text with `fill_codes`."""
    v, both = net.vocabulary, [*texts, *[[] for _ in texts]] if guidance else texts
    samples = [prompt.t2i(text, v, net.config.max_prompt_tokens, net.image_tokens) for text in both]
    return fill_codes(net, samples, noise, steps=steps, guidance=guidance, temperature=temperature)


@torch.no_grad()
def fill_codes(
    net: Network,
    samples: list[prompt.Sample],  # with guidance, the conditional ones, then the unconditional ones
    noise: SamplerNoise,
    h_v: Tensor | None = None,  # for all samples
    *,
    steps: int,
    guidance: float,
    temperature: float,
) -> Tensor:  # int64 [B, N]
    """Generate codes. All are masked at first; each step samples every masked code and masks the least certain again.

    guidance g combines logits as (1 + g) * cond - g * uncond. temperature scales the Gumbel noise on the certainty;
    each step multiplies it by the remaining share of steps, so it is 0 in the last step.
    """
    v, n, branches = net.vocabulary, net.image_tokens, 2 if guidance else 1
    given, image = prompt.split_image(prompt.layout(samples, v).to(net.device), n)
    prompts = CachedPrompts(net.showo.model, net.embed(given.src, h_v), given.position_ids, given.runs)
    codes = torch.full((len(samples) // branches, n), v.codes, device=net.device)  # v.codes is the mask
    for step in range(steps):
        logits = net.code_logits(prompts, image, codes.repeat(branches, 1)).float()
        if guidance:
            cond, uncond = logits.chunk(2)
            logits = (1 + guidance) * cond - guidance * uncond
        probabilities = logits.softmax(-1)
        unknown = codes == v.codes
        sampled = torch.where(unknown, noise.codes(step, probabilities), codes)

        done = (step + 1) / steps
        temperature *= 1 - done
        hidden = (
            (unknown.sum(1) - 1)
            .clamp(max=int((n * cosine(torch.tensor(done, dtype=torch.float32))).floor()))
            .clamp(min=1)
        )
        certainty = probabilities.gather(2, sampled[..., None])[..., 0].clamp(min=TINY).log()
        certainty = certainty + temperature * noise.gumbel(step, n)
        certainty = certainty.masked_fill(~unknown, math.inf)
        cut = certainty.sort(1).values.gather(1, hidden[:, None])
        codes = torch.where(certainty < cut, v.codes, sampled)
    return sampled


@torch.no_grad()
def answer(net: Network, images: list[Tensor], questions: list[str], max_new_tokens: int, batch: int = 64) -> list[str]:
    """Answer questions about images by greedy decoding, `batch` at a time."""
    v, source, system = net.vocabulary, conditioner(net, "i2t"), net.tokens(net.config.system_prompt)
    frame = sum(run.length for run in source.conversation_sample([], [], v, system).runs)
    most, view, replies = net.config.phi.max_position_embeddings - frame, source.view(), []
    whole, end = [source.question(net.tokens, text, v) for text in questions], net.tokens(" ASSISTANT:")
    ids = truncated(whole, most, len(end))
    samples = [source.conversation_sample(row, [IGNORE_INDEX] * len(row), v, system) for row in ids]
    for i in range(0, len(images), batch):
        pixels = to_unit([fit_to_view(image, view) for image in images[i : i + batch]]).to(net.device)
        layout = prompt.layout(samples[i : i + batch], v).to(net.device)
        tokens = greedy(net, net.embed(layout.src, source.encode(pixels)), layout, max_new_tokens)
        replies += decode_replies(net.tokenizer, tokens, v.eos)
    return replies


def greedy(net: Network, embeddings: Tensor, layout: prompt.Layout, max_new_tokens: int) -> Tensor:
    """Continue prompts by greedy decoding, int64 [B, n]."""
    return planned_greedy(
        net.showo.model,
        net.showo.lm_head,
        embeddings,
        layout.position_ids,
        layout.runs,
        max_new_tokens,
        net.vocabulary.eos,
    )
