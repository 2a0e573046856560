"""The rows of measured steps, and their files: results/step/DEVICE.csv."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import rows
from benchmarks.rows import RESULTS

FOLDER = RESULTS / "step"
# release_kept: the released form in a process that keeps freed memory, as ours does on CPUs
FORMS = ("ours", "release", "release_kept")
# In the order of a step. waiting: for batches, beyond decoding and preparing them in this thread. other: sums, counts
PARTS = (
    "waiting", "decode", "prepare", "encoders", "prompt", "blocks", "head and loss", "backward", "optimizer", "other",
)  # fmt: skip


@dataclass
class StepRow(rows.Made):
    """One form of one model at one size. Seconds are those of a whole step; rates are per second.

    flops         computed by this form, including recomputation; useful_flops: those of ours without recomputation
    gemm, copy    rates of a matmul (FLOPs) and of a copy (bytes read plus written), measured with the same clock
    operators     operators of a step that compute; bytes: read and written by all of them without FLOPs
    host_waits    host synchronisations of the forward and backward passes, on a GPU
    """

    model: str
    size: str
    form: str
    images: int | str = ""
    seconds_p50: float | str = ""
    seconds_p20: float | str = ""
    seconds_p80: float | str = ""
    steps: int | str = ""
    waiting: float | str = ""
    decode: float | str = ""
    prepare: float | str = ""
    encoders: float | str = ""
    prompt: float | str = ""
    blocks: float | str = ""
    head_and_loss: float | str = ""
    backward: float | str = ""
    optimizer: float | str = ""
    other: float | str = ""
    peak_gib: float | str = ""
    flops: float | str = ""
    useful_flops: float | str = ""
    gemm: float | str = ""
    copy: float | str = ""
    operators: int | str = ""
    bytes: float | str = ""
    host_waits: int | str = ""
    trained: int | str = ""
    dtype: str = ""
    clock: str = ""
    note: str = ""

    @property
    def measured(self) -> bool:
        return self.seconds_p50 != ""

    @property
    def images_per_s(self) -> float:
        return self.images / self.seconds_p50

    @property
    def product_share(self) -> float:
        """Return the FLOP rate of this form relative to that of a matmul."""
        return self.flops / self.seconds_p50 / self.gemm

    @property
    def mfu(self) -> float:
        """Return the rate of useful FLOPs relative to the FLOP rate of a matmul."""
        return self.useful_flops / self.seconds_p50 / self.gemm

    @property
    def roofline_s(self) -> float:
        """Return the seconds of the FLOPs at the rate of a matmul, plus those of the bytes at the rate of a copy."""
        return self.flops / self.gemm + self.bytes / self.copy

    def part(self, name: str) -> float:
        return getattr(self, name.replace(" ", "_"))


read, write = partial(rows.read, kind=StepRow), partial(rows.write, kind=StepRow)


def merged(path: Path, made: list[StepRow]) -> list[StepRow]:
    """Return the rows of a file, with new ones replacing those of the same model, size and form."""
    new = {(row.model, row.size, row.form): row for row in made}
    kept = [row for row in read(path) if (row.model, row.size, row.form) not in new]
    return sorted([*kept, *made], key=lambda row: (row.size, row.model, row.form))


def all_results(folder: Path = FOLDER) -> list[list[StepRow]]:
    """Return the rows of every file, the CPU's first."""
    return [found for found in map(read, rows.files(folder)) if found]
