"""Errors of checkpoints, and the one line that is said of others."""

import torch.distributed.checkpoint as dcp

from reca import exits


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, or does not belong to this run."""

    exit_code = exits.RECIPE


def first_failure(error: BaseException) -> BaseException:
    """Return the error of the first rank that failed, where DCP has collected those of all."""
    if isinstance(error, dcp.api.CheckpointException) and error.failures:
        return next(iter(error.failures.values()))[0]
    return error


def first_line(error: BaseException) -> str:
    """Return the message of the first rank that failed, without the traceback that DCP adds."""
    error = first_failure(error)
    return (str(error) or type(error).__name__).splitlines()[0]
