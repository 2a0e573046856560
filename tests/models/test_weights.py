"""Where weights come from, and what is said when they are not there."""

import errno
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors

from reca.models.common.hub import TOKENIZER, fetch, fetch_tokenizer
from reca.models.common.weight_files import read_tensors


def test_a_local_path_comes_first(tmp_path):
    assert fetch(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("inside", ["", "checkpoints/000004", "checkpoints/000004/weights/model.safetensors"])
def test_a_run_is_no_published_model(inside, tmp_path, monkeypatch):
    """Its tokenizer is missed first, and to set another would not help."""
    path = tmp_path / inside
    path.mkdir(parents=True, exist_ok=True)
    assert fetch(str(path)) == path
    for name in ("recipe.yaml", "status.json"):
        (tmp_path / name).touch()
    (tmp_path / "export").mkdir()
    assert fetch(str(tmp_path / "export")) == tmp_path / "export"
    monkeypatch.chdir(tmp_path)
    for source in (str(path), f"./{inside}"):
        said = f"model.weights={source} belongs to the run .* train.init_from"
        with pytest.raises(ValueError, match=said):
            fetch(source)
        with pytest.raises(ValueError, match=said):
            fetch_tokenizer(SimpleNamespace(tokenizer=None, weights=source), {})


def test_hub_repository_and_file_of_one(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **_: asked.append(repo) or str(tmp_path))
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda repo, file: asked.append((repo, file)) or str(tmp_path)
    )
    fetch("owner/name")
    fetch("owner/name/folder/file.pth")
    assert asked == ["owner/name", ("owner/name", "folder/file.pth")]


@pytest.mark.parametrize("source", ["owner/name", "owner/name/file.pth"])
def test_a_tokenizer_on_the_hub_is_read_without_the_weights_beside_it(monkeypatch, tmp_path, source):
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **how: asked.append(how) or str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("a file of weights was read"))
    config, downloads = SimpleNamespace(tokenizer=None, weights=source), {"weights": ["*.safetensors"]}
    assert fetch_tokenizer(config, downloads, local=True) == tmp_path
    assert asked == [{"allow_patterns": TOKENIZER, "local_files_only": True}]
    assert fetch_tokenizer(SimpleNamespace(tokenizer=None, weights=None), downloads) is None


@pytest.mark.parametrize("source", ["/nowhere/at/all", "./model", "model", "owner/name/folder"])
def test_neither_path_nor_hub_id(source):
    with pytest.raises(ValueError, match="does not exist; give a folder, a file, or a hub id"):
        fetch(source)


HUB_ERRORS = {
    "cannot be reached (OSError)": OSError("no route to host\nand more\nlines"),
    "is disabled (HF_HUB_OFFLINE)": errors.OfflineModeIsEnabled("offline"),
    "has no such file in this repository": errors.EntryNotFoundError("404"),
    "could not be downloaded from: the disk of its cache is full (HF_HOME moves the cache)": OSError(
        errno.EDQUOT, "Disk quota exceeded", "/cache/hub"
    ),
    "could not be downloaded from: /cache/hub: Permission denied (HF_HOME moves the cache)": PermissionError(
        errno.EACCES, "Permission denied", "/cache/hub"
    ),
    "cannot be reached (RuntimeError)": RuntimeError("of a library below"),
}


@pytest.mark.parametrize("cause", HUB_ERRORS)
def test_a_hub_that_gives_nothing(monkeypatch, cause):
    """One sentence: which repository, why not, how large, how to get it, where to put it."""

    def fails(*_, **__):
        raise HUB_ERRORS[cause]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fails)
    with pytest.raises(ValueError) as caught:
        fetch("ByteDance-Seed/BAGEL-7B-MoT", ["*.json", "*.txt"])
    assert str(caught.value) == (
        f"model.weights: ByteDance-Seed/BAGEL-7B-MoT, about 27.52 GiB, is not on this machine, and the hub {cause}; "
        "get it elsewhere with `hf download ByteDance-Seed/BAGEL-7B-MoT --include '*.json' --include '*.txt' "
        "--local-dir BAGEL-7B-MoT`, copy the folder here and set model.weights=BAGEL-7B-MoT"
    )
    with pytest.raises(ValueError, match=r"hf download a/b c/d\.pth --local-dir b`.* set model\.overlay=b/c/d\.pth"):
        fetch("a/b/c/d.pth", key="model.overlay")


def test_wrong_files(tmp_path):
    for name in ("x.safetensors", "x.safetensors.index.json"):
        with pytest.raises(ValueError, match=f"weight file .*{name} does not exist"):
            read_tensors(tmp_path / name)
    with pytest.raises(ValueError, match="contains no .*index.json"):
        read_tensors(tmp_path)
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(ValueError):
        read_tensors(tmp_path / "x.txt")


@pytest.mark.parametrize("key", ["state_dict", "model", "module", None])
def test_nested_state_dicts(tmp_path, key):
    state = {"a": torch.ones(2)}
    torch.save({key: state} if key else state, tmp_path / "x.pth")
    assert torch.equal(read_tensors(tmp_path / "x.pth")["a"], state["a"])
