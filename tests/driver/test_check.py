"""`reca check`: counts against published figures, FLOPs and memory against a real model's."""

import contextlib
import functools
import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from reca import preflight
from reca.cli import main
from reca.config.recipe import ParallelConfig
from reca.config.recipe_files import load_recipe, recipe_names
from reca.data import dali
from reca.data.batch import Batch
from reca.data.errors import DataError
from reca.data.views import View, Views
from reca.estimate import check, counts, memory
from reca.estimate.held import held, host_moments, part
from reca.estimate.meta_model import build_meta
from reca.models import umm_package
from reca.models.show_o import prompt
from reca.models.show_o.conditioner import conditioner
from reca.optim import freeze, make_optimizer
from reca.options.fields import RecipeError
from reca.rng import CounterRNG
from reca.training.parallelize import replicas_fit, shard_size

TINY = ["show_o_tiny", "harmon_tiny", "open_uni_tiny", "bagel_tiny", "janus_tiny", "janusflow_tiny"]


@functools.cache
def meta(name):
    """A recipe's model without weights, for tests that only read it."""
    return build_meta(load_recipe(name))


def numbers(name):
    return counts.parameters(meta(name)[0])


@pytest.fixture
def no_step(monkeypatch):
    """The report without numbers of a step and of decoding, which take seconds, for tests of its other lines."""
    monkeypatch.setattr(memory, "predict", lambda *given: memory.Memory(0, 0, 0, 0, 0))
    monkeypatch.setattr(counts, "flops", lambda *given: counts.Flops(1.0, 1.0, 1.0))
    monkeypatch.setattr(check.decode_speed, "seconds", lambda views: 0.001)


# As the public files and code have them. Show-o's CLIP is without its last layer and norm, and Harmon's figures are
# without a table of 1000 classes that nothing reads.
PUBLISHED = {
    "show_o_512": {"shared_lm + embed": 1_448_176_770, "bridge": 6_295_552, "und_encoder": 303_507_456 - 12_598_272},
    "harmon_1_5b": {"shared_lm + embed": 1_543_714_304},
    "harmon_0_5b": {"shared_lm + embed": 494_032_768},
    "open_uni_l_512": {
        "und_encoder": 304_012_288 + 8_662_016,
        "und_lm": 1_310_340_608,
        "embed": 2 * 232_971_264,
        "bridge": 221_910_528 + 3_541_248 + 393_216,
        "gen_head": 1_604_462_752,
        "codec": 312_250_275,
    },
    "open_uni_b_512": {"und_encoder + und_lm + embed": 938_193_024, "gen_head": 591_747_872},
    "bagel_7b": {
        "gen_lm": 6_525_628_928,
        "und_lm": 6_525_628_928,
        "embed": 2 * 544_997_376,
        "und_encoder": 402_552_736,
        "bridge": 16_980_992,
        "gen_head": 13_769_728 + 232_960 + 229_440,
        "codec": 83_819_683,
    },
    "janus_pro_1b": {
        "und_encoder": 316_283_904 + 6_295_552,
        "codec": 71_883_403,
        "shared_lm + embed": 1_652_656_128,
        "embed": 2 * 209_715_200,
        "bridge": 131_072 + 4_214_784,
        "gen_head": 37_767_168,
        "und_encoder + codec + shared_lm + embed + bridge + gen_head": 2_089_232_011,
    },
    "janus_pro_7b": {
        "und_encoder": 316_283_904 + 20_979_712,
        "shared_lm + embed": 6_910_365_696,
        "bridge": 131_072 + 16_818_176,
        "gen_head": 83_906_560,
        "und_encoder + codec + shared_lm + embed + bridge + gen_head": 7_420_368_523,
    },
    # Half the bytes of the published file, 4.09 GB, without the autoencoder; the paper gives bridge and head 70 M.
    "janusflow_1_3b": {
        "und_encoder": 316_283_904 + 2_099_200 + 2048,
        "shared_lm + embed": 1_652_656_128,
        "bridge": 5_771_264 + 13_056 + 2 * 7_915_008 + 1_574_912,
        "gen_head": 768 + 2 * 25_267_200 + 26_128 + 2048 + 1_573_632,
        "und_encoder + shared_lm + embed + bridge + gen_head": 2_046_367_504,
        "codec": 83_653_863,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_the_published_ones(name):
    count = numbers(name)
    for roles, published in PUBLISHED[name].items():
        assert sum(count[role].total for role in roles.split(" + ")) == published, roles


@pytest.mark.parametrize(("name", "millions"), [("harmon_0_5b", 704.9), ("harmon_1_5b", 2494.8)])
def test_harmon_trains_what_its_authors_count(name, millions):
    recipe = load_recipe(name)
    unread = recipe.model.mar.classes * recipe.model.mar.width
    trained = sum(count.trained for count in numbers(name).values())
    assert round((trained + unread) / 1e6, 1) == millions


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_has_a_meta_model_with_roles_and_memory(name):
    recipe = load_recipe(name)
    adapter, fake = meta(name)
    count = counts.parameters(adapter)
    assert sum(n.total for n in count.values()) == sum(p.numel() for p in adapter.parameters())
    assert {role for role, n in count.items() if n.trained} <= set(adapter.trainable_roles)
    assert all(p.fake_mode is fake for p in adapter.parameters())
    trained = [p for p in adapter.parameters() if p.requires_grad]
    assert held(adapter, recipe, 1, 8).moments == 8 * sum(p.numel() for p in trained)
    needs = [held(adapter, recipe, gpus, 8) for gpus in (2, 3, 4, 6, 8)]
    assert all(more.moments > less.moments for more, less in itertools.pairwise(needs))
    assert held(adapter, recipe, 64, 8).weights == held(adapter, recipe, 16, 8).weights
    assert all(rows > 0 for rows in adapter.sequence().values())


def test_moments_on_the_host_are_those_that_are_not_on_the_gpu(no_step, capsys):
    keys = ["parallel.strategy=fsdp", "optim.name=adamw_8bit"]
    here, there = (load_recipe("open_uni_b_512", [*keys, f"optim.offload={value}"]) for value in ("false", "true"))
    adapter, _ = build_meta(here)
    for gpus in (1, 3, 16):
        assert held(adapter, there, gpus, 8).moments == 0 == host_moments(adapter, here, gpus, 8)
        assert host_moments(adapter, there, gpus, 8) == min(gpus, 8) * held(adapter, here, gpus, 8).moments
    assert "moments on the host" not in check.report(load_recipe("bagel_tiny"))
    main(["check", "bagel_tiny", "optim.offload=true"])
    assert "moments on the host" in capsys.readouterr().out


@pytest.mark.parametrize("name", TINY)
def test_flops_are_those_of_a_real_step(name):
    recipe = load_recipe(name)
    without_memory = counts.flops(*build_meta(recipe), 2)
    adapter = umm_package(recipe.umm).Adapter.load(recipe.model).eval()
    freeze(adapter, recipe.train.roles, recipe.train.frozen)
    assert counts.flops(adapter, contextlib.nullcontext(), 2) == without_memory
    assert 0 < without_memory.forward < without_memory.backward


def test_a_forced_attention_of_gpus_does_not_end_a_count(monkeypatch):
    """Fake tensors stand for those of a GPU, but they are on a CPU, where no FlashAttention runs."""
    recipe = load_recipe("show_o_tiny", ["objective.i2t.weight=0", "objective.reca.batch_size=2"])
    monkeypatch.delenv("RECA_ATTENTION", raising=False)
    expected = counts.flops(*build_meta(recipe), 2), memory.predict(recipe).total
    monkeypatch.setenv("RECA_ATTENTION", "fa3")
    assert (counts.flops(*build_meta(recipe), 2), memory.predict(recipe).total) == expected
    assert os.environ["RECA_ATTENTION"] == "fa3"


def test_flops_of_a_transformer_by_hand():
    """Two for every weight and row, forward; attention 4 d for every pair of rows; the head on hidden rows alone."""
    recipe = load_recipe("show_o_tiny")
    adapter, fake = build_meta(recipe)
    phi, images = adapter.showo.model, 4
    work = counts.flops(adapter, fake, images)
    rows = (
        sum(adapter.sequence().values()) + len(adapter.tokens(prompt.TEMPLATE.format(counts.TEXT))) + 7
    )  # mmu soi eoi bos eos, soi eoi
    weights = sum(m.weight.numel() for m in phi.modules() if isinstance(m, nn.Linear))
    attention = 4 * rows**2 * recipe.model.phi.hidden_size * recipe.model.phi.num_hidden_layers
    projector = sum(m.weight.numel() for m in adapter.mm_projector.modules() if isinstance(m, nn.Linear))
    batch = Batch("reca", torch.arange(images), [counts.TEXT] * images)
    head = adapter.prepare(batch, CounterRNG(0)).weight / images * adapter.showo.lm_head.weight.numel()
    by_hand = 2 * (rows * weights + conditioner(adapter, "reca").tokens() * projector + head) + attention
    assert work.forward == pytest.approx(by_hand, rel=0.01)  # the rest: rotary angles


def test_depthwise_convolutions_count_their_own_channel_only():
    layer, x = nn.Conv2d(8, 8, 3, groups=8), torch.randn(1, 8, 6, 6, requires_grad=True)
    with counts.FlopCounterMode(display=False, custom_mapping=counts.CONVOLUTIONS) as counter:
        y = layer(x)
        forward = counter.get_total_flops()
        y.sum().backward()
    assert forward == 2 * 8 * 4 * 4 * 9 and counter.get_total_flops() == 3 * forward


@pytest.mark.parametrize("name", ["show_o_tiny", "open_uni_tiny"])
def test_memory_of_a_real_step(name):
    overrides = ["objective.i2t.weight=0"]
    recipe = load_recipe(name, overrides)
    need = held(build_meta(recipe)[0], recipe, 1, 8)
    adapter = umm_package(recipe.umm).Adapter.load(recipe.model)
    freeze(adapter, recipe.train.roles, recipe.train.frozen)
    optimizer, view = make_optimizer(adapter, recipe.optim), adapter.views("reca").gen
    images = [torch.zeros(3, view.size, view.size, dtype=torch.uint8)] * 2
    adapter(Batch("reca", torch.arange(2), [counts.TEXT] * 2, images), CounterRNG(0)).sum.backward()
    optimizer.step()
    size = lambda tensors: sum(t.numel() * t.itemsize for t in tensors)  # noqa: E731
    assert need.weights == size(adapter.parameters()) + size(adapter.buffers())
    assert need.gradients == size(p.grad for p in adapter.parameters() if p.grad is not None)
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert need.moments == size(moments)
    assert need.copies == 0  # fp32


def test_what_no_memory_holds_is_refused_before_it_is_loaded(monkeypatch):
    """Two ranks of a machine share its memory; moments on the host are a part of it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for overrides, said in ((["optim.offload=false"], "training needs at least"), (["optim.offload=true"], "moments")):
        recipe = load_recipe("show_o_tiny", overrides)
        adapter, _ = build_meta(recipe)
        moments = host_moments(adapter, recipe, 2, 2)
        whole = moments + 2 * held(adapter, recipe, 2, 2).total
        monkeypatch.setattr(preflight, "host_memory", lambda whole=whole: whole)
        preflight._memory(recipe, adapter, 2, 2)
        for less in (whole - 1, moments - 1) if moments else (whole - 1,):
            monkeypatch.setattr(preflight, "host_memory", lambda less=less: less)
            with pytest.raises(RecipeError, match=said if less < moments else "training needs at least"):
                preflight._memory(recipe, adapter, 2, 2)


def test_memory_when_sharded():
    """One backward pass per step, then two; three ranks divide no dimension of most parameters."""
    once = load_recipe(
        "show_o_tiny", ["objective.i2t.weight=0", "objective.reca.batch_size=6", "objective.reca.micro_batch=2"]
    )
    adapter, _ = build_meta(once)
    parts, trained, whole = 0, 0, 0
    for p in adapter.parameters():
        own = (p.shape[0] + 2) // 3 * (p.numel() // p.shape[0]) * 4
        parts, trained = parts + own, trained + own * p.requires_grad
        whole += 4 * p.numel() * p.requires_grad
    need = held(adapter, once, 3, 8)
    assert need.weights - parts == sum(b.numel() * b.itemsize for b in adapter.buffers())
    assert need.gradients == trained and need.moments == 2 * trained
    layers = sum(p.numel() for p in adapter.showo.model.layers.parameters())
    rest = sum(p.numel() for p in adapter.parameters()) - layers
    assert need.copies == 4 * (rest + layers * 2 // 3)  # two of three layers
    twice = load_recipe(
        "show_o_tiny", ["objective.i2t.weight=0", "objective.reca.batch_size=6", "objective.reca.micro_batch=1"]
    )
    assert held(adapter, twice, 3, 8).gradients == whole
    twice.parallel.reduce_every_micro_batch = True
    assert held(adapter, twice, 3, 8).gradients == trained
    replicas = load_recipe(
        "show_o_tiny",
        ["objective.i2t.weight=0", "objective.reca.batch_size=6", "objective.reca.micro_batch=1", "parallel.shard=1"],
    )
    need = held(adapter, replicas, 3, 8)
    assert need.moments == 2 * whole
    assert need.copies == whole - 4 * sum(p.numel() for p in adapter.showo.model.layers.parameters()) // 3


def test_parts_of_a_parameter():
    assert part(nn.Parameter(torch.zeros(5, 3)), 2) == 9
    assert part(nn.Parameter(torch.zeros(2, 3)), 8) == 3
    assert part(nn.Parameter(torch.zeros(())), 8) == 1


def test_bf16_weights_and_copies():
    recipe = load_recipe("show_o_tiny", ["model.dtype=bf16", "train.precision=bf16"])
    adapter, _ = build_meta(recipe)
    need = held(adapter, recipe, 1, 8)
    trained = [p for p in adapter.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.bfloat16}
    assert need.gradients == 2 * sum(p.numel() for p in trained) and need.copies == 0
    masters = load_recipe("show_o_tiny", ["train.precision=bf16"])
    adapter, _ = build_meta(masters)
    assert held(adapter, masters, 1, 8).copies == 2 * sum(
        p.numel() for p in adapter.parameters() if p.requires_grad and p.ndim > 1
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show_o_tiny", "--gpus", "0"], "--gpus and --gpus-per-node must be at least 1"),
        (
            ["show_o_tiny", "parallel.shard=2", "--gpus", "3"],
            "does not divide the 3 ranks of this run: set it to one of 1, 3",
        ),
        (["show_o_512", "parallel.shard=2", "--gpus", "5"], "parallel.shard=2 does not divide the 5 ranks"),
        (["show_o_tiny", "train.roles=[gen_lm]"], "has no parameters of role 'gen_lm'"),
        (["show_o_tiny", "train.frozen=[nothing]"], "no parameter matches 'nothing'"),
        (["show_o_tiny", "model.image_size=21"], "image_size"),
        (["no_such_recipe"], "no recipe 'no_such_recipe'"),
    ],
)
def test_what_training_would_refuse(capsys, arguments, words):
    assert main(["check", *arguments]) == 3
    assert words in capsys.readouterr().err


def test_shards_by_default():
    """Of one machine; of all where they do not hold equally many."""
    sizes = {(1, 1): 1, (3, 3): 3, (6, 6): 6, (8, 8): 8, (16, 8): 8, (64, 8): 8, (12, 8): 12, (12, 4): 4, (7, 2): 7}
    assert {key: shard_size(ParallelConfig(), *key) for key in sizes} == sizes
    assert shard_size(ParallelConfig(shard=2), 8, 4) == 2
    with pytest.raises(ValueError, match="one of 1, 2, 4, 8, or"):
        shard_size(ParallelConfig(shard=3), 8, 4)


def test_every_gpu_holds_all_weights_where_they_fit():
    assert shard_size(ParallelConfig(), 16, 8, replicas_fit=True) == 1
    assert shard_size(ParallelConfig(strategy="ddp"), 16, 8) == 1
    assert shard_size(ParallelConfig(strategy="fsdp"), 16, 8, replicas_fit=True) == 8
    assert shard_size(ParallelConfig(shard=4), 16, 8, replicas_fit=True) == 4


def test_when_replicas_fit():
    """fp32: 4 bytes a weight, and 12 more of a trained one, in half of the memory."""
    trained, frozen = nn.Linear(100, 10, bias=False), nn.Linear(100, 10, bias=False).requires_grad_(False)
    both = nn.ModuleList([trained, frozen])
    assert replicas_fit(both, 2 * 20_000) and not replicas_fit(both, 2 * 20_000 - 1)


def test_command_says_how_the_weights_are_held(no_step, capsys):
    for arguments, words in (
        (["show_o_tiny"], "holds all weights (ddp)"),
        (["show_o_tiny", "parallel.strategy=fsdp"], "holds 1/8 of the weights"),
        (["show_o_tiny", "parallel.shard=2"], "holds 1/2 of the weights"),
    ):
        assert main(["check", *arguments, "--gpus", "8"]) == 0
        assert words in capsys.readouterr().out


def test_command_says_how_an_update_is_split(no_step, capsys):
    keys = [f"objective.{task}.{key}" for task in ("reca", "i2t") for key in ("batch_size=10", "micro_batch=2")]
    for gpus in (1, 4, 8):
        assert main(["check", "show_o_tiny", *keys, "objective.mean=micro_batch", "--gpus", str(gpus)]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert ("differ from the recipe's" in out) == (gpus != 1)
        if gpus == 8:
            assert "samples per step on 8 GPUs reca 10 1 to 2 per GPU, 1 pass of 2 or 1 i2t 10" in out


def test_command(capsys):
    assert main(["check", "show_o_tiny"]) == 0
    out = capsys.readouterr().out
    assert "335,520" in out and "image tokens" in out and "MFLOP" in out and "MiB" in out
    assert "not predicted: generation and evaluation between steps (log.reconstructions)" in out
    assert main(["check", "show_o_tiny", "--gpus", "8", "eval.every=9", "log.reconstructions=0"]) == 0
    out = capsys.readouterr().out
    assert "between steps (eval.every)" in out and "holds all weights (ddp)" in out


def test_bagel_at_full_size_takes_little_memory():
    """Four of its layers would take 6 GiB. torch alone takes 0.35 GiB, or 0.85 if built for CUDA."""
    assert sum(count.trained for count in numbers("bagel_7b").values()) == 6_539_861_056
    code = """
import torch
from reca.cli import main
from reca.monitoring.speed import peak_memory
before = peak_memory(torch.device("cpu"))
main(["check", "bagel_7b", "train.activation_checkpointing=false", "model.language.num_hidden_layers=4"])
print(peak_memory(torch.device("cpu")) - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *report, memory = done.stdout.splitlines()
    assert any("bridge" in line and "16,980,992" in line for line in report)
    assert int(memory) < 2**29


@pytest.mark.parametrize(
    "seconds,workers,said",
    [
        (0.001, 2, "the recipe has 2"),
        (3.0, 7, "the recipe has 7: TOO FEW, steps will wait"),
        (99.0, 7, "data.cache decodes each only once"),
    ],
)
def test_threads_that_decode_as_fast_as_a_gpu_computes(monkeypatch, seconds, workers, said):
    """An image of each task takes so long; a step computes its RECA images at half of an H100's peak."""
    asked = []
    monkeypatch.setattr(check.decode_speed, "seconds", lambda views: asked.append(views) or seconds)
    recipe = load_recipe("show_o_tiny", [f"data.workers={workers}"])
    adapter, _ = build_meta(recipe)
    flops, images = 20e12, recipe.objective.reca.batch_size + recipe.objective.i2t.batch_size
    lines = check._decoding(recipe, adapter, flops)
    assert asked == [adapter.views("reca"), adapter.views("i2t")]
    step = recipe.objective.reca.batch_size * flops / (0.5 * 989.4e12)
    threads = f"{max(1, -(-1.25 * images * seconds // step)):.0f}" if seconds < 99 else "any:"
    assert lines[-1].split()[:2] == ["data.workers", threads] and lines[-1].endswith(said)
    assert f"{1e3 * images * seconds:.1f} ms of one core" in lines[2] and f"{1e3 * step:.1f} ms" in lines[3]
    assert lines[3].endswith("of one NVIDIA H100's 989.4 TFLOP/s")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Unknown")
    assert check._decoding(recipe, adapter, flops) == lines  # not the H100's peak under the other's name


def test_the_image_that_is_decoded_is_like_a_photograph():
    """Photos of 1024 px at quality 90 have 130 to 350 KB."""
    data = check.decode_speed.jpeg()
    assert 130e3 < len(data) < 350e3 and data == check.decode_speed.jpeg()
    assert 0 < check.decode_speed.seconds(Views(View(64), View(32)), rounds=1) < 5


def test_templates_that_the_model_would_truncate(no_step, tmp_path):
    """Are refused if the tokenizer is here; otherwise the report says that they are unchecked."""
    (tmp_path / "templates.txt").write_text("red " * 400)
    with pytest.raises(ValueError, match="shorten it in data.templates: 'red red"):
        check.report(load_recipe("janus_tiny", [f"data.templates={tmp_path}/templates.txt"]))
    assert "not checked" not in check.report(load_recipe("janus_tiny"))
    said = " ".join(check.report(load_recipe("janus_tiny", ["model.tokenizer=owner/name"])).split())
    assert "the templates' lengths are not checked, which needs the tokenizer: model.tokenizer: owner/name is" in said
    assert "the hub is not asked for it here; get it elsewhere with" in said


def test_a_decoder_that_is_not_installed_is_refused_before_the_weights_are_read(monkeypatch):
    monkeypatch.setattr(dali, "available", lambda: False)
    recipe = load_recipe("show_o_tiny", {"data.decoder": "dali"})
    with pytest.raises(DataError, match="DALI is not installed"):
        preflight.check(recipe, ["reca"], 1, 1)
