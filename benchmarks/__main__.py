"""python -m benchmarks [OP ...] [--threads N]: time the kernels, print tables, write CSV and PNG to benchmarks/results.

Rows of other ops that a result file holds stay in it.
"""

import argparse
import csv
import importlib
from pathlib import Path

import torch

from benchmarks.plot import plot
from benchmarks.runner import COLUMNS, RESULTS, as_dict, measure, show

OPS = ("template_concat", "masked_cross_entropy", "masked_linear_cross_entropy", "flow_matching", "diffusion_loss")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("ops", nargs="*", default=OPS, help=f"among {', '.join(OPS)}; default all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="cpu", help="name of the result files")
    options = parser.parse_args()
    if unknown := set(options.ops) - set(OPS):
        parser.error(f"unknown ops {', '.join(sorted(unknown))}; known are {', '.join(OPS)}")
    torch.set_num_threads(options.threads)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{options.name}.csv"
    rows = _kept(path, options.ops)
    for op in options.ops:
        module = importlib.import_module(f"benchmarks.{op}")
        for case in module.cases():
            measured = measure(case, options.threads)
            print(show(measured, module.BEST_EAGER), flush=True)
            rows += map(as_dict, measured)
    rows.sort(key=lambda row: OPS.index(row["op"]))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {path} and {plot(path)}")


def _kept(path: Path, ops: list[str]) -> list[dict]:
    if not path.exists():
        return []
    with path.open() as file:
        return [row for row in csv.DictReader(file) if row["op"] not in ops]


main()
