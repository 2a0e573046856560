"""BAGEL's language model: every layer has two experts, one for understanding and one for generation, and one attention.

Text, image borders and h_v are rows of the understanding expert, latents are rows of the generation expert. They are
kept apart, each side contiguous, so that no layer gathers or scatters; they meet in the joint attention alone.

A sequence is read in passes. A pass sees what earlier passes left in a `KVCache`, and returns a cache that holds its
own keys and values too. Where understanding is frozen its rows run without a graph, also in the pass of a noisy image,
so that no gradient reaches their keys and values (as the release's `freeze_und`, which detaches them one by one).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reca.models.common.qwen2 import Qwen2Sizes
from reca_kernels import AttentionPlan, AttentionSpan, attention, attention_plan

UND, GEN = "", "_moe_gen"  # parameter-name suffix of each expert
KeysValues = tuple[Tensor, Tensor]  # each [rows, key heads, head_dim], one sample after another


class Split(NamedTuple):
    """Rows of one sample that enter the sequence together: a text, or an image.

    They see what the sample has kept so far, and each other by their mode. The rows of a pass stand in the order of its
    splits, for both experts.

    mode  causal, full, or noise: full, and no later row sees them (the release's attn_modes)
    """

    sample: int
    und: int  # rows of the understanding expert
    gen: int  # rows of the generation expert
    mode: str

    def rows(self, expert: str) -> int:
        return self.gen if expert == GEN else self.und


class KVCache:
    """Keys and values that later passes see.

    layers     [layer]: of all samples, packed; None while no sample has a row
    lengths    [sample]: its rows
    positions  [sample]: rotary position of its next row
    """

    def __init__(self, layers: list[KeysValues | None], lengths: list[int], positions: list[int]):
        self.layers, self.lengths, self.positions = layers, lengths, positions

    @classmethod
    def empty(cls, layers: int, samples: int) -> "KVCache":
        return cls([None] * layers, [0] * samples, [0] * samples)

    def __len__(self) -> int:
        return len(self.lengths)

    def __add__(self, other: "KVCache") -> "KVCache":
        """Concatenate the samples of both."""
        layers = [_concatenate(mine, theirs) for mine, theirs in zip(self.layers, other.layers, strict=True)]
        return KVCache(layers, self.lengths + other.lengths, self.positions + other.positions)

    def after(self, layers: list[KeysValues | None], splits: Sequence[Split], positions: list[int]) -> "KVCache":
        """Return the cache after a pass over `splits` that left `layers`."""
        lengths = list(self.lengths)
        for split in splits:
            lengths[split.sample] += 0 if split.mode == "noise" else split.und + split.gen
        return KVCache(layers, lengths, positions)

    def split(self, n: int) -> tuple["KVCache", "KVCache"]:
        """Return the cache of the first n samples and that of the others."""
        rows = sum(self.lengths[:n])
        first = [layer and (layer[0][:rows], layer[1][:rows]) for layer in self.layers]
        rest = [layer and (layer[0][rows:], layer[1][rows:]) for layer in self.layers]
        return (
            KVCache(first, self.lengths[:n], self.positions[:n]),
            KVCache(rest, self.lengths[n:], self.positions[n:]),
        )


class Pass:
    """Attention layout and rotary tables shared by all layers of one pass.

    attention  what the rows see: per sample the cached rows and then its splits
    lengths    [sample]: cached rows
    uniform    all samples have the same layout
    rotary     per expert the cosines and sines of its rows' positions, fp32 [rows, head_dim / 2]
    learn      the understanding rows carry a gradient

    It is no dataclass, and its tables are no arguments of a layer, as FSDP2 would cast them to bf16.
    """

    def __init__(
        self,
        splits: Sequence[Split],
        attention: AttentionPlan,
        lengths: Sequence[int],
        uniform: bool,
        rotary: dict[str, KeysValues],
        learn: bool,
    ) -> None:
        self.splits, self.attention, self.lengths = splits, attention, lengths
        self.uniform, self.rotary, self.learn = uniform, rotary, learn

    @classmethod
    def plan(cls, splits: Sequence[Split], cache: KVCache, rotary: dict[str, KeysValues], learn: bool) -> "Pass":
        """Plan a pass over `splits` behind what is cached."""
        samples = [[AttentionSpan(length, cached=True)] if length else [] for length in cache.lengths]
        for split in splits:
            samples[split.sample].append(AttentionSpan(split.und + split.gen, split.mode))
        device = next(iter(rotary.values()))[0].device
        uniform = bool(splits) and len(set(map(tuple, samples))) == 1
        return cls(splits, attention_plan(samples, device=device), cache.lengths, uniform, rotary, learn)

    def graph(self, expert: str) -> bool:
        """Return whether this expert's rows are computed with a graph."""
        return torch.is_grad_enabled() and (expert == GEN or self.learn)


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

    def project(self, expert: str, x: Tensor, rotary: KeysValues) -> tuple[Tensor, Tensor, Tensor]:  # [rows, D]
        """Return queries [rows, heads, d], keys and values [rows, key heads, d]; norm and rotation in fp32."""
        q, k, v = (getattr(self, f"{p}_proj{expert}")(x).unflatten(-1, (-1, self.head_dim)) for p in "qkv")
        q, k = (
            apply_rotary(getattr(self, f"{name}_norm{expert}")(rows.float()), *rotary).to(v.dtype)
            for name, rows in (("q", q), ("k", k))
        )
        return q, k, v

    def forward(
        self, rows: dict[str, Tensor], past: KeysValues | None, now: Pass
    ) -> tuple[dict[str, Tensor], KeysValues | None]:
        """rows: per expert [rows, D], experts without rows left out. Returns the same, and what later passes see."""
        projected = {}
        for expert, x in rows.items():
            with torch.set_grad_enabled(now.graph(expert)):
                projected[expert] = self.project(expert, x, now.rotary[expert])
        mixed, kept = joint_attention(projected, past, now)
        out = {}
        for expert, heads in mixed.items():
            with torch.set_grad_enabled(now.graph(expert)):
                out[expert] = getattr(self, f"o_proj{expert}")(heads.flatten(1).to(rows[expert].dtype))
        return out, kept


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
        self, rows: dict[str, Tensor], past: KeysValues | None, now: Pass
    ) -> tuple[dict[str, Tensor], KeysValues | None]:
        normed = {}
        for expert, x in rows.items():
            with torch.set_grad_enabled(now.graph(expert)):
                normed[expert] = getattr(self, f"input_layernorm{expert}")(x)
        mixed, kept = self.self_attn(normed, past, now)
        out = {}
        for expert, x in rows.items():
            with torch.set_grad_enabled(now.graph(expert)):
                x = x + mixed[expert]
                out[expert] = x + getattr(self, f"mlp{expert}")(getattr(self, f"post_attention_layernorm{expert}")(x))
        return out, kept


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
        cache: KVCache,
        learn: bool,
    ) -> tuple[dict[str, Tensor], list[KeysValues | None]]:
        """Return normed hidden states per expert, and per layer what later passes see."""
        head_dim = self.sizes.hidden_size // self.sizes.num_attention_heads
        rotary = {expert: rotary_cos_sin(positions[expert], head_dim, self.sizes.rope_theta) for expert in rows}
        now, kept = Pass.plan(splits, cache, rotary, learn), []
        for layer, past in zip(self.layers, cache.layers, strict=True):
            rows, seen = layer(rows, past, now)
            kept.append(seen)
        out = {}
        for expert, x in rows.items():
            with torch.set_grad_enabled(now.graph(expert)):
                out[expert] = getattr(self, f"norm{expert}")(x)
        return out, kept


class LanguageModel(nn.Module):
    def __init__(self, sizes: Qwen2Sizes):
        super().__init__()
        self.model = Transformer(sizes)
        self.lm_head = nn.Linear(sizes.hidden_size, sizes.vocab_size, bias=False)


@torch.compiler.disable  # layouts change; what stands around it compiles for any number of rows
def joint_attention(
    projected: dict[str, tuple[Tensor, Tensor, Tensor]], past: KeysValues | None, now: Pass
) -> tuple[dict[str, Tensor], KeysValues | None]:
    """Attend from the rows of both experts to all that they see.

    projected: per expert queries, keys and values, [rows, heads, d]. Returns per expert [rows, heads, d], and the keys
    and values that later passes see.
    """
    q, k, v = (_by_split({expert: rows[i] for expert, rows in projected.items()}, now) for i in range(3))
    if past is not None:
        k, v = (_behind(old, new, now) for old, new in zip(past, (k, v), strict=True))
    q = q.to(k.dtype)
    if now.uniform:
        samples = len(now.lengths)
        queries, keys, values = (x.unflatten(0, (samples, -1)) for x in (q, k, v))
        out = attention(queries, keys, values, now.attention).flatten(0, 1)
    else:
        out = attention(q, k, v, now.attention)
    mixed = _by_expert(out, list(projected), now)
    mixed = {expert: heads if now.graph(expert) else heads.detach() for expert, heads in mixed.items()}
    return mixed, _kept(past, (k, v), now)


def _by_split(rows: dict[str, Tensor], now: Pass) -> Tensor:
    """Put the rows of both experts into the order of the splits, in each the understanding rows first."""
    if len(rows) == 1:
        return next(iter(rows.values()))
    if alike := _alike(now.splits):
        pieces = [rows[expert].unflatten(0, (alike, -1)) for expert in (UND, GEN)]
        return torch.cat(pieces, dim=1).flatten(0, 1)
    pieces = [rows[expert].split([split.rows(expert) for split in now.splits]) for expert in (UND, GEN)]
    return torch.cat([piece for pair in zip(*pieces, strict=True) for piece in pair])


def _by_expert(rows: Tensor, experts: list[str], now: Pass) -> dict[str, Tensor]:
    """Undo `_by_split`."""
    if len(experts) == 1:
        return {experts[0]: rows}
    if alike := _alike(now.splits):
        first = now.splits[0]
        und, gen = rows.unflatten(0, (alike, -1)).split([first.und, first.gen], dim=1)
        return {UND: und.flatten(0, 1), GEN: gen.flatten(0, 1)}
    pieces = rows.split([n for split in now.splits for n in (split.und, split.gen)])
    return {UND: torch.cat(pieces[::2]), GEN: torch.cat(pieces[1::2])}


def _alike(splits: Sequence[Split]) -> int:
    """Return the number of splits where all have as many rows of each expert, else 0."""
    return len(splits) if len({(split.und, split.gen) for split in splits}) == 1 else 0


def _behind(old: Tensor, new: Tensor, now: Pass) -> Tensor:
    """Put every sample's new rows behind its cached ones."""
    if now.uniform:
        return torch.cat([x.unflatten(0, (len(now.lengths), -1)) for x in (old, new)], dim=1).flatten(0, 1)
    pieces = old.split(list(now.lengths)), new.split(list(now.attention.query_sizes))
    return torch.cat([piece for pair in zip(*pieces, strict=True) for piece in pair])


def _kept(past: KeysValues | None, seen: KeysValues, now: Pass) -> KeysValues | None:
    """Take what is noise out of the keys and values that a pass has seen."""
    noise = [split.mode == "noise" for split in now.splits]
    if not any(noise):
        return seen
    if all(noise):
        return past
    samples: list[list[tuple[int, bool]]] = [[(length, True)] for length in now.lengths]
    for split in now.splits:
        samples[split.sample].append((split.und + split.gen, split.mode != "noise"))
    sizes, stay = zip(*(piece for sample in samples for piece in sample), strict=True)
    k, v = (torch.cat([p for p, s in zip(x.split(list(sizes)), stay, strict=True) if s]) for x in seen)
    return k, v


def _concatenate(first: KeysValues | None, second: KeysValues | None) -> KeysValues | None:
    if first is None or second is None:
        return second if first is None else first
    return torch.cat((first[0], second[0])), torch.cat((first[1], second[1]))


def rotary_cos_sin(positions: Tensor, head_dim: int, theta: float) -> KeysValues:  # int64 [rows]
    """Return cosines and sines of rotary positions, fp32 [rows, head_dim / 2]."""
    steps = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    angles = positions.float()[:, None] * theta ** (-steps / head_dim)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [rows, H, d], [rows, d / 2] twice
    """Rotate the first half of each head against the second."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
