"""python -m benchmarks [--device cpu|cuda] [--ops OP ...]: time the kernels, print tables, write CSV and PNG.

The files are benchmarks/results/<device>.csv and .png. Rows of other ops in a result file are preserved. On CPUs the C
library keeps freed memory, as in `reca train`; the recorded command of such results says so.
"""

import argparse
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.devices import Device, ceilings, opened
from benchmarks.plot import plot
from benchmarks.rows import BY_SIZE, CEILING, OURS, RESULTS, Row, read, write
from benchmarks.runner import Case, ceiling_rows, facts, measure, show
from reca.errors import first_line
from reca_kernels import dispatch

OPS = (*dispatch.OPS, "row_gradients", "attention")
KEPT = "freed memory is kept"
DTYPES = (torch.float32, torch.bfloat16)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ops", nargs="+", default=OPS, metavar="OP", help=f"some of {', '.join(OPS)} (default: all)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--out", type=Path, help="folder of the result files (default: benchmarks/results)")
    parser.add_argument(
        "--resume", action="store_true", help="skip cases that the file has results for, of this command and commit"
    )
    parser.add_argument(
        "--quick", action="store_true", help="one small shape of each op, two rounds; writes files only with --out"
    )
    options = parser.parse_args(arguments)
    if unknown := set(options.ops) - set(OPS):
        parser.error(f"unknown ops {', '.join(sorted(unknown))}; expected some of {', '.join(OPS)}")
    torch.set_num_threads(options.threads)
    device = opened(parser, options.device)
    command = " ".join(["python -m benchmarks", *arguments])
    if device.type == "cpu" and not options.quick and device.keep_freed():
        command += f"  # {KEPT}"
    run(device, options.ops, options.threads, options.quick, options.out, command, options.resume)


def run(
    device: Device, ops: list[str], threads: int, quick: bool, out: Path | None, command: str, resume: bool = False
) -> None:
    about = facts(device, threads, command)
    most = ceilings(device, DTYPES, rounds=2 if quick else 9, share=16 if quick else 1)
    products = ", ".join(f"{dtype} {rate:.4g} TFLOP/s" for dtype, rate in most.gemm.items())
    print(f"{about['device']}: copy {most.copy:.4g} GB/s, matrix product {products}")
    path = None if quick and out is None else (out or RESULTS) / f"{device.result_file}.csv"
    every = [case for op in ops for case in cases(op, device, quick)]
    known = {(case.op, case.shape, case.dtype) for case in every}
    held = [row for row in read(path) if row.op != CEILING] if path else []
    held = [row for row in held if row.op not in ops or _case(row) in known]
    done = {_case(row) for row in held if (row.commit, row.command) == (about["commit"], about["command"])}
    rows, failed = held + ceiling_rows(most, about), 0
    for case in every:
        own = case.op, case.shape, case.dtype
        if resume and own in done:
            continue
        device.free()  # what a case that failed had
        try:
            measured = measure(case, device, most, about, rounds=2 if quick else None)
        except Exception as error:  # of its inputs, or of the device: a provider's is a note in its row
            print(f"{' '.join(own)}  not measured: {type(error).__name__}: {first_line(error)}", flush=True)
            failed += 1
            continue
        rows = [row for row in rows if _case(row) != own] + measured
        if path:  # after every case, so that an interrupted run keeps its results
            write(path, sorted(rows, key=lambda row: (CEILING, *OPS).index(row.op)))
        print(show(measured, case.best), flush=True)
    written = [path, plot(path)] if path else []
    print("wrote " + " and ".join(map(str, filter(None, written))) if path else "--quick: nothing was written")
    if failed:
        sys.exit(f"{failed} of {len(every)} cases were not measured")


def _case(row: Row) -> tuple[str, str, str]:
    return row.op, row.shape, row.dtype


def cases(op: str, device: Device, quick: bool) -> Iterator[Case]:
    """Return an op's cases.

    The shapes for choosing a backend run only our backends and the reference; other shapes do not run the reference.
    """
    module = importlib.import_module(f"benchmarks.{op}")
    for case in module.cases(device):
        by_size = case.shape.startswith(BY_SIZE)
        case.providers = {
            name: provider
            for name, provider in case.providers.items()
            if (name.startswith(OURS) if by_size else name != f"{OURS}: reference")
        }
        if not quick or case.shape == BY_SIZE + next(iter(module.SHAPES["sizes"])):
            yield case


if __name__ == "__main__":
    main(sys.argv[1:])
