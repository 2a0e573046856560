"""Runs of a model that draws the toy dataset shapes."""

import pytest

from reca.eval import targets
from tests.eval.painter import Painter


@pytest.fixture
def painter(monkeypatch, tmp_path):
    """Every model that is loaded is a Painter: of a run one without fault, of its base one that misses 40 %."""
    monkeypatch.chdir(tmp_path)
    Painter.made = 0

    def load(side, device):
        return Painter(0.0 if side.trained else 0.4)

    monkeypatch.setattr(targets.Target, "load", load)
    run = tmp_path / "run"
    (run / "eval/000002/other/images").mkdir(parents=True)  # without checkpoints: the last step with evaluations
    (run / "recipe.yaml").write_text("umm: show_o\nrun_dir: run\n")
    return run
