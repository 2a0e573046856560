"""The lines of the console, one by one, and the log of a rank other than 0."""

import io
import logging
import sys
import time

import pytest

from reca.monitoring.console import Console, evaluation_line, rank_file
from tests.driver.test_log import METRICS


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_expected_end_is_printed_once(monkeypatch, capsys):
    monkeypatch.setattr(time, "time", lambda: 1_800_000_000.0)
    console = Console("run", steps=9, done=0)
    console.line(1, METRICS, None)  # nothing is known yet
    console.line(2, METRICS, 90_000.0)
    console.line(3, METRICS, 80_000.0)
    ends = [line for line in capsys.readouterr().err.splitlines() if line.startswith("expected end")]
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(1_800_090_000))
    assert ends == [f"expected end {when}, in 1d 1:00:00"]


def test_the_bar_has_the_loss_and_the_rate(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    console = Console("run", steps=2, done=0)
    console.step(0.5, 80.0)
    console.step(0.25, 81.0)
    console.close()
    assert "2/2" in terminal.getvalue() and "loss 0.2500, 81.0 images/s" in terminal.getvalue()


@pytest.mark.parametrize(("change", "shown"), [({}, ""), ({"toy/change": -0.0625}, ", -0.0625")])
def test_the_line_of_an_evaluation(change, shown):
    values = {
        "toy/score": 0.5,
        "toy/score_low": 0.4,
        "toy/score_high": 0.6,
        "holdout/loss": 1.25,
        "other": 1.0,
        **change,
    }
    line = evaluation_line(20, 40, values, 3.14)
    assert line == f"evaluation at step 20/40  toy 0.5 [0.4, 0.6]{shown}  holdout/loss 1.25  3.1 s"


def test_the_file_of_a_rank(tmp_path, monkeypatch):
    """It has warnings; the terminal has errors only, until the file is closed."""
    monkeypatch.setattr("reca.distributed.rank", lambda: 3)
    log, root = logging.getLogger("reca"), logging.getLogger()
    shown: list[str] = []
    terminal = logging.Handler()
    terminal.emit = lambda record: shown.append(record.getMessage())
    once = lambda record: record.getMessage() not in shown  # noqa: E731
    monkeypatch.setattr(root, "handlers", [terminal])
    monkeypatch.setattr(log, "filters", [once])
    before = log.handlers[:]
    with rank_file(tmp_path):
        log.info("a")
        assert not (tmp_path / "rank_3.log").exists()
        log.warning("b")
        log.error("c")
        log.error("c")
    log.warning("d")
    lines = [line.split(" ", 2)[2] for line in (tmp_path / "rank_3.log").read_text().splitlines()]
    assert lines == ["WARNING b", "ERROR c", "ERROR c"] and shown == ["c", "d"]
    assert log.handlers == before and log.filters == [once] and not terminal.filters and terminal.level == 0
