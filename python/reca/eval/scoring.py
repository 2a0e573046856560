"""Scoring of answers by a suite's rule. An answer that the rule cannot read fails its own image only."""

import math
from collections.abc import Mapping, Sequence

from reca.eval.suites import Item, Key, Score, Suite

SHOWN = 200  # maximum characters of an answer in a message


def score(suite: Suite, answers: Mapping[Key, object], items: Sequence[Item]) -> Score:
    """Apply the suite's rule. Answers that it cannot read, and those with a non-finite value, are in `failed`."""
    failed: list[tuple[Key, str]] = []
    try:
        found = suite.score(answers, items)
    except Exception:  # a rule can raise anything for an answer of an unexpected form
        failed = _unread(suite, answers, items)
        lost = {key for key, _ in failed}  # empty if answers fail only in combination; the next line then raises again
        found = suite.score({key: answer for key, answer in answers.items() if key not in lost}, items)
    not_finite = {(v.item, v.k): v.value for v in found.values if not math.isfinite(v.value)}
    if not_finite:
        failed += [(key, f"the judge's answer has the value {value}") for key, value in not_finite.items()]
        lost = {key for key, _ in failed}
        found = suite.score({key: answer for key, answer in answers.items() if key not in lost}, items)
    return found._replace(failed=[*found.failed, *failed])


def _unread(suite: Suite, answers: Mapping[Key, object], items: Sequence[Item]) -> list[tuple[Key, str]]:
    """Score each answer alone, and list those for which the rule raises."""
    by_id, unread = {item.id: item for item in items}, []
    for key, answer in answers.items():
        try:
            suite.score({key: answer}, [by_id[key[0]]])
        except Exception as error:
            unread.append((key, f"the judge's answer cannot be read ({error!r}): {str(answer)[:SHOWN]!r}"))
    return unread
