import pytest

from reca.config.recipe_files import load_recipe
from tests.driver.toy import write_images, write_recipe


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "images")


@pytest.fixture
def recipe(tmp_path, images):
    """Makes the toy recipe with overrides."""
    return lambda *overrides: load_recipe(write_recipe(tmp_path, images), list(overrides))
