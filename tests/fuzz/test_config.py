"""Recipes and overrides of any text: the value as it is written, or one sentence that names it."""

import math
import re
import string
import tempfile
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from reca.config.recipe_files import RECIPES, explain, load_recipe, recipe_names, save_recipe, walk
from reca.models import UMMS
from reca.options.fields import RecipeError
from reca.options.values import BLANK, NULLS, guess, override_text, write_yaml
from tests.fuzz.bounds import counted, fewer
from tests.fuzz.mutate import mutate, mutations

# A recipe of one key for every UMM: thousands of them are read in a minute.
FOLDER = tempfile.TemporaryDirectory()
SMALL = {umm: Path(FOLDER.name) / f"{umm}.yaml" for umm in UMMS}
for umm, path in SMALL.items():
    path.write_text(f"umm: {umm}\n")
KEYS = {umm: [key for _, _, key in walk(load_recipe(path))] for umm, path in SMALL.items()}

# Pieces that YAML, OmegaConf, Python or a shell read as something else than text.
WORDS = """
    0010 no On YES true null None ~ ~/x ~x 12:30 1:2:3 1e3 1e-5 1.10 -0 +5 .5 5. 0x1f 0o17 1_000 .inf -.inf nan 1e999
    9223372036854775808 9999999999999999999999 *.tar &a !x !!int << = # #1 [ ] [a [] { } {a: {a:1} , a,b : a: :a ? - --a
    @ ` % | > ' " '' "" 'a' "a" "\\n" "\\x41" "\\q ${ ${a} ${oc.env:HOME} $HOME ??? \\ é 写 😀 ٣ a a.b:c?d=1 s3://x
    reca.toy_datasets.shapes: 000..003 adamw cosine clip bf16
"""
BLANKS = [" ", "\t", "\n", "\0", "\ufeff", "\x85", "\u2028", "\x1b", "\udcff", ", ", ": ", " #"]
PIECES = st.sampled_from([*WORDS.split(), *BLANKS])
TEXTS = st.lists(PIECES | st.text(max_size=4), max_size=5).map("".join)
LISTS = st.lists(TEXTS, max_size=4).map(lambda items: f"[{','.join(items)}]")
NUMBERS = st.one_of(
    st.integers(),
    st.floats(),
    st.from_regex(r"[+-]?[0-9_]{0,4}\.?[0-9]{0,3}([eE][+-]?[0-9]{1,3})?", fullmatch=True),
).map(str)
VALUES = TEXTS | LISTS | NUMBERS
UMMS = st.sampled_from(UMMS)
NOT_KEYS = st.lists(PIECES | st.sampled_from(["optim", "lr", "betas", "0", ".", "model", "umm"]), max_size=5).map(
    ".".join
)


@st.composite
def overrides(draw):
    """(umm, override): mostly of a key that there is."""
    umm = draw(UMMS)
    key = draw(st.sampled_from(KEYS[umm]) | NOT_KEYS | st.sampled_from(["optim", "model", "objective.reca", "data"]))
    return umm, f"{key}={draw(VALUES)}" if draw(st.integers(0, 20)) else draw(TEXTS)


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def sentence(error: RecipeError) -> str:
    text = str(error)
    assert text and text.isprintable() and len(text) < 900, text
    return text


def value_of(recipe, key):
    for part in key.split("."):
        recipe = getattr(recipe, part)
    return recipe


def sound(recipe) -> None:
    """Every value is of its declared type, and every number finite."""
    for group, f, key in walk(recipe):
        value = getattr(group, f.name)
        items = value if isinstance(value, list) else [value]
        for item in [x for part in items for x in (part.values() if isinstance(part, dict) else [part])]:
            assert item is None or type(item) in (str, int, float, bool), key
            assert not isinstance(item, float) or math.isfinite(item), key


@given(overrides())
def test_overrides(folder, given_):
    umm, override = given_
    with counted("overrides"):
        try:
            recipe = load_recipe(SMALL[umm], [override])
        except RecipeError as error:
            sentence(error)
            return
        sound(recipe)
        key, _, written = override.partition("=")
        if key not in KEYS[recipe.umm]:
            return
        value = value_of(recipe, key)
        if isinstance(value, str) and written.strip(BLANK)[0] not in "\"'~":
            assert value == written
        if value is None:
            assert written.strip(BLANK) in NULLS
        nested = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        path = folder / "written.yaml"
        path.write_text(write_yaml({"umm": recipe.umm} | nested))
        again = load_recipe(SMALL[umm], [f"{key}={override_text(value)}"])
        assert asdict(recipe) == asdict(load_recipe(path)) == asdict(again)


@fewer(0.25)
@given(UMMS, TEXTS, TEXTS, st.lists(TEXTS, max_size=3), st.floats(min_value=0, allow_infinity=False))
def test_values_survive_files_and_explanations(folder, umm, path, sentence_, words, number):
    """What is put into a recipe by a program is what its file, and the lines of --explain, give back."""
    assume("\0" not in path + sentence_ + "".join(words) and path.strip(BLANK) and not path.startswith(("~", "$")))
    assume("${" not in path and not any("\ud800" <= c <= "\udfff" for c in sentence_ + "".join(words)))
    recipe = load_recipe(SMALL[umm])
    recipe.run_dir, recipe.log.prompts, recipe.model.words = path, [sentence_], words
    recipe.optim.lr = number
    with counted("recipes written and read"):
        save_recipe(recipe, folder / "v.yaml")
        assert asdict(load_recipe(folder / "v.yaml")) == asdict(recipe)
        lines = explain(recipe).splitlines()
        assert len(lines) == len(KEYS[umm])
        again = [f"{key}={override_text(value_of(recipe, key))}" for key in KEYS[umm]]
        assert asdict(load_recipe(SMALL[umm], again)) == asdict(recipe)


@fewer(0.25)
@given(st.sampled_from(recipe_names()), mutations())
def test_damaged_recipes(folder, name, how):
    path = folder / "damaged.yaml"
    path.write_bytes(mutate((RECIPES / f"{name}.yaml").read_bytes(), how))
    with counted("damaged recipes"):
        try:
            sound(load_recipe(path))
        except RecipeError as error:
            assert re.search(r"damaged\.yaml|=|\b(model|objective|optim|train|data|log|parallel)\b", sentence(error))


TREES = st.recursive(
    VALUES,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]")
        | st.dictionaries(st.sampled_from(["lr", "<<", "reca", "a", "&x b"]) | TEXTS, inner, max_size=3).map(
            lambda items: "{" + ", ".join(f"{key}: {value}" for key, value in items.items()) + "}"
        )
    ),
    max_leaves=8,
)


@fewer(0.25)
@given(
    st.dictionaries(st.sampled_from(["umm", "run_dir", "optim", "objective", "train", "model", "data"]) | TEXTS, TREES)
)
def test_recipe_texts(folder, groups):
    path = folder / "text.yaml"
    text = "".join(f"{key}: {value}\n" for key, value in groups.items())
    path.write_bytes(text.encode(errors="surrogatepass"))
    with counted("recipe texts"):
        try:
            sound(load_recipe(path))
        except RecipeError as error:
            sentence(error)


@fewer(0.25)
@given(VALUES)
def test_guesses(text):
    with counted("sampling options"):
        try:
            guess(text, "--sampling steps")
        except RecipeError as error:
            sentence(error)


@fewer(0.25)
@given(UMMS, st.lists(st.text(string.printable, max_size=12) | overrides().map(lambda pair: pair[1]), max_size=4))
def test_many_overrides(umm, texts):
    with counted("command lines"):
        try:
            sound(load_recipe(SMALL[umm], texts))
        except RecipeError as error:
            sentence(error)
