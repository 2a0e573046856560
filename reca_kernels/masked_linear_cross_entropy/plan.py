"""How masked_linear_cross_entropy divides the logits: into chunks of rows, and into column ranges for the matmuls."""

import functools
from typing import NamedTuple

import torch

PITCH = 128  # the row stride of logits is a multiple of this: 256 bytes of 16-bit elements
CPU_ROWS = 512  # rows per chunk on CPUs
CPU_COLUMNS = 1024  # of one fp32 matmul of logits on a CPU: MKL is slower on all columns at once
ACCESS = 16  # bytes; matmuls are fast if every contiguous extent is a multiple of this
# A GPU computes a matmul in waves of output tiles, one tile per multiprocessor. It performs about 200 FLOPs per byte of
# memory traffic (A100 156, H200 184, H100 263).
TILE_ROWS, TILE_COLUMNS = 128, 256
FLOPS_A_BYTE = 200
SHARE = 32  # logits use at most 1 / SHARE of a GPU's memory


class Machine(NamedTuple):
    """The properties of a device that a plan depends on."""

    processors: int  # multiprocessors of a GPU; 0: a CPU
    memory: int = 0  # bytes of GPU memory

    @property
    def is_gpu(self) -> bool:
        return self.processors > 0


CPU = Machine(0)


class Plan(NamedTuple):
    """Chunks of `rows` rows, the last of which may have fewer, and separate columns [0, body) and [body, classes).

    The logits of a chunk are computed at most `columns` columns at a time.
    """

    rows: int
    chunks: int
    pitch: int  # row stride of the logits, in elements
    body: int
    columns: int


@functools.cache
def machine(device: torch.device) -> Machine:
    if device.type != "cuda":
        return CPU
    properties = torch.cuda.get_device_properties(device)
    return Machine(properties.multi_processor_count, properties.total_memory)


def plan(most: int, classes: int, width: int, size: int, machine: Machine, chunk_rows: int | None = None) -> Plan:
    """Plan the matmuls for `most` rows.

    On GPUs a chunk has at most chunk_rows rows, or as many as fit in 1 / SHARE of the memory. If several chunks are
    needed, the number of rows per chunk minimises the estimated cost of all: waves of tiles, including partial ones,
    and one read and write of the fp32 weight gradient per chunk. If a row of classes is not a multiple of 16 bytes, the
    columns beyond the last whole PITCH are multiplied separately.

    Args:
        most: Rows that may carry a label.
        classes: Columns of the logits.
        width: Width of the hidden state.
        size: Bytes per element.
        machine: The device.
        chunk_rows: Most rows per chunk; None: chosen here.
    """
    pitch = -(-classes // PITCH) * PITCH
    if not machine.is_gpu:
        rows = max(min(chunk_rows or CPU_ROWS, most), 1)
        columns = CPU_COLUMNS if size == torch.float32.itemsize else classes
        return Plan(rows, -(-most // rows), pitch, classes, columns)
    whole = classes // PITCH * PITCH
    body = classes if classes * size % ACCESS == 0 or whole == 0 else whole
    fit = chunk_rows or max(machine.memory // SHARE // (pitch * size), PITCH)
    rows = max(min(fit, most), 1)
    if fit < most:
        equal = -(-most // -(-most // fit))
        tiled = range(fit // TILE_ROWS * TILE_ROWS, fit // 2, -TILE_ROWS)
        rows = min((*tiled, equal), key=lambda rows: _cost(rows, most, classes, width, machine.processors))
    return Plan(rows, -(-most // rows), pitch, body, classes)


def waves(rows: int, columns: int, processors: int) -> int:
    """Return the number of waves in which a GPU computes a matmul with an output [rows, columns]."""
    return -(-(-(-rows // TILE_ROWS) * -(-columns // TILE_COLUMNS)) // processors)


def _cost(rows: int, most: int, classes: int, width: int, processors: int) -> float:
    """Estimate the time of all chunks' matmuls and updates of dW, in bytes of memory traffic."""
    chunks = -(-most // rows)

    def products(n: int) -> int:  # waves times inner dimension
        return waves(n, width, processors) * classes + waves(n, classes, processors) * width

    done = (chunks - 1) * products(rows) + products(most - (chunks - 1) * rows)
    return done * processors * 2 * TILE_ROWS * TILE_COLUMNS / FLOPS_A_BYTE + chunks * 8 * classes * width
