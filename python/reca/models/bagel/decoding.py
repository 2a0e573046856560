"""BAGEL's decoding: passes of one text token per sample after a cache that they extend in place."""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from reca.models.bagel.modules import Network
from reca.models.bagel.transformer import UND, KeysValues, KVCache, Pass
from reca.models.common.kv_cache import GrowingLayer
from reca.models.common.planned import OneRow, padded, unpadded


class OneRowPass(Pass[GrowingLayer]):
    """A pass of one row of the understanding expert per sample. It makes no attention plan.

    row  what the rows attend to
    """

    def __init__(self, rotary: KeysValues, row: OneRow):
        super().__init__({UND: rotary}, learn=False)
        self.row = row

    @torch.compiler.disable  # else every number of cached rows would recompile
    def attend(
        self, projected: dict[str, tuple[Tensor, Tensor, Tensor]], past: GrowingLayer
    ) -> tuple[dict[str, Tensor], GrowingLayer]:
        q, k, v = (rows[:, :, None] for rows in projected[UND])
        keys, values = past.update(k, v)
        return {UND: self.row.attend(q.to(k.dtype), keys, values)}, past


class Continuation:
    """Continue the samples of a cache one text token at a time. The cache itself stays as it is."""

    def __init__(self, net: Network, cache: KVCache):
        self.net, self.positions = net, torch.tensor(cache.positions, device=net.device)
        self.row = OneRow(unpadded(padded(cache.lengths, max(cache.lengths)), net.device))
        self.layers = [_growing(layer, cache.lengths) for layer in cache.layers]

    def __call__(self, ids: Tensor) -> Tensor:  # int64 [B]
        """Return the last hidden states of these tokens, [B, D]."""
        model, self.row = self.net.language_model.model, self.row.behind()
        rows = model.embed_tokens(ids).to(self.net.residual_dtype(model.embed_tokens.weight))
        out, _ = model({UND: rows}, self.layers, OneRowPass(model.rotary(self.positions), self.row))
        self.positions = self.positions + 1
        return out[UND]


def _growing(packed: KeysValues | None, lengths: list[int]) -> GrowingLayer:
    """Return the rows of a layer padded on the left, with room for more."""
    layer = GrowingLayer()
    if packed is not None:
        k, v = (pad_sequence(x.split(lengths), batch_first=True, padding_side="left") for x in packed)
        layer.update(k.transpose(1, 2), v.transpose(1, 2))
    return layer
