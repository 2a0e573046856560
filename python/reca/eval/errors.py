"""Errors of evaluation."""

from reca import exits


class EvaluationError(ValueError):
    """Images, records or a judge that cannot be used; the message says what to do. What was made so far is kept."""

    exit_code = exits.DATA
