"""What is said when generate, edit or answer is asked for what no model can do."""

import logging

import numpy as np
import pytest
import torch

from reca.models.common import inference
from reca.models.common.images import check_side, to_uint8, to_unit
from reca.models.common.inference import check_pairs, warn_of_cut, warn_of_unknown_words
from reca.models.common.tiny_tokenizer import word_tokenizer


def test_lists_of_one_length_and_seeds_with_an_address():
    check_pairs(prompts=["a", "b"], seeds=[0, 2**56 - 1])
    check_pairs(prompts=np.array(["a", "b"]), seeds=np.arange(2))
    check_pairs(prompts=("a", "b"), seeds=torch.arange(2))
    for wrong in (None, b"a", 1):
        for name in ("prompts", "instructions", "questions"):
            with pytest.raises(TypeError, match=rf"{name} must be strings, got {wrong!r}"):
                check_pairs(**{name: ["a", wrong]})
    for wrong in (1.5, "1", None):
        with pytest.raises(TypeError, match=rf"seeds must be integers, got {wrong!r}"):
            check_pairs(prompts=["a"], seeds=[wrong])
    with pytest.raises(ValueError, match="1 images, 2 instructions, 1 seeds; expected the same number of each"):
        check_pairs(images=[0], instructions=["a", "b"], seeds=[0])
    for seed in (-1, 2**56):
        with pytest.raises(ValueError, match=f"seed {seed} is outside"):
            check_pairs(seeds=[0, seed])


def test_warnings_of_what_is_not_read(caplog, monkeypatch):
    monkeypatch.setattr(inference, "_WARNED", set())
    tokenizer = word_tokenizer(["a", "red", "circle"], [])
    with caplog.at_level(logging.WARNING, "reca"):
        warn_of_unknown_words(tokenizer, ["a red circle"])
        warn_of_cut([3], 3)
        assert not caplog.records
        warn_of_unknown_words(tokenizer, ["a red zebra", "a zebra quux"])
        warn_of_cut([1, 3], 2)
        warn_of_cut([4], 2)
    assert [record.getMessage() for record in caplog.records] == [
        "words outside this model's vocabulary are read as <unk>: zebra, quux",
        "a prompt has 3 tokens, but this model reads at most 2: its end is truncated; this is reported once",
    ]


@pytest.mark.parametrize("floor", [False, True])
def test_nan_is_black_and_told(floor, caplog):
    pixels = torch.linspace(-1.5, 1.5, 4 * 3 * 2 * 2).view(4, 3, 2, 2)
    sound = to_uint8(pixels, floor)
    assert sound.min() == 0 and sound.max() == 255 and not caplog.records
    pixels[1, 2, 0, 1] = pixels[3] = torch.nan
    found = to_uint8(pixels, floor)
    assert found[3].max() == 0 and found[1, 2, 0, 1] == 0
    assert torch.equal(found[::2], sound[::2]) and torch.equal(found[1, :2], sound[1, :2])
    assert "NaN pixels are black in 2 generated images: use a smaller guidance" in caplog.text
    caplog.clear()
    to_uint8(pixels[1], floor)
    assert "in 1 generated image: " in caplog.text


def test_pixels():
    image = torch.tensor([0, 255], dtype=torch.uint8).expand(3, 1, 2)
    assert torch.equal(to_unit(image), torch.tensor([-1.0, 1.0]).expand(3, 1, 2))
    assert torch.equal(to_unit([image, image])[1], to_unit(image))
    check_side("model.image_size", 8, 4)
    for side in (0, 6, 3):
        with pytest.raises(ValueError, match=f"model.image_size is {side} pixels; it must be a positive multiple of 4"):
            check_side("model.image_size", side, 4)
