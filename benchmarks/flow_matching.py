"""flow_matching: noisy input, then loss and gradient, noise included."""

import torch

from benchmarks.runner import Case, compiled, gradients
from benchmarks.shapes import FLOW
from reca_kernels import Philox, flow_matching_loss, flow_matching_prepare
from reca_kernels.reference.flow_matching import tokens

BEST_EAGER = "eager"


def cases():
    for name, s in FLOW.items():
        generator = torch.Generator().manual_seed(0)
        images = [torch.randn(size, generator=generator) for size in s["sizes"]]
        x0 = torch.stack(images) if s["patch"] == 1 else images
        t, patch = torch.rand(len(images), generator=generator), s["patch"]
        noise = Philox(torch.tensor(5), torch.arange(len(images)), 4)
        pred = torch.randn(flow_matching_prepare(x0, t, noise, patch=patch).shape, generator=generator).requires_grad_()
        counts = torch.tensor([image.numel() for image in images])

        def ours(x0=x0, t=t, noise=noise, pred=pred, patch=patch):
            x_t = flow_matching_prepare(x0, t, noise, patch=patch)
            return x_t, *gradients(flow_matching_loss(pred, x0, t, noise, patch=patch), pred)

        def upstream(images=images, t=t, pred=pred, patch=patch):  # image by image
            clean = torch.cat([tokens(image, patch) for image in images])
            levels = torch.cat([level.expand(image.numel()) for level, image in zip(t, images, strict=True)])
            eps = torch.randn_like(clean)
            x_t = (1 - levels) * clean + levels * eps
            error = (pred.flatten() - (eps - clean)) ** 2
            return x_t, *gradients(error.mean(), pred)

        def eager(images=images, t=t, pred=pred, patch=patch, counts=counts):
            clean = torch.stack(images).flatten(1) if patch == 1 else torch.cat([tokens(i, patch) for i in images])
            level = t[:, None] if patch == 1 else t.repeat_interleave(counts)
            eps = torch.randn_like(clean)
            return torch.lerp(clean, eps, level), *gradients((pred.view_as(clean) - eps).add(clean).square().mean(), pred)

        def step(clean, level, pred):
            eps = torch.randn_like(clean)
            return (1 - level) * clean + level * eps, (pred - (eps - clean)).square().mean()

        fast = compiled(step)

        def with_compile(images=images, t=t, pred=pred, patch=patch, counts=counts, fast=fast):
            clean = torch.cat([tokens(image, patch) for image in images])
            x_t, loss = fast(clean, t.repeat_interleave(counts), pred.flatten())
            return x_t, *gradients(loss, pred)

        def exact(x0=x0, t=t, noise=noise, pred=pred, patch=patch):
            wide = x0.double() if isinstance(x0, torch.Tensor) else [x.double() for x in x0]
            p = pred.detach().double().requires_grad_()
            x_t = flow_matching_prepare(wide, t.double(), noise, patch=patch, backend="reference")
            return x_t, *gradients(flow_matching_loss(p, wide, t, noise, patch=patch, backend="reference"), p)

        providers = {"ours": ours, "eager as upstream": upstream, BEST_EAGER: eager, "torch.compile": with_compile}
        yield Case("flow_matching", name, "float32", providers, {"ours": exact}, 5 * 4 * int(counts.sum()))
