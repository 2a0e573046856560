"""python -m benchmarks.data [--device cpu|cuda] [--images N] [--rounds N]: images per second of loaders on one core.

Measures from JPEG files of 512 and 1024 px, 4:2:0, quality 90, to the two views of show_o_512: 512 px for generation
and 336 px for understanding. Loaders: ours, plain Pillow, torchvision's ImageFolder in a DataLoader and its
decode_jpeg, webdataset, DALI. On a CPU the time is the CPU time of the process, since other processes share the
machine. Loaders alternate, in reverse order in every other round. Their views are compared with Pillow's.

Writes benchmarks/results/data/DEVICE.csv, from which docs/data_speed.md is generated.
"""

import argparse
import itertools
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import torch

from benchmarks import docs
from benchmarks.data import photos
from benchmarks.data.loaders import Way, ways
from benchmarks.data.rows import FOLDER, PAGE, Row, write
from benchmarks.devices import opened
from benchmarks.rows import rounded
from benchmarks.runner import facts, percentiles

JPEGS = (512, 1024)
GEN, UND = 512, 336
PACKAGES = {"Pillow": "pillow", "torchvision": "torchvision", "webdataset": "webdataset", "DALI": "nvidia-dali-cuda130"}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--images", type=int, default=32, help="files per size (default: 32)")
    parser.add_argument("--rounds", type=int, default=9, help="times that each loader reads them (default: 9)")
    parser.add_argument(
        "--out", type=Path, help=f"folder of the result file (default: {FOLDER}, which also updates the page)"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    device = opened(parser, options.device)
    about = facts(device, 1, " ".join(["python -m benchmarks.data", *arguments]))
    about |= {"versions": _versions(), "clock": "CPU" if options.device == "cpu" else "wall"}
    rows = []
    for side in JPEGS:
        measured = measure(side, options.images, options.rounds, options.device, about)
        rows += measured
        print("\n".join(show(row) for row in measured), flush=True)
    path = (options.out or FOLDER) / f"{device.result_file}.csv"
    write(path, rows)
    print(f"wrote {path}")
    if options.out is None:
        PAGE.write_text(docs.filled(PAGE))
        print(f"wrote {PAGE}")


def measure(side: int, images: int, rounds: int, device: str, about: dict) -> list[Row]:
    """Return the rows of all loaders for files of one size."""
    with tempfile.TemporaryDirectory() as folder:
        files = photos.write(Path(folder), side, images)
        found = ways(Path(folder), files, GEN, UND, device)
        able = {name: way for name, way in found.items() if isinstance(way, Way)}
        wanted, off = _views(able["Pillow"]), {}
        for name, way in able.items():
            off[name] = _difference(_views(way), wanted) if way.in_order else ("", "")
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in able}
        for number in range(rounds):
            order = list(able)[:: 1 if number % 2 == 0 else -1]
            for name in order:
                times[name].append(_time(able[name], device))
    rows = []
    for name, way in found.items():
        row = Row(name, side, GEN, UND, **about)
        rows.append(row)
        if isinstance(way, str):
            row.note = way
            continue
        clock = [1e3 * (cpu if device == "cpu" else wall) / images for wall, cpu in times[name]]
        row.ms_p20, row.ms_p50, row.ms_p80 = map(rounded, percentiles(clock))
        row.cpu_ms = rounded(percentiles([1e3 * cpu / images for _, cpu in times[name]])[1])
        row.largest_off, row.off_by_more = off[name]
    return rows


def _views(way: Way) -> list[torch.Tensor]:
    return [view.cpu() for gen, und in way.run() for view in itertools.chain(gen, und)]


def _difference(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> tuple[int, float]:
    """Return the largest difference, and the percentage of values that differ by more than 1."""
    off = torch.cat([(a.int() - b.int()).abs().flatten() for a, b in zip(found, wanted, strict=True)])
    return int(off.max()), float(f"{100 * float((off > 1).float().mean()):.2g}")


def _time(way: Way, device: str) -> tuple[float, float]:
    """Return wall and CPU seconds of all images."""
    if device == "cuda":
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in way.run():
        pass
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def _versions() -> str:
    found = []
    for name, package in PACKAGES.items():
        try:
            found.append(f"{name} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def show(row: Row) -> str:
    if row.note:
        return f"{row.jpeg:5} px  {row.by:<28} {row.note}"
    return (
        f"{row.jpeg:5} px  {row.by:<28} {row.images_per_s:7.1f} images/s  {row.ms_p50:7.3f} ms [{row.ms_p20}, "
        f"{row.ms_p80}]  CPU {row.cpu_ms} ms  largest difference {row.largest_off}, over 1: {row.off_by_more} %"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
