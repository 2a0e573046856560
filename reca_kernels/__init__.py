"""Fused kernels for reconstruction-alignment training of unified multimodal models."""

from reca_kernels.ops.philox import Philox, philox_normal, philox_uniform

__all__ = ["Philox", "philox_normal", "philox_uniform"]
