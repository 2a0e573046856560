"""Memory that is full while a model draws, answers or is evaluated: smaller batches, or a clear end."""

import json

import pytest
import torch

from reca import api, cli, exits, inference
from reca.commands import serve
from reca.config.recipe_files import load_recipe
from reca.data.batch import Batch
from reca.errors import first_line
from reca.estimate import out_of_memory
from reca.monitoring.reconstructions import reconstruct
from reca.options.fields import RecipeError
from reca.trainer import Trainer
from tests.driver.test_evaluations import PROMPTS, Reconstructing, lines
from tests.driver.toy import ToyAdapter, run_toy, weights

WORDS = "CUDA out of memory. Tried to allocate 2.00 GiB.\nMore words"


def full(size: int, room: float) -> None:
    if size > room:
        raise torch.OutOfMemoryError(WORDS)


class Small(ToyAdapter):
    """A toy with room for so many images at once."""

    def __init__(self, room: float):
        super().__init__()
        self.room, self.calls = room, []

    def generate(self, prompts, seeds, *, batch: int = 16, **sampling):
        self.calls.append(len(prompts))
        full(min(batch, len(prompts)), self.room)
        return super().generate(prompts, seeds)

    def answer(self, images, questions, max_new_tokens=100):
        full(len(images), self.room)
        return [f"{question} {image.sum()}" for image, question in zip(images, questions, strict=True)]

    def reconstruct(self, batch, seeds, **sampling):
        full(len(batch), self.room)
        return [image + seed for image, seed in zip(batch.gen, seeds, strict=True)]


def values(images):
    return [int(image[0, 0, 0]) for image in images]


def test_the_batch_is_halved_and_stays_so(caplog):
    model, seeds = Small(room=3), list(range(40))
    assert values(inference.generate(model, ["x"] * 40, seeds)) == seeds
    assert model.calls == [16, 8, 4] + [2] * 20
    assert caplog.text.count("generate: memory was full with 16 images at once (CUDA out of memory.") == 1
    assert "from now on the batch size is 2" in caplog.text and "More words" not in caplog.text
    model.calls.clear()
    assert values(inference.generate(model, ["x"] * 3, [7, 8, 9], batch=16)) == [7, 8, 9]
    assert model.calls == [2, 1] and len(caplog.records) == 1
    assert inference.generate(model, [], []) == []


def test_a_batch_that_was_asked_for_is_not_made_larger():
    model = Small(room=100)
    inference.generate(model, ["x"] * 5, [1] * 5, batch=2)
    assert model.calls == [2, 2, 1]


def test_not_even_one(caplog):
    message = r"a single image .CUDA out of memory. Tried to allocate 2.00 GiB.. .* height and width"
    with pytest.raises(inference.MemoryFull, match=message):
        inference.generate(Small(room=0), ["x"] * 4, [0] * 4)
    assert exits.expected(inference.MemoryFull("x")) == exits.RECIPE and "More words" not in caplog.text


def test_what_else_goes_wrong_is_not_tried_again():
    tried = []

    def fails(rows):
        tried.append(rows)
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        inference.in_batches(Small(1), "generate", fails, ([1, 2],))
    assert tried == [[1, 2]]


FULL = [
    torch.OutOfMemoryError(WORDS),
    MemoryError(),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: out of memory\nMore words"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory: you tried"),
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: first_line(error)[:30])
def test_a_full_memory_is_the_same_everywhere(error, monkeypatch, tmp_path):
    monkeypatch.setattr(out_of_memory, "advice", lambda recipe: "advice")
    monkeypatch.setattr(Small, "generate", lambda *_, **__: raised(error))
    recipe = load_recipe("show_o_tiny", {"run_dir": str(tmp_path)})
    with pytest.raises(RecipeError, match="out of memory .*advice"), out_of_memory.explained(lambda: recipe):
        raise error
    with pytest.raises(RecipeError, match="out of memory .*micro_batch"), out_of_memory.memory_errors():
        raise error
    with pytest.raises(inference.MemoryFull) as told:
        inference.generate(Small(room=9), ["x"], [0])
    with pytest.raises(inference.MemoryFull), out_of_memory.explained(lambda: recipe):  # it has advice of its own
        raise told.value
    requests = serve.Requests([serve.Side("a", Small(room=9))])
    with pytest.raises(SystemError, match="memory is full with a single image"):
        serve._with_messages(requests.generate, lambda text, **_: SystemError(text))("x", 0)


@pytest.mark.parametrize("error", [ValueError("not enough memory"), RuntimeError("shapes differ")])
def test_another_error_is_no_full_memory(error):
    with pytest.raises(type(error), match=str(error)), out_of_memory.memory_errors(), out_of_memory.explained(None):
        raise error


def raised(error):
    raise error


def test_answers_and_reconstructions():
    images = [torch.full((3, 4, 4), i, dtype=torch.uint8) for i in range(9)]
    batch = Batch("reca", torch.arange(9), ["t"] * 9, gen=images)
    for method in (
        lambda model: inference.answer(model, images, ["how many?"] * 9),
        lambda model: values(reconstruct(model, batch, seeds=range(1, 10))),
    ):
        assert method(Small(room=2)) == method(Small(room=100))


def test_a_command_ends_with_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(api, "load", lambda *_, **__: Small(room=0))
    assert cli.main(["generate", "show_o_tiny", "--prompt", "a", "--out", str(tmp_path)]) == exits.RECIPE
    shown = capsys.readouterr().err
    assert "memory is full with a single image" in shown and "Traceback" not in shown


# ---- in training ----


class Full(Reconstructing):
    """Has room for nothing but training."""

    def generate(self, *_, **__):
        full(1, 0)

    def reconstruct(self, *_, **__):
        full(1, 0)

    def loss(self, prepared, features, rng):
        full(1, int(self.training))
        return super().loss(prepared, features, rng)


@pytest.mark.parametrize("suite", [["eval.suite=toy", "eval.prompts=2"], []])
def test_training_goes_on_with_the_same_bits(recipe, tmp_path, suite):
    keys = ["eval.holdout=4", "train.steps=4", PROMPTS]
    plain = run_toy(recipe(*keys, f"run_dir={tmp_path / 'plain'}"))
    keys += ["eval.every=2", "log.sample_every=2", "log.reconstructions=2", *suite]
    trainer = Trainer(recipe(*keys), Full())
    trainer.run()
    assert all(torch.equal(value, weights(trainer.adapter)[key]) for key, value in weights(plain.adapter).items())
    assert [line["step"] for line in lines(trainer.run_dir)] == [0, 2, 4]
    assert not any("holdout/loss" in line for line in lines(trainer.run_dir))
    said = [line["warning"] for line in lines(trainer.run_dir, "warning") if line["step"] == 2]
    drawn = "score of toy" if suite else "images of log.prompts"
    for words in ("no held-out loss (", f"no {drawn} (memory is full with a single image", "no reconstructions ("):
        assert any(text.startswith(words) for text in said), (words, said)
    assert json.loads((trainer.run_dir / "status.json").read_text())["state"] == "finished"


def test_an_evaluation_in_training_halves_its_batch_once(recipe, caplog):
    trainer = Trainer(recipe("eval.every=3", "eval.suite=toy", "eval.prompts=8"), Small(room=3))
    trainer.run()
    assert [line["toy/score"] for line in lines(trainer.run_dir)] == [0, 0, 0]
    assert caplog.text.count("generate: memory was full with 8 images at once") == 1
