"""LoRA and DoRA through training, checkpoints, other runs and exports."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reca import checkpoint
from reca.config.recipe_files import load_recipe
from reca.estimate import counts
from reca.estimate.meta_model import build_meta
from reca.models import umm_package
from reca.options.fields import RecipeError
from reca.options.sampling import defaults
from reca.runs.lineage import load_trained
from reca.trainer import Trainer
from reca.training import lora
from tests.driver.toy import ToyAdapter, run_toy, weights

peft = pytest.importorskip("peft", reason="LoRA needs the package peft")

ON = ["lora.rank=4"]
DORA = [*ON, "lora.dora=true"]
TINY = ["show_o_tiny", "harmon_tiny", "open_uni_tiny", "bagel_tiny", "janus_tiny"]


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def saved(run_dir, part="weights"):
    folder = checkpoint.latest(run_dir) / part
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


@pytest.mark.parametrize(
    "more", [[], ["lora.dora=true"], ["lora.dropout=0.3"], ["train.activation_checkpointing=true"]]
)
def test_only_lora_learns_and_resume_is_exact(more, recipe, tmp_path):
    whole = run_toy(recipe(f"run_dir={tmp_path}/whole", *ON, *more))
    run_toy(recipe(f"run_dir={tmp_path}/parts", "train.steps=3", *ON, *more))
    resumed = run_toy(recipe(f"run_dir={tmp_path}/parts", *ON, *more))
    ours, start = weights(whole.adapter), weights(ToyAdapter())
    assert same(ours, weights(resumed.adapter))
    base = {lora.published_name(name): value for name, value in ours.items() if not lora.is_lora(name)}
    assert same(base, start)
    trained = {name for name, p in whole.adapter.named_parameters() if p.requires_grad}
    assert all(value.any() for name, value in ours.items() if ".lora_B." in name)
    kinds = {"lora_A", "lora_B", *(["lora_magnitude_vector"] if "lora.dora=true" in more else [])}
    assert {name.split(".")[2] for name in trained} == kinds and len(trained) == 2 * len(kinds)
    assert saved(tmp_path / "whole").keys() == trained  # a checkpoint holds nothing else
    losses = [json.loads(line)["loss"] for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("dtype", "device"), [(torch.bfloat16, "cpu"), (torch.float64, "meta")])
def test_what_new_tensors_are_by_default_changes_nothing(dtype, device, recipe, tmp_path):
    """A caller's bf16 rounded the pixels of images, LoRA's matrices and AdamW's counters; another device failed."""
    models, merged = [ToyAdapter() for _ in range(2)], [ToyAdapter() for _ in range(2)]
    chosen = ("usual", torch.float32, "cpu"), ("other", dtype, device)
    for (name, numbers, place), model, plain in zip(chosen, models, merged, strict=True):
        made = recipe(f"run_dir={tmp_path}/{name}", *ON, "optim.moments=bf16", "train.steps=2")
        torch.set_default_dtype(numbers)
        try:
            with torch.device(place):
                Trainer(made, model).run()
                assert torch.empty(0).dtype == numbers and torch.empty(0).device.type == place
            checkpoint.load_lora(checkpoint.latest(tmp_path / name), plain, made.lora)
        finally:
            torch.set_default_dtype(torch.float32)
    assert same(*map(weights, models)) and same(*map(weights, merged))
    assert same(*(saved(tmp_path / name, "optimizer") for name in ("usual", "other")))


def test_dropout_acts_in_training_only(recipe, tmp_path):
    plain = run_toy(recipe(f"run_dir={tmp_path}/plain", *ON))
    dropped = run_toy(recipe(f"run_dir={tmp_path}/dropped", *ON, "lora.dropout=0.5"))
    assert not same(weights(plain.adapter), weights(dropped.adapter))
    layer = dropped.adapter.eval().layers[0]
    x = torch.randn(2, layer.in_features)
    assert torch.equal(layer(x), layer(x))


def test_the_start_does_not_depend_on_global_random_numbers(recipe):
    one, other = ToyAdapter(), ToyAdapter()
    lora.choose_trained(one, recipe(*ON))
    torch.rand(7)
    lora.choose_trained(other, recipe(*ON))
    assert same(weights(one), weights(other))
    third = ToyAdapter()
    lora.choose_trained(third, recipe(*ON, "train.seed=1"))
    assert not torch.equal(third.layers[0].lora_A.default.weight, one.layers[0].lora_A.default.weight)
    bound = 1 / math.sqrt(48)
    assert 0.9 * bound < float(one.layers[0].lora_A.default.weight.detach().abs().max()) <= bound


def test_targets_and_frozen_choose_layers(recipe):
    chosen = {}
    for name, overrides in {
        "all": [],
        "one": ["lora.targets=['*.1']"],
        "rest": ["train.frozen=['layers.1.weight']"],
    }.items():
        adapter = ToyAdapter()
        lora.choose_trained(adapter, recipe(*ON, *overrides))
        chosen[name] = list(lora.layers(adapter))
    assert chosen == {"all": ["layers.0", "layers.1"], "one": ["layers.1"], "rest": ["layers.0"]}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["lora.targets=['q_proj']"],
            "lora.targets: no trained linear layer matches 'q_proj'; names look like 'layers.0'",
        ),
        (["train.roles=[und_encoder]"], "toy trains no linear layer inside its blocks"),
    ],
)
def test_layers_that_are_not_there_are_refused(overrides, message, recipe):
    with pytest.raises(ValueError, match=message.replace("*", ".")):
        Trainer(recipe(*ON, *overrides), ToyAdapter())


def test_bf16_weights_need_bf16(recipe):
    with pytest.raises(RecipeError, match="base_dtype=bf16 needs train.precision=bf16"):
        recipe(*ON, "lora.base_dtype=bf16")


def test_weights_in_bf16_are_what_autocast_makes_of_fp32(recipe, tmp_path):
    bf16 = ["train.precision=bf16", *ON]
    wide = run_toy(recipe(f"run_dir={tmp_path}/wide", *bf16))
    narrow = run_toy(recipe(f"run_dir={tmp_path}/narrow", *bf16, "lora.base_dtype=bf16"))
    assert {p.dtype for name, p in narrow.adapter.named_parameters() if ".base_layer." in name} == {torch.bfloat16}
    assert same(*({n: v for n, v in weights(t.adapter).items() if lora.is_lora(n)} for t in (wide, narrow)))


@pytest.fixture(scope="module", params=TINY)
def tiny(request, tmp_path_factory):
    """A tiny model's run of two steps with DoRA."""
    folder = tmp_path_factory.mktemp(request.param)
    return train_tiny(request.param, folder, [*DORA, *published(request.param, folder)])


def published(name: str, folder: Path) -> list[str]:
    """Weights for Harmon without layers of 0, as its random ones have: nothing before its last layer would learn."""
    if name != "harmon_tiny":
        return []
    model = umm_package("harmon").Adapter.load(load_recipe(name).model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.export(folder / "published")
    return [f"model.weights={folder / 'published'}"]


def train_tiny(name: str, folder: Path, overrides: list[str]) -> Trainer:
    given = (
        "train.steps=2 objective.reca.batch_size=2 objective.i2t.weight=0 objective.t2i.weight=0 optim.lr=0.01 "
        "optim.schedule=constant optim.warmup_steps=0 train.activation_checkpointing=true data.workers=0 log.every=1 "
        "log.tensorboard=false log.prompts=[]"
    ).split()
    trainer = Trainer(load_recipe(name, [*given, *overrides, f"run_dir={folder / 'run'}"]), progress=lambda _: None)
    trainer.run()
    return trainer


def test_every_layer_of_every_model_learns(tiny):
    trainer = tiny
    values = weights(trainer.adapter)
    idle = [name for name, value in values.items() if ".lora_B." in name and not value.any()]
    assert not idle and len(lora.layers(trainer.adapter)) > 10
    assert trainer.adapter.roles().keys() == values.keys()
    expected = trainer.adapter.trainable_roles
    assert {trainer.adapter.roles()[n] for n, p in trainer.adapter.named_parameters() if p.requires_grad} <= expected
    meta, _ = build_meta(trainer.recipe)
    assert counts.parameters(meta) == counts.parameters(trainer.adapter)
    shapes = [{n: tuple(p.shape) for n, p in a.named_parameters()} for a in (meta, trainer.adapter)]
    assert shapes[0] == shapes[1]


def test_an_export_is_the_run_under_published_names(tiny, tmp_path):
    """Images differ by less than 2 of 255, since A and B are multiplied with each other and not with the input."""
    trainer = tiny
    model = load_trained(trainer.run_dir, trainer.recipe)
    plain = umm_package(trainer.recipe.umm).Adapter.load(trainer.recipe.model)
    files = plain.export(tmp_path / "plain")
    before = weights(model)
    written = model.export(tmp_path / "merged")
    assert same(before, weights(model))  # to the bit
    extra = ["lora/adapter_config.json", "lora/adapter_model.safetensors"]
    assert sorted(written) == sorted([*files, *extra])
    state = plain.state_dict()
    with lora.merged(model):
        merged = {n: t.clone() for n, t in model.state_dict().items()}
    assert list(merged) == list(state)
    moved = {n for n in state if not torch.equal(state[n], merged[n])}
    assert moved == {f"{n}.weight" for n in lora.layers(model)}
    prompts, seeds = ["a red square", "a blue circle"], [1, 2]
    few = {name: 4 for name in defaults(model.generate) if name == "steps"}
    ours = model.generate(prompts, seeds, **few)
    with lora.merged(model):
        theirs = model.generate(prompts, seeds, **few)
    base = plain.eval().generate(prompts, seeds, **few)
    apart = [int((torch.stack(ours).int() - torch.stack(other).int()).abs().max()) for other in (theirs, base)]
    assert apart[0] < 2 < apart[1]


def test_an_export_that_fails_in_its_lora_keeps_the_export_before(tiny, tmp_path):
    trainer = tiny
    model = load_trained(trainer.run_dir, trainer.recipe)
    written = umm_package(trainer.recipe.umm).Adapter.load(trainer.recipe.model).export(tmp_path)
    (tmp_path / "lora").touch()
    before = {name: (tmp_path / name).read_bytes() for name in written}
    with pytest.raises(OSError, match="lora cannot be written"):
        model.export(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in written} == before


def test_peft_loads_the_adapters(tiny, tmp_path):
    trainer = tiny
    model = load_trained(trainer.run_dir, trainer.recipe)
    model.export(tmp_path)
    fresh = umm_package(trainer.recipe.umm).Adapter.load(trainer.recipe.model)
    wrapped = peft.PeftModel.from_pretrained(lora._holder(fresh), tmp_path / "lora")
    name = next(iter(lora.layers(model)))
    layer, ours = wrapped.base_model.model.get_submodule(name), model.get_submodule(name)
    x = torch.randn(3, ours.in_features, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(layer(x), ours(x), atol=1e-6) and not torch.equal(layer(x), layer.base_layer(x))
    theirs = {n.removeprefix("base_model.model."): p for n, p in wrapped.named_parameters() if lora.is_lora(n)}
    assert same(theirs, {n: p for n, p in model.named_parameters() if lora.is_lora(n)})


def test_a_run_starts_from_another(recipe, tmp_path):
    """LoRA of the same form goes on; of another form, or where the next run has none, it is merged."""
    scaled = [*DORA, "lora.alpha=12"]
    first = run_toy(recipe(f"run_dir={tmp_path}/first", *scaled))
    init = [f"train.init_from={tmp_path}/first", "train.steps=1", "optim.lr=0"]
    again = run_toy(recipe(f"run_dir={tmp_path}/again", *init, *scaled, "lora.dropout=0.1"))
    assert same(weights(first.adapter), weights(again.adapter))
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    expected = [layer(x) for layer in first.adapter.eval().layers]
    others = {"full": [], "other": ["lora.rank=2"], "dora": ["lora.rank=2", "lora.dora=true"], "alpha": DORA}
    for name, more in others.items():
        second = run_toy(recipe(f"run_dir={tmp_path}/{name}", *init, *more))
        for layer, output in zip(second.adapter.eval().layers, expected, strict=True):
            assert torch.allclose(layer(x), output, atol=1e-5)
        assert {"layers.0.weight", "layers.1.weight"} <= saved(tmp_path / name).keys()
        third = run_toy(recipe(f"run_dir={tmp_path}/{name}", *init[:1], *more, "train.steps=2", "optim.lr=0"))
        assert same(weights(second.adapter), weights(third.adapter))


def test_lora_starts_from_a_run_without(recipe, tmp_path):
    first = run_toy(recipe(f"run_dir={tmp_path}/first", "train.steps=2"))
    second = run_toy(recipe(f"run_dir={tmp_path}/second", f"train.init_from={tmp_path}/first", *DORA, "train.steps=1"))
    base = {lora.published_name(n): v for n, v in weights(second.adapter).items() if not lora.is_lora(n)}
    assert same(base, weights(first.adapter))
    assert second.adapter.inherited == {"layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias"}
    assert second.adapter.inherited <= saved(tmp_path / "second").keys()
    start = ToyAdapter()
    start.load_state_dict(base)
    lora.choose_trained(start, replace(second.recipe))
    norms = start.layers[0].lora_magnitude_vector.default.weight
    assert torch.allclose(norms, first.adapter.layers[0].weight.norm(dim=1))
    third = run_toy(recipe(f"run_dir={tmp_path}/third", f"train.init_from={tmp_path}/second", "optim.lr=0"))
    with lora.merged(second.adapter):  # into the weights of the first
        assert same(weights(third.adapter), weights(second.adapter))
    assert third.adapter.inherited == second.adapter.inherited


def test_lora_of_another_model_is_refused(recipe, tmp_path):
    run_toy(recipe(f"run_dir={tmp_path}/first", *ON, "train.steps=1"))
    with pytest.raises(checkpoint.CheckpointError, match="does not fit"):
        checkpoint.load_weights(checkpoint.find_valid(tmp_path / "first"), ToyAdapter())


def test_without_peft_the_error_says_what_to_do(recipe, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ValueError, match=r"pip install 'reca\[lora\]', or set lora.rank=0"):
        Trainer(recipe(*ON), ToyAdapter())


def test_dora_of_rows_of_zeros_is_refused(recipe):
    adapter = ToyAdapter()
    with torch.no_grad():
        adapter.layers[1].weight[3] = 0
    with pytest.raises(ValueError, match="layers.1.weight has zero rows"):
        Trainer(recipe(*DORA), adapter)
