"""Weight files that were cut, or have other bytes than were written: one sentence that never suggests to trust them."""

import errno
import random
import re

import pytest
import torch
from safetensors.torch import save_file

from reca.models.common.weight_files import read_tensors
from tests.models.test_weight_files import STATE, legacy, refused, same


@pytest.mark.parametrize("save", [torch.save, legacy, save_file], ids=["zip", "legacy", "safetensors"])
def test_files_cut_anywhere(tmp_path, save):
    path = tmp_path / ("m.safetensors" if save is save_file else "m.pth")
    save(STATE, path)
    whole = path.read_bytes()
    same(read_tensors(path))
    for cut in sorted({*range(0, 40, 3), *range(40, len(whole), 97), *range(len(whole) - 9, len(whole))}):
        path.write_bytes(whole[:cut])
        refused(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_cut_safetensors_file_is_not_called_damaged(tmp_path, metadata):
    path = tmp_path / "m.safetensors"
    save_file(STATE, path, metadata)
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for cut in (start, start + 1, len(whole) - 1):
        path.write_bytes(whole[:cut])
        refused(path, f"is cut off: it declares {len(whole)} bytes and has {cut}")
    path.write_bytes(whole[: start - 1])
    refused(path, f"is cut off: it declares a header of {start - 8} bytes and has {start - 1}")
    path.write_bytes(whole)
    same(read_tensors(path))


@pytest.mark.parametrize("save", [torch.save, legacy, save_file], ids=["zip", "legacy", "safetensors"])
def test_damaged_bytes_end_in_a_sentence_or_in_tensors(tmp_path, save):
    path, rng = tmp_path / ("m.safetensors" if save is save_file else "m.pth"), random.Random(0)
    save(STATE, path)
    whole = path.read_bytes()
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 8)):
            damaged[rng.randrange(min(len(damaged), 600))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            assert all(isinstance(tensor, torch.Tensor) for tensor in read_tensors(path).values())
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            assert not re.search("default|weights_only|add_safe|trust", str(error))


def test_a_damaged_name_in_an_archive_is_damage(tmp_path):
    """It would otherwise be taken for code."""
    torch.save(STATE, tmp_path / "m.pth")
    whole = (tmp_path / "m.pth").read_bytes()
    (tmp_path / "m.pth").write_bytes(whole.replace(b"FloatStorage", b"FloatStorbge", 1))
    refused(tmp_path / "m.pth", "is a damaged torch.save file (Bad CRC-32", "fetch it again")


@pytest.mark.parametrize(("name", "reader"), [("m.safetensors", "load_file"), ("m.pth", "torch.load")])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), MemoryError()])
def test_an_error_of_the_disk_or_of_memory_is_no_damage(name, reader, error, tmp_path, monkeypatch):
    def failing(*_, **__):
        raise error

    (save_file if name.endswith(".safetensors") else torch.save)(STATE, tmp_path / name)
    monkeypatch.setattr(f"reca.models.common.weight_files.{reader}", failing)
    with pytest.raises(type(error)) as caught:
        read_tensors(tmp_path / name)
    assert caught.value is error
