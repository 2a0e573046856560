"""Every amount of bytes that is written for people has one form."""

import re
from pathlib import Path

import pytest

import reca
from reca import units


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"), (1, "1 bytes"), (132, "132 bytes"), (1023, "1023 bytes"), (1024, "1.00 KiB"),
        (1536, "1.50 KiB"), (2**20 - 1, "1024.00 KiB"), (2**20, "1.00 MiB"), (5.82e9, "5.42 GiB"),
        (3 * 2**40, "3.00 TiB"),
    ],
)  # fmt: skip
def test_sizes(count, text):
    assert units.size(count) == text


def test_no_other_file_writes_bytes_by_itself():
    """A power of ten or two beside a unit is a second rule."""
    own = re.compile(r"(1e3|1e6|1e9|2 ?\*\* ?[1-4]0|1024)[^\n]*?[^\w](kB|MB|GB|[KMGT]iB)[^\w]")
    found = []
    for path in Path(reca.__file__).parent.rglob("*.py"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if path.name != "units.py" and own.search(line.split("  # ")[0]):
                found.append(f"{path}:{number}: {line.strip()}")
    assert found == []
