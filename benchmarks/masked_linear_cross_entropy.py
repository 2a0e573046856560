"""masked_linear_cross_entropy: output head and cross-entropy in one, logits never kept."""

import torch
import torch.nn.functional as F

from benchmarks.runner import Case, compiled, gradients
from benchmarks.shapes import LINEAR_CROSS_ENTROPY
from reca_kernels import masked_linear_cross_entropy

BEST_EAGER = "eager, rows gathered"


def cases():
    for name, s in LINEAR_CROSS_ENTROPY.items():
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(s["rows"], s["hidden"], generator=generator).requires_grad_()
        weight = (torch.randn(s["vocabulary"], s["hidden"], generator=generator) * 0.02).requires_grad_()
        bias = torch.zeros(s["vocabulary"]).requires_grad_()
        labels = torch.randint(0, s["vocabulary"], (s["rows"],), generator=generator)
        labels[torch.rand(s["rows"], generator=generator) >= s["labelled"]] = -100
        keep, leaves = labels != -100, (hidden, weight, bias)

        def upstream(leaves=leaves, labels=labels):  # logits of all rows, in fp32
            return gradients(F.cross_entropy(F.linear(*leaves).float(), labels, ignore_index=-100), *leaves)

        def gathered(leaves=leaves, labels=labels, keep=keep):
            h, w, b = leaves
            return gradients(F.cross_entropy(F.linear(h[keep], w, b), labels[keep]), *leaves)

        fast = compiled(lambda h, w, b, labels=labels: F.cross_entropy(F.linear(h, w, b), labels, ignore_index=-100))

        wide = [x.detach().double().requires_grad_() for x in leaves]

        def exact(leaves=wide, labels=labels, keep=keep):
            h, w, b = leaves
            return gradients(F.cross_entropy(F.linear(h[keep], w, b), labels[keep]), *leaves)

        def ours(leaves=leaves, labels=labels):
            h, w, b = leaves
            return gradients(masked_linear_cross_entropy(h, w, labels, b), *leaves)

        providers = {
            "ours": ours,
            "eager as upstream": upstream,
            BEST_EAGER: gathered,
            "torch.compile": lambda leaves=leaves, f=fast: gradients(f(*leaves), *leaves),
        }
        yield Case(
            "masked_linear_cross_entropy", name, "float32", providers, dict.fromkeys(providers, exact), 3 * weight.numel() * 4
        )
