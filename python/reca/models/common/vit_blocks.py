"""Pre-norm ViT blocks with timm's names: those of Harmon's MAR and of Janus' SigLIP."""

import torch.nn.functional as F
from torch import Tensor, nn

from reca.models.common.dropout import attention, dropout


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, seen: Tensor | None) -> Tensor:  # x [B, L, D], seen bool [B, 1, 1, L]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = attention(q, k, v, seen, self.dropout if self.training else 0.0).transpose(1, 2).flatten(2)
        return dropout(self.proj(x), self.dropout, self.training)


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int, dropout: float = 0.0):
        super().__init__()
        self.dropout = dropout
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = dropout(F.gelu(self.fc1(x)), self.dropout, self.training)
        return dropout(self.fc2(x), self.dropout, self.training)


class Block(nn.Module):
    """A block with bidirectional attention. hidden: width of its MLP; eps: epsilon of its LayerNorms."""

    def __init__(self, width: int, heads: int, hidden: int, eps: float, dropout: float = 0.0):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.attn, self.mlp = Attention(width, heads, dropout), Mlp(width, hidden, dropout)

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """Compute [B, L, D]. seen: the keys that are attended to, bool [B, 1, 1, L]; None: all."""
        x = x + self.attn(self.norm1(x), seen)
        return x + self.mlp(self.norm2(x))
