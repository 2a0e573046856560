"""How masked_linear_cross_entropy cuts the matrix of logits: into chunks of rows, and its columns for the products."""

import functools
from typing import NamedTuple

import torch

PITCH = 128  # logits lie on multiples of as many elements: 256 bytes of 16-bit ones
CPU_ROWS = 512  # of a chunk
ACCESS = 16  # bytes; products are fast where every extent that lies contiguous is a multiple of them
# A product on a GPU goes by tiles of the result, one on a multiprocessor at a time, in waves. In a wave's time its
# multiprocessors multiply 200 times as often as memory moves a byte (A100 156, H200 184, H100 263).
TILE_ROWS, TILE_COLUMNS = 128, 256
FLOPS_A_BYTE = 200
SHARE = 32  # of a GPU's memory one part may be logits


class Machine(NamedTuple):
    """What a plan depends on."""

    processors: int  # multiprocessors of a GPU; 0: a CPU
    memory: int = 0  # bytes of a GPU

    @property
    def is_gpu(self) -> bool:
        return self.processors > 0


CPU = Machine(0)


class Plan(NamedTuple):
    """Chunks of `rows` rows, the last of which may have fewer, and columns [0, body) and [body, classes) apart."""

    rows: int
    chunks: int
    pitch: int  # elements from a row of logits to the next
    body: int


@functools.cache
def machine(device: torch.device) -> Machine:
    if device.type != "cuda":
        return CPU
    properties = torch.cuda.get_device_properties(device)
    return Machine(properties.multi_processor_count, properties.total_memory)


def plan(most: int, classes: int, width: int, size: int, machine: Machine, chunk_rows: int | None = None) -> Plan:
    """Plan the products of `most` rows.

    On GPUs a chunk is as large as SHARE of the memory allows, or chunk_rows. Where that is not enough for all rows,
    the height of a chunk is chosen by what all of them cost: waves of tiles, begun ones too, and another read and write
    of the weight's gradient in fp32 per chunk. The columns that are left beyond whole tiles are multiplied apart where
    the number of classes is no multiple of 16 bytes.

    Args:
        most: Rows that may carry a label.
        classes: Columns of the logits.
        width: Of the hidden state.
        size: Bytes of an element.
        machine: What the products run on.
        chunk_rows: The most rows of a chunk; None: chosen.
    """
    pitch = -(-classes // PITCH) * PITCH
    if not machine.is_gpu:
        rows = max(min(chunk_rows or CPU_ROWS, most), 1)
        return Plan(rows, -(-most // rows), pitch, classes)
    whole = classes // PITCH * PITCH
    body = classes if classes * size % ACCESS == 0 or whole == 0 else whole
    fit = chunk_rows or max(machine.memory // SHARE // (pitch * size), PITCH)
    rows = max(min(fit, most), 1)
    if fit < most:
        equal = -(-most // -(-most // fit))
        tiled = range(fit // TILE_ROWS * TILE_ROWS, fit // 2, -TILE_ROWS)
        rows = min((*tiled, equal), key=lambda rows: _cost(rows, most, classes, width, machine.processors))
    return Plan(rows, -(-most // rows), pitch, body)


def waves(rows: int, columns: int, processors: int) -> int:
    """Count in how many waves a GPU computes a product of so many rows and columns."""
    return -(-(-(-rows // TILE_ROWS) * -(-columns // TILE_COLUMNS)) // processors)


def _cost(rows: int, most: int, classes: int, width: int, processors: int) -> float:
    """Count bytes that memory could move in the time of all chunks' logits, their products with the weight, and dW."""
    chunks = -(-most // rows)

    def products(n: int) -> int:  # in waves, times how often each multiplies
        return waves(n, width, processors) * classes + waves(n, classes, processors) * width

    done = (chunks - 1) * products(rows) + products(most - (chunks - 1) * rows)
    return done * processors * 2 * TILE_ROWS * TILE_COLUMNS / FLOPS_A_BYTE + chunks * 8 * classes * width
