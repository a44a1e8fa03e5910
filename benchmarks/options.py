"""What an option of training costs in time and memory: python -m benchmarks.options; the table is printed.

    python -m benchmarks.options --size 128 'plain=' "velocity=flow='velocity'" "both ways=inverse_factor=0.1"

Each variant, NAME=NET_ARGS, is a training step of one pair, with 56 labels and 20 landmarks where they are asked for.
The variants take turns in one process; a row has the median of a step in wall time and in time of all cores, and both
over those of the first variant. Peak memory is that of a fresh process a variant, beyond weights.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import cli
import network  # noqa: F401  (before TensorFlow: it sets what that reads)
import start
from benchmarks import memory
from errors import UserError


def main(arguments=None):
    """Measure the variants and print the table."""
    flags = argparse.ArgumentParser(prog="python -m benchmarks.options", description="What training options cost.")
    flags.add_argument("variants", nargs="+", metavar="NAME=NET_ARGS", help="name of a row, and its --net_args")
    flags.add_argument("-b", "--base_network", default="VTN", help="VTN or VoxelMorph (VTN)")
    flags.add_argument("-n", "--n_cascades", type=int, default=2, help="cascades (2)")
    flags.add_argument("--size", type=int, default=128, help="voxels an axis (128)")
    flags.add_argument("--rounds", type=int, default=7, help="times that each variant is run (7)")
    flags.add_argument("--memory", action="store_true", help="print the peak memory of the one variant, in bytes")
    args = flags.parse_args(arguments)
    cli.positive("size", args.size)
    cli.positive("rounds", args.rounds)
    start.keep_memory()  # as train.py does
    variants = dict(named(text) for text in args.variants)
    steps = {name: make_step(args, net_args) for name, net_args in variants.items()}
    if args.memory:
        print(json.dumps([memory.peak_of(step) for step in steps.values()]))
        return
    seconds = measure(steps, args.rounds)
    del steps
    print(
        "| variant | step, s | of the first | time of all cores, s | of the first | peak memory, MiB | of the first |"
    )
    print("|" + " --- |" * 7)
    first = None
    for name, net_args in variants.items():
        values = [*seconds[name], peak(args, f"{name}={net_args}") / 2**20]
        first = first or values
        cells = [f"{value:.{digits}f}" for value, digits in zip(values, (2, 2, 0), strict=True)]
        ratios = [f"{value / other:.2f}x" for value, other in zip(values, first, strict=True)]
        print(
            f"| {name} | " + " | ".join(f"{cell} | {ratio}" for cell, ratio in zip(cells, ratios, strict=True)) + " |"
        )


def named(text):
    """(NAME, NET_ARGS) of a text NAME=NET_ARGS."""
    name, sign, net_args = text.partition("=")
    if not (name and sign):
        raise UserError(f"variant {text!r} is not NAME=NET_ARGS; write 'plain=' for one without options")
    return name, net_args


def make_step(args, net_args):
    """A function without arguments that does a training step of one pair."""
    from benchmarks.cases import training_step
    from network.config import CascadeConfig

    config = CascadeConfig(args.base_network, args.n_cascades, image_size=(args.size,) * 3)
    return training_step(config.with_net_args(net_args))


def measure(steps, rounds):
    """Medians of the wall time and of the time of all cores of each step, in seconds."""
    for step in steps.values():
        step()
    found = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            started = time.perf_counter(), time.process_time()
            step()
            found[name].append((time.perf_counter() - started[0], time.process_time() - started[1]))
    return {name: [statistics.median(values) for values in zip(*times, strict=True)] for name, times in found.items()}


def peak(args, variant):
    """Peak memory of a variant's step in a process of its own, in bytes."""
    size = ["-b", args.base_network, "-n", str(args.n_cascades), "--size", str(args.size)]
    command = [sys.executable, "-m", "benchmarks.options", *size, "--memory", variant]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, **memory.EXACT})
    if done.returncode:
        reason = (done.stderr.strip() or "no message").splitlines()[-1]
        raise UserError(f"{variant}: its process ended with status {done.returncode} ({reason})")
    return json.loads(done.stdout.splitlines()[-1])[0]


if __name__ == "__main__":
    sys.exit(cli.run(main))
