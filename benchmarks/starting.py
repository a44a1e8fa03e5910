"""How long a command takes from its start to its first result, in fresh processes: `python -m benchmarks` runs them.

`python -m benchmarks.starting CASE VARIANT SIZE` is such a process: it does one case, and ends.
"""

import contextlib
import os
import statistics
import subprocess
import sys
import time

# name -> (what is done, cascades of VTN)
CASES = {
    "start to first pair, VTN-1": ("pair", 1),
    "start to first pair, VTN-10": ("pair", 10),
    "start to first training step, VTN-1": ("step", 1),
}
VARIANTS = ("ours", "plain")
ROUNDS = 3  # at most: a process takes up to half a minute


def measure(name, size, rounds):
    """A row: wall and CPU seconds by variant, medians over `rounds` processes of each, which take turns."""
    wall, cpu = {v: [] for v in VARIANTS}, {v: [] for v in VARIANTS}
    for _ in range(rounds):
        for variant in VARIANTS:
            started, before = time.perf_counter(), os.times()
            command = [sys.executable, "-m", "benchmarks.starting", name, variant, str(size)]
            subprocess.run(command, check=True, capture_output=True)
            wall[variant].append(time.perf_counter() - started)
            after = os.times()
            cpu[variant].append(sum(after[2:4]) - sum(before[2:4]))
    medians = ({v: statistics.median(times) for v, times in kind.items()} for kind in (wall, cpu))
    return dict(zip(("name", "seconds", "cpu_seconds"), (name, *medians), strict=True))


def table(rows):
    """The rows as lines of Markdown."""
    lines = [
        "",
        "From the start of Python to the first result, weights drawn: seconds of fresh processes, medians. Both take",
        "the kernels that a process before them has compiled (`kernel_cache.py`).",
        "",
        "| what | ours, s | plain | ours, CPU s | plain |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        (ours, plain), (cpu, plain_cpu) = ([row[kind][v] for v in VARIANTS] for kind in ("seconds", "cpu_seconds"))
        lines.append(f"| {row['name']} | {ours:.1f} | {plain / ours:.1f}x | {cpu:.1f} | {plain_cpu / cpu:.1f}x |")
    return lines


def main(name, variant, size):
    """Do a case up to its first result."""
    import start

    start.tensorflow()
    start.compiler()
    import tensorflow as tf

    from benchmarks import plain
    from network.config import CascadeConfig
    from network.kernels import whole_step
    from network.recursive_cascaded_networks import build_network

    what, n = CASES[name]
    config = CascadeConfig("VTN", n, image_size=(int(size),) * 3)
    with plain.everywhere() if variant == "plain" else contextlib.nullcontext():
        if what == "step":
            from benchmarks.cases import training_step

            training_step(config)()
            return
        network = build_network(config)
        images = [tf.random.stateless_uniform((1, *config.image_size, 1), (0, k)) for k in range(2)]
        whole_step(lambda *images: network(images).stages[-1])(*images)


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # what a process does at its end is no part of it
