"""Errors of evaluation."""

from reca import exits


class EvaluationError(ValueError):
    """Images, records or a judge cannot be used; the message says what to do. Finished outputs are kept."""

    exit_code = exits.DATA
