"""Dropout on CPUs: its law, its gradient, what its draws depend on, and the same draws for attention."""

import torch
import torch.nn.functional as F

from reca.models.common.dropout import attention, dropout


def test_its_law():
    torch.manual_seed(0)
    x = torch.ones(1000, 1001)  # no multiple of a vector
    out = dropout(x, 0.1, True)
    assert set(out.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.9))}
    share = (out == 0).double()
    deviation = (0.1 * 0.9 / x.numel()) ** 0.5
    assert abs(share.mean() - 0.1) < 4 * deviation
    assert (share.mean(0) - 0.1).abs().max() < 6 * (0.09 / 1000) ** 0.5  # in no column more than in others
    neighbours = (share[:, 1:] * share[:, :-1]).mean()
    assert abs(neighbours - 0.01) < 5 * (0.01 / x.numel()) ** 0.5
    assert abs(out.double().mean() - 1) < 5 * deviation / 0.9


def test_its_gradient_and_its_seed():
    x = torch.rand(7, 9, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    out = dropout(x, 0.5, True)
    out.sum().backward()
    torch.manual_seed(3)
    assert torch.equal(dropout(x, 0.5, True), out) and torch.equal(x.grad, (out != 0).double() * 2)
    assert dropout(x, 0.5, False) is x and dropout(x, 0.0, True) is x


def test_attention_drops_its_probabilities():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 4, requires_grad=True) for _ in range(3))
    seen = torch.rand(2, 1, 1, 5) < 0.7
    seen[..., 0] = True
    torch.manual_seed(1)
    out = attention(q, k, v, seen, 0.25)
    torch.manual_seed(1)
    weights = ((q @ k.mT) / 2).masked_fill(~seen, -torch.inf).softmax(-1)
    expected = dropout(weights, 0.25, True) @ v
    assert torch.allclose(out, expected, atol=1e-6) and not torch.allclose(out, weights @ v, atol=1e-3)
    whole = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    assert torch.equal(attention(q, k, v, seen, 0.0), whole)
