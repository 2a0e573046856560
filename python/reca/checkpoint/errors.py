"""Errors of checkpoints, and one-line messages of other errors."""

import torch.distributed.checkpoint as dcp

from reca import exits
from reca.errors import first_line, lost_rank


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, or does not belong to this run."""

    exit_code = exits.RECIPE


def first_failure(error: BaseException) -> BaseException:
    """Return the error of the first failed rank, if DCP has collected those of all; otherwise the error itself."""
    if isinstance(error, dcp.api.CheckpointException) and error.failures:
        return next(iter(error.failures.values()))[0]
    return error


def first_reason(error: BaseException) -> str:
    """Return the first line of the first failed rank's message, without the traceback that DCP adds."""
    failure = first_failure(error)
    return lost_rank(failure) or first_line(failure)
