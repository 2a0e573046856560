"""BAGEL's language model: every layer has two experts, one for understanding and one for generation, and one attention.

Text, image borders and h_v are rows of the understanding expert, latents are rows of the generation expert. They are
kept apart, each side contiguous, so that no layer gathers or scatters; they meet as keys of the same attention calls.

A sequence is read in passes. A pass sees what earlier passes left in a `Context`, and leaves its own keys and values
there. Where understanding is frozen its rows run without a graph, also in the pass of a noisy image, so that no
gradient reaches their keys and values (as the release's `freeze_und`, which detaches them one by one).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from reca.models.common.qwen2 import Qwen2Sizes

UND, GEN = "", "_moe_gen"  # what the experts' parts have behind their names
KeysValues = tuple[Tensor, Tensor]  # each [L, key heads, head_dim]
TOGETHER = 512  # rows up to which splits of one shape are stacked for one attention call


class Split(NamedTuple):
    """Rows of one sample that enter the sequence together: a text, or an image.

    They see what the sample has kept so far, and each other: all of it, or (causal) what stands before. The rows of a
    pass stand in the order of its splits, on both sides.
    """

    sample: int
    und: int  # rows of the understanding expert
    gen: int  # rows of the generation expert
    causal: bool
    kept: bool  # later rows of the sample see them; False for a noisy image

    def rows(self, expert: str) -> int:
        return self.gen if expert == GEN else self.und


@dataclass(frozen=True)
class Plan:
    """How the rows of one pass hang together; the same in every layer.

    groups: numbers of splits that attend in one call, in an order in which they may.
    turns: per expert the cosines and sines of its rows' positions, fp32 [rows, head_dim / 2]. They are in here, and no
    arguments of a layer, because FSDP casts those.
    learn: the understanding rows carry a gradient.
    """

    splits: Sequence[Split]
    groups: Sequence[Sequence[int]]
    turns: dict[str, KeysValues]
    learn: bool

    def graph(self, expert: str) -> bool:
        """Whether this expert's rows are computed with a graph."""
        return torch.is_grad_enabled() and (expert == GEN or self.learn)


class Context:
    """What later passes see of each sample.

    layers   [layer][sample]: keys and values, None before the first row
    cursors  [sample]: position of the next row
    """

    def __init__(self, layers: list[list[KeysValues | None]], cursors: list[int]):
        self.layers, self.cursors = layers, cursors

    @classmethod
    def empty(cls, layers: int, samples: int) -> "Context":
        return cls([[None] * samples for _ in range(layers)], [0] * samples)

    def __len__(self) -> int:
        return len(self.cursors)

    def __add__(self, other: "Context") -> "Context":
        """The samples of both, one after another."""
        layers = [mine + theirs for mine, theirs in zip(self.layers, other.layers, strict=True)]
        return Context(layers, self.cursors + other.cursors)


class RMSNorm(nn.Module):
    """Statistics in fp32, result in the dtype of the input."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:  # [..., D]
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    def __init__(self, sizes: Qwen2Sizes):
        super().__init__()
        self.head_dim = sizes.hidden_size // sizes.num_attention_heads
        width, narrow = sizes.hidden_size, sizes.num_key_value_heads * self.head_dim
        for expert in (UND, GEN):
            self.add_module(f"q_proj{expert}", nn.Linear(width, width))
            self.add_module(f"k_proj{expert}", nn.Linear(width, narrow))
            self.add_module(f"v_proj{expert}", nn.Linear(width, narrow))
            self.add_module(f"o_proj{expert}", nn.Linear(width, width, bias=False))
            self.add_module(f"q_norm{expert}", RMSNorm(self.head_dim, sizes.rms_norm_eps))
            self.add_module(f"k_norm{expert}", RMSNorm(self.head_dim, sizes.rms_norm_eps))

    def project(self, expert: str, x: Tensor, turn: KeysValues) -> tuple[Tensor, Tensor, Tensor]:  # [rows, D]
        """Queries [rows, heads, d], keys and values [rows, key heads, d]; norm and rotation in fp32."""
        q, k, v = (getattr(self, f"{p}_proj{expert}")(x).unflatten(-1, (-1, self.head_dim)) for p in "qkv")
        q, k = (
            rotated(getattr(self, f"{name}_norm{expert}")(rows.float()), *turn).to(v.dtype)
            for name, rows in (("q", q), ("k", k))
        )
        return q, k, v

    def forward(
        self, rows: dict[str, Tensor], past: Sequence[KeysValues | None], plan: Plan
    ) -> tuple[dict[str, Tensor], list[KeysValues | None]]:
        """rows: per expert [rows, D], experts without rows left out. Returns the same, and what later passes see."""
        made = {}
        for expert, x in rows.items():
            with torch.set_grad_enabled(plan.graph(expert)):
                made[expert] = self.project(expert, x, plan.turns[expert])
        mixed, seen = mix(made, past, plan)
        out = {}
        for expert, heads in mixed.items():
            with torch.set_grad_enabled(plan.graph(expert)):
                out[expert] = getattr(self, f"o_proj{expert}")(heads.flatten(1).to(rows[expert].dtype))
        return out, seen


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, sizes: Qwen2Sizes):
        super().__init__()
        self.gate_proj = nn.Linear(sizes.hidden_size, sizes.intermediate_size, bias=False)
        self.up_proj = nn.Linear(sizes.hidden_size, sizes.intermediate_size, bias=False)
        self.down_proj = nn.Linear(sizes.intermediate_size, sizes.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, sizes: Qwen2Sizes):
        super().__init__()
        self.self_attn = Attention(sizes)
        for expert in (UND, GEN):
            self.add_module(f"mlp{expert}", MLP(sizes))
            self.add_module(f"input_layernorm{expert}", RMSNorm(sizes.hidden_size, sizes.rms_norm_eps))
            self.add_module(f"post_attention_layernorm{expert}", RMSNorm(sizes.hidden_size, sizes.rms_norm_eps))

    def forward(
        self, rows: dict[str, Tensor], past: Sequence[KeysValues | None], plan: Plan
    ) -> tuple[dict[str, Tensor], list[KeysValues | None]]:
        normed = {}
        for expert, x in rows.items():
            with torch.set_grad_enabled(plan.graph(expert)):
                normed[expert] = getattr(self, f"input_layernorm{expert}")(x)
        mixed, seen = self.self_attn(normed, past, plan)
        out = {}
        for expert, x in rows.items():
            with torch.set_grad_enabled(plan.graph(expert)):
                x = x + mixed[expert]
                out[expert] = x + getattr(self, f"mlp{expert}")(getattr(self, f"post_attention_layernorm{expert}")(x))
        return out, seen


class Transformer(nn.Module):
    def __init__(self, sizes: Qwen2Sizes):
        super().__init__()
        self.sizes = sizes
        self.embed_tokens = nn.Embedding(sizes.vocab_size, sizes.hidden_size)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.num_hidden_layers))
        for expert in (UND, GEN):
            self.add_module(f"norm{expert}", RMSNorm(sizes.hidden_size, sizes.rms_norm_eps))

    def forward(
        self,
        rows: dict[str, Tensor],  # per expert [rows, D]
        positions: dict[str, Tensor],  # per expert int64 [rows]
        splits: Sequence[Split],
        context: Context,
        learn: bool,
    ) -> tuple[dict[str, Tensor], list[list[KeysValues | None]]]:
        """Normed hidden states per expert, and per layer what later passes see."""
        head_dim = self.sizes.hidden_size // self.sizes.num_attention_heads
        turns = {expert: turn(positions[expert], head_dim, self.sizes.rope_theta) for expert in rows}
        plan, kept = Plan(splits, grouped(splits, context), turns, learn), []
        for layer, past in zip(self.layers, context.layers, strict=True):
            rows, seen = layer(rows, past, plan)
            kept.append(seen)
        out = {}
        for expert, x in rows.items():
            with torch.set_grad_enabled(plan.graph(expert)):
                out[expert] = getattr(self, f"norm{expert}")(x)
        return out, kept


class LanguageModel(nn.Module):
    def __init__(self, sizes: Qwen2Sizes):
        super().__init__()
        self.model = Transformer(sizes)
        self.lm_head = nn.Linear(sizes.hidden_size, sizes.vocab_size, bias=False)


@torch.compiler.disable  # a loop over samples; what stands around it compiles for any number of rows
def mix(
    made: dict[str, tuple[Tensor, Tensor, Tensor]], past: Sequence[KeysValues | None], plan: Plan
) -> tuple[dict[str, Tensor], list[KeysValues | None]]:
    """What every row sees. made: per expert queries, keys and values, [rows, heads, d].

    Returns per expert [rows, heads, d], and per sample what later passes see.
    """
    parts = {}
    for expert, projected in made.items():
        sizes = [split.rows(expert) for split in plan.splits]
        with torch.set_grad_enabled(plan.graph(expert)):
            parts[expert] = [rows.split(sizes) for rows in projected]
    seen, out = list(past), {expert: [None] * len(plan.splits) for expert in made}
    for group in plan.groups:
        first, samples = plan.splits[group[0]], [plan.splits[i].sample for i in group]
        own = [expert for expert in made if first.rows(expert)]
        sources = [[seen[sample] for sample in samples]] if seen[first.sample] is not None else []
        sources += [[(parts[expert][1][i], parts[expert][2][i]) for i in group] for expert in own]
        keys, values = (_joined([_stacked([kv[which] for kv in source]) for source in sources]) for which in (0, 1))
        for expert in own:
            with torch.set_grad_enabled(plan.graph(expert)):
                mixed = attend(_stacked([parts[expert][0][i] for i in group]), keys, values, first.causal)
                for i, one in zip(group, mixed.unbind(), strict=True):
                    out[expert][i] = one
        if first.kept:
            for sample, k, v in zip(samples, keys.unbind(), values.unbind(), strict=True):
                seen[sample] = (k, v)
    joined = {}
    for expert, pieces in out.items():
        with torch.set_grad_enabled(plan.graph(expert)):
            # A pass may hold no row at all of an expert: every rank runs the same layers, whatever was dropped.
            joined[expert] = torch.cat([made[expert][0][:0], *(piece for piece in pieces if piece is not None)])
    return joined, seen


def grouped(splits: Sequence[Split], context: Context) -> list[list[int]]:
    """Splits of one shape, from different samples, may attend together; large ones are left alone, because it takes a
    copy of their rows."""
    lengths = [0 if kv is None else len(kv[0]) for kv in context.layers[0]]
    turn_of, groups = [0] * len(lengths), {}
    for i, split in enumerate(splits):
        small = split.und + split.gen <= TOGETHER
        key = (turn_of[split.sample], lengths[split.sample], *split[1:], -1 if small else i)
        groups.setdefault(key, []).append(i)
        turn_of[split.sample] += 1
        if split.kept:
            lengths[split.sample] += split.und + split.gen
    return [groups[key] for key in sorted(groups)]


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:  # [B, Lq, H, d], [B, Lk, G, d] twice
    """Grouped attention, [B, Lq, H, d]. causal: the last query sees every key, the one before it all but the last."""
    mask = None
    if causal and q.shape[1] > 1 and q.is_cuda:
        mask = causal_lower_right(q.shape[1], k.shape[1])
    elif causal and q.shape[1] > 1:  # what the subclass becomes on CPUs, where modes that count or fake can look at it
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril(k.shape[1] - q.shape[1])
    if k.is_cuda and k.dtype == torch.float32:  # FlashAttention knows heads in groups, the fp32 kernels do not
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    q, k, v = (x.to(k.dtype).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def _stacked(rows: list[Tensor]) -> Tensor:
    return rows[0][None] if len(rows) == 1 else torch.stack(rows)


def _joined(parts: list[Tensor]) -> Tensor:  # [B, L, G, d] each
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def turn(positions: Tensor, head_dim: int, theta: float) -> KeysValues:  # int64 [rows]
    """Cosines and sines of rotary positions, fp32 [rows, head_dim / 2]."""
    steps = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    angles = positions.float()[:, None] * theta ** (-steps / head_dim)
    return angles.cos(), angles.sin()


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [rows, H, d], [rows, d / 2] twice
    """First and second half of each head turned against each other."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
