"""Use an op of reca_kernels in a plain PyTorch loop: fused output head and cross-entropy on the labelled rows.

    python examples/custom_loss.py

A two-layer model learns to count. Three quarters of the rows are prompt and carry no label: the op excludes them from
every matmul, and never materialises the [rows, vocabulary] logits.
"""

import torch
from torch import nn

from reca_kernels import masked_linear_cross_entropy

ROWS, VOCABULARY, WIDTH = 256, 1000, 64
IGNORE = -100


def main(steps: int = 60) -> list[float]:
    """Train and return the loss of every step."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU())
    head = nn.Linear(WIDTH, VOCABULARY)
    optimizer = torch.optim.AdamW([*body.parameters(), *head.parameters()], lr=1e-2)
    losses = []
    for _ in range(steps):
        tokens = torch.randint(VOCABULARY - 1, (ROWS,))
        labels = torch.where(torch.rand(ROWS) < 0.25, tokens + 1, IGNORE)
        loss = masked_linear_cross_entropy(body(tokens), head.weight, labels, head.bias, ignore_index=IGNORE)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
