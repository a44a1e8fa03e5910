"""How time and memory grow with voxels and cascades: `python -m benchmarks` runs these in fresh processes.

`python -m benchmarks.growth TASK X Y Z CASCADES ROUNDS` is such a process: it prints what it measured.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import time

from benchmarks import memory

SIZES = ((96, 96, 96), (128, 128, 128), (160, 192, 224))
# Size and cascades of VTN: by size with one cascade, by cascades at one size, and the most of both.
POINTS = (*((size, 1) for size in SIZES), (SIZES[0], 4), (SIZES[0], 10), (SIZES[-1], 10))
TASKS = ("training step", "a pair registered")


def name_of(task, size, n):
    """What a row is called."""
    return f"growth: {task}, {' x '.join(map(str, size))}, VTN-{n}"


def names():
    """The names of all rows, with what each measures: task, size, cascades."""
    return {name_of(task, *point): (task, *point) for task in TASKS for point in POINTS}


def measure(name, rounds):
    """A row: median of the seconds, and the peak in bytes beyond weights and images, each of a process of its own."""
    task, size, n = names()[name]

    def run(rounds, settings):
        command = [sys.executable, "-m", "benchmarks.growth", task, *map(str, (*size, n, rounds))]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **settings})
        return json.loads(done.stdout.splitlines()[-1])

    found = {"seconds": run(rounds, {})["seconds"], "peak": run(1, memory.EXACT)["peak"]}
    row = {"name": name, "voxels": math.prod(size), "cascades": n, **found}
    print(json.dumps(row), file=sys.stderr)
    return row


def table(rows):
    """The rows as lines of Markdown."""
    lines = [
        "",
        "Growth: a voxel and cascade is a voxel of the volume seen by a cascade, the affine one counted.",
        "",
        "| what | s | ns a voxel and cascade | peak, MiB | bytes a voxel and cascade |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        work = row["voxels"] * (row["cascades"] + 1)
        seconds, peak = row["seconds"], row["peak"]
        cells = row["name"].removeprefix("growth: "), f"{seconds:.2f}", f"{1e9 * seconds / work:.0f}"
        lines.append(f"| {' | '.join(cells)} | {peak / 2**20:.0f} | {peak / work:.0f} |")
    return lines


def main(task, *numbers):
    """Measure one row and print it."""
    *size, n, rounds = map(int, numbers)
    import start

    tf = start.tensorflow()
    from benchmarks.cases import training_step
    from network.config import CascadeConfig
    from network.kernels import whole_step
    from network.recursive_cascaded_networks import build_network

    config = CascadeConfig("VTN", n, image_size=tuple(size))
    if task == "training step":
        run = training_step(config)
    else:
        network = build_network(config)
        images = [tf.random.stateless_uniform((1, *size, 1), (0, k)) for k in range(2)]
        registered = whole_step(lambda *images: network(images).stages[-1])
        run = lambda: registered(*images)  # noqa: E731
    run()
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    print(json.dumps({"seconds": statistics.median(seconds), "peak": memory.peak_of(run)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
