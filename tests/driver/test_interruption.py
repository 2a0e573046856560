"""Signals to a run, from its set-up to its last word."""

import os
import signal
from pathlib import Path

import pytest

from reca import exits
from reca import trainer as driver
from reca.processes.interruption import Interruption
from reca.runs.folder import RunFolder
from reca.runs.status import Status
from reca.trainer import Trainer
from tests.driver.forks import exit_codes, fork_ranks
from tests.driver.toy import ToyAdapter, run_toy

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP]


@pytest.fixture(autouse=True)
def heeded():
    """The tests may run under nohup, or in the background of a shell: there SIGHUP and SIGINT are ignored."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in (signal.SIGINT, signal.SIGHUP):
        if before[number] == signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def interrupted(trainer: Trainer) -> int:
    with pytest.raises(SystemExit) as stop:
        trainer.run()
    status = Status.read(trainer.run_dir)
    assert (stop.value.code, status.state, status.exit_code) == (exits.INTERRUPTED, "interrupted", exits.INTERRUPTED)
    return status.step


@pytest.mark.parametrize("number", SIGNALS)
def test_signals_end_a_run_behind_the_update(recipe, number):
    before = [signal.getsignal(n) for n in SIGNALS]
    trainer = Trainer(recipe(), ToyAdapter(), lambda step: step == 2 and os.kill(os.getpid(), number))
    assert interrupted(trainer) == 2
    assert [signal.getsignal(n) for n in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS)
def test_signals_before_the_first_step_end_a_run_at_once(recipe, number, monkeypatch):
    """There is nothing to save, and loading of weights may take minutes."""
    made, choose = recipe(), driver.choose_trained
    monkeypatch.setattr(driver, "choose_trained", lambda *given: [os.kill(os.getpid(), number), choose(*given)][1])
    monkeypatch.setattr(driver, "make_optimizer", lambda *given: pytest.fail("the start went on"))
    with pytest.raises(SystemExit) as stop:
        Trainer(made, ToyAdapter())
    assert (stop.value.code, Status.read(Path(made.run_dir)).state) == (exits.INTERRUPTED, "interrupted")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_of_a_kind_ends_the_process(number):
    def twice(rank: int) -> None:
        interruption = Interruption()
        with interruption.handle_signals():
            interruption.deferred = True
            os.kill(os.getpid(), number)
            assert interruption.requested
            os.kill(os.getpid(), number)

    assert exit_codes(fork_ranks(1, twice)) == [-number]


@pytest.mark.parametrize("embedded", [True, False])
def test_a_run_of_another_command_does_not_say_what_that_will_do(recipe, embedded, caplog):
    """The demo's runs said that the same command continues them, which begins anew."""
    trainer = Trainer(recipe("train.steps=2"), ToyAdapter(), (lambda step: None) if embedded else None)
    trainer.interruption.requested = True
    assert interrupted(trainer) == 1
    assert "interrupted at step 1" in caplog.text
    assert ("the same command continues" in caplog.text) != embedded


def test_two_kinds_of_signals_are_one_interruption(recipe):
    """A batch system sends SIGUSR1, and SIGTERM when its patience ends: the step is still ended."""

    def signals(step: int) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)

    assert interrupted(Trainer(recipe(), ToyAdapter(), signals)) == 2


@pytest.mark.parametrize("moment", ["samples", "save", "loading of the first batch"])
def test_a_signal_at_any_moment_waits_for_the_update(recipe, moment, monkeypatch):
    trainer = Trainer(recipe("log.prompts=[a]", "log.sample_every=1", "checkpoint.every=1"), ToyAdapter())
    owner, name = {
        "samples": (trainer.diagnostics, "images"),
        "save": (trainer, "save"),
        "loading of the first batch": (trainer, "next_batches"),
    }[moment]
    original = getattr(owner, name)

    def signalled(*arguments):
        monkeypatch.setattr(owner, name, original)
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(owner, name, signalled)
    assert interrupted(trainer) == (2 if moment == "save" else 1)


def test_a_signal_behind_the_last_update_does_not_hide_that_the_run_is_finished(recipe, monkeypatch):
    write_status = RunFolder.write_status

    def signalled(folder, state, *more):
        if state == "finished":
            os.kill(os.getpid(), signal.SIGTERM)
        write_status(folder, state, *more)

    monkeypatch.setattr(RunFolder, "write_status", signalled)
    assert Status.read(run_toy(recipe("train.steps=1")).run_dir).state == "finished"


def test_nohup_stays_what_it_is(recipe):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        trainer = Trainer(recipe("train.steps=2"), ToyAdapter(), lambda _: os.kill(os.getpid(), signal.SIGHUP))
        trainer.run()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert Status.read(Path(trainer.run_dir)).state == "finished"
