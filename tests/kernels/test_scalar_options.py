"""Options that are numbers or dtypes: a value of another kind is named, whatever the backend."""

import re

import numpy as np
import pytest
import torch

from reca_kernels import (
    AttentionSpan,
    Philox,
    TextSegment,
    VisualSegment,
    attention,
    attention_plan,
    concat_plan,
    diffusion_add_noise,
    diffusion_schedule,
    flow_matching_add_noise,
    masked_cross_entropy,
    masked_linear_cross_entropy,
    philox_normal,
    space_timesteps,
    template_concat,
)

ROWS, LABELS, WEIGHT = torch.randn(4, 8), torch.zeros(4, dtype=torch.int64), torch.randn(5, 8)
SEED, IDS, T = torch.tensor(1), torch.arange(4), torch.rand(4)
NOISE, IMAGES, SRC = Philox(SEED, IDS, 0), torch.randn(4, 2, 4, 4), torch.zeros(4, dtype=torch.int64)
PLAN = attention_plan([[AttentionSpan(4)]])
HEADS = ROWS.view(4, 1, 8)


@pytest.mark.parametrize("wrong", ["2", 2.0, True, torch.tensor(2)], ids=repr)
@pytest.mark.parametrize(
    "name, call",
    [
        ("ignore_index", lambda n: masked_cross_entropy(ROWS, LABELS, ignore_index=n)),
        ("ignore_index", lambda n: masked_linear_cross_entropy(ROWS, WEIGHT, LABELS, ignore_index=n)),
        ("chunk_rows", lambda n: masked_linear_cross_entropy(ROWS, WEIGHT, LABELS, chunk_rows=n)),
        ("max_labelled", lambda n: masked_linear_cross_entropy(ROWS, WEIGHT, LABELS, max_labelled=n)),
        ("n", lambda n: philox_normal(NOISE, n)),
        ("stream", lambda n: philox_normal(Philox(SEED, IDS, n), 4)),
        ("patch", lambda n: flow_matching_add_noise(IMAGES, T, NOISE, patch=n)),
        ("length", lambda n: attention_plan([[AttentionSpan(2), AttentionSpan(n)]])),
        ("n", lambda n: concat_plan([[VisualSegment(n)]])),
        ("length", lambda n: concat_plan([[TextSegment([1])]], length=n)),
        ("pad_id", lambda n: concat_plan([[TextSegment([1])]], pad_id=n)),
        ("steps", lambda n: diffusion_schedule(n)),
        ("keep", lambda n: diffusion_schedule(10, keep=n)),
        ("keep", lambda n: space_timesteps(10, n)),
    ],
)
def test_what_is_no_whole_number(name, call, wrong):
    """A span of 2.0 rows was taken where one of 2 had been planned before, and n=-1 gave no numbers."""
    call(np.int64(4))
    with pytest.raises(TypeError, match=re.escape(f"{name} must be a whole number, got {wrong!r}")):
        call(wrong)


@pytest.mark.parametrize("wrong", ["2", None, torch.tensor(2.0)], ids=repr)
@pytest.mark.parametrize(
    "name, call",
    [
        ("label_smoothing", lambda x: masked_cross_entropy(ROWS, LABELS, label_smoothing=x)),
        ("z_loss", lambda x: masked_linear_cross_entropy(ROWS, WEIGHT, LABELS, z_loss=x)),
        ("softcap", lambda x: masked_cross_entropy(ROWS, LABELS, softcap=x)),
        ("scale", lambda x: attention(HEADS, HEADS, HEADS, PLAN, scale=x)),
    ],
)
def test_what_is_no_number(name, call, wrong):
    call(np.float32(0.5))
    if wrong is None and name in ("softcap", "scale"):
        call(None)
        return
    with pytest.raises(TypeError, match=f"{name} must be a number, got {type(wrong).__name__}"):
        call(wrong)


@pytest.mark.parametrize("wrong", ["bf16", torch.int32, torch.complex64, "cuda"], ids=repr)
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(
    "call",
    [
        lambda **options: template_concat(WEIGHT, ROWS, SRC, **options),
        lambda **options: flow_matching_add_noise(IMAGES, T, NOISE, **options),
        lambda **options: diffusion_add_noise(ROWS, LABELS, NOISE, diffusion_schedule(10), **options),
    ],
    ids=["template_concat", "flow_matching", "diffusion_loss"],
)
def test_what_is_no_dtype_of_a_result(call, backend, wrong):
    """Embeddings as int32 were rounded to 0."""
    assert call(out_dtype=torch.float64, backend=backend).dtype == torch.float64
    with pytest.raises(TypeError, match=r"out_dtype must be a floating-point torch.dtype or None, got"):
        call(out_dtype=wrong, backend=backend)


def test_values_that_no_noise_and_no_sum_can_have():
    with pytest.raises(ValueError, match="n must be at least 0, got -1"):
        philox_normal(NOISE, -1)
    with pytest.raises(TypeError, match=r"adds must be a list of pairs \(rows, index\)"):
        template_concat(WEIGHT, ROWS, SRC, adds=(WEIGHT, SRC))
