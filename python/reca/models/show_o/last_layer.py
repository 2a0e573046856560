"""The last layer of Show-o's transformer, of which a CPU computes only what is read."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.phi.modeling_phi import PhiDecoderLayer, rotate_half

from reca_kernels import AttentionPlan, AttentionSpan, attention, attention_plan


class Tail(NamedTuple):
    """The rows that attend in the last layer: of every sample, those from the first span with a row that is read.

    plan    what they attend to, which is any row
    rows    int64: their places among all rows
    read    int64: places of the rows that are read, among all rows
    within  int64: places of the rows that are read, among those of the tail
    """

    plan: AttentionPlan
    rows: Tensor
    read: Tensor
    within: Tensor


def find_tail(samples: Sequence[Sequence[AttentionSpan]], read: Tensor) -> Tail:
    """Find the tail of samples without padding. read: int64, in order, on a CPU, as the rows are."""
    ends = np.cumsum([sum(span.length for span in sample) for sample in samples])
    places = np.append(read.numpy(), ends[-1])
    first_read = places[np.searchsorted(places, [0, *ends[:-1]])]
    attends, spans, begin = np.ones(ends[-1], dtype=bool), [], 0
    for sample, at, end in zip(samples, first_read.tolist(), ends.tolist(), strict=True):
        own, earlier = _from_row(tuple(sample), at - begin)
        attends[begin : begin + earlier] = False
        spans.append(own)
        begin = end
    rows = attends.nonzero()[0]
    within = torch.from_numpy(np.searchsorted(rows, places[:-1]))
    return Tail(attention_plan(spans), torch.from_numpy(rows), read, within)


@functools.lru_cache(maxsize=4096)
def _from_row(sample: tuple[AttentionSpan, ...], row: int) -> tuple[tuple[AttentionSpan, ...], int]:
    """Leave the spans before that of a row, at most all but the last, without queries. Returns their length too."""
    earlier, count = 0, 0
    for span in sample[:-1]:
        if earlier + span.length > row:
            break
        earlier, count = earlier + span.length, count + 1
    return (*(span._replace(cached=True) for span in sample[:count]), *sample[count:]), earlier


class LastLayer(PhiDecoderLayer):
    """A layer that may compute the rows alone that are read, as no layer comes behind that attends to others."""

    def forward(self, hidden_states: Tensor, *args: Any, tail: Tail | None = None, **kwargs: Any) -> Tensor:
        """Compute all rows, [B, L, H]; or, with their tail, those that are read in one line, [1, n, H]."""
        if tail is None:
            return super().forward(hidden_states, *args, **kwargs)
        hidden = hidden_states.flatten(0, 1)
        normed = self.input_layernorm(hidden)
        attended = self._attend(normed, tail, *kwargs["position_embeddings"])
        before, normed = (x.index_select(0, tail.read) for x in (hidden, normed))
        return (self.resid_dropout(attended) + self.resid_dropout(self.mlp(normed)) + before)[None]

    def _attend(self, normed: Tensor, tail: Tail, cos: Tensor, sin: Tensor) -> Tensor:  # [T, H], [B, L, turned] twice
        """Compute what `self_attn` gives the rows that are read, [n, H]."""
        own = self.self_attn
        cos, sin = cos.flatten(0, 1)[:, None], sin.flatten(0, 1)[:, None]

        def heads(projection: nn.Module, x: Tensor) -> Tensor:
            return projection(x).unflatten(-1, (-1, own.head_dim))

        q = own.q_layernorm(heads(own.q_proj, normed.index_select(0, tail.rows)))
        k, v = own.k_layernorm(heads(own.k_proj, normed)), heads(own.v_proj, normed)
        q, k = _turn(q, cos[tail.rows], sin[tail.rows]), _turn(k, cos, sin)
        out = attention(q, k, v, tail.plan, scale=own.scaling)
        return own.dense(out.index_select(0, tail.within).flatten(1))


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [T, heads, d], [T, 1, turned] twice
    """Turn the first channels of every head by their positions."""
    turned, kept = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    return torch.cat((turned * cos + rotate_half(turned) * sin, kept), dim=-1)
