"""A device that cannot be used is refused by every function that takes one, before anything is loaded."""

import pytest
import torch

import reca
from reca.hardware.devices import usable_device
from reca.options.fields import RecipeError


@pytest.mark.parametrize(
    "device",
    ["cuda", "cuda:9", "mps", "meta", "foo", "", "cpu:0:0", torch.device("cuda"), torch.device("meta")],
    ids=str,
)
def test_a_device_that_cannot_be_used_is_refused(device, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    calls = [
        lambda: reca.load("show_o_tiny", device=device),
        lambda: reca.evaluate("toy", "show_o_tiny", device=device, limit=1, out=tmp_path / "out"),
    ]
    for call in calls:
        with pytest.raises(
            RecipeError, match=rf"device='{device}' (cannot be used: expected cpu|is not a usable GPU: )"
        ):
            call()
    assert not (tmp_path / "out").exists()


def test_gpus_are_counted(monkeypatch):
    assert usable_device("cpu") == torch.device("cpu")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert usable_device(None) == usable_device("cuda") == torch.device("cuda")
    assert usable_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(RecipeError, match="'cuda:2' is not a usable GPU: this machine has 2, numbered from 0"):
        usable_device("cuda:2")
