"""Measure all cases and write the table: python -m benchmarks -o docs/benchmarks; without -o it is printed.

The variants of a case take turns in one process, so that a noisy machine is noisy to all; the table gives medians and
their ratios. Peak memory is that of a fresh process a variant, beyond what it holds before, such as weights. How long a
start takes is that of whole processes (`starting.py`), and so is growth by voxels and cascades (`growth.py`).
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

# Settings that hold OpenBLAS back.
for setting in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
    os.environ.pop(setting, None)

import start  # noqa: E402

start.keep_memory()  # as the commands do, for all variants; not in the processes that measure memory

import network  # noqa: E402, F401, I001  (before TensorFlow: it sets what that reads)
import tensorflow as tf  # noqa: E402

import cli  # noqa: E402
import files  # noqa: E402
from benchmarks import growth, memory, starting  # noqa: E402
from benchmarks.cases import cases  # noqa: E402
from errors import UserError  # noqa: E402

OTHERS = ("plain", "op by op", "torch")
tf.get_logger().setLevel("ERROR")  # each variant is traced anew, on purpose


def main(arguments=None):
    """Measure and write OUTPUT.md and OUTPUT.json, or print the table."""
    flags = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure speed and memory.")
    flags.add_argument("-o", "--output", help="prefix of the .md and .json, which are replaced (the table is printed)")
    flags.add_argument("--size", type=int, default=128, help="voxels an axis (128)")
    flags.add_argument("--rounds", type=int, default=7, help="times that each variant is run (7)")
    flags.add_argument("--only", default="", help="only the rows with this in their name")
    flags.add_argument("--memory", nargs=2, metavar=("CASE", "VARIANT"), help="print the memory of one, in bytes")
    args = flags.parse_args(arguments)
    cli.positive("size", args.size)
    cli.positive("rounds", args.rounds)
    known = list(cases(args.size))
    chosen = [case for case in known if args.only in case.name]
    starts = [name for name in starting.CASES if args.only in name]
    grown = [name for name in growth.names() if args.only in name]
    if not (chosen or starts or grown):
        names = "; ".join([*(case.name for case in known), *starting.CASES, *growth.names()])
        raise UserError(f"--only {args.only!r} is in no case's name: {names}")
    if args.memory:
        name, variant = args.memory
        case = next(case for case in known if case.name == name)
        kept = memory.kept_by(case.tapes[variant]()) if case.tapes else None
        print(json.dumps({"peak": memory.peak_of(case.variants[variant]()), "kept": kept}))
        return
    bounds = {"bytes": copy_bandwidth(), "operations": matrix_peak()}
    rows = [measure(case, args, bounds) for case in chosen]
    started = [starting.measure(name, args.size, min(args.rounds, starting.ROUNDS)) for name in starts]
    result = {
        "machine": f"{processor()}, {os.cpu_count()} cores, {devices()}",
        "versions": {"python": platform.python_version(), "tensorflow": tf.__version__},
        "size": args.size,
        "copy_bytes_per_second": bounds["bytes"],
        "matrix_operations_per_second": bounds["operations"],
        "rows": rows,
        "starts": started,
        "growth": [growth.measure(name, min(args.rounds, 3)) for name in grown],
    }
    if args.output is None:
        print(table(result))
        return
    pathlib.Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    files.write_text(f"{args.output}.json", json.dumps(result, indent=2) + "\n")
    files.write_text(f"{args.output}.md", table(result))
    print(f"{args.output}.md")


def measure(case, args, bounds):
    """A row of the table: medians in seconds and peaks in bytes by variant, and the bound in seconds."""
    runs = {}
    for name, make in case.variants.items():
        try:
            runs[name] = make()
        except ImportError:
            continue  # torch is optional
        runs[name]()
    seconds = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    del runs
    moved = (case.moved or 0) / bounds["bytes"]
    computed = (case.operations or 0) / bounds["operations"]
    row = {
        "name": case.name,
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "bytes": {name: bytes_of(case, name, args.size) for name in ("ours", "plain")},
        "bound_seconds": max(moved, computed) or None,
    }
    print(json.dumps(row), file=sys.stderr)
    return row


def bytes_of(case, variant, size):
    """Memory of a variant in a process of its own: {"peak": bytes, "kept": bytes for the backward pass or None}."""
    command = [sys.executable, "-m", "benchmarks", "--size", str(size), "--memory", case.name, variant]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **memory.EXACT})
    return json.loads(done.stdout.splitlines()[-1])


def copy_bandwidth():
    """Bytes a second that this machine reads and writes while it copies on all cores."""
    source = tf.random.uniform([2**26])
    copy = tf.function(lambda a: a + 1.0)
    return 2 * 4 * 2**26 / _best(lambda: copy(source))


def matrix_peak():
    """Floating-point operations a second of a matrix product."""
    side = 2048
    a = tf.random.uniform([side, side])
    product = tf.function(lambda a: a @ a)
    return 2 * side**3 / _best(lambda: product(a))


def _best(run):
    times = []
    for _ in range(8):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def processor():
    """Name of the processor, with what matters most of it here."""
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
    return name + (" with AVX-512" if any("avx512f" in line for line in lines) else "")


def devices():
    """What TensorFlow computes on."""
    gpus = [tf.config.experimental.get_device_details(gpu).get("device_name", "GPU") for gpu in _gpus()]
    return ", ".join(gpus) or "no GPU"


def _gpus():
    return tf.config.list_physical_devices("GPU")


def table(result):
    """The result as Markdown."""
    lines = [
        "# Benchmarks",
        "",
        f"`python -m benchmarks` on {result['machine']}; TensorFlow {result['versions']['tensorflow']}, volumes of",
        f"{result['size']}^3, batch 1. Ratios of medians; above 1, ours is faster. *plain*: eight gathers by stacked",
        "indices, a warp a label, TensorFlow's own gradients, losses and metrics op by op (`benchmarks/plain.py`).",
        "*op by op*: `--no-fast_reconstruction`. *torch*: `grid_sample`. *bound*: the time for the bytes that must",
        f"move at the measured {result['copy_bytes_per_second'] / 1e9:.1f} GB/s, or the convolutions' operations at "
        f"the {result['matrix_operations_per_second'] / 1e9:.0f} GFLOP/s of a matrix product. *peak*: beyond weights",
        "and inputs. *kept*: what the tape holds for the backward pass beyond inputs and result. Memory in MiB.",
        "The original itself takes up to 40 % less time than *plain*: [measured.md](measured.md#beside-the-original).",
        "",
        "| what | ours, ms | plain | op by op | torch | bound, ms | peak ours | plain | ratio | kept ours | plain |",
        "|" + " --- |" * 11,
    ]
    for row in result["rows"]:
        ours = row["seconds"]["ours"]
        ratios = [f"{row['seconds'][name] / ours:.1f}x" if name in row["seconds"] else "" for name in OTHERS]
        bound = f"{1000 * row['bound_seconds']:.0f}" if row["bound_seconds"] else ""
        peaks, kept = ([row["bytes"][name][what] for name in ("ours", "plain")] for what in ("peak", "kept"))
        ratio = f"{peaks[0] / peaks[1]:.2f}x" if peaks[1] else ""
        cells = [row["name"], f"{1000 * ours:.0f}", *ratios, bound, *map(_mib, peaks), ratio, *map(_mib, kept)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, *starting.table(result["starts"]), *growth.table(result["growth"])]) + "\n"


def _mib(count):
    return "" if count is None else f"{count / 2**20:.0f}"


if __name__ == "__main__":
    sys.exit(cli.run(main))
