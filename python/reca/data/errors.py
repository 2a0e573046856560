"""Data errors: fatal ones and bad samples."""

from reca import exits


class DataError(ValueError):
    """Error in the data that stops a run. The message names the file, the reason and what to do."""

    exit_code = exits.DATA


class BadSample(ValueError):
    """A sample that cannot be used. The message is the reason. It is recorded, and another sample takes its place."""


class Outage(OSError):
    """Remote storage that no longer answers requests that it answered before. No sample is at fault."""


class LeftOut(BadSample):
    """A row that is not a sample, such as one without an image. Another takes its place; it is not recorded as bad."""
