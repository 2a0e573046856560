"""template_concat: token embeddings and h_v into one sequence; table frozen, and trained."""

import torch
import torch.nn.functional as F

from benchmarks.runner import Case, compiled
from benchmarks.shapes import CONCAT
from reca_kernels import TextSegment, VisualSegment, concat_plan, template_concat

BEST_EAGER = "eager, one cat"


def cases():
    for name, s in CONCAT.items():
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, s["vocabulary"], (s["batch"], s["text"] + s["image"]), generator=generator)
        text, image = ids[:, : s["text"]], ids[:, s["text"] :]
        plan = concat_plan([[TextSegment(t[:2]), VisualSegment(s["visual"]), TextSegment(torch.cat((t[2:], i)))] for t, i in zip(text, image, strict=True)])
        src = plan.src.view(s["batch"], -1)
        for trained in s["trained"]:
            table = torch.randn(s["vocabulary"], s["hidden"], generator=generator).requires_grad_(trained)
            visual = torch.randn(s["batch"], s["visual"], s["hidden"], generator=generator).requires_grad_()
            leaves = (visual, table) if trained else (visual,)
            grad = torch.randn(s["batch"], src.shape[1], s["hidden"], generator=generator)

            def both(x, leaves=leaves, grad=grad):
                # Contiguous, as the products need them that come before: cat's own gradient is a view.
                return x.detach(), *(g.contiguous() for g in torch.autograd.grad(x, leaves, grad))

            def one_cat(table, visual, ids=ids):
                e = F.embedding(ids, table)
                return torch.cat((e[:, :2], visual, e[:, 2:]), dim=1)

            def scattered(table, visual, src=src, ids=ids):  # zeros, then two boolean scatters, as OpenUni does
                x = torch.zeros(*src.shape, table.shape[1])
                x[src >= 0] = F.embedding(ids, table).flatten(0, 1)
                x[src < 0] = visual.flatten(0, 1)
                return x

            fast = compiled(one_cat)
            moved = (src.numel() * 2 + visual.numel() // s["hidden"] * 2) * s["hidden"] * 4
            providers = {
                "ours": lambda t=table, v=visual, src=src, both=both: both(template_concat(t, v, src)),
                "eager as upstream": lambda t=table, v=visual, both=both, f=scattered: both(f(t, v)),
                BEST_EAGER: lambda t=table, v=visual, both=both, f=one_cat: both(f(t, v)),
                "torch.compile": lambda t=table, v=visual, both=both, f=fast: both(f(t, v)),
            }

            def exact(leaves=leaves, table=table, grad=grad, f=one_cat):
                wide = [x.detach().double().requires_grad_() for x in leaves]
                x = f(wide[1] if len(wide) > 1 else table.double(), wide[0])
                return x.detach(), *torch.autograd.grad(x, wide, grad.double())

            shape = f"{name}{', table trained' if trained else ''}"
            bytes_ = moved + (table.numel() * 4 if trained else 0)
            yield Case("template_concat", shape, "float32", providers, dict.fromkeys(providers, exact), bytes_)
