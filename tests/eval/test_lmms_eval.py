"""The model class of lmms-eval, against a stand-in of what it takes of release 0.7.3, which it was run with."""

import abc
import importlib
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import reca
from reca.models.common.likelihood import LogLikelihood


class Lmms(abc.ABC):
    is_simple = True

    def __init__(self):
        self._rank, self._world_size, self.task_dict = 0, 1, {}

    @property
    def rank(self):
        return self._rank

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...


@dataclass
class GenerationResult:
    text: object
    token_counts: object = None


@pytest.fixture
def module(monkeypatch):
    for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model", "lmms_eval.api.instance", "lmms_eval.models"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["lmms_eval.api.model"].lmms = Lmms
    sys.modules["lmms_eval.api.instance"].GenerationResult = GenerationResult
    registry = ModuleType("lmms_eval.models.registry_v2")
    registry.ModelManifest = lambda name, simple_class_path: (name, simple_class_path)
    monkeypatch.setitem(sys.modules, registry.__name__, registry)
    name = "reca.eval.lmms_eval_model"
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(name)
    sys.modules.pop(name, None)


class Model:
    """Answers with the question, the size of the image and its first pixel; likes answers the better, the longer."""

    abilities = frozenset({"answer"})

    def __init__(self):
        self.calls = []

    def answer(self, images, questions, max_new_tokens):
        self.calls.append((len(images), max_new_tokens))
        return [f"{q} {tuple(i.shape)} {i[:, 0, 0].tolist()}\n\nmore" for i, q in zip(images, questions, strict=True)]

    def log_likelihood(self, images, questions, answers):
        self.images = images
        return [LogLikelihood(-10.0, len(answer)) for answer in answers]


@pytest.fixture
def model(monkeypatch):
    made = Model()
    made.loaded = []
    monkeypatch.setattr(reca, "load", lambda *given: made.loaded.append(given) or made, raising=False)
    return made


def request(text, options, number, images=1):
    def visual(document):
        return [document if isinstance(document, Image.Image | str) else Image.new("L", (document, 4))] * images

    return SimpleNamespace(args=(text, options, visual, number, "task", "test"))


def test_answers_come_in_the_order_of_requests(module, model):
    ours = module.Reca("runs/x", batch_size="2", **{"model.dtype": "bf16"})
    assert model.loaded == [("runs/x", {"model.dtype": "bf16"}, torch.device("cpu"), False)]
    ours.task_dict = {"task": {"test": [5, 6, 7, 8]}}
    answers = ours.generate_until([
        request("<image>\nred?", {"max_new_tokens": 16, "until": ["\n\n"]}, 0),
        request("blue?", {}, 1),
        request("green?", {"max_new_tokens": 16, "until": "\n\n"}, 2),
        request("black?", {"max_new_tokens": 16, "until": None}, 3),
    ])  # fmt: skip
    assert [answer.partition(" [")[0] for answer in answers] == [
        f"{word}? (3, 4, {width})" for word, width in (("red", 5), ("blue", 6), ("green", 7), ("black", 8))
    ]
    assert [answer.endswith("more") for answer in answers] == [False, True, False, True]
    assert model.calls == [(2, 16), (1, 16), (1, module.NEW_TOKENS)]
    for images in (0, 2):
        with pytest.raises(ValueError, match=f"has {images} images or a video, but this model supports one image"):
            ours.generate_until([request("x", {}, 0, images)])
    with pytest.raises(NotImplementedError, match="choose tasks"):
        ours.generate_until_multi_round([])
    model.abilities = frozenset({"generate"})
    with pytest.raises(ValueError, match="cannot answer questions"):
        module.Reca("runs/x")


def test_options_of_a_task(module, model, caplog):
    ours = module.Reca("runs/x", batch_size="auto", max_batch_size=3, max_new_tokens=20)
    ours.task_dict = {"task": {"test": [5]}}
    options = [{"max_new_tokens": 4096, "temperature": 0}, {"do_sample": True, "max_new_tokens": 8}, {"num_beams": 5}]
    ours.generate_until([request("x", given, 0) for given in options])
    assert model.calls == [(2, 20), (1, 8)] and caplog.text.count("this model decodes greedily") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_rank_knows_its_place(module, model, monkeypatch):
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    ours = module.Reca("runs/x")
    assert (ours._rank, ours._world_size, ours.device) == (3, 4, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert module.Reca("runs/x").device == torch.device("cuda", 1)
    assert module.Reca("runs/x", device="cpu").device == torch.device("cpu")


def test_images_are_read_as_training_reads_them(module, model, tmp_path):
    clear, grey = Image.new("RGBA", (4, 4), (9, 9, 9, 0)), Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16))
    Image.new("RGB", (4, 4), "red").save(tmp_path / "red.png")
    ours = module.Reca("runs/x")
    documents = [clear, grey, Image.new("CMYK", (4, 4)), str(tmp_path / "red.png")]
    ours.task_dict = {"task": {"test": [*documents, str(tmp_path / "none.png"), Image.new("F", (4, 4))]}}
    answers = ours.generate_until([request("x", {}, number) for number in range(4)])
    pixels = [json.loads(answer.partition(") ")[2].partition("\n")[0]) for answer in answers]
    assert pixels == [[255, 255, 255], [156, 156, 156], [255, 255, 255], [255, 0, 0]]
    for number, message in ((4, "none.png does not exist"), (5, "task, document 5: pixels are floating-point")):
        with pytest.raises(ValueError, match=message):
            ours.generate_until([request("x", {}, number)])


def test_the_likelihood_of_choices(module, model):
    """A loss per token, wrapped; and whether the greedy answer is this one, which is asked once for a document."""
    ours = module.Reca("runs/x")
    ours.task_dict = {"task": {"test": [5]}}
    model.answer = lambda images, questions, max_new_tokens: model.calls.append(max_new_tokens) or ["a cat"]
    found = ours.loglikelihood(
        [request("x", given, 0) for given in (" a cat", " dog", lambda document: "a" * document)]
    )
    assert [result.text for result in found] == [(2.0, True), (10 / 3, False), (2.0, False)]
    assert model.calls == [5]
    assert len(model.images) == 3 and len(set(map(id, model.images))) == 1  # which the model encodes once
    with pytest.raises(ValueError, match="omit that metric"):
        ours.loglikelihood([SimpleNamespace(args=("", "dog"))])


def test_an_answer_that_is_not_read_is_no_choice(module, model):
    """Behind a question that is too long: its loss is the greatest, and no greedy answer is asked for it."""
    ours = module.Reca("runs/x")
    ours.task_dict = {"task": {"test": [5]}}
    model.log_likelihood = lambda images, questions, answers: [LogLikelihood(-math.inf, 0)] * len(answers)
    found = ours.loglikelihood([request("x", given, 0) for given in ("a cat", "")])
    assert [result.text for result in found] == [(math.inf, False)] * 2 and model.calls == []


def test_lmms_eval_finds_it(module):
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'[project.entry-points."lmms_eval.models"]\nreca = "{module.__name__}:manifest"\n' in project
    assert module.manifest() == ("reca", f"{module.__name__}.Reca")
