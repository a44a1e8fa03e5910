"""A run on two workers that a cluster stops loses nothing, whenever the signals come."""

import csv
import os
import pathlib
import random
import signal
import threading
import time

import numpy as np
import pytest
import tensorflow as tf

import cli
from data_util.phantoms import write_dataset
from network import checkpoints
from tests.commands import finish, run_named, two_workers

STEPS = 48
SIGNALS = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]  # as under nohup
FLAGS = (
    *("-d", "datasets/p.json", "-b", "VoxelMorph", "-n", "1", "--batch", "2", "--net_args", "channels=2"),
    *("--round", "12", "--epochs", str(STEPS / 12), "--val_steps", "5", "--val_pairs", "2"),
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A working folder with the data set p.json."""
    home = tmp_path_factory.mktemp("stopping")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        pathlib.Path("datasets").mkdir()
        write_dataset("datasets/p", (16, 16, 16), 4, 3, 0)
    return home


def losses(run):
    """What log.csv tells of each step, as text."""
    return {int(row["step"]): row["loss"] for row in csv.DictReader((run / "log.csv").open())}


def weights(run, step):
    reader = tf.train.load_checkpoint(str(run / f"model-{step}"))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


def assert_same_bits(one, other):
    assert losses(one).items() <= losses(other).items()
    for name, value in weights(one, STEPS).items():
        np.testing.assert_array_equal(value, weights(other, STEPS)[name], name)


def printed(process):
    """Lines that the process has printed so far, read by a thread, which ends with the process."""
    lines = []

    def read():
        for line in process.stdout:
            lines.append(line)

    thread = threading.Thread(target=read)
    thread.start()
    return lines, thread


def stop_somewhere(processes, chance, log):
    """Signal both workers within a second of each other, at a moment of any phase; their statuses and outputs."""
    readers = [printed(process) for process in processes]
    compiles = lambda: any("Compiling" in line for line in readers[0][0])  # noqa: E731
    steps = lambda: log() is not None and len(log().read_text().splitlines()) > 1  # noqa: E731
    begun, seconds = chance.choice([(compiles, 10), (steps, 4), (steps, 4)])
    while not begun() and processes[0].poll() is None:
        time.sleep(0.02)
    time.sleep(chance.uniform(0, seconds))
    apart, number = chance.uniform(-1, 1), chance.choice(SIGNALS)
    for process in processes[:: 1 if apart > 0 else -1]:
        process.send_signal(number)
        time.sleep(abs(apart))
    for process in processes:
        process.wait(timeout=300)
    for _, thread in readers:
        thread.join()
    return [process.returncode for process in processes], ["".join(lines) for lines, _ in readers]


def campaign(home, undisturbed, tries, seed):
    """Stop runs by signals, `tries` times in all, and continue each: it ends with the bits of the undisturbed run."""
    chance, survived, chain, source, name = random.Random(seed), 0, 0, None, None
    while survived < tries or source is not None:
        name = f"chain{chain}-{survived}"
        flags = ("--name", name, *(FLAGS if source is None else ("-c", str(source), "--val_steps", "5")))
        processes = two_workers(home, *flags)
        if survived == tries:
            finish(*processes)
            statuses = [0, 0]
        else:
            started = time.monotonic()
            log = lambda name=name: next(home.glob(f"weights/*_{name}/log.csv"), None)  # noqa: E731
            statuses, outputs = stop_somewhere(processes, chance, log)
            assert statuses in ([cli.STOPPED] * 2, [0, 0]), outputs
            survived += 1
            print(f"try {survived}: statuses {statuses}, {time.monotonic() - started:.0f} s", flush=True)
        run = run_named(home, name)
        done = losses(run)
        (newest,) = checkpoints.list_steps(run)[-1:]
        assert newest == max(done), outputs
        assert done.items() <= losses(undisturbed).items()
        print(f"steps {min(done)} to {newest}", flush=True)
        source = run
        if newest == STEPS:
            assert_same_bits(run, undisturbed)
            source, chain = None, chain + 1


@pytest.fixture(scope="module")
def undisturbed(home):
    finish(*two_workers(home, *FLAGS, "--name", "undisturbed"))
    return run_named(home, "undisturbed")


@pytest.mark.slow
def test_two_runs_that_nobody_stops_have_the_same_bits(home, undisturbed):
    finish(*two_workers(home, *FLAGS, "--name", "again"))
    assert_same_bits(run_named(home, "again"), undisturbed)


@pytest.mark.slow
def test_a_run_that_is_stopped_loses_nothing(home, undisturbed):
    campaign(home, undisturbed, int(os.environ.get("STOPS", "20")), seed=0)
