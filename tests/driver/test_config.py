import pytest

from reca.config import RecipeError, as_dict, explain, load_recipe, recipe_names, save_recipe


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
        ("umm=bagle", "show_o, harmon, open_uni, bagel"),
        ("train.updates", "has no '='"),
        ("objective.reca.weight=0", "nothing to train"),
        ("objective.reca.micro_batch=0", "at least 1"),
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


def test_unknown_recipe_lists_the_known():
    with pytest.raises(RecipeError, match="show_o_512"):
        load_recipe("shouo")


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
    assert as_dict(load_recipe(tmp_path / "copy.yaml")) == as_dict(recipe)
