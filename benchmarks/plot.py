"""Bar charts of a result file: every provider's time as a multiple of ours, with the lower bound as a line."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.rows import BY_SIZE, CEILING, OURS, Row, complete, floor_ms, read


def pyplot() -> Any:
    """Return matplotlib's pyplot with a file backend. If it is not installed, print a message and return None."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install matplotlib")
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def plot(path: Path) -> Path | None:
    """Write a plot of a CSV of results next to it, as PNG. Return its path; None without matplotlib."""
    plt = pyplot()
    if plt is None:
        return None
    cases = _cases(read(path))
    figure, axes = plt.subplots(max(len(cases), 1), 1, figsize=(9, 1.6 * max(len(cases), 1)), squeeze=False)
    for axis, (case, rows) in zip(axes[:, 0], cases.items(), strict=False):
        base = min((row.ms_p50 for row in rows if row.provider.startswith(OURS)), default=rows[0].ms_p50)
        rows = rows[::-1]
        ratios = [row.ms_p50 / base for row in rows]
        colors = ["tab:green" if row.provider.startswith(OURS) else "tab:gray" for row in rows]
        bars = axis.barh([row.provider for row in rows], ratios, color=colors)
        labels = [f"{ratio:.2f} x, {row.ms_p50:.4g} ms" for ratio, row in zip(ratios, rows, strict=True)]
        axis.bar_label(bars, labels, padding=3)
        if floor := floor_ms(rows[0]):
            axis.axvline(floor / base, color="tab:red", linewidth=1)
        axis.set_title(case, fontsize=9, loc="left")
        axis.set_xlim(0, 1.3 * max(ratios))
    figure.tight_layout()
    out = path.with_suffix(".png")
    figure.savefig(out, dpi=110)
    plt.close(figure)
    return out


def _cases(rows: list[Row]) -> dict[str, list[Row]]:
    """Return the timed rows of complete calls, by case and clock, without the shapes for choosing a backend."""
    cases: dict[str, list[Row]] = defaultdict(list)
    for row in complete(rows):
        if row.op != CEILING and not row.shape.startswith(BY_SIZE):
            cases[f"{row.op}\n{row.shape}, {row.dtype}, {row.timing}"].append(row)
    return cases
