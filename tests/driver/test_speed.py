"""FLOPs, peaks and what the log makes of them."""

import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from tokenizers import pre_tokenizers

from reca.config.recipe_files import load_recipe
from reca.data.batch import task_rng
from reca.estimate import counts, memory
from reca.estimate.meta_model import build_meta
from reca.hardware.peaks import known_peak
from reca.models.show_o import Adapter
from reca.monitoring import speed
from reca.trainer import Trainer

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.4),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-80GB", 311.8),
        ("NVIDIA A40", 149.7),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L40", 181.05),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("NVIDIA TITAN V", None),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H800 PCIe", 756.4),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),  # a part of a card
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
    ],
)
def test_peaks_of_cards_as_cuda_names_them(name, tflops):
    assert known_peak(name) == (None if tflops is None else pytest.approx(tflops * 1e12))


def test_a_cpu_has_a_peak_only_if_it_is_given():
    assert speed.peak_flops(CPU, None) == (None, "")
    assert speed.peak_flops(CPU, 2e12) == (2e12, "log.peak_flops")


def test_a_gpu_is_looked_up_by_its_name_or_measured(monkeypatch):
    gpu, name = torch.device("cuda"), "NVIDIA H100 80GB HBM3"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(speed, "_measured_rate", lambda device: 3e12)
    assert speed.peak_flops(gpu, None) == (pytest.approx(989.4e12), f"peak of {name}, dense bf16")
    assert speed.peak_flops(gpu, 5e12) == (5e12, "log.peak_flops")
    name = "Some Other GPU"
    peak, source = speed.peak_flops(gpu, None)
    assert peak == 3e12 and "Some Other GPU is not in the table" in source


def test_the_rate_of_a_measured_product(monkeypatch):
    monkeypatch.setattr(speed, "MEASURED_SIZE", 64)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    times = iter([10.0, 10.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    assert speed._measured_rate(CPU) == pytest.approx(2 * 64**3 * speed.MEASURED_TIMES / 0.5)


def first_batches(tmp_path, name: str, *keys: str) -> tuple:
    recipe = load_recipe(name, [f"run_dir={tmp_path}/{name}", "data.workers=0", "log.tensorboard=false", *keys])
    trainer = Trainer(recipe)
    batches = {task: [next(iter(loader))] for task, loader in trainer.loaders.items()}
    for loader in trainer.loaders.values():
        loader.close()
    return recipe, batches, trainer.adapter.tokenizer


def test_a_step_counts_every_task_with_all_its_samples(tmp_path):
    keys = ["objective.reca.batch_size=6", "objective.reca.micro_batch=3", "objective.i2t.batch_size=4"]
    recipe, batches, tokenizer = first_batches(tmp_path, "show_o_tiny", *keys)
    both = speed.step_flops(recipe, batches, tokenizer)
    reca, i2t = (speed.step_flops(recipe, {task: batches[task]}, tokenizer) for task in ("reca", "i2t"))
    assert both == pytest.approx(reca + i2t) and min(reca, i2t) > 0.02 * both
    adapter, fake = build_meta(recipe)
    assert reca == pytest.approx(6 * sum(counts.flops(adapter, fake, 3)), rel=0.1)  # texts are of other lengths


def test_texts_are_counted_with_the_tokens_of_the_model(tmp_path):
    """A tokenizer may make several tokens of a word."""
    keys = ["objective.i2t.weight=0", "model.max_reca_tokens=120"]
    recipe, batches, tokenizer = first_batches(tmp_path, "show_o_tiny", *keys)
    words = speed.step_flops(recipe, batches, tokenizer)
    letters = Adapter.load_tokenizer(recipe.model)
    letters.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    assert speed.step_flops(recipe, batches, letters) > 1.1 * words


def test_the_image_that_a_scored_one_stays_close_to_is_encoded_too():
    keys = ["objective.reca.weight=0", "objective.srum.weight=1", "objective.srum.batch_size=2"]
    recipe = load_recipe("bagel_tiny", keys)
    adapter, fake = build_meta(recipe)
    batch = memory._batch(adapter, recipe, "srum", memory.Fill(3, 2), 0, fake)
    work = [
        counts.batch_flops(adapter, counts.without_memory(one, fake), task_rng(0, "srum"))
        for one in (batch, replace(batch, target=None))
    ]
    assert batch.und is None and work[0].encode == 2 * work[1].encode > 0


def test_a_head_is_counted_on_the_tokens_that_the_step_hides(tmp_path):
    keys = ["objective.i2t.weight=0", "objective.reca.batch_size=4", "objective.reca.micro_batch=4"]
    recipe, batches, tokenizer = first_batches(tmp_path, "show_o_tiny", *keys)
    adapter, _ = build_meta(recipe)
    flops, rows = [], []
    for seed in (0, 1):
        recipe.train.seed = seed
        flops.append(speed.step_flops(recipe, batches, tokenizer))
        rows.append(adapter.prepare(batches["reca"][0], task_rng(seed, "reca")).weight)
    assert rows[0] != rows[1]
    assert flops[1] - flops[0] == 6 * (rows[1] - rows[0]) * adapter.showo.lm_head.weight.numel()


def test_what_is_frozen_and_what_is_cached_costs_less(tmp_path):
    keys = ["objective.i2t.weight=0", "objective.reca.micro_batch=4"]
    recipe, batches, tokenizer = first_batches(tmp_path, "show_o_tiny", *keys)
    whole = speed.step_flops(recipe, batches, tokenizer)
    (batch,) = batches["reca"]
    batch.features = Trainer(recipe).adapter.encode(batch)
    cached = speed.step_flops(recipe, batches, tokenizer)
    recipe.train.frozen = ["*layers.*.mlp.*"]
    assert speed.step_flops(recipe, batches, tokenizer) < 0.95 * cached < 0.95 * whole


PEAK = """
import torch
from reca.monitoring.speed import peak_memory
before = peak_memory(torch.device("cpu"))
torch.ones(2**26)
print(before, peak_memory(torch.device("cpu")))
"""


def test_peak_memory_is_of_this_process_alone():
    """Not of the one that started it, whose peak getrusage hands on."""
    held = torch.ones(2**30, dtype=torch.uint8)
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before < held.numel() and after >= before + 2**27


def test_mfu_is_flops_over_time_gpus_and_peak(monkeypatch):
    meter = speed.Speed(images=10, steps=100)
    meter.flops, meter.peak = 4e12, 1e13
    monkeypatch.setattr("reca.distributed.world_size", lambda: 4)
    for step in (1, 2):
        meter.add(step, seconds=0.5, waited=0.1)
    found = meter.metrics(CPU)
    assert found["mfu"] == pytest.approx(4e12 / (0.5 * 4 * 1e13))
    assert (found["images_per_s"], found["images_per_s_per_gpu"]) == pytest.approx((20, 5))
    assert (found["step_s"], found["data_wait_s"], found["data_wait"]) == pytest.approx((0.5, 0.1, 0.2))


def test_a_line_is_about_the_steps_since_the_last_one(monkeypatch):
    monkeypatch.setattr(speed, "peak_memory", lambda device: 3 * 2**29)
    meter = speed.Speed(images=10, steps=100)
    meter.flops = 4e12  # without the rate of the GPU there is no share of it
    meter.add(1, seconds=2.0, waited=1.5)
    meter.metrics(CPU)
    meter.add(2, seconds=0.5, waited=0.1)
    found = meter.metrics(CPU)
    assert (found["step_s"], found["images_per_s"], found["data_wait_s"]) == pytest.approx((0.5, 20, 0.1))
    assert found["memory_gib"] == 1.5 and "mfu" not in found


def test_the_time_to_the_end_leaves_out_the_first_step(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    meter = speed.Speed(images=10, steps=12)
    assert meter.remaining(0) is None
    meter.add(3, 60.0, 0.0)  # the first that this process makes, with its compilation
    assert meter.remaining(3) is None
    now += 8.0
    meter.add(5, 1.0, 0.0)
    assert meter.remaining(5) == pytest.approx(4.0 * 7)
    assert meter.remaining(12) == 0
