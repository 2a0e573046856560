"""The rows of measured loaders (results/data/DEVICE.csv), and the figures of docs/data_speed.md."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import rows
from benchmarks.rows import OURS, RESULTS, digits

FOLDER = RESULTS / "data"
PAGE = Path(__file__).parents[2] / "docs" / "data_speed.md"
NO_GPU = "**GPU.** Not measured yet on a GPU; run `python -m benchmarks.data --device cuda`."


@dataclass
class Row(rows.Made):
    """One loader at one size of files.

    ms           per image: CPU time of all threads; on a GPU wall time, with the CPU time in `cpu_ms`
    largest_off  largest difference from Pillow's views, in levels of 255
    off_by_more  percentage of values that differ by more than 1
    """

    by: str
    jpeg: int
    gen: int
    und: int
    ms_p50: float | str = ""
    ms_p20: float | str = ""
    ms_p80: float | str = ""
    cpu_ms: float | str = ""
    largest_off: int | str = ""
    off_by_more: float | str = ""
    note: str = ""
    clock: str = ""
    versions: str = ""

    @property
    def images_per_s(self) -> float:
        return 1e3 / self.ms_p50


read, write = partial(rows.read, kind=Row), partial(rows.write, kind=Row)


def section(folder: Path = FOLDER) -> str:
    """Return the measured part of docs/data_speed.md."""
    paths = rows.files(folder)
    parts = [_section(read(path), path.stem == "cpu") for path in paths]
    if all(path.stem == "cpu" for path in paths):
        parts.append(NO_GPU + "\n")
    return "\n".join(parts)


def _section(measured: list[Row], cpu: bool) -> str:
    row = measured[0]
    what = "CPU time of one thread" if cpu else "Wall time"
    rate = "images/s per core" if cpu else "images/s"
    lines = [
        f"**{'CPU' if cpu else 'GPU'}.** {row.device}, torch {row.torch}, {row.versions}, {row.date}, commit "
        f"{row.commit}: `{row.command}`. {what}, medians [p20, p80].",
        "",
        f"| JPEG | loader | {rate} | ms per image | vs ours | largest difference from Pillow | off by more than 1 |",
        "|---|---|---|---|---|---|---|",
        *(_line(row, measured) for row in measured if row.ms_p50 != ""),
    ]
    absent = dict.fromkeys(f"{row.by}: {row.note}" for row in measured if row.note)
    return "\n".join(lines) + "\n" + (f"\nNot run: {'; '.join(absent)}.\n" if absent else "")


def _line(row: Row, measured: list[Row]) -> str:
    best = min(r.ms_p50 for r in measured if r.jpeg == row.jpeg and r.by.startswith(OURS) and r.ms_p50 != "")
    cells = [
        f"{row.jpeg} px",
        f"**{row.by}**" if row.by.startswith(OURS) else row.by,
        f"{row.images_per_s:.0f}",
        f"{digits(row.ms_p50)} [{digits(row.ms_p20)}, {digits(row.ms_p80)}]",
        f"{row.ms_p50 / best:.2f} x",
        _levels(row.largest_off),
        _percent(row.off_by_more),
    ]
    return "| " + " | ".join(cells) + " |"


def _levels(off: int | str) -> str:
    return "" if off == "" else f"{off} level{'s' * (off != 1)}" if off else "none"


def _percent(share: float | str) -> str:
    return "" if share == "" else f"{share:.2g} %" if share else "none"
