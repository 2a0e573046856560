"""`pytest tests/models/test_contract.py --recipe FILE` holds the model of a recipe to the contract, wherever it is."""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--recipe", type=Path, metavar="FILE", help="tiny recipe of the model to test")


def pytest_configure(config: pytest.Config) -> None:
    if recipe := config.getoption("recipe", default=None):
        from tests.models.contract import hold_to_it  # before a test module reads the cases

        try:
            hold_to_it(recipe)
        except ValueError as error:
            raise pytest.UsageError(f"--recipe: {error}") from error
