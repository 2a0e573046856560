"""log p(answer | image) against the softmax of a decoder that goes token by token, in fp64."""

import importlib
import math

import pytest
import torch

from reca.config.recipe_files import load_recipe
from reca.models import UMMS, umm_package
from reca.models.common import greedy, likelihood, planned
from tests.models.contract import images, load, shared

QUESTIONS = ["what is this", "describe the picture", "this"]
ANSWERS = ["a red square", "a blue circle drawn with care", "red"]
SIZES = [(20, 20), (12, 20), (30, 15)]


def forced(monkeypatch, name, answer):
    """Make greedy decoding say `answer` and then end. The list is filled with the log-probabilities, in fp64."""
    said = []

    def decode(next_logits, max_new_tokens, eos):
        tokens, last = [*answer, eos], None
        for token in tokens:
            logits = next_logits(last)
            said.append(float(logits.double().log_softmax(-1)[0, token]))
            last = torch.tensor([token])
        return torch.tensor([tokens])

    for module in (planned, greedy, importlib.import_module(f"reca.models.{name}.sampling")):
        if hasattr(module, "greedy_tokens"):
            monkeypatch.setattr(module, "greedy_tokens", decode)
    return said


def words(model, text):
    """The tokens of an answer: of the tiny tokenizers one a word."""
    return [model.tokenizer.convert_tokens_to_ids(word) for word in text.split()]


@pytest.mark.parametrize("name", UMMS)
def test_it_is_the_product_of_the_decoders_probabilities(name, monkeypatch):
    model = load(name)
    found = model.log_likelihood(images(SIZES), QUESTIONS, ANSWERS)
    for number, answer in enumerate(ANSWERS):
        with monkeypatch.context() as patch:
            said = forced(patch, name, words(model, answer))
            assert model.answer([images(SIZES)[number]], [QUESTIONS[number]], 9) == [answer]
        assert found[number].tokens == len(said) == len(answer.split()) + 1
        assert found[number].sum == pytest.approx(sum(said), rel=1e-5)
        assert found[number].mean == pytest.approx(sum(said) / len(said), rel=1e-5)


@pytest.mark.parametrize("name", UMMS)
def test_it_does_not_depend_on_the_rest(name):
    model, shown = shared(name), images(SIZES)
    together = model.log_likelihood(shown, QUESTIONS, ANSWERS)
    assert together == model.train().log_likelihood(shown, QUESTIONS, ANSWERS) and model.training
    model.eval()
    reverse = model.log_likelihood(shown[::-1], QUESTIONS[::-1], ANSWERS[::-1])
    assert together == reverse[::-1]
    assert model.log_likelihood([], [], []) == []
    with pytest.raises(ValueError, match="3 images, 3 questions, 1 answers; expected the same number of each"):
        model.log_likelihood(shown, QUESTIONS, ANSWERS[:1])


@pytest.mark.parametrize("name", UMMS)
def test_an_image_is_encoded_once_for_its_answers(name, monkeypatch):
    model, (one, other, _), calls, encode = shared(name), images(SIZES), [], shared(name).encode
    given = [one, one, other], [QUESTIONS[0]] * 3, ANSWERS
    alone = [model.log_likelihood(*([x] for x in sample))[0] for sample in zip(*given, strict=True)]
    monkeypatch.setattr(model, "encode", lambda batch: calls.append(batch) or encode(batch))
    assert model.log_likelihood(*given) == alone and len(calls) == 2


@pytest.mark.parametrize("name", UMMS)
def test_an_answer_that_is_not_read_is_the_least_likely(name, caplog, monkeypatch):
    """And not a certain one: a sum over nothing. The question that leaves no room is named once."""
    monkeypatch.setattr("reca.models.bagel.prompt.MAX_LENGTH", 2048)
    model, long = shared(name), f"{name} {'red ' * 3000}"
    likelihood._warn_once.cache_clear()
    for _ in range(2):
        short, *cut = model.log_likelihood(images([SIZES[0]] * 3), ["this", long, long], ANSWERS)
        assert short.tokens == 4 and math.isfinite(short.sum)
        assert cut == [(-math.inf, 0)] * 2 and {one.mean for one in cut} == {-math.inf}
    assert caplog.text.count(f"the question '{name} red red") == 1 and "shorten the question" in caplog.text


@pytest.mark.parametrize("name", UMMS)
def test_an_answer_that_is_truncated_is_named(name, caplog, monkeypatch):
    """Once, and only from the first answer on whose end token is not read."""
    monkeypatch.setattr("reca.models.bagel.prompt.MAX_LENGTH", 2048)
    model, shown, asked = shared(name), images([SIZES[0]]), ["what is this"]
    likelihood._warn_once.cache_clear()
    most = model.log_likelihood(shown, asked, ["red " * 3000])[0].tokens
    assert "the answer 'red red" in caplog.text and "its first tokens; shorten it" in caplog.text
    caplog.clear()
    whole = ["red " * n for n in (most - 2, most - 1)]
    assert [one.tokens for one in model.log_likelihood(shown * 2, asked * 2, whole)] == [most - 1, most]
    assert not caplog.records
    for _ in range(2):
        assert model.log_likelihood(shown, asked, ["red " * most])[0].tokens == most
    assert len(caplog.records) == 1


@pytest.mark.parametrize("dtype", ["bf16", "mixed"])
def test_weights_of_other_types(dtype):
    recipe = load_recipe("bagel_tiny", [f"model.dtype={dtype}"])
    model = umm_package("bagel").Adapter.load(recipe.model).eval()
    near = load("bagel").log_likelihood(images(SIZES), QUESTIONS, ANSWERS)
    for one, other in zip(model.log_likelihood(images(SIZES), QUESTIONS, ANSWERS), near, strict=True):
        assert one.sum == pytest.approx(other.sum, rel=0.05) and one.tokens == other.tokens
