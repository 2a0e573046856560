"""Every script of examples/ runs, and does what it says."""

from pathlib import Path

import pytest

from examples import custom_loss, reconstruct

FOLDER = Path(__file__).parents[1] / "examples"
RUN = {"custom_loss", "reconstruct"}
ELSEWHERE = {"custom_model"}  # in test_contributing.py


def test_all_examples_are_run():
    assert {path.stem for path in FOLDER.glob("*.py")} == RUN | ELSEWHERE


def test_a_loss_in_a_plain_loop():
    losses = custom_loss.main()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("recipe", ["show_o_tiny"])
def test_reconstruction_by_hand(recipe):
    losses = reconstruct.main(recipe, steps=6)
    assert len(losses) == 6 and losses[-1] < losses[0]
