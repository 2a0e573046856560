"""Weight files as people have them: one sentence for what cannot be used, and what trainers wrap is unwrapped."""

import json
import logging
import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from reca.io.files import read_json
from reca.models.common.text import read_tokenizer
from reca.models.common.tiny_tokenizer import word_tokenizer
from reca.models.common.weight_files import assign_state_dict, init_on_meta, read_tensors, weight_file

STATE = {"a.weight": torch.arange(4.0).view(2, 2), "b.bias": torch.ones(300)}


class Code:
    """An object whose pickle runs a command when it is read."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def same(tensors, wanted=STATE):
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)


def refused(path, *words):
    """One sentence, with the file and its size."""
    with pytest.raises(ValueError) as caught:
        read_tensors(path)
    text = str(caught.value)
    assert str(path) in text and "\n" not in text and len(text) < 500, text
    assert any(unit in text for unit in (" bytes)", "KiB)", "MiB)")), text
    assert all(word in text for word in words), text


def legacy(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)


# files that are not weight files

FOREIGN = {
    "pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
        "Git LFS pointer",
        "git lfs pull",
    ),
    "html": (b"<!DOCTYPE html><html>Sign in</html>", "web page", "fetch it again"),
    "html after blanks": (b"\xef\xbb\xbf \n<HTML>", "web page"),
    "xml": (b"<?xml version='1.0'?><Error/>", "web page"),
    "empty": (b"", "is empty", "fetch it again"),
    "zeros": (b"\0" * 4096, "zeros", "fetch it again"),
    "garbage": (bytes(range(7, 250)), "first bytes"),
    "text": (b"hello, these are no weights", "first bytes"),
    "json error": (b'{"error": "Repository not found"}', "first bytes"),
    "gzip": (b"\x1f\x8b\x08\0abcdefgh", "gzip", "unpack it"),
    "hdf5": (b"\x89HDF\r\n\x1a\n", "HDF5"),
    "gguf": (b"GGUF\x03\0\0\0", "GGUF"),
    "numpy": (b"\x93NUMPY\x01\0", "NumPy"),
    "one byte": (b"\x80", ""),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin", ".ckpt"])
@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_weight_file(tmp_path, name, suffix):
    content, *words = FOREIGN[name]
    path = tmp_path / f"m{suffix}"
    path.write_bytes(content)
    refused(path, *words)


def test_other_suffixes(tmp_path):
    save_file(STATE, tmp_path / "m.bin")
    refused(tmp_path / "m.bin", "safetensors file under another suffix", "rename it to m.safetensors")
    torch.save(STATE, tmp_path / "m.safetensors")
    refused(tmp_path / "m.safetensors", "torch file under another suffix", "rename it to m.pth")
    torch.save(STATE, tmp_path / "m.pkl")
    refused(tmp_path / "m.pkl", "rename it to m.pth")
    torch.save(STATE, tmp_path / "m.pth.tar")
    refused(tmp_path / "m.pth.tar", "rename it to m.pth")
    save_file(STATE, tmp_path / "m.pth.zip")
    refused(tmp_path / "m.pth.zip", "rename it to m.safetensors")
    (tmp_path / "m.safetensors.incomplete").write_bytes(b"12345678{")
    refused(tmp_path / "m.safetensors.incomplete", "fetch it again")
    (tmp_path / "notes.txt").write_text("notes")
    refused(tmp_path / "notes.txt", "expected .safetensors")


@pytest.mark.parametrize("suffix", ["incomplete", "part", "partial", "crdownload", "download", "aria2", "tmp"])
def test_a_download_that_has_not_finished_is_recognised_by_its_name(tmp_path, suffix):
    """Its first bytes may be those of a weight file; renaming it would not help."""
    path = tmp_path / f"m.pth.{suffix}"
    for save in (torch.save, legacy, save_file):
        save(STATE, path)
        refused(path, "is a download that has not finished; fetch it again")
    path.write_bytes(b"GGUF")
    refused(path, "GGUF")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.ones(1)], "a list of 1"),
        ((), "a tuple of 0"),
        (torch.ones(2), "a Tensor"),
        (3, "a int"),
        ({}, "no tensors by name, only none"),
        ({"epoch": 3, "best": 0.1}, "no tensors by name, only epoch, best"),
        ({0: torch.ones(1)}, "no tensors by name, only 0"),
        ({"generator": STATE, "critic": STATE}, "several state dicts (generator, critic)"),
    ],
)
@pytest.mark.parametrize("save", [torch.save, legacy])
def test_other_contents(tmp_path, content, words, save):
    save(content, tmp_path / "m.pth")
    refused(tmp_path / "m.pth", words)


def test_no_code_runs(tmp_path):
    marker = tmp_path / "ran"
    for save in (torch.save, legacy):
        save({"state_dict": STATE, "hook": Code(marker)}, tmp_path / "m.pth")
        refused(tmp_path / "m.pth", "Python objects", "system", "state dict alone")
    (tmp_path / "p.pth").write_bytes(pickle.dumps(Code(marker)))
    refused(tmp_path / "p.pth")
    (tmp_path / "n.pth").write_bytes(pickle.dumps({"a": np.ones(3)}))
    refused(tmp_path / "n.pth")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    refused(tmp_path / "module.pth", "Python objects", "Linear")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    refused(tmp_path / "script.pt", "TorchScript")
    assert not marker.exists()


def test_a_tokenizer_folder_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    word_tokenizer(["a"], ["<|im_end|>"]).save_pretrained(tmp_path)
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    for config in ({"auto_map": {"AutoTokenizer": ["code.Own", "code.Own"], "AutoConfig": "code.Own"}},):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", **config}))
        own = json.loads((tmp_path / "tokenizer_config.json").read_text())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(own | config | {"tokenizer_class": "Own"}))
        try:
            read_tokenizer(tmp_path)
        except ValueError as error:
            assert str(tmp_path) in str(error)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"<html>", b"version https://git-lfs.github.com/spec/v1\n", b"", b"{", b"[]"])
def test_damaged_tokenizers_and_descriptions(tmp_path, content):
    word_tokenizer(["a"], []).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=str(tmp_path)):
        read_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer\.json \(\d+ bytes\)"):
        read_json(tmp_path / "tokenizer.json")


# what trainers wrap

WRAPPED = {
    "state_dict": lambda s: {"state_dict": s, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(1)}}}},
    "model": lambda s: {"model": s},
    "module": lambda s: {"module": s},
    "twice": lambda s: {"state_dict": {"model": s}, "step": torch.tensor(5)},
    "ema": lambda s: {"ema": s, "steps": 3},
    "model_ema": lambda s: {"model_ema": {"module": s}},
    "params": lambda s: {"params": s, "params_ema": {n: t + 1 for n, t in s.items()}},
    "no key": lambda s: s | {"epoch": 3, "averages": {"x": torch.ones(1)}},
    "another name": lambda s: {"denoiser_weights": s, "step": 1},
}
NAMES = [
    "module.{}", "_orig_mod.{}", "module._orig_mod.{}", "_orig_mod.module.{}", "module.module.{}",
    "_fsdp_wrapped_module.{}", "_checkpoint_wrapped_module.{}", "_forward_module.{}",
]  # fmt: skip


@pytest.mark.parametrize("wrap", WRAPPED)
@pytest.mark.parametrize("save", [torch.save, legacy])
def test_wrapped_state_dicts(tmp_path, wrap, save):
    save(WRAPPED[wrap](STATE), tmp_path / "m.pth")
    same(read_tensors(tmp_path / "m.pth"))


OTHERS = {"discriminator": {"x": torch.ones(1)}, "step": 3}  # what a file holds besides the weights
TRAINED = ["state_dict", "model", "module", "model_state_dict", "weights", "params", "net", "checkpoint"]
AVERAGED = ["ema", "ema_state_dict", "state_dict_ema", "model_ema", "ema_model", "params_ema"]


@pytest.mark.parametrize("key", TRAINED + AVERAGED)
def test_the_keys_under_which_trainers_save_weights(tmp_path, key):
    torch.save({key: STATE, **OTHERS}, tmp_path / "m.pth")
    same(read_tensors(tmp_path / "m.pth"))
    if key in TRAINED:
        torch.save({key: STATE, **{ema: {"x": torch.ones(1)} for ema in AVERAGED}}, tmp_path / "both.pth")
        same(read_tensors(tmp_path / "both.pth"))


def test_of_several_averages_the_first_known_one_is_read(tmp_path):
    torch.save({"params_ema": {"x": torch.ones(1)}, "ema": STATE, "step": 3}, tmp_path / "m.pth")
    same(read_tensors(tmp_path / "m.pth"))


@pytest.mark.parametrize("key", TRAINED + AVERAGED)
def test_the_keys_in_a_state_dict_of_other_keys(tmp_path, key):
    torch.save({"model": {"version": 2, key: {"version": 2, **STATE}}, **OTHERS}, tmp_path / "m.pth")
    same(read_tensors(tmp_path / "m.pth"))


def test_a_model_may_have_a_tensor_named_as_that_of_an_average(tmp_path):
    state = STATE | {"n_averaged": torch.ones(1)}
    torch.save(state, tmp_path / "m.pth")
    same(read_tensors(tmp_path / "m.pth"), state)
    named = {f"module.{name}": tensor for name, tensor in STATE.items()}
    torch.save(named, tmp_path / "m.pth")
    same(read_tensors(tmp_path / "m.pth"))


def test_a_model_may_have_a_part_named_as_an_average(tmp_path):
    state = {"ema.weight": torch.ones(1), "head.weight": torch.zeros(1)}
    torch.save(state, tmp_path / "m.pth")
    same(read_tensors(tmp_path / "m.pth"), state)


@pytest.mark.parametrize("form", NAMES)
@pytest.mark.parametrize("save", [torch.save, save_file])
def test_wrapped_names(tmp_path, form, save):
    path = tmp_path / ("m.safetensors" if save is save_file else "m.pth")
    save({form.format(name): tensor for name, tensor in STATE.items()}, path)
    same(read_tensors(path))
    wrapper = form.removesuffix("{}")
    save({f"layers.0.{wrapper}mlp.weight": STATE["a.weight"], "head.bias": STATE["b.bias"]}, path)
    assert sorted(read_tensors(path)) == ["head.bias", "layers.0.mlp.weight"]
    save({"a": torch.ones(1), form.format("a"): torch.ones(1)}, path)
    refused(path, "contains a twice")


def test_a_file_of_averaged_weights_says_so(tmp_path, caplog):
    average = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(2, 2))
    cases = {
        "under a key": ({"ema": STATE}, STATE),
        "in the names": ({f"ema.{name}": tensor for name, tensor in STATE.items()}, STATE),
        "of torch": (average.state_dict(), average.module.state_dict()),
    }
    for number, (saved, wanted) in enumerate(cases.values()):
        caplog.clear()
        torch.save(saved, tmp_path / f"{number}.pth")
        with caplog.at_level(logging.INFO, logger="reca"):
            same(read_tensors(tmp_path / f"{number}.pth"), wanted)
        assert f"{number}.pth contains" in caplog.text and "weights only" in caplog.text
    caplog.clear()
    torch.save({"model": STATE, "ema": {name: tensor + 1 for name, tensor in STATE.items()}}, tmp_path / "both.pth")
    with caplog.at_level(logging.INFO, logger="reca"):
        same(read_tensors(tmp_path / "both.pth"))
    assert "EMA under 'ema' is ignored" in caplog.text


# shards

MANY = {f"layer.{i}": torch.full((2,), float(i)) for i in range(12)}


def shards(folder, form="model-{}-of-12.safetensors", index=True):
    names = {}
    for i, (name, tensor) in enumerate(MANY.items(), 1):
        file = form.format(i)
        (save_file if file.endswith("safetensors") else torch.save)({name: tensor}, folder / file)
        names[name] = file
    if index:
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps({"metadata": {}, "weight_map": names}))


@pytest.mark.parametrize("index", [True, False])
def test_shards_in_the_order_of_their_numbers(tmp_path, index):
    shards(tmp_path, index=index)
    assert list(read_tensors(tmp_path)) == list(MANY)
    assert list(read_tensors(weight_file(tmp_path))) == list(MANY)


def test_shards_that_are_not_there(tmp_path):
    shards(tmp_path)
    for number in (3, 11):
        (tmp_path / f"model-{number}-of-12.safetensors").unlink()
    with pytest.raises(ValueError, match=r"index\.json \(\d+ bytes\) names 12 shards of which 2 .*-3-of-12.*-11-of"):
        read_tensors(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"lacks shards 3, 11 of 12"):
        read_tensors(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<html>", "web page"),
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
        (b"{", "not JSON"),
        (b"[" * 10**5, "nested too deeply"),
        (b"[1]", "a JSON list"),
        (b"{}", "no weight_map"),
        (b'{"weight_map": {}}', "no weight_map"),
        (b'{"weight_map": {"a": 3}}', "no weight_map"),
        (b'{"weight_map": ["a"]}', "no weight_map"),
        (b'{"weight_map": {"a": "../../m.safetensors"}}', "outside its folder"),
        (b'{"weight_map": {"a": "/etc/m.safetensors"}}', "outside its folder"),
    ],
)
def test_indices_that_are_none(tmp_path, content, words):
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(content)
    refused(path, words)


def test_a_header_that_is_nested_too_deeply(tmp_path):
    header = b'{"a": ' + b"[" * 10**5
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    refused(tmp_path / "m.safetensors", "damaged safetensors header")


def test_an_index_and_shards_that_differ(tmp_path):
    shards(tmp_path)
    save_file({"other": torch.ones(1)}, tmp_path / "model-2-of-12.safetensors")
    with pytest.raises(ValueError, match=r"lists 1 tensors that its shards lack, the first layer\.1"):
        read_tensors(tmp_path)
    save_file({"layer.0": torch.ones(1)}, tmp_path / "model-2-of-12.safetensors")
    with pytest.raises(ValueError, match=r"model-2-of-12.*contains layer\.0, which an earlier shard contains too"):
        read_tensors(tmp_path)
    (tmp_path / "model-2-of-12.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"model-2-of-12\.safetensors \(\d+ bytes\) is a Git LFS pointer"):
        read_tensors(tmp_path)


def test_safetensors_go_before_other_formats(tmp_path):
    """A repository may hold both, and what is left of the other one, such as its index, does not matter."""
    shards(tmp_path, index=False)
    other = {name: f"pytorch_model-{i}-of-12.bin" for i, name in enumerate(MANY, 1)}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": other}))
    same(read_tensors(tmp_path), MANY)
    for name, file in other.items():
        torch.save({name: MANY[name] + 1}, tmp_path / file)
    same(read_tensors(tmp_path), MANY)
    (tmp_path / "pytorch_model.bin.index.json").unlink()
    same(read_tensors(weight_file(tmp_path)), MANY)
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    same(read_tensors(tmp_path), {name: tensor + 1 for name, tensor in MANY.items()})


def test_links_of_a_hub_cache(tmp_path):
    (tmp_path / "blobs").mkdir()
    save_file(STATE, tmp_path / "blobs/0123abcd")
    snapshot = tmp_path / "snapshots/f00"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123abcd")
    same(read_tensors(snapshot))
    same(read_tensors(weight_file(snapshot)))
    (tmp_path / "blobs/0123abcd").unlink()
    with pytest.raises(ValueError, match=r"f00 contains no weight file.*missing \(model\.safetensors\): copy"):
        read_tensors(snapshot)


# types


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float64, torch.float32),
        (torch.float8_e4m3fn, torch.bfloat16),
        (torch.float8_e5m2, torch.bfloat16),
    ],
)
def test_types_that_are_computed_in(tmp_path, dtype, kept):
    state = {name: (tensor * 2).to(dtype) for name, tensor in torch.nn.Linear(2, 2).state_dict().items()}
    save_file(state, tmp_path / "m.safetensors")
    module = torch.nn.Linear(2, 2)
    for wanted in (None, torch.float32):
        assign_state_dict(module, read_tensors(tmp_path / "m.safetensors"), "m", wanted)
        assert {parameter.dtype for parameter in module.parameters()} == {wanted or kept}
        assert torch.equal(module.weight.float(), state["weight"].float())


@pytest.mark.parametrize(
    "weight",
    [
        torch.ones(2, 2, dtype=torch.int8),
        torch.ones(2, 2, dtype=torch.uint8),
        torch.ones(2, 2, dtype=torch.bool),
        torch.ones(2, 2, dtype=torch.complex64),
        torch.eye(2).to_sparse(),
        torch.empty(2, 2, device="meta"),
    ],
    ids=["int8", "uint8", "bool", "complex", "sparse", "meta"],
)
def test_weights_of_other_types_are_refused(weight):
    words = r"m does not fit .*\n  1 not plain floating-point tensors: weight: file \w+$"
    with pytest.raises(ValueError, match=words):
        assign_state_dict(torch.nn.Linear(2, 2), {"weight": weight, "bias": torch.ones(2)}, "m", torch.float32)


def test_which_file_of_a_folder(tmp_path):
    with pytest.raises(ValueError, match="contains no weight file"):
        weight_file(tmp_path)
    torch.save(STATE, tmp_path / "m.bin")
    assert weight_file(tmp_path).name == "m.bin"
    save_file(STATE, tmp_path / "m.safetensors")
    save_file(STATE, tmp_path / "m.fp16.safetensors")
    assert weight_file(tmp_path).name == "m.safetensors"
    save_file(STATE, tmp_path / "n.safetensors")
    with pytest.raises(ValueError, match=r"several weight files \(m\.safetensors, n\.safetensors\)"):
        weight_file(tmp_path)
    assert weight_file(tmp_path, ignore=("n.safetensors",)).name == "m.safetensors"


def test_shards_of_two_files(tmp_path):
    for name in ("a-00001-of-00001.bin", "b-00001-of-00001.bin"):
        torch.save(STATE, tmp_path / name)
    with pytest.raises(ValueError, match=r"shards of several files \(a\*.bin, b\*.bin\)"):
        read_tensors(tmp_path)


def test_an_index_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_tensors(tmp_path / "model.safetensors.index.json")


def test_parameters_on_the_meta_device_and_after_it():
    with pytest.raises(KeyError), init_on_meta():
        norm = torch.nn.BatchNorm1d(3)
        norm.weight = norm.weight  # one that is there already
        assert norm.weight.is_meta and norm.bias.is_meta and not norm.running_mean.is_meta
        frozen = torch.nn.Module()
        frozen.weight = torch.nn.Parameter(torch.ones(2), requires_grad=False)
        assert frozen.weight.is_meta and not frozen.weight.requires_grad
        raise KeyError
    assert not torch.nn.Linear(2, 2).weight.is_meta


def test_integers_keep_their_type():
    module = torch.nn.Linear(2, 2, bias=False)
    module.register_buffer("ids", torch.arange(3))
    module.register_buffer("mask", torch.ones(3, dtype=torch.bool))
    state = {"weight": torch.ones(2, 2), "ids": torch.arange(3) + 2**31, "mask": torch.tensor([True, False, True])}
    assign_state_dict(module, state, "file", torch.bfloat16)
    assert module.weight.dtype == torch.bfloat16
    assert torch.equal(module.ids, state["ids"]) and module.ids.dtype == torch.int64 and module.mask.dtype == torch.bool
