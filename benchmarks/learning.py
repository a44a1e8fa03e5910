"""What an option of training brings, on pairs that it never sees: python -m benchmarks.learning; docs/measured.md.

    python -m data_util.phantoms -o /tmp/phantoms --size 48 48 48 --train 16 --pairs 4
    python -m benchmarks.learning -o /tmp/learning -d /tmp/phantoms.json --steps 300 --seeds 0,1,2 \
        'plain=' 'smoother=--net_args "reg_factor=2"'

Each variant, NAME=FLAGS of train.py, is trained from every seed with the same number of steps and then evaluated. A row
of the table has the mean over the seeds of each value, and their standard deviation. A seed of a variant that is
finished is kept in the folder and not done again, so a command that was stopped goes on, and one with more variants or
seeds does those alone.
"""

import argparse
import hashlib
import json
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import cli
import files
from errors import UserError

ROOT = Path(__file__).parents[1]
# Columns: values of the reports of eval.py, and how they are written.
COLUMNS = {
    "dice": ("Dice", 1, 3),
    "landmark_distance": ("landmarks, voxel", 1, 2),
    "flow_error": ("flow error, voxel", 1, 2),
    "folding": ("folded, %", 100, 3),
    "sdlogj": ("SDlogJ", 1, 3),
}
METRICS = "overlap,landmarks,flow_error,folding,sdlogj"


def main(arguments: list[str] | None = None) -> None:
    """Train and evaluate what is not done yet, and print the table."""
    flags = argparse.ArgumentParser(prog="python -m benchmarks.learning", description="What training options bring.")
    flags.add_argument("variants", nargs="+", metavar="NAME=FLAGS", help="name of a row, and its flags of train.py")
    flags.add_argument("-o", "--output", required=True, type=Path, help="folder of the runs and their results")
    flags.add_argument("-d", "--dataset", required=True, type=Path, help="data config to train on")
    flags.add_argument("--test", type=Path, help="data config to evaluate on (that of -d)")
    flags.add_argument("-v", "--val_subset", default="2", help="scheme to evaluate (2)")
    flags.add_argument("--paired", action="store_true", help="evaluate pairs of neighbouring scans only")
    flags.add_argument("--steps", type=int, default=300, help="steps of each run (300)")
    flags.add_argument("--seeds", default="0", help="seeds, comma-separated (0)")
    flags.add_argument(
        "--common", default="-b VoxelMorph -n 2 --batch 1 --lr 4e-4 -g -1", help="flags of all variants (%(default)s)"
    )
    args = flags.parse_args(arguments)
    cli.positive("steps", args.steps)
    variants = dict(named(text) for text in args.variants)
    try:
        seeds = [int(seed) for seed in args.seeds.split(",")]
    except ValueError:
        raise UserError(f"--seeds is {args.seeds!r}; give whole numbers with commas between them") from None
    for path in filter(None, (args.dataset, args.test)):
        if not path.is_file():
            raise UserError(f"{path}: there is no such file; give the JSON file of a data set")
    args.output.mkdir(parents=True, exist_ok=True)
    rows = {name: [result(args, flags_of, seed) for seed in seeds] for name, flags_of in variants.items()}
    print(table(rows))


def named(text: str) -> tuple[str, list[str]]:
    """The name and the flags of a variant.

    >>> named('smoother=--net_args "reg_factor=2"')
    ('smoother', ['--net_args', 'reg_factor=2'])
    """
    name, equals, flags = text.partition("=")
    if not equals or not name or name.startswith("-"):
        raise UserError(f"variant {text!r}; write NAME=FLAGS, such as 'plain=' or 'adam=--lr 1e-3'")
    return name, shlex.split(flags)


def result(args: argparse.Namespace, flags: list[str], seed: int) -> dict[str, float | None]:
    """The values of one variant from one seed, by name: those on file, or else measured now."""
    validation = ["--val_steps", str(args.steps), "--round", str(args.steps), "--epochs", "1", "--seed", str(seed)]
    train = ["-d", str(args.dataset.resolve()), *validation, *shlex.split(args.common), *flags]
    test = ["-d", str((args.test or args.dataset).resolve()), "-v", args.val_subset, "--metrics", METRICS]
    test += ["--paired"] if args.paired else []
    contents = [path.read_text() for path in (args.dataset, args.test or args.dataset)]
    digest = hashlib.blake2b(json.dumps([train, test, contents]).encode(), digest_size=6).hexdigest()
    file = args.output / f"{digest}.json"
    if not file.exists():
        run(args.output, "train.py", *train, "--name", digest)
        newest = max((args.output / "weights").glob(f"*_{digest}"), key=os.path.getmtime)
        run(args.output, "eval.py", "-c", str(newest.relative_to(args.output)), *test, "--batch", "1", "-g", "-1")
        (report,) = (args.output / "evaluate").glob(f"{newest.name}-model-*.json")
        summary = json.loads(report.read_text())["summary"]
        measured = {name: value["mean"] for name, value in summary.items()}
        files.write_text(file, json.dumps({"train": train, "test": test, "values": measured}, indent=1) + "\n")
    return json.loads(file.read_text())["values"]


def run(folder: Path, script: str, *flags: str) -> None:
    """Run a command of the project in a folder.

    Raises:
        UserError: it failed.
    """
    print(shlex.join([script, *flags]), file=sys.stderr)
    done = subprocess.run([sys.executable, str(ROOT / script), *flags], cwd=folder, stdout=sys.stderr, check=False)
    if done.returncode:
        raise UserError(f"{script} ended with status {done.returncode}; see what it said, and start again to go on")


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: a row for each variant, after one of what is measured without registration."""
    results = [values for of_variant in rows.values() for values in of_variant]
    names = [name for name in COLUMNS if any(values.get(name) is not None for values in results)]
    before = {"before": [{name: results[0].get(f"{name}_before") for name in names}]}
    lines = [["variant", *(COLUMNS[name][0] for name in names)], ["---"] * (1 + len(names))]
    for variant, of_variant in {**before, **rows}.items():
        lines.append([variant, *(written(name, [values.get(name) for values in of_variant]) for name in names)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def written(name: str, values: list[float | None]) -> str:
    """A cell: the mean of the values that were measured, and their standard deviation where there are several."""
    _, factor, digits = COLUMNS[name]
    known = [factor * value for value in values if value is not None]
    if not known:
        return ""
    spread = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.{digits}f}{spread}"


if __name__ == "__main__":
    sys.exit(cli.run(main))
