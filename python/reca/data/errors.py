"""The ways in which data can be wrong."""

from reca import exits


class DataError(ValueError):
    """Data that a run cannot start or go on with; the message says which file, why, and what to do."""

    exit_code = exits.DATA


class BadSample(ValueError):
    """One sample that cannot be used; the message says why. It goes to the bad_samples, and another takes its place."""


class LeftOut(BadSample):
    """A row that is no sample, such as one without an image: another takes its place, and nobody needs to repair it."""
