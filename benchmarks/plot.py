"""Bars of a result file: every provider's time as a multiple of ours."""

import csv
from collections import defaultdict
from pathlib import Path


def plot(path: Path) -> Path:
    """Write PATH.png beside a CSV of results."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases: dict[str, dict[str, float]] = defaultdict(dict)
    with path.open() as file:
        for row in csv.DictReader(file):
            if row["ms_p50"]:
                cases[f"{row['op']}\n{row['shape']}, {row['dtype']}"][row["provider"]] = float(row["ms_p50"])
    figure, axes = plt.subplots(len(cases), 1, figsize=(9, 1.5 * len(cases)), squeeze=False)
    for axis, (case, times) in zip(axes[:, 0], cases.items(), strict=True):
        names = list(times)[::-1]
        ratios = [times[name] / times["ours"] for name in names]
        bars = axis.barh(names, ratios, color=["tab:green" if name == "ours" else "tab:gray" for name in names])
        axis.bar_label(bars, [f"{ratio:.2f} x, {times[name]:.1f} ms" for name, ratio in zip(names, ratios, strict=True)], padding=3)
        axis.set_title(case, fontsize=9, loc="left")
        axis.set_xlim(0, 1.3 * max(ratios))
    figure.tight_layout()
    out = path.with_suffix(".png")
    figure.savefig(out, dpi=110)
    return out
