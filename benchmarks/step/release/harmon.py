"""Harmon as released.

The encoder embeds all tokens and drops masked ones by boolean indexing. The prompt is scattered into a zero tensor and
padded before the image; FlashAttention's padded interface gathers the valid rows. The diffusion head runs on every
token, including visible ones, each repeated in memory for its four timesteps. Its condition and timesteps are embedded
for every repeat, and every block computes the SiLU of its condition. Loss terms are materialised, and the visible
tokens are masked out of the mean. Dropout is torch's, in attention and after it. Layers of the language model and the
decoder use re-entrant checkpointing, which also recomputes their last matmul.
"""

import functools
import math
import types
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.step.release.eager import UNPADDED, extended, recompute
from reca.data.batch import Batch
from reca.models.base import LossTerm
from reca.models.common.vit_blocks import Block
from reca.models.harmon import loss as ours
from reca.models.harmon.model import Harmon
from reca.models.harmon.modules import FREQUENCIES, STEPS, DiffusionHead, HeadBlock, Mar
from reca.models.harmon.prompt import SLOT
from reca.rng import CounterRNG, RandomStream
from reca_kernels import Philox, diffusion_schedule, philox_normal
from reca_kernels.diffusion_loss import reference

PAD_ID = 0  # any token: no other row attends to padding


@dataclass(frozen=True, kw_only=True)
class Prepared(ours.PreparedImages):
    """Prepared samples with token ids int64 [B, T], padded on the right, valid bool [B, T], is_hidden bool [B, S]."""

    ids: Tensor
    valid: Tensor
    is_hidden: Tensor


def formulate(adapter: Harmon, checkpointed: bool) -> None:
    """Replace preparation and loss by the released ones."""
    adapter.llm.set_attn_implementation(UNPADDED)
    for block in (*adapter.mar.encoder_blocks, *adapter.mar.decoder_blocks):
        block.forward = functools.partial(vit_block, block)
    if checkpointed:
        for block in (*adapter.llm.model.layers, *adapter.mar.decoder_blocks):
            recompute(block, reentrant=True)
        for block in adapter.mar.encoder_blocks:
            recompute(block, reentrant=False)
    adapter.recomputed_head = checkpointed
    adapter.prepare = types.MethodType(prepare, adapter)
    adapter.loss = types.MethodType(loss, adapter)


def prepare(self: Harmon, batch: Batch, rng: CounterRNG) -> Prepared:
    """Tokenise and pad the prompts, and draw the masked tokens."""
    made = ours.prepare(self, batch, rng)
    prompts = [asked.ids for asked in ours.sample_prompts(self, batch, rng)]
    longest = max(map(len, prompts))
    ids = torch.tensor([[*row, *[PAD_ID] * (longest - len(row))] for row in prompts])
    valid = torch.arange(longest) < torch.tensor([[len(row)] for row in prompts])
    hidden = torch.zeros(len(batch), made.grid[0] * made.grid[1], dtype=torch.bool)
    hidden.view(-1)[made.masking.hidden] = True
    return extended(Prepared, made, ids=ids, valid=valid, is_hidden=hidden)


def loss(self: Harmon, prepared: Prepared, features: dict[str, Any], rng: CounterRNG) -> LossTerm:
    """Return the sum of the diffusion loss over masked tokens and their timesteps."""
    mar, latents, buffers = self.mar, features["latents"], self.config.mar.buffers
    batch = len(latents)
    given = self.proj_in(encode(mar, features["h_v"], torch.zeros_like(prepared.is_hidden)))
    given = torch.cat([given[:, buffers:], given[:, :buffers]], dim=1)
    scale = self.config.hv_grad_scale
    if given.requires_grad:
        given.register_hook(lambda grad: grad * scale)
    encoded = encode(mar, latents, prepared.is_hidden)
    visible = self.proj_in(encoded)
    visible = torch.cat([visible[:, buffers:], visible[:, :buffers]], dim=1)

    text = self.llm.model.embed_tokens(prepared.ids)
    is_given = torch.zeros(batch, text.shape[1] + given.shape[1], dtype=torch.bool, device=text.device)
    is_given[:, SLOT : SLOT + given.shape[1]] = True
    embeds = text.new_zeros(*is_given.shape, text.shape[2])
    embeds[is_given] = given.to(embeds.dtype).flatten(0, 1)
    embeds[~is_given] = text.flatten(0, 1)
    embeds = torch.cat([embeds, visible.to(embeds.dtype)], dim=1)
    valid = torch.ones(*is_given.shape, dtype=torch.bool, device=text.device)
    valid[~is_given] = prepared.valid.flatten()
    valid = F.pad(valid, (0, visible.shape[1]), value=True)
    positions = (valid.long().cumsum(1) - 1).clamp(min=0)
    hidden = self.llm.model(
        inputs_embeds=embeds,
        attention_mask={"full_attention": None},
        position_ids=positions,
        use_cache=False,
        valid=valid,
    ).last_hidden_state
    answered = hidden[:, -visible.shape[1] :]
    answered = torch.cat([answered[:, -buffers:], answered[:, :-buffers]], dim=1)
    z = decode(mar, encoded + self.proj_out(answered), prepared.is_hidden, prepared.grid)
    rows = diffusion_losses(self, prepared, z, latents, rng)
    hidden_rows = prepared.is_hidden.flatten().to(rows.dtype).repeat(self.config.mar.repeats)
    return LossTerm.of((rows * hidden_rows).sum(), prepared)


def encode(mar: Mar, latents: Tensor, hidden: Tensor) -> Tensor:  # [B, m, n, C], bool [B, S]
    """Encode the visible tokens, [B, buffers + V, D]: all tokens are embedded, then the masked ones dropped."""
    x, buffers = mar.z_proj(latents.flatten(1, 2)), mar.c.buffers
    x = torch.cat([mar.fake_latent.unsqueeze(1).repeat(len(x), buffers, 1), x], dim=1)
    x = mar.z_proj_ln(x + mar.positions(mar.encoder_pos_embed_learned, latents.shape[1:3]))
    kept = F.pad(~hidden, (buffers, 0), value=True)
    x = x[kept].reshape(len(x), -1, x.shape[2])
    for block in mar.encoder_blocks:
        x = block(x)
    return mar.encoder_norm(x)


def vit_block(block: Block, x: Tensor) -> Tensor:  # [B, L, D]
    """Run a block of the encoder or decoder."""
    attn, mlp = block.attn, block.mlp
    p = attn.dropout if block.training else 0.0
    q, k, v = attn.qkv(block.norm1(x)).unflatten(-1, (3, attn.heads, -1)).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=p).transpose(1, 2).flatten(2)
    x = x + F.dropout(attn.proj(mixed), p)
    return x + F.dropout(mlp.fc2(F.dropout(F.gelu(mlp.fc1(block.norm2(x))), p)), p)


def decode(mar: Mar, x: Tensor, hidden: Tensor, grid: tuple[int, int]) -> Tensor:
    """Decode the condition of every token, [B, S, D]."""
    x, buffers = mar.decoder_embed(x), mar.c.buffers
    kept = F.pad(~hidden, (buffers, 0), value=True)
    whole = mar.mask_token.repeat(len(x), kept.shape[1], 1).to(x.dtype)
    whole[kept] = x.reshape(-1, x.shape[2])
    x = whole + mar.positions(mar.decoder_pos_embed_learned, grid)
    for block in mar.decoder_blocks:
        x = block(x)
    return mar.decoder_norm(x)[:, buffers:] + mar.positions(mar.diffusion_pos_embed_learned, grid)


def diffusion_losses(self: Harmon, prepared: Prepared, z: Tensor, latents: Tensor, rng: CounterRNG) -> Tensor:
    """Compute the loss of every token at each of its timesteps, [repeats B S]."""
    repeats, (batch, size), ids = self.config.mar.repeats, prepared.is_hidden.shape, sample_ids(self, prepared)
    x0, condition = (x.reshape(batch * size, -1).repeat(repeats, 1) for x in (latents, z))
    token, repeat = torch.arange(size, device=z.device), torch.arange(repeats, device=z.device)
    address = ((ids[:, None] * repeats + repeat[:, None, None]) * size + token).flatten()
    t = (rng.uniform(RandomStream.TIMESTEP, address)[:, 0] * STEPS).long()
    noise: Philox = rng.noise(RandomStream.NOISE, address)
    eps = philox_normal(noise, x0.shape[1]).to(x0.dtype)
    table = diffusion_schedule(STEPS, device=z.device)
    x_t = reference.add_noise(x0, t, eps, table, None)
    out = denoise(self.mar.diffloss.net, x_t, t, condition, self.recomputed_head)
    return reference.losses(out, x0, t, eps, table, None)


def sample_ids(self: Harmon, prepared: Prepared) -> Tensor:
    """Return the global ids of the samples from the addresses of their noise, int64 [B]."""
    repeats, size = self.config.mar.repeats, prepared.is_hidden.shape[1]
    first = prepared.is_hidden.sum(1).cumsum(0) - prepared.is_hidden.sum(1)
    return prepared.noise[first] // (repeats * size)


def denoise(head: DiffusionHead, x_t: Tensor, t: Tensor, condition: Tensor, checkpointed: bool) -> Tensor:
    """Run the head on every row."""
    half = FREQUENCIES // 2
    rates = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angles = t.float()[:, None] * rates
    y = head.time_embed["mlp"](torch.cat([angles.cos(), angles.sin()], dim=1)) + head.cond_embed(condition)
    x = head.input_proj(x_t)
    for block in head.res_blocks:
        x = checkpoint(head_block, block, x, y, use_reentrant=False) if checkpointed else head_block(block, x, y)
    shift, scale = modulation(head.final_layer, y).chunk(2, dim=-1)
    return head.final_layer.linear(head.final_layer.norm(x) * (1 + scale) + shift)


def head_block(block: HeadBlock, x: Tensor, y: Tensor) -> Tensor:
    """Run one residual block."""
    shift, scale, gate = modulation(block, y).chunk(3, dim=-1)
    return x + gate * block.mlp(block.in_ln(x) * (1 + scale) + shift)


def modulation(block: nn.Module, y: Tensor) -> Tensor:
    """Compute a block's shift, scale and gate."""
    return block.adaLN_modulation(F.silu(y))
