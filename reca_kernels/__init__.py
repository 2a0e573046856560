"""Fused kernels for reconstruction-alignment training of unified multimodal models."""

from reca_kernels.attention.op import attention
from reca_kernels.attention.plan import AttentionPlan, AttentionSpan, attention_plan
from reca_kernels.diffusion_loss.op import diffusion_add_noise, diffusion_loss
from reca_kernels.diffusion_loss.schedule import diffusion_schedule, space_timesteps
from reca_kernels.dispatch import backend_report
from reca_kernels.flow_matching.op import flow_matching_add_noise, flow_matching_loss
from reca_kernels.masked_cross_entropy.op import masked_cross_entropy
from reca_kernels.masked_linear_cross_entropy.op import masked_linear_cross_entropy
from reca_kernels.modules import DiffusionLoss, FlowMatchingLoss, MaskedCrossEntropy, MaskedLinearCrossEntropy
from reca_kernels.philox.address import Philox
from reca_kernels.philox.op import philox_normal, philox_uniform
from reca_kernels.template_concat.op import template_concat
from reca_kernels.template_concat.plan import IGNORE_INDEX, ConcatPlan, TextSegment, VisualSegment, concat_plan
from reca_kernels.version import __version__

__all__ = [
    "IGNORE_INDEX",
    "AttentionPlan",
    "AttentionSpan",
    "ConcatPlan",
    "DiffusionLoss",
    "FlowMatchingLoss",
    "MaskedCrossEntropy",
    "MaskedLinearCrossEntropy",
    "Philox",
    "TextSegment",
    "VisualSegment",
    "__version__",
    "attention",
    "attention_plan",
    "backend_report",
    "concat_plan",
    "diffusion_add_noise",
    "diffusion_loss",
    "diffusion_schedule",
    "flow_matching_add_noise",
    "flow_matching_loss",
    "masked_cross_entropy",
    "masked_linear_cross_entropy",
    "philox_normal",
    "philox_uniform",
    "space_timesteps",
    "template_concat",
]
