"""BAGEL as released.

Prompt and noisy image are one packed sequence in one forward pass. Every layer gathers the rows of each expert by index
and scatters its results into zero tensors. Understanding is frozen by detaching the outputs of its rows, so its weights
and the embedding table get all-zero gradients, and optimizer moments. Attention uses a dense mask per sample, with key
heads repeated in memory. The noise level is embedded once per token. Noise, noisy latents and target are materialised.
Checkpointed layers are recomputed completely, because their last matmul is followed by an indexed write.
"""

import functools
import types
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.step.release.eager import extended, mean_squares, recompute
from reca.data.batch import Batch
from reca.models.bagel import loss as ours
from reca.models.bagel.model import Bagel
from reca.models.bagel.modules import patchify, vit_size
from reca.models.bagel.prompt import Text, VitImage, grid
from reca.models.bagel.transformer import GEN, UND, Layer, apply_rotary, rotary_cos_sin
from reca.models.base import LossTerm
from reca.rng import CounterRNG, RandomStream
from reca_kernels import philox_normal


@dataclass(frozen=True, kw_only=True)
class Prepared(ours.Prepared):
    """Prepared samples with the layout of the packed sequence.

    text_ids, text_at       int64: token ids and their positions; vit_at, gen_at: positions of h_v and latents
    vit_places, gen_places  int64: their indices in the position embedding tables
    positions               int64 [T]: rotary positions
    sizes                   the splits of each sample, (length, causal)
    """

    text_ids: Tensor
    text_at: Tensor
    vit_at: Tensor
    gen_at: Tensor
    vit_places: Tensor
    gen_places: Tensor
    positions: Tensor
    sizes: list[list[tuple[int, bool]]]


def formulate(adapter: Bagel, checkpointed: bool) -> None:
    """Replace preparation and loss by the released ones."""
    for one in adapter.language_model.model.layers:
        one.forward = functools.partial(layer, one)
        if checkpointed:
            recompute(one, reentrant=False)
    adapter.prepare = types.MethodType(prepare, adapter)
    adapter.loss = types.MethodType(loss, adapter)


class Packing:
    """The packed sequence under construction."""

    def __init__(self, soi: int, eoi: int) -> None:
        self.soi, self.eoi, self.row = soi, eoi, 0
        self.text_ids: list[int] = []
        self.text_at: list[int] = []
        self.positions: list[int] = []
        self.sizes: list[list[tuple[int, bool]]] = []

    def put(self, ids: list[int], position: int) -> None:
        """Append a text, with consecutive positions."""
        n = len(ids)
        self.text_ids += ids
        self.text_at += range(self.row, self.row + n)
        self.positions += range(position, position + n)
        self.sizes[-1].append((n, True))
        self.row += n

    def put_image(self, n: int, position: int) -> range:
        """Append an image with its border tokens, all at one position. Return the rows of its n tokens."""
        self.text_ids += [self.soi, self.eoi]
        self.text_at += [self.row, self.row + n + 1]
        self.positions += [position] * (n + 2)
        self.sizes[-1].append((n + 2, False))
        self.row += n + 2
        return range(self.row - n - 1, self.row - 1)


def prepare(self: Bagel, batch: Batch, rng: CounterRNG) -> Prepared:
    """Pack the samples: [soi h_v eoi] [text] [soi latents eoi] for each."""
    made = ours.prepare(self, batch, rng)
    assert made.image and batch.gen
    packing = Packing(self.vocabulary.soi, self.vocabulary.eoi)
    vit_at: list[int] = []
    gen_at: list[int] = []
    vit_places, gen_places = [], []
    for items, image in zip(made.items, batch.gen, strict=True):
        position = 0
        packing.sizes.append([])
        for item in items:
            if isinstance(item, Text):
                packing.put(item.ids, position)
                position += len(item.ids)
            else:
                assert isinstance(item, VitImage), "the released trainer has h_v of SigLIP"
                vit_at += packing.put_image(item.height * item.width, position)
                vit_places.append(grid(item.height, item.width, vit_size(self.config.vision)))
                position += 1
        height, width = (side // self.token_side for side in image.shape[1:])
        gen_at += packing.put_image(height * width, position)
        gen_places.append(grid(height, width, self.config.max_latent_size))
    return extended(
        Prepared,
        made,
        text_ids=torch.tensor(packing.text_ids),
        text_at=torch.tensor(packing.text_at),
        vit_at=torch.tensor(vit_at),
        gen_at=torch.tensor(gen_at),
        vit_places=torch.cat(vit_places),
        gen_places=torch.cat(gen_places),
        positions=torch.tensor(packing.positions),
        sizes=packing.sizes,
    )


def loss(self: Bagel, prepared: Prepared, features: dict[str, Any], rng: CounterRNG) -> LossTerm:
    """Return the sum over image tokens of the mean squared error of their velocity."""
    samples, patch, model = prepared.sample_ids, self.config.latent_patch_size, self.language_model.model
    latents = ours.sample_posterior(self, features["moments"], rng, samples)
    t = ours.noise_level(self, rng, samples)
    if self.config.parity:
        latents, t = [z.bfloat16() for z in latents], t.bfloat16().float()
    clean = torch.cat([patchify(z, patch) for z in latents])
    address, width = rng.noise(RandomStream.NOISE, samples), clean.shape[1]
    noise = torch.cat([
        philox_normal(address._replace(sample_ids=samples[i : i + 1]), z.numel()).view(-1, width)
        for i, z in enumerate(latents)
    ])  # fmt: skip
    counts = torch.tensor([z.numel() // width for z in latents], device=t.device)
    levels = t.repeat_interleave(counts)
    noisy = ((1 - levels[:, None]) * clean + levels[:, None] * noise).to(clean.dtype)
    target = noise - clean.float()

    text = model.embed_tokens(prepared.text_ids)
    dtype = self.residual_dtype(self.vae2llm.weight)
    x = text.new_zeros(len(prepared.positions), text.shape[1], dtype=dtype)
    x[prepared.text_at] = text.to(dtype)
    with torch.no_grad():
        h_v = self.connector(torch.cat([tokens.flatten(0, 1) for tokens in features["h_v"]]))
    x[prepared.vit_at] = (h_v + self.vit_pos_embed.pos_embed[prepared.vit_places]).to(dtype)
    latent = self.vae2llm(noisy.to(self.vae2llm.weight.dtype)) + self.time_embedder(levels)
    x[prepared.gen_at] = (latent + self.latent_pos_embed.pos_embed[prepared.gen_places]).to(dtype)
    und = torch.cat([prepared.text_at, prepared.vit_at])
    x[und] = x[und].detach()

    head_dim = self.config.language.hidden_size // self.config.language.num_attention_heads
    rotary = rotary_cos_sin(prepared.positions, head_dim, self.config.language.rope_theta)
    masks = [dense_mask(sizes).to(x.device) for sizes in prepared.sizes]
    for one in model.layers:
        x = one(x, und, prepared.gen_at, rotary, masks)
    last = torch.zeros_like(x)
    last[und] = getattr(model, f"norm{UND}")(x[und])
    last[und] = last[und].detach()
    last[prepared.gen_at] = getattr(model, f"norm{GEN}")(x[prepared.gen_at])
    velocity = self.llm2vae(last[prepared.gen_at].to(self.llm2vae.weight.dtype))
    return LossTerm.of(mean_squares(velocity, target).mean(1).sum(), prepared)


def dense_mask(splits: list[tuple[int, bool]]) -> Tensor:
    """Return the mask of a sample, bool [1, L, L]: rows see earlier splits and, causally or fully, their own."""
    number = torch.repeat_interleave(torch.arange(len(splits)), torch.tensor([n for n, _ in splits]))
    causal = torch.tensor([causal for _, causal in splits])[number]
    place = torch.arange(len(number))
    own = (number[:, None] == number) & (~causal[:, None] | (place[:, None] >= place))
    return ((number[:, None] > number) | own)[None]


def layer(one: Layer, x: Tensor, und: Tensor, gen: Tensor, rotary: tuple, masks: list[Tensor]) -> Tensor:
    """Run one layer over the packed rows, [T, D]."""
    attention = one.self_attn

    def by_expert(rows: Tensor, name: str, module: Any, width: int | None = None) -> Tensor:
        out = rows.new_zeros(*rows.shape[:-1], width or rows.shape[-1])
        out[und] = getattr(module, f"{name}{UND}")(rows[und]).to(out.dtype)
        out[gen] = getattr(module, f"{name}{GEN}")(rows[gen]).to(out.dtype)
        return out

    def frozen(rows: Tensor) -> Tensor:
        rows[und] = rows[und].detach()
        return rows

    normed = by_expert(x, "input_layernorm", one)
    widths = {p: getattr(attention, f"{p}_proj").out_features for p in "qkv"}
    q, k, v = (
        by_expert(normed, f"{p}_proj", attention, widths[p]).unflatten(1, (-1, attention.head_dim)) for p in "qkv"
    )
    q, k = (frozen(by_expert(rows.float(), f"{name}_norm", attention)) for name, rows in (("q", q), ("k", k)))
    q, k, v = *(apply_rotary(rows, *rotary).to(v.dtype) for rows in (q, k)), frozen(v.clone())
    group = q.shape[1] // k.shape[1]
    k, v = (rows.repeat_interleave(group, dim=1) for rows in (k, v))
    sizes = [mask.shape[-1] for mask in masks]
    pieces = [
        F.scaled_dot_product_attention(*(rows.transpose(0, 1)[None] for rows in sample), mask[None])[0].transpose(0, 1)
        for *sample, mask in zip(q.split(sizes), k.split(sizes), v.split(sizes), masks, strict=True)
    ]
    mixed = torch.cat(pieces).flatten(1).to(x.dtype)
    x = x + frozen(by_expert(mixed, "o_proj", attention))
    normed = by_expert(x, "post_attention_layernorm", one)
    return x + frozen(by_expert(normed, "mlp", one))
