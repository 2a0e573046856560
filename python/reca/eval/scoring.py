"""The suite's rule over answers of any kind: what it cannot read fails one image, and no other."""

import math
from collections.abc import Mapping, Sequence

from reca.eval.suites import Item, Key, Score, Suite

SHOWN = 200  # characters of an answer in a message


def score(suite: Suite, answers: Mapping[Key, object], items: Sequence[Item]) -> Score:
    """Apply the suite's rule. Answers that it cannot read, or that are worth no number, are among the failed."""
    failed: list[tuple[Key, str]] = []
    try:
        found = suite.score(answers, items)
    except Exception:  # whatever a rule raises on an answer of another form than its own
        failed = _unread(suite, answers, items)
        lost = {key for key, _ in failed}  # none, where answers fail only together, which then raise again
        found = suite.score({key: answer for key, answer in answers.items() if key not in lost}, items)
    worthless = {(v.item, v.k): v.value for v in found.values if not math.isfinite(v.value)}
    if worthless:
        failed += [(key, f"the judge's answer is worth {value}") for key, value in worthless.items()]
        lost = {key for key, _ in failed}
        found = suite.score({key: answer for key, answer in answers.items() if key not in lost}, items)
    return found._replace(failed=[*found.failed, *failed])


def _unread(suite: Suite, answers: Mapping[Key, object], items: Sequence[Item]) -> list[tuple[Key, str]]:
    """Try every answer by itself, and list those that the rule cannot read."""
    by_id, unread = {item.id: item for item in items}, []
    for key, answer in answers.items():
        try:
            suite.score({key: answer}, [by_id[key[0]]])
        except Exception as error:
            unread.append((key, f"the judge's answer cannot be read ({error!r}): {str(answer)[:SHOWN]!r}"))
    return unread
