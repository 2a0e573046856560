"""Data errors: fatal ones and bad samples."""

from reca import exits

NO_RANGES = "the server does not support partial requests (HTTP Range)"


class DataError(ValueError):
    """Error in the data that stops a run. The message names the file, the reason and what to do."""

    exit_code = exits.DATA


class BadSample(ValueError):
    """A sample that cannot be used. The message is the reason. It is recorded, and another sample takes its place."""


class Outage(Exception):
    """Remote storage that no longer answers requests that it answered before. The message is the reason.

    No sample is at fault. So it is neither an OSError nor a ValueError, which may be turned into a bad sample or a
    damaged file.
    """

    exit_code = exits.DATA

    def __str__(self) -> str:
        return (
            f"remote storage cannot be read: {self.args[0]}. Check the network, the storage and its credentials, then "
            "give the same command again"
        )


class LeftOut(BadSample):
    """A row that is not a sample, such as one without an image. Another takes its place; it is not recorded as bad."""
