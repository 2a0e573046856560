"""Errors of data: fatal ones, and single bad samples."""

from reca import exits


class DataError(ValueError):
    """Data that a run cannot start or go on with; the message names the file, the reason and what to do."""

    exit_code = exits.DATA


class BadSample(ValueError):
    """One sample that cannot be used; the message says why. It is listed, and another sample takes its place."""


class LeftOut(BadSample):
    """A row that is no sample, such as one without an image: another takes its place, and nobody needs to repair it."""
