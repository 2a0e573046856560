"""What holds for the adapter of every UMM: copies, default types, exports."""

import collections
import copy
import logging
import os
import pickle
import resource
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from reca import checkpoint
from reca.cli import main
from reca.config.recipe_files import load_recipe, save_recipe
from reca.data.batch import Batch, task_rng
from reca.data.tasks import Scored, ScoredBox, Turn
from reca.demo.pretrain.optimize import save_as_run
from reca.models import UMMS, umm_package
from reca.models.base import ROLES
from reca.models.common import exporting
from reca.models.common.exporting import export_to
from reca.precompute import features_identity, load_encoders
from reca.runs.lineage import parent_digest
from tests.models.contract import quick

TEXTS = {
    "reca": ["describe"] * 2,
    "t2i": ["a red circle", "a"],
    "i2t": [[Turn("what", "a red circle")]] * 2,
    "srum": [Scored("a red circle", (), 1.0), Scored("a", (ScoredBox(0, 0, 0.5, 1, -0.5),))],
}


def built(name: str):
    recipe = load_recipe(f"{name}_tiny")
    return umm_package(name).Adapter.load(recipe.model).eval()


@pytest.fixture(scope="module", params=UMMS)
def model(request):
    return built(request.param)


def answers(model) -> dict[str, torch.Tensor]:
    """Losses, weights, gradients and images."""
    found, random = {}, torch.Generator().manual_seed(0)

    def pixels(view):
        shape = view and (len(TEXTS["reca"]), 3, view.size, view.size)
        return view and list(torch.randint(0, 256, shape, dtype=torch.uint8, generator=random))

    for task in sorted(model.tasks):
        views, rng = model.views(task), task_rng(0, task)
        batch = Batch(task, torch.arange(2), TEXTS[task], gen=pixels(views.gen), und=pixels(views.und))
        term = model(batch, rng)
        found |= {f"{task} sum": term.sum.detach(), f"{task} weight": term.weight}
        if term.sum.requires_grad:
            model.zero_grad()
            (term.sum / term.weight).backward()
            found |= {f"{task} {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    image = torch.randint(0, 256, (3, 40, 30), dtype=torch.uint8, generator=random)
    found["drawn"] = model.generate(["a red circle"], [0], **quick(model.name, 3))[0]
    if "edit" in model.abilities:
        found["edited"] = model.edit([image], ["red"], [0], steps=3)[0]
    model.answer([image], ["what"], max_new_tokens=2)
    return found


def same(ours: dict, wanted: dict) -> None:
    assert ours.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


TYPES = [
    (name, dtype)
    for name in UMMS
    for dtype in (("fp32", "bf16") if hasattr(load_recipe(f"{name}_tiny").model, "dtype") else (None,))
]


@pytest.mark.parametrize(("name", "dtype"), TYPES)
def test_a_model_without_weights_has_the_parameters_of_one_with_them(name, dtype):
    """Memory and checkpoints are predicted from it."""
    recipe = load_recipe(f"{name}_tiny", [f"model.dtype={dtype}"] if dtype else [])
    adapter = umm_package(name).Adapter
    made, predicted = adapter.load(recipe.model), adapter.build_meta(recipe.model)
    forms = [{n: (p.shape, p.dtype) for n, p in net.named_parameters()} for net in (made, predicted)]
    assert forms[0] == forms[1] and len(forms[0]) > 20
    assert (torch.bfloat16 in {kept for _, kept in forms[0].values()}) == (dtype == "bf16")
    half = [n for net in (made, predicted) for n, b in net.named_buffers() if b.dtype == torch.bfloat16]
    assert not half  # rotary frequencies in bf16 would rotate distant positions by wrong angles


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        *((name, {"dtype": dtype} if dtype else {}) for name, dtype in TYPES),
        ("show_o", {"dtype": "bf16", "understanding": "efficientnet"}),
        ("open_uni", {"understanding": "efficientnet"}),
    ],
)
def test_a_loaded_model_has_the_types_of_a_random_one(name, keys, tmp_path):
    """Show-o's mean and scale of EfficientNet's features were loaded in bf16."""
    keys = [f"model.{key}={value}" for key, value in keys.items()]
    load, source = umm_package(name).Adapter.load, "overlay" if name == "open_uni" else "weights"
    random = load(load_recipe(f"{name}_tiny", keys).model)
    random.export(tmp_path)
    keys += [f"model.weights={tmp_path}", f"model.{source}={tmp_path}"]
    loaded = load(load_recipe(f"{name}_tiny", keys).model)
    types = [{n: t.dtype for n, t in (*net.named_parameters(), *net.named_buffers())} for net in (random, loaded)]
    assert types[0] == types[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(model, dtype):
    wanted, state = answers(model), model.state_dict()
    torch.set_default_dtype(dtype)
    try:
        other = built(model.name)
        ours = answers(other)
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)
    same(other.state_dict(), state)
    same(dict(other.named_buffers()), dict(model.named_buffers()))
    same(ours, wanted)


def test_the_default_device_changes_nothing(model):
    """On a GPU, torch.set_default_device("cuda") is meant; tensors of meta cannot be read at all."""
    image = torch.arange(3 * 40 * 30, dtype=torch.uint8).view(3, 40, 30)

    def made():
        images = model.generate(["a red circle"], [0], **quick(model.name, 3))
        images += model.edit([image], ["red"], [0], steps=3) if "edit" in model.abilities else []
        scores = model.log_likelihood([image], ["what"], ["red"])
        return torch.cat([each.flatten() for each in images]), model.answer([image], ["what"], max_new_tokens=2), scores

    wanted = made()
    with torch.device("meta"):
        ours = made()
    assert torch.equal(ours[0], wanted[0]) and ours[1:] == wanted[1:]


def test_copies_answer_alike_and_are_apart(model):
    wanted = answers(model)
    model.zero_grad()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        same(other.state_dict(), model.state_dict())
        same(answers(other), wanted)
        assert other.tokenizer is not model.tokenizer
        with torch.no_grad():
            next(other.parameters()).add_(1)
        assert not torch.equal(next(other.parameters()), next(model.parameters()))


# exports


def files(folder) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_an_export_names_what_it_wrote_with_the_mode_of_the_umask(model, tmp_path):
    (tmp_path / "mine.txt").touch()
    for umask in (0o022, 0o027):
        before = os.umask(umask)
        try:
            written = model.export(tmp_path)
        finally:
            os.umask(before)
        assert sorted([*written, "mine.txt"]) == files(tmp_path)
        for name in written:
            assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~umask, name


def test_an_export_loads_again(model, tmp_path):
    """Bit for bit, as far as the type of the published files goes; what is loaded exports the same files."""
    first, second = tmp_path / "first", tmp_path / "second"
    written = model.export(first)
    config = replace(load_recipe(f"{model.name}_tiny").model, weights=str(first), seed=7)
    if any("tokenizer" in name for name in written):
        config.words = []
    again = umm_package(model.name).Adapter.load(config)
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        found = again.state_dict()[name]
        assert torch.equal(found, tensor) or torch.equal(found, tensor.bfloat16().to(tensor.dtype)), name
    assert again.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    assert all(p.requires_grad and not p.is_meta for p in again.parameters())
    again.export(second)
    for name in written:
        if name.endswith(".safetensors") or name.split("/")[-1] == "config.json":
            assert (second / name).read_bytes() == (first / name).read_bytes(), name


@pytest.mark.parametrize("weights", ["published", "random"])
def test_encoders_alone_make_the_same_features(model, tmp_path, weights):
    """For `reca cache`: everything that `encode` does not read stays without memory."""
    recipe = load_recipe(f"{model.name}_tiny")
    if weights == "published":
        written = model.export(tmp_path)
        recipe.model = replace(recipe.model, weights=str(tmp_path), seed=7)
        if any("tokenizer" in name for name in written):
            recipe.model.words = []
    whole = umm_package(model.name).Adapter.load(recipe.model)
    alone, _ = load_encoders(recipe, torch.device("cpu"))
    roles = alone.roles()
    assert roles == whole.roles() and whole.encoder_roles <= set(ROLES)
    for name, parameter in alone.named_parameters():
        assert parameter.is_meta == (roles[name] not in whole.encoder_roles), name
        assert parameter.dtype == whole.get_parameter(name).dtype, name
    for task in sorted(model.tasks):
        sample = pixels_of(model, task)
        wanted, found = whole.encode(sample), alone.encode(sample)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert all(torch.equal(a, b) for a, b in zip(found[name], value, strict=True)), (task, name)


@pytest.mark.parametrize("rank", [0, 2])
def test_features_are_those_of_the_run_that_training_starts_from(model, tmp_path, rank):
    """Where that run holds other encoders, as of pre-training, `reca cache` takes them and no other cache."""
    recipe = load_recipe(f"{model.name}_tiny", {"lora.rank": rank})
    start = umm_package(model.name).Adapter.load(recipe.model)
    for parameter in start.parameters():
        parameter.detach().mul_(1.25)
    before = load_recipe(f"{model.name}_tiny", {"run_dir": str(tmp_path / "whole")})
    save_as_run(start, before, tmp_path / "whole", 1)
    own = load_recipe(f"{model.name}_tiny", {"train.init_from": str(tmp_path / "whole"), "lora.rank": rank})
    alone, digest = load_encoders(own, torch.device("cpu"))
    assert digest == parent_digest(own)
    assert any(parameter.is_meta for parameter in alone.parameters())
    for name, parameter in alone.named_parameters():
        assert parameter.is_meta or torch.equal(parameter, start.get_parameter(name)), name
    identities = [features_identity(own, alone, parent) for parent in ("one", "two")]
    published, _ = load_encoders(recipe, torch.device("cpu"))
    assert features_identity(recipe, published, None) not in identities and identities[0] != identities[1]

    trained = start.trainable_roles - start.encoder_roles
    start.requires_grad_(False)
    for name, role in start.roles().items():
        start.get_parameter(name).requires_grad_(role in trained)
    (tmp_path / "part").mkdir()
    save_recipe(before, tmp_path / "part/recipe.yaml")
    optimizer = torch.optim.SGD([p for p in start.parameters() if p.requires_grad], lr=0.0)
    checkpoint.save(tmp_path / "part", {"step": 1}, start, optimizer, checkpoint.Keep(1))
    own.train.init_from = str(tmp_path / "part")
    alone, _ = load_encoders(own, torch.device("cpu"))
    for name, parameter in alone.named_parameters():
        assert parameter.is_meta or torch.equal(parameter, published.get_parameter(name)), name
    assert features_identity(own, alone, "one") == features_identity(recipe, published, None)


def pixels_of(model, task):
    views, random = model.views(task), torch.Generator().manual_seed(0)

    def seen(view):
        size = view and (3, view.size, view.size)
        return view and [torch.randint(0, 256, size, dtype=torch.uint8, generator=random) for _ in range(2)]

    target = seen(views.gen) if task == "srum" else None
    return Batch(task, torch.arange(2), TEXTS[task], gen=seen(views.gen), und=seen(views.und), target=target)


def test_the_command_says_what_it_wrote_and_that_the_model_is_random(model, tmp_path, capsys, caplog):
    (tmp_path / "mine.txt").touch()
    with caplog.at_level(logging.WARNING, logger="reca"):
        assert main(["export", f"{model.name}_tiny", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("wrote ") and "mine.txt" not in said and ".export" not in said
    assert all(path.name in said for path in tmp_path.iterdir() if path.name != "mine.txt")
    assert "this model is random" in caplog.text


def full(monkeypatch, free: int) -> None:
    usage = collections.namedtuple("Usage", "total used free")
    monkeypatch.setattr(exporting.shutil, "disk_usage", lambda _: usage(free, 0, free))


def test_a_disk_without_room_keeps_the_export_before(model, tmp_path, monkeypatch):
    model.export(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    full(monkeypatch, 1000)
    with pytest.raises(
        OSError, match=rf"{tmp_path}/\S+ cannot be written: it needs [\d.]+ [KM]iB and 1000 bytes are free"
    ):
        model.export(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


def test_a_write_that_fails_halfway_keeps_the_export_before(model, tmp_path):
    """A limit on the size of files stands for the disk: the system ends the write in its middle, as a full one does."""
    model.export(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"{tmp_path}/\S+ cannot be written: the disk is full"):
            model.export(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


def test_a_later_file_that_fails_keeps_the_earlier_ones(tmp_path):
    with export_to(tmp_path) as out:
        out.json("config.json", {"a": 1})
        out.tensors("m.safetensors", {"w": torch.zeros(2)})
        assert out.done() == ["config.json", "m.safetensors"]
    with pytest.raises(ZeroDivisionError), export_to(tmp_path) as out:
        out.tensors("m.safetensors", {"w": torch.ones(2)})
        raise ZeroDivisionError
    assert not load_file(tmp_path / "m.safetensors")["w"].any() and files(tmp_path) == ["config.json", "m.safetensors"]
