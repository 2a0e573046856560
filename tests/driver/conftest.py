import pytest

from reca.config import load_recipe
from tests.driver.toy import write_images


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "images")


@pytest.fixture
def recipe(tmp_path, images):
    """A recipe for the toy adapter over a folder of images: 8 samples an update, 6 updates."""

    def make(*overrides: str):
        path = tmp_path / "toy.yaml"
        path.write_text(
            f"umm: show_o\nrun_dir: {tmp_path / 'run'}\n"
            f"data: {{images: {images}, captions: {images}, workers: 0, decoder: pillow}}\n"
            "objective: {reca: {weight: 1.0, per_update: 8, micro_batch: 2}}\n"
            "optim: {lr: 0.01}\n"
            "train: {updates: 6}\n"
            "log: {every: 1, tensorboard: false}\n"
        )
        return load_recipe(path, list(overrides))

    return make
