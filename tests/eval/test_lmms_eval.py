"""The model class of lmms-eval, against a stand-in of its interface (lmms_eval.api.model, release 0.7.3)."""

import abc
import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image

import reca


class Lmms(abc.ABC):
    is_simple = True
    rank = 0

    def __init__(self):
        self.task_dict = {}

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...


@pytest.fixture
def module(monkeypatch):
    for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model", "lmms_eval.models"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["lmms_eval.api.model"].lmms = Lmms
    registry = ModuleType("lmms_eval.models.registry_v2")
    registry.ModelManifest = lambda name, simple_class_path: (name, simple_class_path)
    monkeypatch.setitem(sys.modules, registry.__name__, registry)
    name = "reca.eval.lmms_eval_model"
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(name)
    sys.modules.pop(name, None)


class Model:
    abilities = frozenset({"answer"})

    def __init__(self):
        self.calls = []

    def answer(self, images, questions, max_new_tokens):
        self.calls.append((len(images), max_new_tokens))
        return [f"{question} {tuple(image.shape)}\n\nmore" for image, question in zip(images, questions, strict=True)]


def request(text, options, number, pictures=1):
    def visual(document):
        return [Image.new("L", (document, 4))] * pictures

    return SimpleNamespace(args=(text, options, visual, number, "task", "test"))


def test_answers_come_in_the_order_of_requests(module, monkeypatch):
    model, loaded = Model(), []
    monkeypatch.setattr(reca, "load", lambda *given: loaded.append(given) or model, raising=False)
    ours = module.Reca("runs/x", batch_size="2", **{"model.dtype": "bf16"})
    assert loaded == [("runs/x", {"model.dtype": "bf16"}, None, False)]
    ours.task_dict = {"task": {"test": [5, 6, 7, 8]}}
    answers = ours.generate_until([
        request("<image>\nred?", {"max_new_tokens": 16, "until": ["\n\n"]}, 0),
        request("blue?", {}, 1),
        request("green?", {"max_new_tokens": 16, "until": "\n\n"}, 2),
        request("black?", {"max_new_tokens": 16, "until": None}, 3),
    ])  # fmt: skip
    assert answers == ["red? (3, 4, 5)", "blue? (3, 4, 6)\n\nmore", "green? (3, 4, 7)", "black? (3, 4, 8)\n\nmore"]
    assert model.calls == [(2, 16), (1, 16), (1, module.MOST_NEW_TOKENS)]
    for pictures in (0, 2):
        with pytest.raises(
            ValueError, match=f"it shows {pictures} pictures or a video, and this model answers about one"
        ):
            ours.generate_until([request("x", {}, 0, pictures)])
    for method in (ours.loglikelihood, ours.generate_until_multi_round):
        with pytest.raises(NotImplementedError, match="choose tasks"):
            method([])
    model.abilities = frozenset({"generate"})
    with pytest.raises(ValueError, match="cannot answer questions"):
        module.Reca("runs/x")


def test_lmms_eval_finds_it(module):
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'[project.entry-points."lmms_eval.models"]\nreca = "{module.__name__}:manifest"\n' in project
    assert module.manifest() == ("reca", f"{module.__name__}.Reca")
