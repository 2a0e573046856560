"""Waiting for remote storage: how long, how often it is asked, and what ends it."""

import math

import pytest

from reca import exits
from reca.data import outage
from reca.data.bad_samples import BadSamples
from reca.data.errors import DataError, Outage
from reca.data.sources import remote
from reca.data.sources.factory import open_source
from tests.data.files import conversations, fill, image_bytes, row, tar


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


def asked(clock, monkeypatch, answers_at=math.inf, seconds=0):
    """Read what is away until `answers_at`. seconds: that a read takes which fails."""

    monkeypatch.setattr(outage, "time", clock)
    monkeypatch.setattr(outage, "_announced", -math.inf)

    def read():
        if clock.now < answers_at:
            clock.now += seconds
            raise Outage("a.png: connection reset")
        return "answer"

    return outage.outlast(read, clock)


def test_pauses_double_up_to_the_longest_and_the_wait_is_said_once(monkeypatch, caplog):
    clock = Clock()
    assert asked(clock, monkeypatch, answers_at=30) == "answer"
    assert clock.waits == [1, 2, 4, 8, 10, 10]
    (said,) = caplog.messages
    assert said == "Remote storage cannot be read; waiting up to 240 s for it: a.png: connection reset"


def test_what_answers_at_once_is_not_waited_for(monkeypatch, caplog):
    clock = Clock()
    assert asked(clock, monkeypatch, answers_at=0) == "answer" and not clock.waits and not caplog.messages


def test_the_run_ends_after_its_patience(monkeypatch):
    clock = Clock()
    with pytest.raises(
        DataError, match="could not be read for 245 s: a.png: connection reset. No sample was counted as bad"
    ):
        asked(clock, monkeypatch)
    assert clock.now - clock.waits[-1] < outage.PATIENCE <= clock.now


def test_a_run_whose_reads_take_long_ends_before_its_patience(monkeypatch):
    """So that its error is the one reported, and not a hang: no read begins that could end after it."""
    clock = Clock()
    clock.now = began = 1000.0
    with pytest.raises(DataError, match="for 183 s"):
        asked(clock, monkeypatch, seconds=60)
    assert clock.waits == [1, 2] and clock.now + 60 >= began + outage.PATIENCE > clock.now


def test_an_outage_is_said_once_however_many_reads_wait_for_it(monkeypatch, caplog):
    clock = Clock()
    asked(clock, monkeypatch, answers_at=5)

    def read():
        if clock.now < until:
            raise Outage("b.png: connection reset")

    for until, said in ((20, 1), (outage.PATIENCE - 1, 1), (outage.PATIENCE + 20, 2)):
        clock.now = until - 10
        outage.outlast(read, clock)
        assert len(caplog.messages) == said


@pytest.mark.parametrize("waits", [0, 3])
def test_a_stream_that_is_closed_waits_no_longer(waits, monkeypatch):
    clock = Clock(closes=waits)
    with pytest.raises(DataError):
        asked(clock, monkeypatch)
    assert len(clock.waits) == waits


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.setattr(remote, "PAUSE", 0.0)
    fs = pytest.importorskip("fsspec").filesystem("memory")
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


@pytest.mark.parametrize("name", ["", "a.tar", "a.parquet", "rows.json"])
@pytest.mark.parametrize("sound", [0, 1, 2])
def test_data_that_cannot_be_opened_for_an_outage_are_neither_damaged_nor_missing(
    memory, tmp_path, monkeypatch, name, sound
):
    """sound: number of requests that are answered before."""
    conversations(fill(tmp_path, {"b.png": image_bytes()}), row("human", "Q" * 2000, "gpt", "A"))
    tar(tmp_path / "a.tar", ("a.png", image_bytes()), ("b.png", image_bytes()))
    if name == "a.parquet":
        pytest.importorskip("pyarrow")
        from tests.data.test_parquet import midjourney

        midjourney(tmp_path / name, 0, 8)
    for path in tmp_path.iterdir():
        memory.pipe(f"/data/{path.name}", path.read_bytes())
    assert open_source("memory://data", "reca")[0].image
    monkeypatch.setattr(remote, "BLOCK", 512)
    asked = []

    def ask(path, function, *arguments, ask=remote.RemotePath.ask, **options):
        asked.append(function)
        if len(asked) > sound:
            raise Outage(f"{path} is away")
        return ask(path, function, *arguments, **options)

    monkeypatch.setattr(remote.RemotePath, "ask", ask)
    address, task = f"memory://data/{name}", "i2t" if name == "rows.json" else "reca"
    if not name and sound:  # one request lists a folder
        open_source(address, task)
        return
    with pytest.raises(Outage, match="storage cannot be read: memory://.* is away. Check the network") as error:
        open_source(address, task)
    assert exits.expected(error.value) == exits.DATA and len(asked) == sound + 1


def test_a_bad_row_is_listed_during_an_outage(memory, tmp_path, monkeypatch):
    """Its size is that with which the data were opened: the storage is not asked."""
    pytest.importorskip("pyarrow")
    from tests.data.test_parquet import midjourney

    memory.pipe("/data/a.parquet", midjourney(tmp_path / "a.parquet", 0, 8).read_bytes())
    source = open_source("memory://data", "reca")

    def away(path, *arguments, **options):
        raise Outage(f"{path} is away")

    monkeypatch.setattr(remote.RemotePath, "ask", away)
    bad = BadSamples(tmp_path / "bad.jsonl", source, 0.5)
    bad.add(0, "damaged")
    assert bad.count() == 1 and BadSamples(tmp_path / "bad.jsonl", source, 0.5).count() == 1
    monkeypatch.undo()
    assert BadSamples(tmp_path / "bad.jsonl", source, 0.5).count() == 1
