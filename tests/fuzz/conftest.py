"""Profiles of hypothesis: "ci" is small and always the same, "fuzz" is large and different each time (`make fuzz`)."""

import logging
import os

import pytest
from hypothesis import HealthCheck, settings

from tests.fuzz.bounds import COUNTS, MEMORY, peak, resident

settings.register_profile(
    "ci",
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile(
    "fuzz",
    max_examples=10_000,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def bounded_memory():
    """No test here may take more than MEMORY beyond what the process has."""
    before, highest = resident(), peak()
    yield
    assert peak() == highest or peak() - before < MEMORY


@pytest.fixture(autouse=True)
def silent():
    """What is said of ten thousand inputs would be kept until a test ends."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def pytest_terminal_summary(terminalreporter):
    if COUNTS:
        counts = ", ".join(f"{count} {what}" for what, count in sorted(COUNTS.items()))
        terminalreporter.write_line(f"fuzzed: {counts}")
