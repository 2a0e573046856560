"""Texts longer than what a model reads are truncated, with a warning if a user gives them; templates are refused."""

import bisect

import pytest
import torch

from reca.config.recipe_files import load_recipe
from reca.estimate.meta_model import check_templates
from reca.models import UMMS, umm_package
from reca.models.bagel import prompt as bagel
from reca.models.common import inference, text
from reca.models.harmon import prompt as harmon
from reca.models.open_uni import prompt as open_uni
from reca.rng import CounterRNG
from tests.models.contract import batch

MOST = 200
LONG = [f"what is this ? {'red ' * 400} {end}" for end in ("circle", "square")]
CUT = "its end is truncated"


@pytest.fixture
def limited(monkeypatch):
    """Load tiny models that read MOST tokens, in a process that has warned of nothing."""
    monkeypatch.setattr(inference, "_WARNED", set())
    monkeypatch.setattr(bagel, "MAX_LENGTH", MOST)
    monkeypatch.setattr(harmon, "MAX_CONVERSATION", MOST)
    monkeypatch.setattr(open_uni, "MAX_LENGTH", MOST)
    return lambda name: umm_package(name).Adapter.load(limited_config(name)).eval()


def limited_config(name: str):
    config = load_recipe(f"{name}_tiny").model
    if name == "show_o":
        config.phi.max_position_embeddings = MOST
    elif "janus" in name:
        config.max_length = MOST
    return config


def images(n: int) -> list[torch.Tensor]:
    return [torch.full((3, 20, 20), 9, dtype=torch.uint8)] * n


@pytest.mark.parametrize("name", UMMS)
def test_questions(name, limited, caplog):
    model = limited(name)
    model.answer(images(1), ["what is this ?"], max_new_tokens=1)
    assert CUT not in caplog.text
    one, other = model.answer(images(2), LONG, max_new_tokens=4)
    assert one == other and CUT in caplog.text


@pytest.mark.parametrize("name", UMMS)
def test_a_question_is_tokenised_once(name, limited, monkeypatch):
    model, seen, encode = limited(name), [], text._Plain.encode
    monkeypatch.setattr(text._Plain, "encode", lambda self, said: seen.append(said) or encode(self, said))
    for asked in ("what is this ?", LONG[0]):
        model.answer(images(1), [asked], max_new_tokens=1)
        assert sum(asked.strip() in said for said in seen) == 1, asked


@pytest.mark.parametrize("name", ["bagel", "open_uni"])
def test_instructions(name, limited, caplog):
    model, option = limited(name), {"steps": 2}
    model.edit(images(1), ["red"], [0], **option)
    assert CUT not in caplog.text
    one, other = model.edit(images(2), LONG, [0, 0], **option)
    assert torch.equal(one, other) and CUT in caplog.text


@pytest.mark.parametrize("name", UMMS)
def test_templates(name, limited, monkeypatch):
    """Are refused at the start, from the first one on that training and reconstructing refuse."""
    monkeypatch.setattr(harmon, "MAX_TEXT", MOST)
    model = limited(name)
    model.check_templates(["describe this picture", "red " * 5])
    with pytest.raises(ValueError, match="shorten it in data.templates: 'red red"):
        model.check_templates(["describe this picture", "red " * 400])

    def refused(words: int) -> bool:
        try:
            model.check_templates(["red " * words])
        except ValueError:
            return True
        return False

    def tokens(words: int) -> int:
        sample = batch(model, "reca", [0])
        sample.text = ["red " * words]
        return model.prepare(sample, CounterRNG(0)).tokens[0]

    longest = bisect.bisect_left(range(400), True, key=refused) - 1
    assert longest >= 5 and tokens(longest) == tokens(longest - 1) + 1
    sample = batch(model, "reca", [0])
    sample.text = ["red " * (longest + 1 if name != "bagel" else 400)]  # BAGEL is checked for its largest images
    for refuses in (lambda: model.prepare(sample, CounterRNG(0)), lambda: model.reconstruct(sample, [0])):
        with pytest.raises(ValueError, match="shorten it in data.templates: 'red red"):
            refuses()


@pytest.mark.parametrize("name", UMMS)
def test_templates_are_checked_without_weights(name, limited, monkeypatch):
    monkeypatch.setattr(harmon, "MAX_TEXT", MOST)
    recipe = load_recipe(f"{name}_tiny")
    recipe.model = limited_config(name)
    tokenizer = umm_package(name).Adapter.load_tokenizer(recipe.model)
    check_templates(recipe, tokenizer, ["describe this picture"])
    with pytest.raises(ValueError, match="shorten it in data.templates: 'red red"):
        check_templates(recipe, tokenizer, ["describe this picture", "red " * 400])


def test_prompts_of_bagel(limited, caplog):
    """Are reported once, also if they come in batches."""
    model = limited("bagel")
    one, other = model.generate(LONG, [0, 0], steps=2, batch=1)
    assert torch.equal(one, other) and caplog.text.count(CUT) == 1
