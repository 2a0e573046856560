"""Waiting for remote storage: how long, how often it is asked, and what ends it."""

import pytest

from reca.data import outage
from reca.data.errors import DataError, Outage


class Clock:
    """Time that passes by waiting only. closes: number of waits during which the stream is closed."""

    def __init__(self, closes=None):
        self.now, self.waits, self.closes = 0.0, [], closes

    def monotonic(self):
        return self.now

    def wait(self, seconds):
        self.now += seconds
        self.waits.append(seconds)

    def is_set(self):
        return len(self.waits) == self.closes


def asked(clock, monkeypatch, answers_at=float("inf")):
    monkeypatch.setattr(outage, "time", clock)

    def read():
        if clock.now < answers_at:
            raise Outage("a.png: connection reset")
        return "answer"

    return outage.outlast(read, clock)


def test_pauses_double_up_to_the_longest_and_the_wait_is_said_once(monkeypatch, caplog):
    clock = Clock()
    assert asked(clock, monkeypatch, answers_at=30) == "answer"
    assert clock.waits == [1, 2, 4, 8, 10, 10]
    (said,) = caplog.messages
    assert said == "Remote storage does not answer: waiting up to 240 s for it: a.png: connection reset"


def test_what_answers_at_once_is_not_waited_for(monkeypatch, caplog):
    clock = Clock()
    assert asked(clock, monkeypatch, answers_at=0) == "answer" and not clock.waits and not caplog.messages


def test_the_run_ends_after_its_patience(monkeypatch):
    clock = Clock()
    with pytest.raises(DataError, match="for 245 s: a.png: connection reset. No sample was counted as bad"):
        asked(clock, monkeypatch)
    assert clock.now - clock.waits[-1] < outage.PATIENCE <= clock.now


@pytest.mark.parametrize("waits", [0, 3])
def test_a_stream_that_is_closed_waits_no_longer(waits, monkeypatch):
    clock = Clock(closes=waits)
    with pytest.raises(DataError):
        asked(clock, monkeypatch)
    assert len(clock.waits) == waits
