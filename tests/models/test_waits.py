"""No loss or gradient of any model waits for a GPU: the host decides shapes, and copies stand in the queue."""

import inspect
import io
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import Tensor

from reca import objective
from reca.config.recipe import ObjectiveConfig
from reca.config.recipe_files import load_recipe
from reca.data.batch import Batch, task_rng
from reca.data.tasks import Scored, ScoredBox
from reca.data.transforms import make_view
from reca.models import UMMS, umm_package
from reca.models.bagel import config as bagel
from reca.models.common import scored_flow
from reca.models.harmon import config as harmon
from reca.models.janus import config as janus
from reca.models.janusflow import config as janusflow
from reca.models.open_uni import config as open_uni
from reca.models.show_o import config as show_o
from reca.rng import CounterRNG
from reca.toy_datasets.shapes import understood
from reca_kernels import AttentionSpan as Span
from reca_kernels import attention_plan
from reca_kernels.attention import dense, flex
from reca_kernels.attention import plan as attention_plans
from reca_kernels.host import on_device
from tests.models.fake_gpu import GPU, Waited, gpu, modules_of

# Ways to wait, and what is none. x: fp32 [4] on the GPU; h: int64 [4] on the host.
WAITS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "item": lambda x, h: x[0].item(),
    "float": lambda x, h: float(x.sum()),
    "int": lambda x, h: int(x[0]),
    "bool": lambda x, h: bool((x > 0).any()),
    "if": lambda x, h: 1 if x.sum() > 0 else 0,
    "tolist": lambda x, h: x.tolist(),
    "list": lambda x, h: [float(one) for one in x],
    "range": lambda x, h: h[: x.long()[0]],
    "cpu": lambda x, h: x.cpu(),
    "to": lambda x, h: x.to("cpu", non_blocking=True),
    "numpy": lambda x, h: x.numpy(),
    "nonzero": lambda x, h: x.nonzero(),
    "where": lambda x, h: torch.where(x > 0),
    "mask": lambda x, h: x[x > 0],
    "masked_select": lambda x, h: x.masked_select(x > 0),
    "assignment": lambda x, h: x.__setitem__(h > 0, 1.0),
    "unique": lambda x, h: x.unique(),
    "repeats": lambda x, h: x.repeat_interleave(x.long()),
    "equal": lambda x, h: torch.equal(x, x),
    "split": lambda x, h: x.split(x.long().tolist()),
    "up": lambda x, h: h.to(x.device),
    "up_late_dtype": lambda x, h: h.to(x.device, torch.float32),
    "tensor": lambda x, h: torch.tensor([1.0, 2.0], device=x.device),
    "scalar": lambda x, h: torch.tensor(1.0, device=x.device),
    "new_tensor": lambda x, h: x.new_tensor([1.0]),
    "as_tensor": lambda x, h: torch.as_tensor([1, 2], device=x.device),
    "index": lambda x, h: x[h],
    "list_index": lambda x, h: x[[0, 2]],
    "fill": lambda x, h: x.copy_(h),
    "mixed": lambda x, h: x + h,
}
NONE: dict[str, Callable[[Tensor, Tensor], object]] = {
    "late": lambda x, h: x + on_device(h, x.device),
    "full": lambda x, h: torch.full((), 3, device=x.device) + x,
    "arange": lambda x, h: x[torch.arange(2, device=x.device)],
    "where": lambda x, h: torch.where(x > 0, x, 0.0).sum(),
    "slice": lambda x, h: x[: int(h[1])],
    "host": lambda x, h: h[h > 1].tolist(),
    "repeats": lambda x, h: x.repeat_interleave(x.long(), output_size=4),
    "scalar": lambda x, h: x * torch.tensor(2.0),
}


@pytest.mark.parametrize("name", WAITS)
def test_waits_are_seen(name, monkeypatch):
    with gpu(monkeypatch) as waits:
        x, h = waits.put(torch.zeros(4)), torch.arange(4)
        # Some are refused by torch, as there is nothing to see.
        with waits, pytest.raises((Waited, RuntimeError, NotImplementedError, TypeError)):
            WAITS[name](x, h)


@pytest.mark.parametrize("name", NONE)
def test_other_work_is_none(name, monkeypatch):
    with gpu(monkeypatch) as waits:
        x, h = waits.put(torch.zeros(4)), torch.arange(4)
        with waits:
            NONE[name](x, h)


# ---- the losses ----

# The published codecs in small, and everything that changes what the host decides.
MAGVIT = show_o.MagvitSizes(32, [1, 1, 1], [1] * 3, [1, 1, 1], [1] * 3, 4)
KL16 = harmon.AutoencoderSizes(32, [1, 1, 2], 1, latent_channels=4)
DC_AE = open_uni.AutoencoderSizes(8, 8, ["ResBlock", "EfficientViTBlock"], [8, 16], [1, 1], [1, 1])
VQ = janus.VqSizes(32, [1, 1, 1], 1, z_channels=32, entries=145)
FLUX = bagel.AutoencoderSizes([32, 32], 1, 4)
SDXL = janusflow.AutoencoderSizes([32, 32], 1, 4)
VARIANTS = {
    "show_o": [{}, {"parity": True}, {"hv_source": "vq", "hv_down_scale": 1}, {"codec": "magvitv2", "magvit": MAGVIT}],
    "harmon": [{}, {"parity": True}, {"codec": "kl16", "autoencoder": KL16}],
    "open_uni": [{}, {"parity": True}, {"codec": "dc_ae", "autoencoder": DC_AE}],
    "bagel": [{}, {"parity": True}, {"hv_source": "vae"}, {"codec": "flux", "autoencoder": FLUX, "image_size": 16}],
    "janus": [{}, {"codec": "vq", "vq": VQ, "reca_drop": 0.5, "caption_drop": 0.5}],
    "janusflow": [{"codec": "sdxl", "autoencoder": SDXL, "reca_drop": 0.5, "caption_drop": 0.5}],
}


def cases():
    for umm in UMMS:
        for changes in VARIANTS.get(umm, [{}]):
            for task in sorted(umm_package(umm).Adapter.tasks):
                yield pytest.param(umm, changes, task, id=f"{umm}-{task}-{'-'.join(changes) or 'plain'}")


def batch_of(model, task, n=4):
    source, views = understood("i2t"), model.views(task)
    samples = [source[i] for i in range(n)]

    def seen(view):
        return view and [make_view(Image.open(io.BytesIO(sample.image)), view) for sample in samples]

    text = [sample.text if task == "i2t" else sample.text[0].answer for sample in samples]
    target = None
    if task == "srum":
        text, target = [Scored(caption, (ScoredBox(0, 0, 0.5, 1, -0.5),)) for caption in text], seen(views.gen)
    return Batch(task, torch.arange(n), text, gen=seen(views.gen), und=seen(views.und), target=target)


@pytest.mark.parametrize("umm,changes,task", list(cases()))
def test_no_loss_waits(umm, changes, task, monkeypatch):
    model = umm_package(umm).Adapter.load(replace(load_recipe(f"{umm}_tiny").model, **changes)).train()
    batch, given, rng = batch_of(model, task), [], task_rng(0, task)
    prepared = model.prepare(batch, rng)
    without_kernels(monkeypatch, umm, given)
    with gpu(monkeypatch) as waits:
        waits.put(model)
        here, batch.prepared = batch.to(GPU), prepared
        with waits:
            batch = batch.to(GPU)
            term = model(here, rng)  # prepared now; by the loader, in the steps below
            sums = objective.backward(model, {task: [batch]}, ObjectiveConfig(), 0, nullcontext())
            batch.sources = [0, 1, 0, 1]
            told = {task: ["a", "b"]}
            by_source = objective.backward(model, {task: [batch]}, ObjectiveConfig(), 0, nullcontext(), told)
    assert term.sum.device == term.weight.device == sums[task].device == GPU
    assert term.sum.shape == term.weight.shape == ()
    assert term.sum.dtype == term.weight.dtype == torch.float32
    assert any(p.grad is not None for p in model.parameters())
    # The head's products have as many rows as carry a label, which the host has to know.
    cross_entropy = task == "i2t" or umm in ("show_o", "janus")
    assert given == ([prepared.weight] * 4 if cross_entropy else [])
    assert by_source.keys() == {task, f"{task}/loss@a", f"{task}/loss@b"} and by_source[f"{task}/loss@a"].device == GPU


def test_ids_on_the_host_follow_a_batch():
    batch = Batch("t2i", torch.arange(3), [""] * 3)
    assert batch.host_ids.tolist() == [0, 1, 2]
    moved = batch.to(GPU)
    assert moved.sample_ids.is_meta and moved.host_ids.tolist() == [0, 1, 2] == moved.to(GPU).host_ids.tolist()
    assert replace(batch.to("cpu"), sample_ids=torch.tensor([7, 8, 9])).host_ids.tolist() == [7, 8, 9]


def test_a_batch_goes_through_pinned_memory(monkeypatch):
    """From other memory CUDA copies when the GPU has done all it was given, whatever non_blocking says."""
    seen = []
    monkeypatch.setattr("reca.data.batch.on_device", lambda x, device: seen.append(x) or x.to(device))
    ones = iter(torch.ones(n) for n in range(1, 20))
    neighbour = Batch("reca", next(ones), ["a"], gen=[next(ones)])
    features = {"codes": next(ones), "h_v": [next(ones), next(ones)]}
    pixels = {name: [next(ones), next(ones)] for name in ("gen", "und", "target")}
    Batch("reca", next(ones), ["a", "b"], features=features, neighbour=neighbour, **pixels).to(GPU)
    assert sorted(map(len, seen)) == list(range(1, len(next(ones))))


@pytest.mark.parametrize("impl", ["calls", "dense", "flex"])
def test_no_plan_waits(impl, monkeypatch):
    """Index tensors and masks of a layout that is new, as ragged batches bring one every step.

    The functions that make them are called, as what keeps their results lets no mode see how they are made.
    """
    runs = [
        (
            Span(2, "pad"),
            Span(3),
            Span(6, "full", visible_to_earlier=True),
            Span(5),
        ),
        (Span(4), Span(6, "full", True), Span(6)),
    ]
    make = {
        "calls": attention_plans._calls,
        "dense": inspect.unwrap(dense._dense_mask),
        "flex": inspect.unwrap(flex._blocks_of),
    }
    monkeypatch.setattr("torch.nn.attention.flex_attention.create_block_mask", lambda *a, **b: None)
    with gpu(monkeypatch) as waits, waits:
        assert make[impl](attention_plan(runs, device=GPU))


@pytest.mark.gpu
@pytest.mark.parametrize("umm", UMMS)
def test_no_loss_waits_for_a_real_gpu(umm):
    """Real kernels; torch raises for what it knows to wait."""
    device = torch.device("cuda")
    model = umm_package(umm).Adapter.load(load_recipe(f"{umm}_tiny").model, device).train()
    for task in sorted(model.tasks):
        first = batch_of(model, task)
        other = replace(first, sample_ids=first.sample_ids + 100)  # other rng, so other layouts
        batches = [batch.to(device) for batch in (first, other)]
        model(batches[0], CounterRNG(0))  # compiles, and makes what is kept
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            term = model(batches[1], CounterRNG(0))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert bool(term.sum.isfinite()) and float(term.weight) == model.prepare(batches[1], CounterRNG(0)).weight


def without_kernels(monkeypatch, umm, given):
    """Ops as the shapes they return, on tensors of one device."""

    def together(*tensors):
        for x in tensors:
            assert x is None or x.device == GPU, x.device

    def concat(table, visual, src, adds=(), out_dtype=None):
        together(table, visual, src, *(x for add in adds for x in add))
        return (table.new_empty(*src.shape, table.shape[1]) + table.sum() + visual.sum()).to(out_dtype or table.dtype)

    def head(hidden, weight, labels, bias=None, *, reduction, max_labelled=None):
        together(hidden, weight, labels, bias)
        given.append(max_labelled)
        return hidden.float().sum(1 if reduction == "none" else None)

    def flow_prepare(x0, t, noise, patch=1, out_dtype=None):
        images = list(x0)
        together(*images, t, noise.seed, noise.sample_ids)
        if isinstance(x0, Tensor):
            return torch.empty_like(x0, dtype=out_dtype or torch.float32)
        rows = sum(z.shape[1] * z.shape[2] // patch**2 for z in images)
        return images[0].new_empty(rows, images[0].shape[0] * patch**2, dtype=out_dtype or torch.float32)

    def flow(pred, x0, t, noise, patch=1, reduction="mean"):
        together(pred, *x0, t, noise.seed, noise.sample_ids)
        return pred.new_zeros(len(x0)) + pred.float().sum() if reduction == "sample" else pred.float().sum()

    def diffuse(x0, t, noise, schedule, rows=None, out_dtype=None):
        together(x0, t, noise.seed, noise.sample_ids, schedule, rows)
        return x0.new_empty(len(t), x0.shape[1])

    def diffusion(out, x0, t, noise, schedule, rows=None, reduction="mean"):
        together(out, x0, t, noise.seed, noise.sample_ids, schedule, rows)
        return out.float().flatten(1).sum(1) if reduction == "none" else out.float().sum()

    stands = {
        "template_concat": concat,
        "masked_linear_cross_entropy": head,
        "flow_matching_add_noise": flow_prepare,
        "flow_matching_loss": flow,
        "diffusion_add_noise": diffuse,
        "diffusion_loss": diffusion,
    }
    for module in (*modules_of(umm), scored_flow):
        for name in stands.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, stands[name])
