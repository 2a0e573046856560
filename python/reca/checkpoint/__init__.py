"""Checkpoints of a run: torch.distributed.checkpoint in safetensors, written to a partial folder and then renamed.

    run_dir/checkpoints/000500/
        weights/    parameters that this run or an earlier one has changed, files of every rank, reshardable
        optimizer/  optimizer state, likewise
        ema/        fp32 averages of the trained parameters, likewise, if ema.half_life is set
        state.json  counters
        COMPLETE    written last: size and SHA-256 of every file above

Parameters that no run has changed are not saved: they come from `model.weights`. A checkpoint does not depend on other
runs: the one in train.init_from may be resumed, moved or removed. Reading a checkpoint runs no code: tensors are
safetensors, everything else is JSON.
"""

from reca.checkpoint.background import BackgroundWriter
from reca.checkpoint.contents import changed_parameters, size, snapshot
from reca.checkpoint.errors import CheckpointError
from reca.checkpoint.listing import find_damage, free_space, latest_valid, remove_partial, rename_damaged
from reca.checkpoint.reading import (
    check_fit,
    digest,
    find_valid,
    list_weights,
    load,
    load_ema,
    load_lora,
    load_weights,
    read_state,
    read_weight,
)
from reca.checkpoint.retention import Keep
from reca.checkpoint.writing import save, write
from reca.io.checkpoints import MARKER, latest, list_complete

__all__ = [
    "MARKER",
    "BackgroundWriter",
    "CheckpointError",
    "Keep",
    "changed_parameters",
    "check_fit",
    "digest",
    "find_damage",
    "find_valid",
    "free_space",
    "latest",
    "latest_valid",
    "list_complete",
    "list_weights",
    "load",
    "load_ema",
    "load_lora",
    "load_weights",
    "read_state",
    "read_weight",
    "remove_partial",
    "rename_damaged",
    "save",
    "size",
    "snapshot",
    "write",
]
