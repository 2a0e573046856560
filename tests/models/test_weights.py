"""Where weights come from, and what is said when they are not there."""

import huggingface_hub
import pytest
import torch

from reca.models.hub import fetch
from reca.models.weights import read_tensors


def test_a_local_path_comes_first(tmp_path):
    assert fetch(str(tmp_path)) == tmp_path


def test_hub_repository_and_file_of_one(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **_: asked.append(repo) or str(tmp_path))
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda repo, file: asked.append((repo, file)) or str(tmp_path)
    )
    fetch("owner/name")
    fetch("owner/name/folder/file.pth")
    assert asked == ["owner/name", ("owner/name", "folder/file.pth")]


@pytest.mark.parametrize("source", ["/nowhere/at/all", "./model", "model", "owner/name/folder"])
def test_neither_path_nor_hub_id(source):
    with pytest.raises(ValueError, match="does not exist; give a folder, a file, or a hub id"):
        fetch(source)


def test_a_hub_that_cannot_be_reached(monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ValueError, match="owner/name is not on this machine, and the hub cannot be reached"):
        fetch("owner/name")


def test_wrong_files(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_tensors(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="holds no .*index.json"):
        read_tensors(tmp_path)
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(ValueError):
        read_tensors(tmp_path / "x.txt")


@pytest.mark.parametrize("key", ["state_dict", "model", "module", None])
def test_nested_state_dicts(tmp_path, key):
    state = {"a": torch.ones(2)}
    torch.save({key: state} if key else state, tmp_path / "x.pth")
    assert torch.equal(read_tensors(tmp_path / "x.pth")["a"], state["a"])
