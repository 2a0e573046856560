"""Shapes of the four UMMs: real ones for a GPU, scaled ones for a CPU of 24 GiB. No benchmark has others.

Every table holds, per kind of device, name -> sizes, and under "sizes" what only the choice of a backend by size needs:
there our own backends and the definition run, nobody else.
"""

import torch

from benchmarks.rows import BY_SIZE

FP32, BF16 = torch.float32, torch.bfloat16

PHILOX = {
    "cpu": {"million": dict(samples=32, n=32768)},
    "cuda": {"bagel": dict(samples=7, n=16 * 128 * 128), "synthetic": dict(samples=256, n=1 << 20)},
    "sizes": {"16": dict(samples=1, n=16), "16k": dict(samples=16, n=1024)},
}

# Show-o masks 2/pi of its codes on average; at 512 px 1024 of a sequence's 1155 positions are codes.
# Harmon's understanding loss is over answers. A RECA micro-batch of Show-o has two images (four at 256 px).
CROSS_ENTROPY = {
    "cpu": {
        "show_o_512": dict(rows=1024, vocabulary=58498, labelled=0.637, dtypes=(FP32, BF16)),
        "harmon_i2t": dict(rows=256, vocabulary=151936, labelled=0.4, dtypes=(FP32, BF16)),
    },
    "cuda": {
        "show_o_512": dict(rows=20 * 1155, vocabulary=58498, labelled=0.637 * 1024 / 1155, dtypes=(BF16, FP32)),
        "show_o_512_reca": dict(rows=2 * 1024, vocabulary=58498, labelled=0.637, dtypes=(BF16,)),
        "harmon_i2t": dict(rows=8192, vocabulary=151936, labelled=0.4, dtypes=(BF16,)),
    },
    "sizes": {
        "8x64": dict(rows=8, vocabulary=64, labelled=0.6, dtypes=(FP32, BF16)),
        "64x1024": dict(rows=64, vocabulary=1024, labelled=0.6, dtypes=(FP32, BF16)),
        "512x8192": dict(rows=512, vocabulary=8192, labelled=0.6, dtypes=(FP32, BF16)),
    },
}

# Phi's head, which Show-o has, adds a bias, Qwen2's does not. The last two on a GPU are shapes of published timings
# (Liger-Kernel pull request 1356, on an H200).
LINEAR_CROSS_ENTROPY = {
    "cpu": {
        "show_o_512": dict(rows=2048, hidden=1024, vocabulary=58498, labelled=0.637, bias=True, dtypes=(FP32,)),
        "show_o_narrow": dict(rows=1155, hidden=256, vocabulary=58498, labelled=0.637, bias=True, dtypes=(FP32,)),
    },
    "cuda": {
        "show_o_512": dict(
            rows=20 * 1155, hidden=2048, vocabulary=58498, labelled=0.637 * 1024 / 1155, bias=True, dtypes=(BF16,)
        ),
        "show_o_512_reca": dict(
            rows=2 * 1024, hidden=2048, vocabulary=58498, labelled=0.637, bias=True, dtypes=(BF16,)
        ),
        "harmon_i2t": dict(rows=8192, hidden=1536, vocabulary=151936, labelled=0.4, bias=False, dtypes=(BF16,)),
        "llm_2048": dict(rows=2048, hidden=2048, vocabulary=102400, labelled=1.0, bias=False, dtypes=(BF16,)),
        "llm_4096": dict(rows=4096, hidden=4096, vocabulary=128256, labelled=1.0, bias=False, dtypes=(BF16,)),
    },
    "sizes": {
        "8x32": dict(rows=8, hidden=32, vocabulary=64, labelled=0.6, bias=True, dtypes=(FP32, BF16)),
        "128x128": dict(rows=128, hidden=128, vocabulary=2048, labelled=0.6, bias=True, dtypes=(FP32, BF16)),
    },
}

# text + visual + image positions per sample. Language models of OpenUni and BAGEL are frozen. `added`: of the visual
# rows, how many get a position's and a timestep's row on top, as BAGEL's 64 x 64 latents do.
CONCAT = {
    "cpu": {
        "show_o_512": dict(
            batch=4,
            text=130,
            visual=576,
            image=1024,
            hidden=2048,
            vocabulary=58498,
            trained=(False, True),
            dtypes=(FP32,),
        ),
        "open_uni_l": dict(
            batch=8, text=60, visual=256, image=0, hidden=1536, vocabulary=32000, trained=(False,), dtypes=(FP32,)
        ),
    },
    "cuda": {
        "show_o_512": dict(
            batch=20,
            text=132,
            visual=576,
            image=1024,
            hidden=2048,
            vocabulary=58498,
            trained=(False, True),
            dtypes=(BF16,),
        ),
        "harmon": dict(
            batch=32,
            text=64,
            visual=1088,
            image=0,
            hidden=1536,
            vocabulary=151936,
            trained=(False, True),
            dtypes=(BF16,),
        ),
        "open_uni_l": dict(
            batch=32, text=40, visual=512, image=0, hidden=1536, vocabulary=151674, trained=(False,), dtypes=(BF16,)
        ),
        "bagel": dict(
            batch=7,
            text=586,
            visual=4096,
            image=0,
            hidden=3584,
            vocabulary=152064,
            trained=(False,),
            added=4096,
            dtypes=(BF16,),
        ),
    },
    "sizes": {
        "rows of 8": dict(
            batch=2, text=8, visual=8, image=0, hidden=8, vocabulary=64, trained=(False,), dtypes=(FP32, BF16)
        ),
        "rows of 256": dict(
            batch=2, text=32, visual=32, image=0, hidden=256, vocabulary=1024, trained=(False,), dtypes=(FP32, BF16)
        ),
    },
}

FLOW = {
    "cpu": {
        "open_uni": dict(sizes=[(32, 32, 32)] * 32, patch=1, dtypes=(FP32,)),
        "bagel": dict(sizes=[(16, 128, 128)] * 4 + [(16, 64, 96)] * 3, patch=2, dtypes=(FP32,)),
    },
    "cuda": {
        "open_uni": dict(sizes=[(32, 32, 32)] * 32, patch=1, dtypes=(FP32, BF16)),
        "bagel": dict(sizes=[(16, 128, 128)] * 7, patch=2, dtypes=(FP32, BF16)),
        "synthetic": dict(sizes=[(16, 256, 256)] * 256, patch=1, dtypes=(FP32, BF16)),
    },
    "sizes": {
        "1 image of 4x4": dict(sizes=[(4, 4, 4)], patch=1, dtypes=(FP32, BF16)),
        "8 images of 16x16": dict(sizes=[(4, 16, 16)] * 8, patch=1, dtypes=(FP32, BF16)),
    },
}

# harmon_hidden_rows: the loss over the rows that were hidden, a quarter of them here
DIFFUSION = {
    "cpu": {
        "harmon_512": dict(samples=32 * 1024, channels=16, repeats=4, dtypes=(FP32,)),
        "harmon_hidden_rows": dict(samples=8 * 1024, channels=16, repeats=4, dtypes=(FP32,)),
    },
    "cuda": {
        "harmon_512": dict(samples=32 * 1024, channels=16, repeats=4, dtypes=(FP32, BF16)),
        "harmon_512_reca": dict(samples=48 * 1024, channels=16, repeats=4, dtypes=(BF16,)),
    },
    "sizes": {
        "8 rows": dict(samples=4, channels=16, repeats=2, dtypes=(FP32, BF16)),
        "1024 rows": dict(samples=512, channels=16, repeats=2, dtypes=(FP32, BF16)),
    },
}


# Runs of a sample: (length, mode, seen before). Show-o: two tokens, h_v that all rows see, prompt, codes, one token.
# BAGEL: SigLIP features and their marks, template, noised latents of 1024 px. Harmon's language model: three tokens,
# h_v, prompt, visible tokens with their buffers.
SHOW_O = [(2, "causal"), (576, "full", True), (127, "causal"), (1024, "full"), (1, "causal")]
BAGEL = [(258, "full"), (326, "causal"), (4098, "noise")]
HARMON = [(3, "causal"), (1088, "causal"), (29, "causal"), (200, "causal")]
ATTENTION = {
    "cpu": {
        "show_o_512": dict(batch=1, runs=SHOW_O, heads=(4, 4), channels=64, dtypes=(FP32,)),
        "bagel": dict(batch=1, runs=[(n // 4, *r) for n, *r in BAGEL], heads=(4, 2), channels=128, dtypes=(FP32,)),
        "harmon": dict(batch=1, runs=HARMON, heads=(6, 1), channels=128, dtypes=(FP32,)),
    },
    "cuda": {
        "show_o_512": dict(batch=20, runs=SHOW_O, heads=(32, 32), channels=64, dtypes=(BF16,)),
        "bagel": dict(batch=7, runs=BAGEL, heads=(28, 4), channels=128, dtypes=(BF16,)),
        "harmon": dict(batch=32, runs=HARMON, heads=(12, 2), channels=128, dtypes=(BF16,)),
    },
    "sizes": {
        "24 rows": dict(
            batch=2, runs=[(8, "causal"), (8, "full", True), (8, "noise")], heads=(2, 1), channels=16, dtypes=(FP32,)
        ),
    },
}


def shapes(table: dict, device: str):
    """(name, sizes) of a device's shapes, then of those that the choice of a backend needs, named BY_SIZE + NAME."""
    yield from table[device].items()
    for name, sizes in table["sizes"].items():
        yield BY_SIZE + name, sizes
