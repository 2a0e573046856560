"""masked_cross_entropy: given logits, some rows with labels."""

import torch
import torch.nn.functional as F

from benchmarks.runner import Case, compiled, gradients
from benchmarks.shapes import CROSS_ENTROPY
from reca_kernels import masked_cross_entropy

BEST_EAGER = "eager, rows gathered"


def cases():
    for name, s in CROSS_ENTROPY.items():
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(0, s["vocabulary"], (s["rows"],), generator=generator)
        labels[torch.rand(s["rows"], generator=generator) >= s["labelled"]] = -100
        keep = labels != -100
        for dtype in (torch.float32, torch.bfloat16):
            logits = torch.randn(s["rows"], s["vocabulary"], generator=generator).to(dtype).requires_grad_()
            wide = logits.detach().double().requires_grad_()

            def upstream(x=logits, labels=labels):  # fp32 copies of all rows, as Show-o's trainer makes them
                return gradients(F.cross_entropy(x.float(), labels, ignore_index=-100), x)

            def gathered(x=logits, keep=keep, labels=labels):
                return gradients(F.cross_entropy(x[keep].float(), labels[keep]), x)

            def exact(x=wide, labels=labels):
                return gradients(F.cross_entropy(x, labels, ignore_index=-100), x)

            fast = compiled(lambda x, labels=labels: F.cross_entropy(x.float(), labels, ignore_index=-100))
            providers = {
                "ours": lambda x=logits, labels=labels: gradients(masked_cross_entropy(x, labels), x),
                "eager as upstream": upstream,
                BEST_EAGER: gathered,
                "torch.compile": lambda x=logits, f=fast: gradients(f(x), x),
            }
            moved = (2 * int(keep.sum()) + s["rows"]) * s["vocabulary"] * logits.element_size()
            yield Case(
                "masked_cross_entropy", name, str(dtype).removeprefix("torch."), providers, dict.fromkeys(providers, exact), moved
            )
