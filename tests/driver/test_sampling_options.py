"""Sampling options are the keyword-only parameters of the method that takes them."""

import inspect

import numpy as np
import pytest
import torch

from reca.data.batch import Batch
from reca.models import UMMS, umm_package
from reca.options.sampling import check_sampling_options
from tests.models.contract import quick


@pytest.mark.parametrize("name", UMMS)
def test_options_of_every_model(name):
    adapter = umm_package(name).Adapter
    given = {**quick(name, 3), "guidance": 2, "batch": 2}
    assert check_sampling_options(adapter.generate, given) == given
    for ability in adapter.abilities & {"generate", "edit"}:
        for key in given:
            with pytest.raises(ValueError, match=f"'{key[:-1]}z'; did you mean {key}.*defaults: .*{key}="):
                check_sampling_options(getattr(adapter, ability), {f"{key[:-1]}z": 1})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"steps": "many"}, "steps=many: expected a whole number, such as 50"),
        ({"steps": 1.5}, "steps=1.5: expected a whole number"),
        ({"steps": True}, "steps=True: expected a whole number"),
        ({"steps": None}, "steps=null: expected a whole number"),
        ({"batch": 0}, "batch=0: expected at least 1"),
        ({"guidance": "high"}, "guidance=high: expected a number, such as 4.0"),
        ({"guidance": float("nan")}, "guidance=nan: expected a number"),
        ({"renorm": 3}, "renorm=3: expected a string, such as global"),
        ({"interval": [0.1]}, r"interval=\[0.1\]: expected \[a number, a number\], such as \[0.4, 1.0\]"),
        ({"height": "tall"}, "height=tall: expected a whole number or null, such as null"),
        ({"seeds": [1]}, "no sampling option 'seeds'"),
    ],
)
def test_options_of_another_type(given, words):
    with pytest.raises(ValueError, match=words):
        check_sampling_options(umm_package("bagel").Adapter.generate, given)


@pytest.mark.parametrize("name", UMMS)
def test_a_model_names_the_option_that_is_of_another_type(name):
    """Called from Python, where no command has checked it: whatever the sampler does with it first."""
    adapter = umm_package(name).Adapter
    lists = {
        "generate": (["a"], [0]),
        "edit": ([None], ["a"], [0]),
        "answer": ([None], ["a"]),
        "reconstruct": (Batch("reca", torch.tensor([0]), ["a"]), [0]),
    }
    for ability in adapter.abilities:
        method, of_the_model = getattr(adapter, ability), object()
        for option in inspect.signature(method).parameters.values():
            usual = option.default
            if usual is option.empty:
                continue
            wrong = ["4", True, [], object()] if usual is None or isinstance(usual, int | float) else [3, None, True]
            for value in [*wrong, *([None, 1.5] if isinstance(usual, int) else [])]:
                with pytest.raises(ValueError, match=f"sampling option {option.name}=.*: expected "):
                    method(of_the_model, *lists[ability], **{option.name: value})


def test_numbers_of_numpy_are_numbers():
    given = {"steps": np.int64(3), "guidance": np.float32(0.5)}
    found = check_sampling_options(umm_package("bagel").Adapter.generate, given)
    assert found == {"steps": 3, "guidance": 0.5} and [type(value) for value in found.values()] == [int, float]


def test_options_that_fit():
    given = {"interval": [0, 1.0], "height": None, "width": 20, "renorm": "channel"}
    assert check_sampling_options(umm_package("bagel").Adapter.generate, given) == given | {"interval": (0, 1.0)}
