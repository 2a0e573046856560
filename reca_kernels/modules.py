"""The losses as modules: options are checked at construction, tensors passed at each call. No parameters or buffers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reca_kernels import checks
from reca_kernels.diffusion_loss import op as diffusion
from reca_kernels.diffusion_loss.op import diffusion_add_noise, diffusion_loss
from reca_kernels.diffusion_loss.schedule import diffusion_schedule
from reca_kernels.flow_matching import op as flow_matching
from reca_kernels.flow_matching.op import flow_matching_add_noise, flow_matching_loss
from reca_kernels.masked_cross_entropy import op as cross_entropy
from reca_kernels.masked_cross_entropy.op import masked_cross_entropy
from reca_kernels.masked_linear_cross_entropy import op as linear_cross_entropy
from reca_kernels.masked_linear_cross_entropy.op import masked_linear_cross_entropy
from reca_kernels.philox.address import Philox


class _Loss(nn.Module):
    """Store the options of an op."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class MaskedCrossEntropy(_Loss):
    """Compute `masked_cross_entropy`; a replacement for `torch.nn.CrossEntropyLoss`. Raises what the function raises.

    Args:
        ignore_index: The label of rows that carry none.
        label_smoothing: Weight of the mean over all classes, in [0, 1).
        z_loss: Weight of the squared log-sum-exp.
        softcap: Logits are softcap tanh(logits / softcap), unless None.
        reduction: "mean" over the rows that carry a label, "sum" or "none".
        inplace: The backward pass writes the gradient over the logits.
        backend: The backend that runs. None: chosen by device, dtype and size.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        reduction: str = "mean",
        inplace: bool = False,
        backend: str | None = None,
    ) -> None:
        checks.cross_entropy_options(cross_entropy.OP, ignore_index, label_smoothing, z_loss, softcap, reduction)
        super().__init__(
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            reduction=reduction,
            inplace=inplace,
            backend=backend,
        )

    def forward(
        self,
        logits: Tensor,  # [N, V]
        labels: Tensor,  # [N]
    ) -> Tensor:  # fp32 (fp64 for fp64 inputs), [] or [N]
        """Return the loss of the rows that carry a label."""
        return masked_cross_entropy(logits, labels, **self.options)


class MaskedLinearCrossEntropy(_Loss):
    """Compute `masked_linear_cross_entropy`. Raises what the function raises.

    The head's weight is an argument of the call, as in Liger's fused loss.

    Args:
        ignore_index: The label of rows that carry none.
        label_smoothing: Weight of the mean over all classes, in [0, 1).
        z_loss: Weight of the squared log-sum-exp.
        softcap: Logits are softcap tanh(logits / softcap), unless None.
        reduction: "mean" over the rows that carry a label, "sum" or "none".
        chunk_rows: Rows of logits that exist at a time. None: 512 on CPUs, as many as fit in 1/32 of a GPU's memory.
        backend: The backend that runs. None: chosen by device, dtype and size.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        reduction: str = "mean",
        chunk_rows: int | None = None,
        backend: str | None = None,
    ) -> None:
        linear_cross_entropy.check_chunk_rows(chunk_rows)
        checks.cross_entropy_options(linear_cross_entropy.OP, ignore_index, label_smoothing, z_loss, softcap, reduction)
        super().__init__(
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            reduction=reduction,
            chunk_rows=chunk_rows,
            backend=backend,
        )

    def forward(
        self,
        hidden: Tensor,  # [N, D]
        weight: Tensor,  # [V, D]
        labels: Tensor,  # [N]
        bias: Tensor | None = None,  # [V]
        max_labelled: int | None = None,
    ) -> Tensor:  # fp32 (fp64 for fp64 hidden), [] or [N]
        """Return the loss of hidden @ weight.T + bias. `max_labelled` is an upper bound on the rows with a label."""
        return masked_linear_cross_entropy(hidden, weight, labels, bias, max_labelled=max_labelled, **self.options)


class FlowMatchingLoss(_Loss):
    """Add noise and compute `flow_matching_loss`, with the same patch size for both.

    Raises what `flow_matching_add_noise` and `flow_matching_loss` raise.

    Args:
        patch: Side of a patch, in latent pixels.
        reduction: "mean" over all elements, "sum", or "sample" for the mean of every image.
        backend: The backend that runs. None: chosen by device, dtype and size.
    """

    def __init__(self, patch: int = 1, reduction: str = "mean", backend: str | None = None) -> None:
        flow_matching.check_patch(patch)
        checks.one_reduction(flow_matching.OP, reduction, flow_matching.REDUCTIONS)
        super().__init__(patch=patch, reduction=reduction, backend=backend)

    def add_noise(
        self,
        x0: Tensor | Sequence[Tensor],  # [B, C, H, W], or B times [C, H, W]
        t: Tensor,  # [B]
        noise: Philox | Tensor,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Return x_t = (1 - t) x0 + t eps; see `flow_matching_add_noise`."""
        patch, backend = self.options["patch"], self.options["backend"]
        return flow_matching_add_noise(x0, t, noise, patch=patch, out_dtype=out_dtype, backend=backend)

    def forward(
        self,
        pred: Tensor,  # shaped like add_noise's result
        x0: Tensor | Sequence[Tensor],
        t: Tensor,  # [B]
        noise: Philox | Tensor,
        weight: Tensor | None = None,  # [B]
    ) -> Tensor:  # fp32 (fp64 for fp64 inputs), [] or [B]
        """Return the squared error of the velocity `pred`. The target does not depend on t."""
        return flow_matching_loss(pred, x0, t, noise, weight=weight, **self.options)


class DiffusionLoss(_Loss):
    """Add noise and compute `diffusion_loss`, with the same schedule for both.

    Raises what `diffusion_schedule`, `diffusion_add_noise` and `diffusion_loss` raise.

    Args:
        steps: The number of steps of the diffusion process.
        kind: The noise schedule; only "cosine" is implemented.
        reduction: "mean" over rows, "sum" or "none".
        backend: The backend that runs. None: chosen by device, dtype and size.
    """

    def __init__(
        self, steps: int = 1000, kind: str = "cosine", reduction: str = "mean", backend: str | None = None
    ) -> None:
        super().__init__(reduction=reduction, backend=backend)
        checks.one_reduction(diffusion.OP, reduction)
        self.steps, self.kind = steps, kind
        self.schedule("cpu")  # raises for wrong steps and an unknown kind

    def extra_repr(self) -> str:
        return f"steps={self.steps}, kind={self.kind!r}, {super().extra_repr()}"

    def schedule(self, device: torch.device | str) -> Tensor:
        """Return the schedule, fp32 [steps, 8]. It is cached per device; no buffer that `module.half()` would round."""
        return diffusion_schedule(self.steps, self.kind, device)

    def add_noise(
        self,
        x0: Tensor,  # [N, C]
        t: Tensor,  # [M] int
        noise: Philox | Tensor,
        rows: Tensor | None = None,  # [M] int
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:  # [M, C]
        """Return x_t at step t of every row; see `diffusion_add_noise`."""
        backend = self.options["backend"]
        return diffusion_add_noise(
            x0, t, noise, self.schedule(x0.device), rows=rows, out_dtype=out_dtype, backend=backend
        )

    def forward(
        self,
        out: Tensor,  # [M, 2 C]
        x0: Tensor,  # [N, C]
        t: Tensor,  # [M] int
        noise: Philox | Tensor,
        rows: Tensor | None = None,  # [M] int
    ) -> Tensor:  # fp32 (fp64 for fp64 inputs), [] or [M]
        """Return the loss of the predicted noise and variance `out`; see `diffusion_loss`."""
        return diffusion_loss(out, x0, t, noise, self.schedule(x0.device), rows=rows, **self.options)
