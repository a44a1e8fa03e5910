"""What ends a run at a signal."""

import os
import signal
import types

import pytest

from errors import Stopped
from network.callbacks import StopAtSignal

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Saver:
    saved = 0

    def save(self):
        self.saved += 1


@pytest.fixture
def run(monkeypatch):
    """A StopAtSignal around a run of 9 steps, whose fake model is at step 4; signals that come otherwise are errors."""

    def unheard(*_):
        raise KeyboardInterrupt

    before = {number: signal.signal(number, unheard) for number in NUMBERS}
    stop = StopAtSignal(Saver(), "go on", 9)
    stop.set_model(types.SimpleNamespace(step=4, stops=False, is_over=False, asked_to_stop=False))
    yield stop
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", NUMBERS)
def test_the_first_signal_is_noted_and_the_second_interrupts(run, number):
    run.on_train_begin()
    os.kill(os.getpid(), number)
    assert run.model.asked_to_stop
    run.on_train_batch_end(0)  # several workers go on until all know
    assert run.saver.saved == 0
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), number)


def test_a_run_that_stops_is_saved_first(run):
    run.on_train_begin()
    run.model.stops = True
    with pytest.raises(Stopped, match="Stopped at step 4, which is saved; go on"):
        run.on_train_batch_end(0)
    assert run.saver.saved == 1
    run.saver = None
    with pytest.raises(Stopped, match="Stopped at step 4; go on"):
        run.on_train_batch_end(0)


def test_a_signal_in_the_last_step_changes_nothing(run):
    run.on_train_begin()
    run.model.step, run.model.stops = 9, True
    run.on_train_batch_end(0)
    run.end()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_that_was_ignored_stays_so(run):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    run.on_train_begin()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not run.model.asked_to_stop
    run.end()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
