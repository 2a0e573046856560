from dataclasses import asdict

import pytest

from reca.config.recipe_files import explain, load_recipe, recipe_names, save_recipe
from reca.options.fields import RecipeError


def test_override_is_typed(recipe):
    assert recipe("optim.lr=1e-3", "objective.reca.micro_batch=4").optim.lr == 1e-3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.learning_rate=1", "unknown key 'optim.learning_rate'"),
        ("optim.lrr=1", "did you mean optim.lr"),
        ("objectiv.reca.weight=1", "did you mean objective"),
        ("weight_decay=0.1", "did you mean optim.weight_decay"),
        ("optim.lr=fast", "fast"),
        ("optim.schedule=cosinus", "'constant', 'cosine', 'linear'"),
        (
            "umm=bagle",
            "umm='bagle' is not one of 'bagel', 'harmon', 'janus', 'janusflow', .* package.module; did you mean bagel",
        ),
        ("umm=bagle.model", "umm=bagle.model cannot be imported: there is no module bagle. .*PYTHONPATH"),
        ("umm=reca.optim", "umm=reca.optim must define Config, a dataclass, and Adapter"),
        ("train.steps", "has no '='"),
        ("objective.reca.weight=0", "nothing to train"),
        ("objective.reca.micro_batch=0", "objective.reca.micro_batch=0 must be at least 1"),
        ("objective.reca.weight=-1", "objective.reca.weight=-1 must be at least 0"),
        ("train.steps=0", "train.steps=0 must be at least 1"),
        ("train.threads=-1", "train.threads=-1 must be at least 1"),
        ("data.workers=-1", "data.workers=-1 must be at least 0"),
        ("model.hv_blur=0", "model.hv_blur=0 must be at least 1"),
        ("train.precision=fp8", "train.precision='fp8' is not one of"),
        ("optim.name=adam", "optim.name='adam' is not one of 'adamw', .*; did you mean adamw\\?"),
        ("data.decoder=Pillow", "data.decoder='Pillow' is not one of .*; did you mean pillow\\?"),
        ("optim.betas=[0.9]", "optim.betas=.* two numbers"),
        ("log.profile=soon", "log.profile='soon' must be first:last"),
        ("lr=1e-4", "did you mean optim.lr\\?"),
        ("train.lr=1e-4", "did you mean optim.lr\\?"),
        ("seed=7", "did you mean .*train.seed"),
        ("train.batch_size=8", "did you mean .*objective.reca.batch_size"),
        ("data.image=photos", "did you mean data.images\\?"),
        ("objectiv={reca: {weight: 2}}", "did you mean objective\\?"),
        ("train=4", "train in the overrides is a group of keys"),
        ("=4", "has no key"),
        ("model.hidden=[1", "unknown key 'model.hidden'"),
        ("objective.batch_size=8", "did you mean .*objective.reca.batch_size"),
        ("ema.decay=0.99", "ema has half_life "),
        ("train.grad_accumulation=2", "train has steps, .*micro_batch"),
        ("lora={base_dtype: fp16}", "lora.base_dtype='fp16' is not one of null, 'bf16'"),
        ("objective={condition: other, reca: {batch_size: 0}}", "batch_size=0 must be at least 1"),
    ],
)
def test_mistakes_are_named(recipe, override, message):
    with pytest.raises(RecipeError, match=message):
        recipe(override)


def test_unknown_key_in_the_file_names_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("optim: {lerning_rate: 1}\n")
    with pytest.raises(RecipeError, match="mine.yaml"):
        load_recipe(path)


def test_a_dotted_key_in_a_file_is_to_be_nested(tmp_path):
    path = tmp_path / "mine.yaml"
    for text in ("objective.reca.weight: 1", "objective: {reca.weight: 1}", "objective.reca: {weight: 1}"):
        path.write_text(text)
        with pytest.raises(RecipeError, match=r"has a dot; write nested groups, as objective: \{reca: "):
            load_recipe(path)


def test_keys_of_another_model_are_named_with_the_model():
    with pytest.raises(RecipeError, match="unknown key 'model.* in .*show_o_tiny.yaml for umm=bagel; model has "):
        load_recipe("show_o_tiny", ["umm=bagel"])


@pytest.mark.parametrize(
    "overrides", [[("train.steps", 5)], {1: 2}, {("train", "steps"): 5}, [None], None, 3, iter(["train.steps=5"])]
)
def test_overrides_have_keys_that_are_texts(overrides):
    with pytest.raises(RecipeError, match="must be a list of key=value, or a dict"):
        load_recipe("show_o_tiny", overrides)


def test_unknown_recipe_lists_the_known():
    with pytest.raises(RecipeError, match="show_o_512"):
        load_recipe("shouo")


@pytest.mark.parametrize("override", ["train.steps=four", "train.a\nb=1", "optim.betas=0.9"])
def test_a_mistake_is_one_line(recipe, override):
    with pytest.raises(RecipeError) as caught:
        recipe(override)
    assert "\n" not in str(caught.value)


def test_a_list_is_no_recipe(tmp_path):
    path = tmp_path / "list.yaml"
    path.write_text("- a\n")
    with pytest.raises(RecipeError, match="list.yaml has no keys"):
        load_recipe(path)


def test_broken_yaml_is_one_clear_error(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("optim: {lr: [\n")
    with pytest.raises(RecipeError, match="broken.yaml"):
        load_recipe(path)


def test_every_key_is_documented(recipe):
    for line in explain(recipe()).splitlines():
        key, _, doc = line.partition("  ")
        assert doc.strip(), f"{key} has no documentation"


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_load(name, tmp_path):
    recipe = load_recipe(name)
    save_recipe(recipe, tmp_path / "copy.yaml")
    assert asdict(load_recipe(tmp_path / "copy.yaml")) == asdict(recipe)
