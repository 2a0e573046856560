"""Measured steps as a table to print, a plot, and the figures of docs/step.md."""

from collections.abc import Iterator
from pathlib import Path

from benchmarks.plot import pyplot
from benchmarks.rows import digits, files
from benchmarks.step.rows import FOLDER, PARTS, StepRow, all_results, read
from benchmarks.step.targets import TARGETS, Verdict, target_of, verdicts

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "step.md"


def pairs(rows: list[StepRow]) -> Iterator[tuple[StepRow, StepRow]]:
    """Yield (ours, released form) for every measured released form of the same model and size."""
    measured = [row for row in rows if row.measured]
    for ours in measured:
        for row in measured:
            if ours.form == "ours" != row.form and (row.model, row.size) == (ours.model, ours.size):
                yield ours, row


def table(rows: list[StepRow]) -> str:
    """Return a table to print, with the results for the targets."""
    lines = [f"{rows[0].model} {rows[0].size}"]
    for row in rows:
        if not row.measured:
            lines.append(f"  {row.form:<8} not measured: {row.note}")
            continue
        lines.append(
            f"  {row.form:<8} {row.seconds_p50:8.4g} s [{row.seconds_p20:.4g}, {row.seconds_p80:.4g}]  "
            f"{digits(row.images_per_s)} images/s  peak {row.peak_gib:.2f} GiB  {row.flops / 1e12:.4g} TFLOP at "
            f"{_percent(row.product_share)} of {row.gemm / 1e12:.4g} TFLOP/s  roofline {digits(row.roofline_s)} s  "
            f"{row.operators} operators  {row.host_waits} host waits"
        )
        shares = (f"{name} {_percent(row.part(name) / row.seconds_p50)}" for name in PARTS if row.part(name))
        lines.append(f"           {', '.join(shares)}")
        if row.note:
            lines.append(f"           {row.note}")
    for ours, release in pairs(rows):
        lines += [f"  {release.form}: {_verdict(verdict)}" for verdict in verdicts(ours, release)]
    return "\n".join(lines)


def _verdict(v: Verdict) -> str:
    counted = f", {v.reachable}" if v.reachable else ""
    return f"{v.what}: {v.measured:.2f}, target {v.target:.2f}{counted}: {'met' if v.met else 'not met'}"


def section(folder: Path = FOLDER) -> str:
    """Return the measured part of docs/step.md."""
    parts = []
    for rows in all_results(folder):
        for size in dict.fromkeys(row.size for row in rows):
            parts.append("\n".join(_of_size([row for row in rows if row.size == size])) + "\n")
    parts.append("\n".join(_owed([row for rows in all_results(folder) for row in rows if row.measured])) + "\n")
    return "\n".join(parts)


def _of_size(rows: list[StepRow]) -> Iterator[str]:
    row = rows[0]
    where = f"{row.device}, " + ("one thread" if row.threads == 1 else f"{row.threads} threads")
    commits = " and ".join(dict.fromkeys(row.commit for row in rows))
    dates = " and ".join(dict.fromkeys(row.date for row in rows))
    yield f"### {row.size}, {row.device if row.driver else where}"
    yield ""
    yield f"torch {row.torch}, {dates}, commit {commits}; " + "; ".join(
        f"`{command}`" for command in dict.fromkeys(row.command for row in rows)
    )
    yield ""
    yield (
        "| model | form | images | s/step [p20, p80] | images/s | TFLOP | of the matmul peak | MFU | roofline, s | "
        "peak, GiB | operators | host waits |"
    )
    yield "|---" * 12 + "|"
    for row in rows:
        if row.measured:
            yield (
                f"| {row.model} | {_form(row)} | {row.images} | {digits(row.seconds_p50)} "
                f"[{digits(row.seconds_p20)}, {digits(row.seconds_p80)}] | {digits(row.images_per_s)} | "
                f"{digits(row.flops / 1e12)} | {_percent(row.product_share)} | "
                f"{_percent(row.mfu) if row.useful_flops != '' else ''} | {digits(row.roofline_s)} | "
                f"{row.peak_gib:.2f} | {row.operators} | {row.host_waits} |"
            )
    yield ""
    yield "Share of each part in the step:"
    yield ""
    yield "| model | form | " + " | ".join(PARTS) + " |"
    yield "|---" * (2 + len(PARTS)) + "|"
    for row in rows:
        if row.measured:
            shares = " | ".join(_percent(row.part(name) / row.seconds_p50) for name in PARTS)
            yield f"| {row.model} | {_form(row)} | {shares} |"
    yield from _comparison(rows)
    if notes := [f"{row.model}, {row.form}: {row.note}" for row in rows if row.note]:
        yield ""
        yield f"Not measured: {'; '.join(notes)}."


def _comparison(rows: list[StepRow]) -> Iterator[str]:
    found = list(pairs(rows))
    if not found:
        return
    yield ""
    yield (
        "| model | form | form / ours | without the optimizer | by FLOPs | memory, ours / release | targets | "
        "prediction |"
    )
    yield "|---" * 8 + "|"
    for ours, release in found:
        rest = [row.seconds_p50 - row.optimizer for row in (release, ours)]
        target = target_of(ours)
        targets = "; ".join(
            f"{v.what} {v.target:.2f}: **{v.measured:.2f}**, {'met' if v.met else 'not met'}"
            + (f" ({v.reachable})" if v.reachable else "")
            for v in verdicts(ours, release)
        )
        cells = [
            ours.model,
            release.form,
            f"**{release.seconds_p50 / ours.seconds_p50:.2f}**",
            f"{rest[0] / rest[1]:.2f}",
            f"{release.flops / ours.flops:.2f}",
            f"{ours.peak_gib / release.peak_gib:.2f}",
            targets,
            target.predicted if target else "",
        ]
        yield f"| {' | '.join(cells)} |"


def _owed(measured: list[StepRow]) -> Iterator[str]:
    """Yield the targets for which there is no measurement."""
    done = {("cuda" if ours.driver else "cpu", ours.size, ours.model) for ours, _ in pairs(measured)}
    yield "### Targets without a measurement"
    yield ""
    yield "| model | size | release / ours, at least | of the matmul peak, at least | memory, at most | prediction |"
    yield "|---" * 6 + "|"
    for (kind, size), models in TARGETS.items():
        for model, target in models.items():
            if (kind, size, model) not in done:
                memory = "" if target.memory is None else f"{target.memory:.1f}"
                yield (
                    f"| {model} | {size}, {kind} | {target.ratio:g} | {_percent(target.product)} | {memory} | "
                    f"{target.predicted} |"
                )


def _form(row: StepRow) -> str:
    return f"**{row.form}**" if row.form == "ours" else row.form


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.095 else f"{100 * share:.1f} %"


def plots(folder: Path = FOLDER, out: Path = PAGE.parent / "images") -> list[Path]:
    """Write a plot of every result file: stacked seconds per image by part. Without matplotlib none are written."""
    measured = {path.stem: [row for row in read(path) if row.measured] for path in files(folder)}
    written = [plot(rows, out / f"step_{device}.png") for device, rows in measured.items() if rows]
    return [path for path in written if path]


def plot(rows: list[StepRow], out: Path) -> Path | None:
    """Write a plot of the rows. Return its path; None without matplotlib."""
    plt = pyplot()
    if plt is None:
        return None
    figure, axis = plt.subplots(figsize=(9, 0.45 * len(rows) + 1.4))
    colors = plt.get_cmap("tab10").colors
    for place, row in enumerate(reversed(rows)):
        left = 0.0
        for name, color in zip(PARTS, colors, strict=True):
            width = row.part(name) / row.images
            axis.barh(place, width, left=left, color=color, label=name if place == 0 else None)
            left += width
        axis.plot([row.roofline_s / row.images] * 2, [place - 0.4, place + 0.4], color="black", linewidth=1.5)
        axis.text(left, place, f"  {digits(left)} s", va="center", fontsize=8)
    axis.set_yticks(range(len(rows)), [f"{row.model}, {row.size}, {row.form}" for row in reversed(rows)], fontsize=8)
    axis.set_xlabel(f"seconds per image ({rows[0].clock}); black: roofline")
    axis.margins(x=0.08)
    axis.legend(ncols=5, fontsize=7, loc="upper center", bbox_to_anchor=(0.4, -0.28))
    figure.savefig(out, dpi=110, bbox_inches="tight")
    plt.close(figure)
    return out
