"""Fused kernels for reconstruction-alignment training of unified multimodal models."""

from reca_kernels.dispatch import backend_report
from reca_kernels.ops.attention import attention
from reca_kernels.ops.attention_plan import AttentionPlan, Run, attention_plan
from reca_kernels.ops.concat_plan import IGNORE_INDEX, ConcatPlan, TextSegment, VisualSegment, concat_plan
from reca_kernels.ops.diffusion_loss import diffusion_loss, diffusion_prepare, diffusion_schedule, diffusion_steps
from reca_kernels.ops.flow_matching import flow_matching_loss, flow_matching_prepare
from reca_kernels.ops.masked_cross_entropy import masked_cross_entropy
from reca_kernels.ops.masked_linear_cross_entropy import masked_linear_cross_entropy
from reca_kernels.ops.philox import Philox, philox_normal, philox_uniform
from reca_kernels.ops.template_concat import template_concat
from reca_kernels.version import __version__

__all__ = [
    "IGNORE_INDEX",
    "AttentionPlan",
    "ConcatPlan",
    "Philox",
    "Run",
    "TextSegment",
    "VisualSegment",
    "__version__",
    "attention",
    "attention_plan",
    "backend_report",
    "concat_plan",
    "diffusion_loss",
    "diffusion_prepare",
    "diffusion_schedule",
    "diffusion_steps",
    "flow_matching_loss",
    "flow_matching_prepare",
    "masked_cross_entropy",
    "masked_linear_cross_entropy",
    "philox_normal",
    "philox_uniform",
    "template_concat",
]
