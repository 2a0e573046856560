"""What is said when generate, edit or answer is asked for what no model can do."""

import logging

import pytest
import torch

from reca.models import UMMS, umm_package
from reca.models.common.images import check_side, to_unit
from reca.models.common.inference import check_pairs, sampling_options, warn_of_cut, warn_of_unknown_words
from reca.models.common.tiny_tokenizer import word_tokenizer


@pytest.mark.parametrize("name", UMMS)
def test_options_of_every_model(name):
    adapter = umm_package(name).Adapter
    assert sampling_options(adapter.generate, {"steps": 3, "guidance": 2}) == {"steps": 3, "guidance": 2}
    for ability in adapter.abilities & {"generate", "edit"}:
        with pytest.raises(ValueError, match="'stepz'; did you mean steps.*defaults: .*steps=.*guidance="):
            sampling_options(getattr(adapter, ability), {"stepz": 1})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"steps": "many"}, "steps=many: expected a whole number, such as 50"),
        ({"steps": 1.5}, "steps=1.5: expected a whole number"),
        ({"steps": True}, "steps=True: expected a whole number"),
        ({"steps": None}, "steps=null: expected a whole number"),
        ({"batch": 0}, "batch=0: expected at least 1"),
        ({"guidance": "high"}, "guidance=high: expected a number, such as 4.0"),
        ({"renorm": 3}, "renorm=3: expected a word, such as global"),
        ({"interval": [0.1]}, r"interval=\[0.1\]: expected \[a number, a number\], such as \[0.4, 1.0\]"),
        ({"height": "tall"}, "height=tall: expected a whole number or null, such as null"),
        ({"seeds": [1]}, "no sampling config_field 'seeds'"),
    ],
)
def test_options_of_another_type(given, words):
    with pytest.raises(ValueError, match=words):
        sampling_options(umm_package("bagel").Adapter.generate, given)


def test_options_that_fit():
    given = {"interval": [0, 1.0], "height": None, "width": 20, "renorm": "channel"}
    assert sampling_options(umm_package("bagel").Adapter.generate, given) == given | {"interval": (0, 1.0)}


def test_lists_of_one_length_and_seeds_with_an_address():
    check_pairs(prompts=["a", "b"], seeds=[0, 2**56 - 1])
    with pytest.raises(ValueError, match="1 images, 2 instructions, 1 seeds; there must be as many of each"):
        check_pairs(images=[0], instructions=["a", "b"], seeds=[0])
    for seed in (-1, 2**56):
        with pytest.raises(ValueError, match=f"seed {seed} lies outside"):
            check_pairs(seeds=[0, seed])


def test_warnings_of_what_is_not_read(caplog):
    tokenizer = word_tokenizer(["a", "red", "circle"], [])
    with caplog.at_level(logging.WARNING, "reca"):
        warn_of_unknown_words(tokenizer, ["a red circle"])
        warn_of_cut([[1, 2, 3]], 3)
        assert not caplog.records
        warn_of_unknown_words(tokenizer, ["a red zebra", "a zebra quux"])
        warn_of_cut([[1], [1, 2, 3]], 2)
    assert [record.getMessage() for record in caplog.records] == [
        "words that this model does not know are read as <unk>: zebra, quux",
        "a prompt has 3 tokens and this model reads 2 of it: its end is cut off",
    ]


def test_pixels():
    image = torch.tensor([0, 255], dtype=torch.uint8).expand(3, 1, 2)
    assert torch.equal(to_unit(image), torch.tensor([-1.0, 1.0]).expand(3, 1, 2))
    assert torch.equal(to_unit([image, image])[1], to_unit(image))
    check_side("model.image_size", 8, 4)
    for side in (0, 6, 3):
        with pytest.raises(ValueError, match=f"model.image_size is {side} pixels, which must be a multiple of 4"):
            check_side("model.image_size", side, 4)
