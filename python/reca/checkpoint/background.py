"""Write checkpoints in a thread, from a copy in host memory, while training goes on."""

import logging
import threading
import time
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
from reca.host_memory import available

log = logging.getLogger("reca")
LONG_WAIT = 1.0  # seconds that are worth a warning


class BackgroundWriter:
    """Writes the checkpoints of a run, one at a time. All ranks make the same calls.

    The copy is pinned where there is a GPU, and its memory is used again for the next checkpoint. Where it does not fit
    into host memory, training waits for its checkpoints from then on, after a warning.
    """

    def __init__(self, run_dir: Path, keep: Keep):
        self.run_dir, self.keep = run_dir, keep
        self.stager: DefaultStager | None = None
        self.fits = True
        self.thread: threading.Thread | None = None
        self.written: Path | None = None

    def start(self, taken: Snapshot) -> Path | None:
        """Copy a snapshot and begin to write it, when the one before it is written. Training may go on at once.

        Returns the checkpoint that is complete already: the one before it, or this one where no copy fits.
        """
        began = time.monotonic()
        before = self.wait()
        if (waited := time.monotonic() - began) > LONG_WAIT and distributed.rank() == 0:
            log.warning(
                "training waited %.0f s for the checkpoint before that of step %d: a larger checkpoint.every, or a "
                "faster disk, would save that", waited, taken.state["step"],
            )  # fmt: skip
        copy = self._copy(taken) if self.fits else None
        if copy is None:
            return write(self.run_dir, taken, self.keep) or before
        gpu = torch.cuda.current_device() if torch.cuda.is_available() else None
        self.thread = threading.Thread(target=self._write, args=(copy, gpu), name="checkpoint")
        self.thread.start()
        return before

    def wait(self) -> Path | None:
        """Wait until nothing is being written. Returns what `collect` does."""
        if self.thread is not None:
            self.thread.join()
        return self.collect()

    def collect(self) -> Path | None:
        """Return the checkpoint that has become complete since the last call; None if there is none."""
        if self.thread is None or self.thread.is_alive():
            return None
        self.thread = None
        return self.written

    def _write(self, copy: Snapshot, gpu: int | None) -> None:
        if gpu is not None:
            torch.cuda.set_device(gpu)  # a thread begins with the first one
        self.written = write(self.run_dir, copy, self.keep)

    def _copy(self, taken: Snapshot) -> Snapshot | None:
        """Copy this rank's tensors to host memory; None, on every rank, where they do not fit on one of them."""
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
                            use_non_blocking_copy=gpu,  # all copies are begun, and then waited for
                        )
                    )
                parts: Any = self.stager.stage(taken.parts)
                return replace(taken, parts=parts)
        except (MemoryError, RuntimeError) as error:
            log.warning(
                "checkpoint.async_save is off from here on, and training waits for its checkpoints: %s",
                getattr(error, "reason", None) or error,
            )
            self.fits, self.stager = False, None
            return None


def _check_memory(taken: Snapshot) -> None:
    """Raise MemoryError where the copies of all ranks of this machine do not fit into its memory."""
    tensors = [tensor for part in taken.parts.values() for tensor in part.values()]
    tensors = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    need = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    have = available() // distributed.local_world_size()
    if need > have:
        raise MemoryError(
            f"a copy of a checkpoint takes {units.size(need)} of host memory, and {units.size(have)} are free"
        )
