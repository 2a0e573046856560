"""Benchmark of template_concat: token embeddings and h_v in one sequence; frozen or trained table, additive rows."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from benchmarks.devices import Device
from benchmarks.rows import BACKWARD, BOTH, FORWARD
from benchmarks.runner import BF16, FP32, Case, Provider, compiled, ours, shapes
from reca_kernels import TextSegment, VisualSegment, concat_plan, template_concat

# Positions per sample: text + visual + image (default 0). The language models of OpenUni and BAGEL are frozen.
# added: number of visual rows to which position and timestep embeddings are added (default 0), as to BAGEL's 64 x 64
# latents. trained: whether the table is trained (default: frozen).
SHAPES = {
    "cpu": {
        "show_o_512": dict(
            batch=4, text=130, visual=576, image=1024, hidden=2048, vocabulary=58498, trained=(False, True),
            dtypes=(FP32,),
        ),
        "open_uni_l": dict(batch=8, text=60, visual=256, hidden=1536, vocabulary=32000, dtypes=(FP32,)),
    },
    "cuda": {
        "show_o_512": dict(
            batch=20, text=132, visual=576, image=1024, hidden=2048, vocabulary=58498, trained=(False, True),
            dtypes=(BF16,),
        ),
        "harmon": dict(
            batch=32, text=64, visual=1088, hidden=1536, vocabulary=151936, trained=(False, True), dtypes=(BF16,),
        ),
        "open_uni_l": dict(batch=32, text=40, visual=512, hidden=1536, vocabulary=151674, dtypes=(BF16,)),
        "bagel": dict(batch=7, text=586, visual=4096, hidden=3584, vocabulary=152064, added=4096, dtypes=(BF16,)),
    },
    "sizes": {
        "rows of 8": dict(batch=2, text=8, visual=8, hidden=8, vocabulary=64, dtypes=(FP32, BF16)),
        "rows of 256": dict(batch=2, text=32, visual=32, hidden=256, vocabulary=1024, dtypes=(FP32, BF16)),
    },
}  # fmt: skip

HEAD = 2  # text tokens before the visual rows


def cases(device: Device):
    place = device.torch_device
    for name, s in shapes(SHAPES, device):
        for trained in s.get("trained", (False,)):
            for dtype in s["dtypes"]:
                yield _case(device, name + (", table trained" if trained else ""), s, trained, dtype, place)


def _case(device, name, s, trained, dtype, place) -> Case:
    batch, hidden, n, added = s["batch"], s["hidden"], s["visual"], s.get("added", 0)
    words = s["text"] + s.get("image", 0)

    def inputs(seed):
        generator = torch.Generator(place).manual_seed(seed)

        def drawn(*shape):
            return torch.randn(shape, generator=generator, device=place).to(dtype)

        ids = torch.randint(0, s["vocabulary"], (batch, words), generator=generator, device=place)
        plan = concat_plan([[TextSegment(row[:HEAD]), VisualSegment(n), TextSegment(row[HEAD:])] for row in ids.cpu()])
        src = plan.src.view(batch, -1).to(place)
        x = SimpleNamespace(
            table=drawn(s["vocabulary"], hidden).requires_grad_(trained),
            visual=drawn(batch, n, hidden).requires_grad_(),
            ids=ids,
            src=src,
            grad=drawn(batch, src.shape[1], hidden),
        )
        if added:
            x.positions, x.steps = drawn(added, hidden), drawn(batch, hidden).requires_grad_()
            x.position_index = torch.full_like(src, -1)
            x.position_index[:, HEAD : HEAD + added] = torch.arange(added, device=place)
            x.step_index = torch.where(x.position_index >= 0, torch.arange(batch, device=place)[:, None], -1).int()
        return x

    def run(x, backend):
        adds = ((x.steps, x.step_index), (x.positions, x.position_index)) if added else ()
        return (template_concat(x.table, x.visual, x.src, adds=adds, backend=backend),)

    def plus(visual, steps, positions):
        if not added:
            return visual
        return torch.cat((visual[:, :added] + steps[:, None] + positions, visual[:, added:]), dim=1)

    def step(ids, table, visual, steps=None, positions=None):
        e = F.embedding(ids, table)
        return torch.cat((e[:, :HEAD], plus(visual, steps, positions), e[:, HEAD:]), dim=1)

    def sources(x):
        return x.ids, x.table, x.visual, *((x.steps, x.positions) if added else ())

    def one_cat(x):
        return (step(*sources(x)),)

    def scattered(x):  # zeros, then two boolean scatters, as OpenUni and BAGEL do
        ids, table, *rest = sources(x)
        out = torch.zeros(*x.src.shape, hidden, dtype=dtype, device=place)
        out[x.src >= 0] = F.embedding(ids, table).flatten(0, 1)
        out[x.src < 0] = plus(*rest, *[None] * (3 - len(rest))).flatten(0, 1)
        return (out,)

    fast = compiled(step)

    def with_compile(x, fast=fast):
        return (fast(*sources(x)),)

    rows, seen = batch * (words + n), batch * n
    width = hidden * dtype.itemsize
    # forward reads every source row once and writes the sequence; backward reads and writes gradients of trained rows
    forward = (2 * rows + (added + batch if added else 0)) * width
    backward = (2 * seen + (batch if added else 0)) * width
    if trained:
        backward += (rows - seen + s["vocabulary"]) * width
    return Case(
        op="template_concat",
        shape=name,
        dtype=str(dtype).removeprefix("torch."),
        numel=s["vocabulary"] * hidden,
        inputs=inputs,
        leaves=("visual", *(["table"] if trained else []), *(["steps"] if added else [])),
        providers={
            **ours("template_concat", device, run),
            "eager as upstream": Provider(scattered),
            "eager, one cat": Provider(one_cat),
            "torch.compile": Provider(with_compile),
        },
        best="eager, one cat",
        formula=one_cat,
        bytes={FORWARD: forward, BACKWARD: backward, BOTH: forward + backward},
    )
