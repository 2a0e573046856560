"""The rows of benchmarks.data.waiting (results/waiting/cpu.csv), and their table in docs/data_speed.md."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import rows
from benchmarks.rows import RESULTS, digits

FOLDER, TARGET = RESULTS / "waiting", 0.02


@dataclass
class Row(rows.Made):
    """One run. decode_ms: per image on one core; step_ms: of the model; waited: share of the run's time."""

    jpeg: int
    workers: int
    decode_ms: float
    step_ms: float
    steps: int
    waited: float


read, write = partial(rows.read, kind=Row), partial(rows.write, kind=Row)


def section(folder: Path = FOLDER) -> str:
    """Return the measured part of docs/data_speed.md."""
    found = read(folder / "cpu.csv")
    if not found:
        return "Not measured yet; run `python -m benchmarks.data.waiting`.\n"
    row = found[0]
    lines = [
        f"{row.device}, torch {row.torch}, {row.date}, commit {row.commit}: `{row.command}`.",
        "",
        "| JPEG | data.workers | decoding, ms per image and core | step, ms | steps | waiting for images | at most |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {row.jpeg} px | {row.workers} | {digits(row.decode_ms)} | {digits(row.step_ms)} | {row.steps} | "
            f"**{100 * row.waited:.1f} %** | {100 * TARGET:.0f} % |"
            for row in found
        ),
    ]
    return "\n".join(lines) + "\n"
