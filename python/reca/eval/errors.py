"""Errors of evaluation."""

from reca import exits


class EvaluationError(ValueError):
    """Images, records or a judge cannot be used; the message says what to do. Finished outputs are kept."""

    exit_code = exits.DATA


class OptionError(EvaluationError):
    """An option is missing, or does not fit the others; the message names it."""

    exit_code = exits.RECIPE
