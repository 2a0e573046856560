"""AdamW with small moments, moments on the host and steps in the backward pass."""

import gc
import json
import sys
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from reca import checkpoint, distributed
from reca.checkpoint import contents
from reca.config.recipe import OptimConfig
from reca.config.recipe_files import load_recipe
from reca.estimate import memory
from reca.optim import FusedBackward, adamw, check_apex, make_optimizer, moments, state_bytes
from reca.options.fields import RecipeError
from reca.trainer import Trainer
from reca.training.parallelize import shard
from reca.training.skipped_steps import NonFiniteError
from tests.driver.toy import ToyAdapter, run_toy, weights

SHAPES = [(37,), (150, 300), (7, 5, 3), (1,), (33, 1000), ()]
SMALL = [{"moments": "bf16"}, {"name": "adamw_8bit"}]
ALL = [*SMALL, {"offload": True}, {"moments": "bf16", "offload": True}, {"name": "adamw_8bit", "offload": True}]


class Parameters(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for i, shape in enumerate(SHAPES):
            self.register_parameter(f"p{i}", nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))

    def decays(self, name, parameter):
        return parameter.ndim > 1


def steps(count=20, dtype=torch.float32, seed=0, **config):
    """Make steps with gradients that are the same whatever is asked for, but for their type."""
    model = Parameters(dtype)
    optimizer = make_optimizer(model, OptimConfig(lr=1e-2, weight_decay=0.1, **config), seed)
    generator = torch.Generator().manual_seed(2)
    for _ in range(count):
        for parameter in model.parameters():
            gradient = torch.randn(parameter.shape, generator=generator) * 0.1 + 0.05
            parameter.grad = gradient.bfloat16().to(dtype)
        optimizer.step()
    return model, optimizer


def moved_apart(model, other):
    """The root mean square difference as a share of how far `other` has moved."""
    ours, theirs, start = (
        torch.cat([p.detach().double().flatten() for p in m.parameters()]) for m in (model, other, Parameters())
    )
    return float((ours - theirs).norm() / (theirs - start).norm())


@pytest.fixture(scope="module")
def exact():
    """AdamW in fp64, written out."""
    model = Parameters(torch.float64)
    start = [p.detach().clone() for p in model.parameters()]
    _, optimizer = steps(dtype=torch.float64)
    assert type(optimizer) is torch.optim.AdamW
    generator = torch.Generator().manual_seed(2)
    m, v = [torch.zeros_like(p) for p in start], [torch.zeros_like(p) for p in start]
    for step in range(1, 21):
        for i, p in enumerate(start):
            g = (torch.randn(p.shape, generator=generator) * 0.1 + 0.05).bfloat16().double()
            p *= 1 - 1e-2 * (0.1 if p.ndim > 1 else 0)
            m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.95 * v[i] + 0.05 * g * g
            p -= 1e-2 * (m[i] / (1 - 0.9**step)) / ((v[i] / (1 - 0.95**step)).sqrt() + 1e-8)
    with torch.no_grad():
        for parameter, p in zip(model.parameters(), start, strict=True):
            parameter.copy_(p)
    return model


@pytest.mark.parametrize(
    ("config", "tolerance"),
    [({}, 1e-5), ({"offload": True}, 1e-5), ({"moments": "bf16"}, 0.01), ({"name": "adamw_8bit"}, 0.03)],
)
def test_steps_are_those_of_adamw_in_fp64(config, tolerance, exact):
    """Measured: 3e-6 of the way in fp32, 0.3 % in bf16, 1.1 % in 8 bits."""
    assert moved_apart(steps(**config)[0], exact) < tolerance


@pytest.mark.parametrize(
    ("config", "tolerance"), [({"moments": "bf16"}, 0.03), ({"name": "adamw_8bit"}, 0.03), ({"offload": True}, 1e-12)]
)
def test_parameters_in_fp64_go_with_any_moments(config, tolerance, exact):
    model, _ = steps(dtype=torch.float64, **config)
    assert all(p.dtype == torch.float64 for p in model.parameters()) and moved_apart(model, exact) < tolerance


@pytest.mark.parametrize("config", [{}, {"moments": "bf16"}])
def test_parameters_in_bf16_are_rounded_stochastically(config, exact):
    """Rounded to the nearest, steps of 1e-5 would be lost on weights of 1."""
    model, optimizer = nn.Linear(1, 1, dtype=torch.bfloat16), OptimConfig(lr=1e-5, **config)
    model.weight, model.other = (nn.Parameter(torch.ones(1, 20000, dtype=torch.bfloat16)) for _ in range(2))
    model.decays = lambda *_: False
    optimizer = make_optimizer(model, optimizer)
    for _ in range(10):
        for parameter in (model.weight, model.other):
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert optimizer.state[model.weight]["exp_avg"].dtype == moments.storage(
        (20000,), torch.bfloat16, OptimConfig(**config)
    )
    assert float(model.weight.detach().double().mean()) == pytest.approx(1 - 1e-4, abs=2e-5)
    # 51 of them by 2^-8 in every step: others each time, and in each parameter.
    assert 430 < int((model.weight < 1).sum()) < 590 and not torch.equal(model.weight, model.other)


def test_one_parameter_in_bf16_is_rounded_stochastically_beside_others_in_fp32():
    model = nn.Linear(1, 1)
    model.small, model.decays = nn.Parameter(torch.ones(1, 20000, dtype=torch.bfloat16)), lambda *_: False
    optimizer = make_optimizer(model, OptimConfig(lr=1e-4))
    model.small.grad = torch.ones_like(model.small)
    optimizer.step()
    assert 400 < int((model.small < 1).sum()) < 620  # one in 39: 1e-4 of the 2^-8 to the next
    assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {torch.float32}


@pytest.mark.parametrize("config", ALL)
def test_a_parameter_that_is_not_contiguous_makes_the_same_step(config):
    found = []
    for order in (lambda x: x.permute(2, 1, 0), lambda x: x.permute(2, 1, 0).contiguous()):
        model, generator = nn.Module(), torch.Generator().manual_seed(0)
        model.weight = nn.Parameter(order(torch.randn(80, 8, 9, generator=generator)))
        model.decays = lambda *_: True
        optimizer = make_optimizer(model, OptimConfig(lr=1e-2, **config))
        for _ in range(2):
            model.weight.grad = order(torch.randn(80, 8, 9, generator=generator))
            optimizer.step()
        found.append(model.weight.detach())
    assert not found[0].is_contiguous() and torch.equal(*found)


def test_rounding_is_unbiased_and_a_function_of_row_and_seed():
    values = torch.full((3, 40000), 1 + 2**-10)  # an eighth of the way from 1 to the next bf16
    rounded = moments.round_to_bf16(values, torch.tensor(5), 10, 0)
    assert set(rounded.unique().tolist()) == {1.0, 1.0078125}
    assert float((rounded > 1).double().mean()) == pytest.approx(1 / 8, abs=0.005)
    assert torch.equal(moments.round_to_bf16(values[1:], torch.tensor(5), 11, 0), rounded[1:])
    for other in (torch.tensor(6), 10, 0), (torch.tensor(5), 11, 0), (torch.tensor(5), 10, 1):
        assert not torch.equal(moments.round_to_bf16(values, *other), rounded)
    special = torch.tensor([[0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.0, -1.5]])
    assert torch.equal(
        moments.round_to_bf16(special, torch.tensor(0), 0, 0).float().nan_to_num(7), special.nan_to_num(7)
    )
    of_a_gpu = torch.tensor([[0x7FFFFFFF, -1]], dtype=torch.int32).view(torch.float32)  # NaN of all bits
    assert moments.round_to_bf16(of_a_gpu, torch.tensor(0), 0, 0).isnan().all()


def test_a_shard_is_rounded_as_its_rows_of_the_whole_are(monkeypatch):
    found = []
    for first in (0, 12):
        model = nn.Linear(300, 1, bias=False, dtype=torch.bfloat16)
        model.weight = nn.Parameter(torch.ones(20 - first, 300, dtype=torch.bfloat16))
        model.decays = lambda *_: False
        monkeypatch.setattr(adamw, "own_rows", lambda _, first=first: slice(first, 20))
        optimizer = make_optimizer(model, OptimConfig(lr=1e-3, moments="bf16"))
        model.weight.grad = torch.full_like(model.weight, 0.1)
        optimizer.step()
        found.append(model.weight.detach())
    assert torch.equal(found[0][12:], found[1]) and len(found[1].unique()) == 2


@pytest.mark.parametrize("row", [64, 256, 300, 1000])
@pytest.mark.parametrize("signed", [True, False])
def test_eight_bits_keep_what_they_are_documented_to(row, signed):
    values = torch.randn(9, row, generator=torch.Generator().manual_seed(row)) * 10.0 ** torch.arange(-4, 5)[:, None]
    values = values if signed else values.square()
    values[2, :5] = 0
    back = moments.dequantize(*moments.quantize(values, signed), signed)
    largest = torch.stack([part.abs().amax(1) for part in values.split(256, 1)], 1).repeat_interleave(256, 1)[:, :row]
    assert ((back - values).abs() <= largest * 0.0079).all()  # half of the widest step between two codes
    assert (back[values == 0] == 0).all()
    if not signed:
        assert (back[values > 0] > 0).all()
    part = moments.dequantize(*moments.quantize(values[3:5], signed), signed)
    assert torch.equal(part, back[3:5])  # whatever rows a rank has


def test_codes_are_those_of_torchao():
    ao = pytest.importorskip("torchao.optim.quant_utils")
    values = torch.randn(8, 512, generator=torch.Generator().manual_seed(0))
    for signed in (True, False):
        levels = torch.tensor(ao.create_dynamic_map(signed))
        given = values if signed else values.abs() + 1e-3
        scaled, scale = ao.scale_tensor(given, moments.BLOCK)
        codes, scales = moments.quantize(given, signed)
        assert torch.equal(scales.flatten(), scale)
        assert torch.equal(codes, ao.quantize_8bit_with_qmap(scaled, levels))
        assert torch.equal(moments.dequantize(codes, scales, signed), ao.dequant_with_qmap(codes, levels, scale))


@pytest.mark.parametrize("config", ALL)
def test_pieces_and_the_host_change_no_bit(config, monkeypatch):
    whole, _ = steps(**(config | {"offload": False}))
    update, rows = adamw.AdamW._update_piece, set()

    def counted(self, stored, *given):
        rows.add(len(stored["parameter"]))
        update(self, stored, *given)

    monkeypatch.setattr(adamw.AdamW, "_update_piece", counted)
    monkeypatch.setattr(adamw, "PIECE", 20_000)
    pieces, optimizer = steps(**config)
    assert {64, 22} <= rows and max(rows) == 64  # the 150 rows of p1 in three pieces
    assert optimizer.offload == config.get("offload", False)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), pieces.parameters(), strict=True))


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_moments_on_the_host_are_pinned_where_they_lie(name, monkeypatch):
    """Beside a GPU, and as long as they are there."""
    pinned = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(adamw, "pin_memory", lambda address, size: pinned.update({address: size}))
    monkeypatch.setattr(adamw, "unpin_memory", lambda address: pinned.pop(address))
    model, optimizer = steps(2, name=name, offload=True)
    state = [t for p in model.parameters() for name, t in optimizer.state[p].items() if name != "step"]
    assert pinned == {t.data_ptr(): t.numel() * t.itemsize for t in state} and len(state) >= 2 * len(SHAPES)
    del state, model, optimizer
    gc.collect()
    assert not pinned
    with FakeTensorMode():  # as `reca check` predicts a run
        _, optimizer = steps(0, offload=True)
    assert not pinned and len(optimizer.state) == len(SHAPES)


@pytest.mark.parametrize("config", [{}, *ALL])
def test_bytes_are_counted_as_they_are(config):
    model, optimizer = steps(1, **config)
    for parameter in model.parameters():
        tensors = [t for name, t in optimizer.state[parameter].items() if name != "step"]
        assert state_bytes(parameter, OptimConfig(**config)) == sum(t.numel() * t.itemsize for t in tensors)
    parameter = model.p4  # 33 rows: 17 and 16 of them on two ranks
    assert state_bytes(parameter, OptimConfig(name="adamw_8bit"), 2) == 2 * (17 * 1000 + 4 * 17 * 4)


@pytest.mark.parametrize("config", [*ALL, {"fused_backward": True}, {"fused_backward": True, **SMALL[1]}])
def test_resume_is_exact(config, recipe, tmp_path):
    given = [f"optim.{key}={str(value).lower()}" for key, value in config.items()]
    if "fused_backward" in config:
        given += ["optim.max_grad_norm=null", "objective.reca.micro_batch=8"]
    whole = run_toy(recipe(f"run_dir={tmp_path}/whole", *given))
    run_toy(recipe(f"run_dir={tmp_path}/parts", "train.steps=3", *given))
    resumed = run_toy(recipe(f"run_dir={tmp_path}/parts", *given))
    assert all(torch.equal(v, weights(resumed.adapter)[n]) for n, v in weights(whole.adapter).items())
    for parameter, again in zip(whole.optimizer.state.values(), resumed.optimizer.state.values(), strict=True):
        assert all(torch.equal(again[name], tensor) for name, tensor in parameter.items())


class Partly(ToyAdapter):
    """With a trained layer that no loss depends on."""

    def __init__(self):
        super().__init__()
        self.unused = nn.LayerNorm((64, 64))  # which starts without random numbers


def assert_same_run(ours, theirs):
    assert all(torch.equal(v, weights(theirs.adapter)[n]) for n, v in weights(ours.adapter).items())
    for state, other in zip(ours.optimizer.state.values(), theirs.optimizer.state.values(), strict=True):
        assert state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


@pytest.mark.parametrize("config", [{}, *ALL])
def test_resume_is_exact_where_a_parameter_never_gets_a_gradient(config, recipe, tmp_path):
    given, done = [f"optim.{key}={str(value).lower()}" for key, value in config.items()], {}
    for folder, steps in (("whole", 2), ("parts", 1), ("parts", 2)):
        done[folder] = Trainer(recipe(f"run_dir={tmp_path / folder}", f"train.steps={steps}", *given), Partly())
        done[folder].run()
    assert_same_run(done["whole"], done["parts"])
    taken = [state["step"].item() for state in done["parts"].optimizer.state.values()]
    assert sorted(taken) == [0, 0, 2, 2, 2, 2]


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("bagel_tiny", ["train.roles=[und_lm,gen_lm,gen_head]", "objective.i2t.weight=0"]),
        ("janus_tiny", ["objective.reca.weight=0", "objective.i2t={weight: 1, batch_size: 2, micro_batch: 2}"]),
    ],
)
def test_a_model_resumes_exactly_without_some_gradients(name, given, tmp_path):
    given = [*given, "objective.reca.batch_size=2", "data.limit=32", "log.tensorboard=false", "log.reconstructions=0"]
    done = {}
    for folder, steps in (("whole", 2), ("parts", 1), ("parts", 2)):
        done[folder] = Trainer(load_recipe(name, [f"run_dir={tmp_path / folder}", f"train.steps={steps}", *given]))
        done[folder].run()
    assert_same_run(done["whole"], done["parts"])
    assert {state["step"].item() for state in done["parts"].optimizer.state.values()} == {0, 2}


def test_a_checkpoint_that_lacks_part_of_a_state_is_refused(recipe, monkeypatch):
    find = contents.tensors
    with monkeypatch.context() as patch:
        patch.setattr(contents, "tensors", lambda state: {n: t for n, t in find(state).items() if "avg_sq" not in n})
        run_toy(recipe("train.steps=1"))
    with pytest.raises(Exception, match="Missing key"):
        run_toy(recipe("train.steps=2"))


@pytest.fixture(params=["whole", "sharded"])
def toy(request):
    """Makes toys, under FSDP2 or not."""
    if request.param == "whole":
        yield ToyAdapter
        return
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())

    def sharded():
        adapter = ToyAdapter()
        shard(adapter, 1, torch.device("cpu"), "fp32")
        return adapter

    yield sharded
    distributed.shut_down()


@pytest.mark.parametrize("fused", [True, False])
def test_the_first_state_is_what_torch_makes(fused, toy, monkeypatch):
    make = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *given, **named: make(*given, **(named | {"fused": fused})))
    done = []
    for cleared in (False, True):
        model = toy()
        optimizer = make_optimizer(model, OptimConfig())
        if cleared:
            optimizer.state.clear()
        for _ in range(2):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        done.append((list(model.parameters()), list(optimizer.state.values())))
    (parameters, states), (wanted, made) = done
    assert all(torch.equal(a, b) for a, b in zip(parameters, wanted, strict=True))
    for state, other in zip(states, made, strict=True):
        assert list(state) == list(other)
        for name, tensor in state.items():
            assert torch.equal(tensor, other[name]) and type(tensor) is type(other[name])
            assert tensor.dtype == other[name].dtype and tensor.stride() == other[name].stride()


@pytest.mark.parametrize("config", [{}, *ALL])
def test_reading_and_writing_a_state_counts_no_step(config):
    model = ToyAdapter()
    optimizer = make_optimizer(model, OptimConfig(**config))
    state = get_optimizer_state_dict(model, optimizer, options=contents.FLAT)
    set_optimizer_state_dict(model, optimizer, state, options=contents.FLAT)
    assert [s["step"].item() for s in optimizer.state.values()] == [0] * len(list(model.parameters()))


def test_the_map_of_codes_is_no_fake_one_after_a_prediction():
    """As `reca check` makes one, and training in the same process then."""
    moments._map.cache_clear()
    with FakeTensorMode():
        moments.quantize(torch.ones(1, 64), True)
    codes, _ = moments.quantize(torch.ones(1, 64), True)
    assert not isinstance(codes, FakeTensor) and codes.unique().tolist() == [255]


def test_rounding_depends_on_the_seed(recipe, tmp_path):
    one, other = (run_toy(recipe(f"run_dir={tmp_path}/{seed}", "optim.moments=bf16", "train.steps=1")) for seed in "ab")
    assert all(torch.equal(v, weights(other.adapter)[n]) for n, v in weights(one.adapter).items())
    first, second = steps(moments="bf16", seed=1)[0], steps(moments="bf16", seed=2)[0]
    assert not torch.equal(first.p1, second.p1)


FUSED = ["optim.fused_backward=true", "optim.max_grad_norm=null", "objective.reca.micro_batch=8"]


def test_steps_in_the_backward_pass_are_the_same(recipe, tmp_path):
    plain = run_toy(recipe(f"run_dir={tmp_path}/plain", *FUSED[1:]))
    trainer = Trainer(recipe(f"run_dir={tmp_path}/fused", *FUSED), ToyAdapter())
    alive = []
    for parameter in trainer.optimizer.state:
        parameter.register_post_accumulate_grad_hook(
            lambda own: alive.append(sum(p.grad is not None for p in trainer.adapter.parameters() if p is not own))
        )
    trainer.run()
    assert max(alive) == 0 and len(alive) == 6 * 4  # each is freed before the next is complete
    assert all(torch.equal(v, weights(trainer.adapter)[n]) for n, v in weights(plain.adapter).items())
    norms = [
        [json.loads(line)["grad_norm"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("plain", "fused")
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_steps_in_the_backward_pass_is_that_of_all_gradients_of_a_step(dtype):
    """In fp32: bf16 would round the norm of each by up to 0.4 %."""
    model = Parameters(dtype)
    fused = FusedBackward(make_optimizer(model, OptimConfig(fused_backward=True, max_grad_norm=None)))
    for seed in (1, 2):
        generator, exact = torch.Generator().manual_seed(seed), 0.0
        for parameter in model.parameters():
            gradient = torch.randn(parameter.shape, generator=generator).to(dtype)
            with fused.steps():
                (parameter * gradient).sum().backward()
            exact += float(gradient.double().square().sum())
        assert fused.finish_step() == pytest.approx(exact**0.5, rel=1e-5)
    assert fused.finish_step() == 0


@pytest.mark.parametrize("then", [FUSED, []])
def test_the_next_run_of_a_model_is_not_updated_by_the_optimizer_of_the_first(then, recipe, tmp_path):
    """Its hooks stayed on the parameters: they updated them in the next run, and left no gradients."""
    model, fresh = ToyAdapter(), ToyAdapter()
    Trainer(recipe(f"run_dir={tmp_path}/first", "train.steps=2", *FUSED), model).run()
    fresh.load_state_dict(model.state_dict())
    for name, one in (("next", model), ("fresh", fresh)):
        Trainer(recipe(f"run_dir={tmp_path}/{name}", "train.steps=2", *then), one).run()
    assert all(torch.equal(value, weights(fresh)[name]) for name, value in weights(model).items())


@pytest.mark.parametrize("config", [[], ["optim.name=adamw_8bit"], ["optim.moments=bf16"]])
def test_a_gradient_that_is_not_finite_stops_its_backward_pass(config, recipe):
    """Layer 1 comes first; layer 0's gradient is NaN in the second step, which its parameters do not make."""
    trainer = Trainer(recipe("train.steps=3", "train.max_skips=1", *FUSED, *config), ToyAdapter())
    seen = []

    def poison(gradient):
        return gradient * float("nan") if trainer.step == 1 else gradient

    trainer.adapter.layers[0].bias.register_hook(poison)
    for parameter in trainer.adapter.layers[0].parameters():
        parameter.register_hook(poison)
    step = trainer.train_step

    def watched(batches):
        before = weights(trainer.adapter), [s["step"].item() for s in trainer.optimizer.state.values()]
        found = step(batches)
        after = weights(trainer.adapter)
        seen.append({name for name in after if not torch.equal(before[0][name], after[name])})
        return found

    trainer.train_step = watched
    trainer.run()
    first, second = {"layers.0.weight", "layers.0.bias"}, {"layers.1.weight", "layers.1.bias"}
    assert seen == [first | second, second, first | second]
    assert all(torch.isfinite(p).all() for p in trainer.adapter.parameters())
    names = {p: n for n, p in trainer.adapter.named_parameters()}
    taken = {names[p]: state["step"].item() for p, state in trainer.optimizer.state.items()}
    assert taken == dict.fromkeys(first, 2.0) | dict.fromkeys(second, 3.0)
    lines = (trainer.run_dir / "non_finite_0.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2]


def test_losses_that_stay_nan_end_the_run(recipe):
    trainer = Trainer(recipe("train.max_skips=1", *FUSED), ToyAdapter())
    loss = trainer.adapter.loss
    trainer.adapter.loss = lambda *given: (term := loss(*given))._replace(sum=term.sum * float("nan"))
    start = weights(trainer.adapter)
    with pytest.raises(NonFiniteError, match="2 steps in a row"):
        trainer.run()
    assert all(torch.equal(v, weights(trainer.adapter)[n]) for n, v in start.items())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.fused_backward=true"], "cannot clip: set optim.max_grad_norm=null"),
        ([*FUSED, "train.skip_spikes=3"], "set train.skip_spikes=null"),
        (["optim.name=adamw_8bit", "optim.moments=bf16"], "has 8-bit moments"),
        (["optim.name=apex", "optim.offload=true"], "offload=True needs optim.name=adamw"),
        (["optim.name=apex", "optim.moments=bf16"], "moments='bf16' needs optim.name=adamw"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides, message, recipe):
    with pytest.raises(RecipeError, match=message):
        recipe(*overrides)


@pytest.fixture
def apex(monkeypatch):
    """NVIDIA apex as its FusedAdam is called: zero_grad takes nothing, and steps are counted by group."""

    class FusedAdam(torch.optim.Optimizer):
        def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True):
            super().__init__(params, {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps})
            assert adam_w_mode and not isinstance(self.param_groups[0]["params"][0], FakeTensor)

        def zero_grad(self):
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad = None

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                group["step"] = group.get("step", 0) + 1
                (beta1, beta2), decay = group["betas"], group["weight_decay"]
                options = dict(beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=decay, eps=group["eps"])
                for p in (p for p in group["params"] if p.grad is not None):
                    state = [[self.state[p][name]] for name in ("exp_avg", "exp_avg_sq")]
                    count = [torch.tensor(float(group["step"]))]
                    torch._fused_adamw_([p], [p.grad], *state, [], count, amsgrad=False, maximize=False, **options)

    optimizers = ModuleType("apex.optimizers")
    optimizers.FusedAdam = FusedAdam
    for module in (ModuleType("amp_C"), ModuleType("apex"), optimizers):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_apex_makes_the_steps_of_adamw_and_is_continued(apex, recipe, tmp_path):
    wanted = weights(run_toy(recipe(f"run_dir={tmp_path}/adamw")).adapter)
    run_toy(recipe("optim.name=apex", "train.steps=3", f"run_dir={tmp_path}/apex"))
    continued = run_toy(recipe("optim.name=apex", f"run_dir={tmp_path}/apex"))
    assert type(continued.optimizer).__name__ == "FusedAdam" and continued.optimizer.param_groups[0]["step"] == 6
    for name, weight in weights(continued.adapter).items():
        torch.testing.assert_close(weight, wanted[name], rtol=1e-6, atol=1e-7)


def test_apex_is_predicted_without_apex_and_a_gpu(apex):
    """It would be made in a process that sees no GPU, over tensors without memory."""
    small = ["objective.reca.batch_size=2", "objective.i2t.weight=0"]
    adamw, fused = (memory.predict(load_recipe("show_o_tiny", [*small, f"optim.name={n}"])) for n in ("adamw", "apex"))
    assert fused == adamw


@pytest.mark.parametrize(
    ("dtype", "ranks", "message"),
    [
        (torch.float32, 2, "DTensors, which the parameters are with 2 processes: set optim.name=adamw"),
        (torch.bfloat16, 1, "updates of 16-bit weights .*: set model.dtype=fp32, or optim.name=adamw"),
    ],
)
def test_apex_is_refused_for_what_it_would_train_wrongly(apex, dtype, ranks, message):
    with pytest.raises(RecipeError, match=message):
        check_apex(Parameters(dtype), OptimConfig(name="apex"), ranks)


def test_apex_that_is_not_here_is_refused_before_the_weights_are_read(monkeypatch, recipe):
    monkeypatch.setattr("reca.trainer.choose_trained", lambda *_: pytest.fail("the model is there already"))
    with pytest.raises(ValueError, match="NVIDIA apex built with its CUDA extensions .*, which cannot be imported"):
        Trainer(recipe("optim.name=apex"), ToyAdapter())


@pytest.mark.parametrize("more", [["objective.reca.micro_batch=2"], ["objective.t2i={weight: 1, batch_size: 2}"]])
def test_several_backward_passes_are_refused(more, recipe):
    with pytest.raises(RecipeError, match="needs one backward pass per step"):
        Trainer(recipe(*FUSED, *more), ToyAdapter())


def test_a_checkpoint_takes_the_moments_bytes(recipe, tmp_path):
    sizes = {}
    for name, config in {"fp32": {}, "bf16": {"moments": "bf16"}}.items():
        run_toy(recipe(f"run_dir={tmp_path}/{name}", "train.steps=1", *(f"optim.{k}={v}" for k, v in config.items())))
        folder = checkpoint.latest(tmp_path / name) / "optimizer"
        sizes[name] = sum(path.stat().st_size for path in folder.iterdir())
    numbers = sum(p.numel() for p in ToyAdapter().layers.parameters())
    assert sizes["fp32"] - sizes["bf16"] == pytest.approx(4 * numbers, abs=500)


def test_a_run_may_take_its_moments_off_the_gpu_when_it_is_continued(recipe, tmp_path):
    whole = run_toy(recipe(f"run_dir={tmp_path}/whole"))
    run_toy(recipe(f"run_dir={tmp_path}/parts", "train.steps=2"))
    run_toy(recipe(f"run_dir={tmp_path}/parts", "train.steps=4", "optim.offload=true"))
    resumed = run_toy(recipe(f"run_dir={tmp_path}/parts"))
    assert all(torch.equal(v, weights(resumed.adapter)[n]) for n, v in weights(whole.adapter).items())
