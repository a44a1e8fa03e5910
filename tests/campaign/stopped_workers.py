"""Stop a run on two workers again and again, at moments of any phase, and look whether anything is lost.

    python -m tests.campaign.stopped_workers FOLDER --tries 20 --seed 0

Both workers get a signal, up to a second apart. What they leave is continued, stopped again, and so on; each step must
have the loss, and the end the weights, of a run that nobody stopped, to the last bit.
"""

import argparse
import csv
import pathlib
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

import cli
from data_util.phantoms import write_dataset
from network import checkpoints
from tests.commands import finish, run_named, two_workers

STEPS = 48
SMALLEST = ("-d", "datasets/p.json", "-b", "VoxelMorph", "-n", "1", "--batch", "2", "--net_args", "channels=2")
VALIDATION = ("--val_steps", "5", "--val_pairs", "2")
FLAGS = (*SMALLEST, "--round", "12", "--epochs", str(STEPS / 12), *VALIDATION)
PHASES = {"a step": 4, "compiling": 10}  # what a signal comes after, by at most so many seconds
SIGNALS = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]  # as under nohup


@dataclass(frozen=True)
class Try:
    """One stop of both workers.

    Attributes:
        told: the signal, seconds between the two workers, and after what it came.
        seconds: from the start of the processes to their end.
        steps: first and last step of this part of the run; () where it did none.
        lost: what is wrong, or None.
    """

    told: str
    seconds: float
    steps: tuple[int, ...]
    lost: str | None

    def __str__(self) -> str:
        outcome = "survived" if self.lost is None else f"LOST: {self.lost}"
        return f"{self.told}: steps {'-'.join(map(str, self.steps)) or 'none'}, {self.seconds:.0f} s, {outcome}"


def undisturbed(home: pathlib.Path, name: str = "undisturbed") -> pathlib.Path:
    """The run in `home` that nobody stops, made where it is not there, with its data set."""
    if not (home / "datasets").exists():
        (home / "datasets").mkdir(parents=True)
        write_dataset(home / "datasets" / "p", (16, 16, 16), 4, 3, 0)
    if not list(home.glob(f"weights/*_{name}")):
        finish(*two_workers(home, *FLAGS, "--name", name))
    return run_named(home, name)


def losses(run: pathlib.Path) -> dict[int, str]:
    """The loss of each step of a run, as it is written."""
    with (run / "log.csv").open() as file:
        return {int(row["step"]): row["loss"] for row in csv.DictReader(file)}


def difference(run: pathlib.Path, whole: pathlib.Path) -> str | None:
    """What of a run differs from an undisturbed one, or None where all bits are the same."""
    expected = losses(whole)
    for step, loss in losses(run).items():
        if loss != expected[step]:
            return f"{run.name}: the loss of step {step} is {loss}, not {expected[step]}"
    newest = checkpoints.list_steps(run)[-1]
    if newest == STEPS:
        one, other = (tf.train.load_checkpoint(str(folder / f"model-{STEPS}")) for folder in (run, whole))
        for name in other.get_variable_to_shape_map():
            if not np.array_equal(one.get_tensor(name), other.get_tensor(name)):
                return f"{run.name}: {name} has other values"
    return None


class Output:
    """What a process has printed so far, read by a thread."""

    def __init__(self, process):
        self.text = ""
        self.thread = threading.Thread(target=self._read, args=(process,), daemon=True)
        self.thread.start()

    def _read(self, process):
        for line in process.stdout:
            self.text += line


def stop(
    home: pathlib.Path, name: str, flags: tuple[str, ...], phase: str, chance: random.Random
) -> tuple[str, list[int], str]:
    """Start both workers and stop them in a phase: what they were told, their statuses and what they printed."""
    processes = two_workers(home, *flags, "--name", name)
    outputs = [Output(process) for process in processes]

    def begun():
        if phase == "compiling":
            return "Compiling the first step" in outputs[0].text
        return any(len(log.read_text().splitlines()) > 1 for log in home.glob(f"weights/*_{name}/log.csv"))

    later, apart, number = chance.uniform(0, PHASES[phase]), chance.uniform(-1, 1), chance.choice(SIGNALS)
    while not begun() and processes[0].poll() is None:
        time.sleep(0.02)
    time.sleep(later)
    for process in processes[:: 1 if apart > 0 else -1]:
        process.send_signal(number)
        time.sleep(abs(apart))
    statuses = [process.wait(timeout=600) for process in processes]
    for output in outputs:
        output.thread.join()
    # A worker that stopped with the other may get its own signal while Python ends, and then nobody handles it.
    for k, output in enumerate(outputs):
        if statuses[k] == -number and ("which is saved" in output.text or "has saved it" in output.text):
            statuses[k] = cli.STOPPED
    told = f"{number.name}, the second worker {apart:+.2f} s after the first, {later:.1f} s after {phase}"
    return told, statuses, "\n".join(output.text for output in outputs)


def campaign(home: pathlib.Path, tries: int, seed: int) -> Iterator[Try]:
    """Stop runs `tries` times in all, each continued from what the one before left, and let the last one end."""
    chance, whole, source = random.Random(seed), undisturbed(home), None
    for k in range(tries):
        name, phase, started = f"part{seed}-{k}", [*PHASES][k % len(PHASES)], time.monotonic()
        told, statuses, printed = stop(
            home, name, FLAGS if source is None else ("-c", str(source), *VALIDATION), phase, chance
        )
        seconds, runs = time.monotonic() - started, [*home.glob(f"weights/*_{name}")]
        steps = tuple(losses(runs[0])) if runs and (runs[0] / "log.csv").exists() else ()
        lost = None
        if statuses not in ([cli.STOPPED] * 2, [0, 0]):
            lost = f"statuses {statuses}: {printed}"
        elif steps and checkpoints.list_steps(runs[0])[-1:] != [steps[-1]]:
            lost = f"step {steps[-1]} is done, and the checkpoints are {checkpoints.list_steps(runs[0])}"
        elif steps:
            lost = difference(runs[0], whole)
        yield Try(told, seconds, (steps[0], steps[-1]) if steps else (), lost)
        if runs and checkpoints.list_steps(runs[0]):
            source = None if steps[-1] == STEPS else runs[0]
    if source is not None:
        finish(*two_workers(home, "-c", str(source), *VALIDATION, "--name", f"part{seed}-end"))
        if wrong := difference(run_named(home, f"part{seed}-end"), whole):
            yield Try("not stopped", 0, (), wrong)


def main() -> int:
    """Print each try and how many were lost; the status is 1 where any was."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("folder", type=pathlib.Path)
    flags.add_argument("--tries", type=int, default=20)
    flags.add_argument("--seed", type=int, default=0)
    args = flags.parse_args()
    lost = 0
    for done in campaign(args.folder.resolve(), args.tries, args.seed):
        print(done, flush=True)
        lost += done.lost is not None
    print(f"lost: {lost} of {args.tries}")
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
