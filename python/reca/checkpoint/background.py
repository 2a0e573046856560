"""Write checkpoints in a thread, from a copy in host memory, while training continues."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor

from reca import distributed, units
from reca.checkpoint.contents import Snapshot
from reca.checkpoint.retention import Keep
from reca.checkpoint.writing import write
from reca.hardware.host_memory import available

log = logging.getLogger("reca")
LONG_WAIT = 1.0  # seconds of waiting that cause a warning


class BackgroundWriter:
    """Writes the checkpoints of a run, one at a time. All ranks must make the same calls.

    is_lost: as of `write`.

    The copy is in pinned memory if there is a GPU, and the memory is reused for the next checkpoint. If it does not fit
    into host memory, checkpoints are written synchronously from then on, after a warning.
    """

    def __init__(self, run_dir: Path, keep: Keep, is_lost: Callable[[], bool]):
        self.run_dir, self.keep, self.is_lost = run_dir, keep, is_lost
        self.stager: DefaultStager | None = None
        self.fits = True
        self.thread: threading.Thread | None = None
        self.written: Path | None = None

    def start(self, taken: Snapshot) -> Path | None:
        """Wait for the previous checkpoint, copy a snapshot and begin to write it. Training may then continue.

        Returns the checkpoint that is complete: the previous one, or this one if it was written synchronously.
        """
        began = time.monotonic()
        before = self.wait()
        if (waited := time.monotonic() - began) > LONG_WAIT and distributed.rank() == 0:
            log.warning(
                "training waited %.0f s for the checkpoint before that of step %d: to avoid this, increase "
                "checkpoint.every or use a faster disk", waited, taken.state["step"],
            )  # fmt: skip
        copy = self._copy(taken) if self.fits else None
        if copy is None:
            return write(self.run_dir, taken, self.keep, self.is_lost) or before
        gpu = torch.cuda.current_device() if torch.cuda.is_available() else None
        self.thread = threading.Thread(target=self._write, args=(copy, gpu), name="checkpoint")
        self.thread.start()
        return before

    def wait(self) -> Path | None:
        """Wait until nothing is being written, and return the result of `collect`."""
        if self.thread is not None:
            self.thread.join()
        return self.collect()

    def collect(self) -> Path | None:
        """Return the checkpoint that was completed since the last call; None if there is none."""
        if self.thread is None or self.thread.is_alive():
            return None
        self.thread = None
        return self.written

    def _write(self, copy: Snapshot, gpu: int | None) -> None:
        if gpu is not None:
            torch.cuda.set_device(gpu)  # a new thread starts with device 0
        self.written = write(self.run_dir, copy, self.keep, self.is_lost)

    def _copy(self, taken: Snapshot) -> Snapshot | None:
        """Copy this rank's tensors to host memory. Return None, on all ranks, if they do not fit on one of them."""
        try:
            with distributed.fail_together(distributed.gloo_group()):
                if self.stager is None:
                    _check_memory(taken)
                    gpu = torch.cuda.is_available()
                    self.stager = DefaultStager(
                        StagingOptions(
                            use_pinned_memory=gpu,
                            use_shared_memory=False,
                            use_async_staging=False,
                            use_non_blocking_copy=gpu,  # starts all copies, then synchronises once
                        )
                    )
                parts: Any = self.stager.stage(taken.parts)
                return replace(taken, parts=parts)
        except (MemoryError, RuntimeError) as error:
            log.warning(
                "checkpoint.async_save is disabled from now on, so training waits for its checkpoints: %s",
                getattr(error, "reason", None) or error,
            )
            self.fits, self.stager = False, None
            return None


def _check_memory(taken: Snapshot) -> None:
    """Raise MemoryError if the copies of all ranks on this machine do not fit into its memory."""
    tensors = [tensor for part in taken.parts.values() for tensor in part.values()]
    tensors = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    need = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    have = available() // distributed.local_world_size()
    if need > have:
        raise MemoryError(
            f"a copy of a checkpoint takes {units.size(need)} of host memory, and {units.size(have)} are free"
        )
