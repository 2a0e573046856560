"""BAGEL's language model: every layer has an expert for understanding, one for generation, and joint attention.

Text, image borders and h_v are rows of the understanding expert; latents are rows of the generation expert. The rows of
each expert are a contiguous tensor of their own, so that no layer gathers or scatters except in the joint attention.

A sequence is processed in passes. A pass attends to the `KVCache` of earlier passes, and returns a cache extended by
its own keys and values. If understanding is frozen, its rows run without a gradient, also in the pass of a noisy image,
so that no gradient reaches their keys and values. The release's `freeze_und` detaches them one by one instead.
"""

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reca.models.common.qwen2 import Qwen2Sizes
from reca_kernels import AttentionPlan, AttentionSpan, attention, attention_plan

UND, GEN = "", "_moe_gen"  # parameter-name suffix of each expert
KeysValues = tuple[Tensor, Tensor]  # each [rows, key heads, head_dim], samples concatenated
P = TypeVar("P")  # the form in which a pass reads and keeps a layer's keys and values


class Split(NamedTuple):
    """Consecutive rows of one sample with the same attention mode: a text, or an image.

    They attend to the sample's earlier rows and to each other according to `mode`. For both experts, the rows of a pass
    are in the order of its splits.

    mode  causal; full; or noise: full, and no later row attends to them (the release's attn_modes)
    """

    sample: int
    und: int  # rows of the understanding expert
    gen: int  # rows of the generation expert
    mode: str

    def rows(self, expert: str) -> int:
        return self.gen if expert == GEN else self.und


class KVCache:
    """Keys and values that later passes attend to.

    layers     keys and values of all samples per layer, packed; None if there are no rows yet
    lengths    number of rows of each sample
    positions  rotary position of each sample's next row
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
        """Return the cache after a pass over `splits`. layers: its keys and values per layer, earlier ones included."""
        lengths = list(self.lengths)
        for split in splits:
            lengths[split.sample] += 0 if split.mode == "noise" else split.und + split.gen
        return KVCache(layers, lengths, positions)

    def split(self, n: int) -> tuple["KVCache", "KVCache"]:
        """Return the cache of the first n samples, and that of the others."""
        rows = sum(self.lengths[:n])
        first = [layer and (layer[0][:rows], layer[1][:rows]) for layer in self.layers]
        rest = [layer and (layer[0][rows:], layer[1][rows:]) for layer in self.layers]
        return (
            KVCache(first, self.lengths[:n], self.positions[:n]),
            KVCache(rest, self.lengths[n:], self.positions[n:]),
        )


class Pass(Generic[P]):
    """Attention and rotary tables shared by all layers of one pass.

    rotary  cosines and sines of the rows' positions per expert, fp32 [rows, head_dim / 2]
    learn   whether the understanding rows have a gradient

    This is not a dataclass, and its tables are not arguments of a layer, because FSDP2 would cast them to bf16.
    """

    def __init__(self, rotary: dict[str, KeysValues], learn: bool) -> None:
        self.rotary, self.learn = rotary, learn

    def graph(self, expert: str) -> bool:
        """Tell whether this expert's rows are computed with a gradient."""
        return torch.is_grad_enabled() and (expert == GEN or self.learn)

    def attend(self, projected: dict[str, tuple[Tensor, Tensor, Tensor]], past: P) -> tuple[dict[str, Tensor], P]:
        """Compute attention jointly over the rows of both experts and the cached ones.

        projected: queries, keys and values per expert, [rows, heads, d]. Returns [rows, heads, d] per expert, and the
        keys and values to cache.
        """
        raise NotImplementedError


class PackedPass(Pass[KeysValues | None]):
    """A pass over splits of any length, whose samples are concatenated.

    attention  attention plan: for each sample its cached rows, then its splits
    lengths    number of cached rows of each sample
    uniform    whether all samples have the same layout
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
        super().__init__(rotary, learn)
        self.splits, self.attention, self.lengths, self.uniform = splits, attention, lengths, uniform

    @classmethod
    def plan(cls, splits: Sequence[Split], cache: KVCache, rotary: dict[str, KeysValues], learn: bool) -> "PackedPass":
        """Plan a pass over `splits` that follow the cached rows."""
        samples = [[AttentionSpan(length, cached=True)] if length else [] for length in cache.lengths]
        for split in splits:
            samples[split.sample].append(AttentionSpan(split.und + split.gen, split.mode))
        device = next(iter(rotary.values()))[0].device
        uniform = bool(splits) and len(set(map(tuple, samples))) == 1
        return cls(splits, attention_plan(samples, device=device), cache.lengths, uniform, rotary, learn)

    @torch.compiler.disable  # else every new layout would recompile; a layer's rest compiles for any number of rows
    def attend(
        self, projected: dict[str, tuple[Tensor, Tensor, Tensor]], past: KeysValues | None
    ) -> tuple[dict[str, Tensor], KeysValues | None]:
        q, k, v = (_by_split({expert: rows[i] for expert, rows in projected.items()}, self) for i in range(3))
        if past is not None:
            k, v = (_behind(old, new, self) for old, new in zip(past, (k, v), strict=True))
        q = q.to(k.dtype)
        if self.uniform:
            samples = len(self.lengths)
            queries, keys, values = (x.unflatten(0, (samples, -1)) for x in (q, k, v))
            out = attention(queries, keys, values, self.attention).flatten(0, 1)
        else:
            out = attention(q, k, v, self.attention)
        mixed = _by_expert(out, list(projected), self)
        mixed = {expert: heads if self.graph(expert) else heads.detach() for expert, heads in mixed.items()}
        return mixed, _kept(past, (k, v), self)


class RMSNorm(nn.Module):
    """RMSNorm with fp32 statistics and a result in the input's dtype."""

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
        """Compute queries [rows, heads, d], and keys and values [rows, key heads, d]; norm and RoPE are in fp32."""
        q, k, v = (getattr(self, f"{p}_proj{expert}")(x).unflatten(-1, (-1, self.head_dim)) for p in "qkv")
        q, k = (
            apply_rotary(getattr(self, f"{name}_norm{expert}")(rows.float()), *rotary).to(v.dtype)
            for name, rows in (("q", q), ("k", k))
        )
        return q, k, v

    def forward(self, rows: dict[str, Tensor], past: P, now: Pass[P]) -> tuple[dict[str, Tensor], P]:
        """Attend jointly. rows: [rows, D] per expert that has rows. Returns the same, and keys and values to cache."""
        projected = {}
        for expert, x in rows.items():
            with torch.set_grad_enabled(now.graph(expert)):
                projected[expert] = self.project(expert, x, now.rotary[expert])
        mixed, kept = now.attend(projected, past)
        out = {}
        for expert, heads in mixed.items():
            with torch.set_grad_enabled(now.graph(expert)):
                out[expert] = getattr(self, f"o_proj{expert}")(heads.flatten(1).to(rows[expert].dtype))
        return out, kept


class MLP(nn.Module):
    """An MLP with SwiGLU."""

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

    def forward(self, rows: dict[str, Tensor], past: P, now: Pass[P]) -> tuple[dict[str, Tensor], P]:
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

    def rotary(self, positions: Tensor) -> KeysValues:  # int64 [rows]
        """Compute the cosines and sines of rotary positions, fp32 [rows, head_dim / 2]."""
        c = self.sizes
        return rotary_cos_sin(positions, c.hidden_size // c.num_attention_heads, c.rope_theta)

    def forward(
        self,
        rows: dict[str, Tensor],  # per expert [rows, D]
        layers: Sequence[P],
        now: Pass[P],
    ) -> tuple[dict[str, Tensor], list[P]]:
        """Return the normalised hidden states per expert, and the keys and values to cache per layer."""
        kept = []
        for layer, past in zip(self.layers, layers, strict=True):
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


def _by_split(rows: dict[str, Tensor], now: PackedPass) -> Tensor:
    """Merge the rows of both experts in the order of the splits; within a split, understanding rows come first."""
    if len(rows) == 1:
        return next(iter(rows.values()))
    if alike := _alike(now.splits):
        pieces = [rows[expert].unflatten(0, (alike, -1)) for expert in (UND, GEN)]
        return torch.cat(pieces, dim=1).flatten(0, 1)
    pieces = [rows[expert].split([split.rows(expert) for split in now.splits]) for expert in (UND, GEN)]
    return torch.cat([piece for pair in zip(*pieces, strict=True) for piece in pair])


def _by_expert(rows: Tensor, experts: list[str], now: PackedPass) -> dict[str, Tensor]:
    """Invert `_by_split`."""
    if len(experts) == 1:
        return {experts[0]: rows}
    if alike := _alike(now.splits):
        first = now.splits[0]
        und, gen = rows.unflatten(0, (alike, -1)).split([first.und, first.gen], dim=1)
        return {UND: und.flatten(0, 1), GEN: gen.flatten(0, 1)}
    pieces = rows.split([n for split in now.splits for n in (split.und, split.gen)])
    return {UND: torch.cat(pieces[::2]), GEN: torch.cat(pieces[1::2])}


def _alike(splits: Sequence[Split]) -> int:
    """Return the number of splits if all have the same number of rows per expert, else 0."""
    return len(splits) if len({(split.und, split.gen) for split in splits}) == 1 else 0


def _behind(old: Tensor, new: Tensor, now: PackedPass) -> Tensor:
    """Append every sample's new rows to its cached ones."""
    if now.uniform:
        return torch.cat([x.unflatten(0, (len(now.lengths), -1)) for x in (old, new)], dim=1).flatten(0, 1)
    pieces = old.split(list(now.lengths)), new.split(list(now.attention.query_sizes))
    return torch.cat([piece for pair in zip(*pieces, strict=True) for piece in pair])


def _kept(past: KeysValues | None, seen: KeysValues, now: PackedPass) -> KeysValues | None:
    """Remove the rows of noise splits from the keys and values of a pass."""
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
    """Compute the cosines and sines of rotary positions, fp32 [rows, head_dim / 2]."""
    steps = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    angles = positions.float()[:, None] * theta ** (-steps / head_dim)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [rows, H, d], [rows, d / 2] twice
    """Apply RoPE, pairing channel i of the first half of each head with channel i of the second half."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
