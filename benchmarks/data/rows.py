"""The rows of measured loaders, results/data/DEVICE.csv, and the page that is made of them."""

import csv
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from benchmarks.rows import OURS, RESULTS

FOLDER = RESULTS / "data"
PAGE = Path(__file__).parents[2] / "docs" / "data_speed.md"
BEGIN, END = "<!-- measured: data -->\n", "<!-- /measured -->"
NO_GPU = "**GPU.** Not measured yet on a GPU: `python -m benchmarks.data --device cuda` does it."


@dataclass
class Row:
    """One way at one size of files.

    ms            of an image: CPU time of all threads; with a GPU wall time, and `cpu_ms` beside it
    largest_off   grey levels between these views and Pillow's; off_by_more: percent of the values that differ by over 1
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
    device: str = ""
    driver: str = ""
    threads: int | str = ""
    torch: str = ""
    versions: str = ""
    commit: str = ""
    date: str = ""
    command: str = ""

    @property
    def images_per_s(self) -> float:
        return 1e3 / self.ms_p50


NUMBERS = {"jpeg": int, "gen": int, "und": int, "largest_off": int, "threads": int} | dict.fromkeys(
    ("ms_p50", "ms_p20", "ms_p80", "cpu_ms", "off_by_more"), float
)


def write(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        writer.writeheader()
        writer.writerows(map(asdict, rows))


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return [
            Row(**{name: NUMBERS[name](text) if name in NUMBERS and text else text for name, text in row.items()})
            for row in csv.DictReader(file)
        ]


def page(text: str, folder: Path = FOLDER) -> str:
    """Return the page with the figures of the result files between its markers."""
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    paths = sorted(folder.glob("*.csv"), key=lambda path: (path.stem != "cpu", path.stem))
    parts = [_section(read(path), path.stem == "cpu") for path in paths]
    if all(path.stem == "cpu" for path in paths):
        parts.append(NO_GPU + "\n")
    return text[:begin] + "\n".join(parts) + text[end:]


def _section(rows: list[Row], cpu: bool) -> str:
    row = rows[0]
    what = "CPU time of one thread" if cpu else "Wall time"
    rate = "images/s a core" if cpu else "images/s"
    lines = [
        f"**{'CPU' if cpu else 'GPU'}.** {row.device}, torch {row.torch}, {row.versions}, {row.date}, commit "
        f"{row.commit}: `{row.command}`. {what}, medians [p20, p80].",
        "",
        f"| JPEG | by | {rate} | ms an image | to ours | largest difference to Pillow | off by more than 1 |",
        "|---|---|---|---|---|---|---|",
        *(_line(row, rows) for row in rows if row.ms_p50 != ""),
    ]
    absent = dict.fromkeys(f"{row.by}: {row.note}" for row in rows if row.note)
    return "\n".join(lines) + "\n" + (f"\nNot run: {'; '.join(absent)}.\n" if absent else "")


def _line(row: Row, rows: list[Row]) -> str:
    best = min(r.ms_p50 for r in rows if r.jpeg == row.jpeg and r.by.startswith(OURS) and r.ms_p50 != "")
    cells = [
        f"{row.jpeg} px",
        f"**{row.by}**" if row.by.startswith(OURS) else row.by,
        f"{row.images_per_s:.0f}",
        f"{row.ms_p50:.3g} [{row.ms_p20:.3g}, {row.ms_p80:.3g}]",
        f"{row.ms_p50 / best:.2f} x",
        _levels(row.largest_off),
        _percent(row.off_by_more),
    ]
    return "| " + " | ".join(cells) + " |"


def _levels(off: int | str) -> str:
    return "" if off == "" else f"{off} level{'s' * (off != 1)}" if off else "none"


def _percent(share: float | str) -> str:
    return "" if share == "" else f"{share:.2g} %" if share else "none"
