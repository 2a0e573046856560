"""python -m benchmarks.docs: write the measured figures into README.md and pages of docs/.

Text between `<!-- measured: NAME -->` and `<!-- /measured -->` is generated from benchmarks/results and never edited.
NAME is an op, `kernels` for one table of all ops, `step` for whole training steps, `data` for loaders, or `waiting` for
the time that runs wait for images.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from benchmarks.data import rows as data
from benchmarks.data import waiting_rows as waiting
from benchmarks.rows import BACKWARD, BY_SIZE, CEILING, FORWARD, OURS, RESULTS, Row, all_results, complete, digits
from benchmarks.step import report as step

ROOT = Path(__file__).parents[1]
EAGER = ("eager", "torch.randn")  # prefixes of the names of eager PyTorch providers
MARKED = re.compile(r"(<!-- measured: (\w+) -->\n).*?(<!-- /measured -->)", re.DOTALL)
LEFT_OUT = (CEILING, "row_gradients")  # not in the summary: neither is a complete op
NO_GPU = "Not measured yet on a GPU; run `python -m benchmarks --device cuda`."


def pages(root: Path = ROOT) -> list[Path]:
    own = [root / "docs" / name for name in ("step.md", "data_speed.md")]
    return [root / "README.md", *own, *sorted((root / "docs" / "kernels").glob("*.md"))]


def filled(page: Path, folder: Path = RESULTS) -> str:
    """Return the page's text with the measured parts generated from the results.

    Raises ValueError for a page without markers.
    """
    text = page.read_text()
    if not MARKED.search(text):
        raise ValueError(
            f"{page} has no markers for its figures; add lines '<!-- measured: {page.stem} -->' and "
            "'<!-- /measured -->'"
        )
    sections = {
        "kernels": lambda: summary(folder),
        "step": lambda: step.section(folder / step.FOLDER.name),
        "data": lambda: data.section(folder / data.FOLDER.name),
        "waiting": lambda: waiting.section(folder / waiting.FOLDER.name),
    }
    return MARKED.sub(lambda m: m[1] + sections.get(m[2], lambda: of_op(m[2], folder))() + m[3], text)


def of_op(op: str, folder: Path = RESULTS) -> str:
    """Return, per device, a line on the measurement and a table of all providers."""
    parts = []
    for device, label in (("cpu", "CPU"), ("cuda", "GPU")):
        found = [rows for rows in (_of(op, rows) for rows in all_results(device, folder)) if rows]
        parts += [f"**{label}.** {_how(rows)}\n\n{_table(rows)}{_absent(rows)}" for rows in found]
        if not found:
            parts.append(f"**{label}.** {NO_GPU if device == 'cuda' else 'Not measured.'}\n")
    return "\n".join(parts)


def _of(op: str, rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.op == op and not row.shape.startswith(BY_SIZE)]


def _how(rows: list[Row]) -> str:
    row = rows[0]
    versions = [f"torch {row.torch}"]
    if row.driver:
        versions += [f"Triton {row.triton}", f"driver {row.driver}"]
    where = f"{row.device}, {_threads(row)}" if not row.driver else row.device
    how = f"{where}, {', '.join(versions)}, {row.date}, commit {row.commit}: `{row.command}`. "
    if all(r.gb_per_s == "" for r in rows):
        return how + (
            "Medians [p20, p80] of forward and backward over one set of inputs, measured without ceilings, rotating "
            "inputs and separate passes; the error is the largest relative error against fp64."
        )
    return how + (
        "Medians [p20, p80] of forward and backward; percentages are relative to a plain copy and a matrix product in "
        "the same run; the error is the largest relative error against fp64."
    )


def _threads(row: Row) -> str:
    return "one thread" if row.threads == 1 else f"{row.threads} threads"


def _table(rows: list[Row]) -> str:
    columns = (
        "shape", "provider", "forward, ms", "backward, ms", "complete, ms", "vs ours", "GB/s", "TFLOP/s", "peak, MB",
        "error",
    )  # fmt: skip
    whole = complete(rows)
    unknown = {
        "GB/s": all(row.gb_per_s == "" for row in whole),
        "TFLOP/s": all(row.tflop_per_s == "" for row in whole),
        **dict.fromkeys(("forward, ms", "backward, ms"), not any(row.mode == BACKWARD for row in rows)),
    }
    used = [c for c in columns if not unknown.get(c)]
    lines = ["| " + " | ".join(used) + " |", "|---" * len(used) + "|"]
    for row in whole:
        base = _base(whole, row)
        part = {mode: _part(rows, row, mode) for mode in (FORWARD, BACKWARD)}
        cells = {
            "shape": f"{row.shape}, {short(row.dtype)}" + (", graph" if row.timing == "graph" else ""),
            "provider": f"**{row.provider}**" if row.provider.startswith(OURS) else row.provider,
            "forward, ms": _ms(part[FORWARD]),
            "backward, ms": _ms(part[BACKWARD]),
            "complete, ms": f"{digits(row.ms_p50)} [{digits(row.ms_p20)}, {digits(row.ms_p80)}]",
            "vs ours": f"{row.ms_p50 / base:.2f} x" if base else "",
            "GB/s": _share(row.gb_per_s, row.percent_copy),
            "TFLOP/s": _share(row.tflop_per_s, row.percent_gemm),
            "peak, MB": f"{row.peak_mb:.1f}",
            "error": _error(row),
        }
        lines.append("| " + " | ".join(cells[c] for c in used) + " |")
    return "\n".join(lines) + "\n"


def _base(whole: list[Row], row: Row) -> float | None:
    """Return the time of our fastest backend for that row's case and clock."""
    return min((r.ms_p50 for r in whole if r.case == row.case and r.provider.startswith(OURS)), default=None)


def _part(rows: list[Row], row: Row, mode: str) -> Row | None:
    same = (row.case, row.provider, mode)
    return next((r for r in rows if (r.case, r.provider, r.mode) == same), None)


def _ms(row: Row | None) -> str:
    return "" if row is None else digits(row.ms_p50)


def _share(rate: float | str, percent: float | str) -> str:
    return "" if rate == "" else f"{digits(rate)} ({percent:.0f} %)"


def _error(row: Row) -> str:
    if row.relative_error == "":
        return "n/a" if not row.note else ""
    return f"{row.relative_error:.1e}" if row.relative_error else "0"


def _absent(rows: list[Row]) -> str:
    """Return a line with the notes of providers that did not run, or were measured differently."""
    notes: dict[str, list[str]] = {}
    for row in rows:
        if row.note:
            notes.setdefault(f"{row.provider}: {row.note}", []).append(row.shape)
    if not notes:
        return ""
    everywhere = len({row.shape for row in rows})
    said = [
        note + ("" if len(set(shapes)) == everywhere else f" ({', '.join(dict.fromkeys(shapes))})")
        for note, shapes in notes.items()
    ]
    return f"\nNot run, or measured differently: {'; '.join(said)}.\n"


def summary(folder: Path = RESULTS) -> str:
    """Return one line per case of every op and device: our fastest backend, and other providers relative to it."""
    parts = []
    for device in ("cpu", "cuda"):
        whole = map(complete, all_results(device, folder))
        shown = ([r for r in rows if r.op not in LEFT_OUT and not r.shape.startswith(BY_SIZE)] for rows in whole)
        found = [rows for rows in shown if rows]
        for rows in found:
            row = rows[0]
            where = f"{_threads(row)} of an {row.device}" if device == "cpu" else f"one {row.device}"
            how = f" (`{row.command}`)" if len({row.command for row in rows}) == 1 else ""
            parts.append(
                f"Forward and backward, {where}, torch {row.torch}{how}; all figures, with p20, p80 and the error "
                f"against fp64, in [docs/kernels.md](docs/kernels.md):\n\n" + "\n".join(_summary(rows)) + "\n"
            )
        if not found and device == "cuda":
            parts.append(NO_GPU + "\n")
    return "\n".join(parts)


def _summary(rows: list[Row]) -> Iterator[str]:
    yield "| op | shape | ours, ms | eager as upstream | best eager | torch.compile | peak memory, ours / upstream |"
    yield "|---|---|---|---|---|---|---|"
    for case in dict.fromkeys(row.case for row in rows):
        group = [row for row in rows if row.case == case]
        ours = [row for row in group if row.provider.startswith(OURS)]
        if not ours:
            continue
        best = min(ours, key=lambda row: row.ms_p50)
        eager = [row for row in group if row.provider.startswith(EAGER)]
        upstream = next((row for row in eager if "upstream" in row.provider), None)
        fast = next((row for row in group if row.provider == "torch.compile"), None)
        cells = [
            case[0],
            f"{case[1]}, {short(case[2])}" + (", graph" if case[3] == "graph" else ""),
            digits(best.ms_p50),
            _times(upstream, best),
            _times(min(eager, key=lambda row: row.ms_p50, default=None), best),
            _times(fast, best),
            f"{best.peak_mb / upstream.peak_mb:.2f}" if upstream else "-",
        ]
        yield "| " + " | ".join(cells) + " |"


def _times(row: Row | None, best: Row) -> str:
    return f"{row.ms_p50 / best.ms_p50:.1f} x" if row else "-"


def short(dtype: str) -> str:
    return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(dtype, dtype)


if __name__ == "__main__":
    argparse.ArgumentParser(
        prog="python -m benchmarks.docs", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    ).parse_args()
    for page in pages():
        page.write_text(filled(page))
        print(f"wrote {page}")
