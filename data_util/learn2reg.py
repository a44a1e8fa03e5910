"""Take part in the Learn2Reg challenge: its task as a data set, a run's flows as displacement fields, their scores.

    python -m data_util.learn2reg import TASK -o datasets/oasis
    python -m data_util.learn2reg export TASK -d datasets/oasis.json -c weights/RUN -o submission -g 0
    python -m data_util.learn2reg score TASK submission

TASK is the folder of a task with its dataset.json (`data_util.challenge` says what is read of it). Between the first
two a network is trained on the data set, `python train.py -d datasets/oasis.json`. What a displacement field is:
`data_util.output.challenge_fields`; what the scores are: `data_util.output.challenge_metrics`.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import tqdm

from cli import run
from data_util.challenge import ENDING, SUBSETS, read_grid, read_task
from data_util.config import load_dataset_config
from data_util.making.challenge_set import SCHEMES, check_grids, default_view, import_task
from data_util.making.flags import joined_window, parse_window
from data_util.output.challenge_fields import saved_flow, write_field
from data_util.output.challenge_scores import score_pair, table_text, write_scores
from data_util.store import report_id
from errors import UserError

EVAL = Path(__file__).parents[1] / "eval.py"


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m data_util.learn2reg", description="Take part in the Learn2Reg challenge."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="import|export|score")
    task = argparse.ArgumentParser(add_help=False)
    task.add_argument("task", metavar="TASK", help="folder of the task, with its dataset.json, or that file")
    subset = argparse.ArgumentParser(add_help=False)
    subset.add_argument("--subset", choices=SUBSETS, default="val", help="which of the task's pairs (%(default)s)")

    making = commands.add_parser("import", parents=[task], help="make a data set of a task")
    making.add_argument("-o", "--output", required=True, help="prefix of the .h5 and .json, such as datasets/oasis")
    making.add_argument("--window", help="LEVEL,WIDTH or percentiles LOW%%,HIGH%% (CT 40,400; others 1%%,99%%)")
    making.add_argument("--overwrite", action="store_true", help="replace a data set that is there")

    export = commands.add_parser(
        "export",
        parents=[task, subset],
        help="write displacement fields",
        allow_abbrev=False,
        epilog="Flags that are not listed, such as -g 0 or --refine 50, are given to eval.py.",
    )
    export.add_argument("-d", "--dataset", required=True, help="config of the data set that import made")
    source = export.add_mutually_exclusive_group(required=True)
    source.add_argument("-c", "--checkpoint", help="run to evaluate: FOLDER, FOLDER:STEP or its name in weights/")
    source.add_argument("--flows", help="folder of an evaluation by eval.py --save flow, such as evaluate/REPORT")
    export.add_argument("-o", "--output", required=True, help="folder for the fields")
    export.add_argument("--names", choices=("auto", "long"), default="auto", help="long: with the modalities' numbers")
    export.add_argument("--overwrite", action="store_true", help="replace fields that are there")

    score = commands.add_parser("score", parents=[task, subset], help="score displacement fields")
    score.add_argument("fields", metavar="FIELDS", help="folder of the fields")
    score.add_argument("-o", "--output", help="prefix of the .csv and .json (FIELDS_scores)")
    return parser


def make_set(args: argparse.Namespace) -> None:
    """Make a data set of a task."""
    task = read_task(args.task)
    view = default_view(task)
    if args.window:
        shown, percentiles = parse_window(args.window)
        view = replace(view, window=shown, percentiles=percentiles)
    data, config = import_task(task, args.output, view, args.overwrite)
    content = load_dataset_config(config)
    size = "x".join(map(str, content.image_size))
    print(f"{data}: {size} voxels")
    for scheme, parts in content.schemes.items():
        (subset,) = parts
        pairs = f"pairs that are listed: {len(content.pairs[subset])}" if subset in content.pairs else "all pairs"
        print(f"scheme {scheme}: {len(content.subsets[subset])} scans, {pairs}")
    print(f"next: python -m data_util.check {config}\nthen: python train.py -d {config}")


def export(args: argparse.Namespace, others: Sequence[str]) -> None:
    """Write the displacement fields of a subset's pairs."""
    task, config = read_task(args.task), load_dataset_config(args.dataset)
    pairs = task.pairs_of(args.subset)
    if args.flows is not None and not Path(args.flows).is_dir():
        raise UserError(f"{args.flows}: no such folder; give that of an evaluation by eval.py --save flow")
    which = -1 if args.names == "long" else 0
    folder = Path(args.output)
    paths = {pair: folder / f"{task.field_names(pair)[which]}{ENDING}" for pair in pairs}
    there = next((path for path in paths.values() if path.exists()), None)
    if there and not args.overwrite:
        raise UserError(f"{there} is there already; choose another folder with -o, or replace it with --overwrite")
    check_grids(config, task, pairs)
    flows = Path(args.flows) if args.flows else evaluate(args.checkpoint, args.dataset, SCHEMES[args.subset], others)
    folder.mkdir(parents=True, exist_ok=True)
    (name,) = config.files
    with tqdm.tqdm(paths.items(), unit="field") as progress:
        for pair, path in progress:
            fixed, moving = (report_id(f"{name}/{scan}") for scan in pair)
            write_field(saved_flow(flows, fixed, moving), read_grid(task.cases[pair[0]].image), path)
    print(
        f"displacement fields in {folder}: {len(paths)}\nnext: python -m data_util.learn2reg score {args.task} {folder}"
    )


def evaluate(checkpoint: str, dataset: str, scheme: str, others: Sequence[str]) -> Path:
    """Evaluate a run on a scheme by eval.py, which keeps the flows; return their folder.

    An evaluation that was stopped goes on, and one that was finished before is not done again.

    Raises:
        UserError: eval.py failed; it has said why.
    """
    flags = ["-c", checkpoint, "-d", dataset, "-v", scheme, "--save", "flow", "--save_format", "npz", "--resume"]
    done = subprocess.run([sys.executable, EVAL, *flags, *others], stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, end="")
    report = re.search(r"^Report: (.+)\.txt", done.stdout, re.MULTILINE)
    if done.returncode or report is None:
        raise UserError("eval.py failed, as it says above; no field is written")
    return Path(report[1])


def score(args: argparse.Namespace) -> None:
    """Score the displacement fields of a subset's pairs."""
    task, fields = read_task(args.task), Path(args.fields)
    pairs = task.pairs_of(args.subset)
    if not fields.is_dir():
        raise UserError(f"{fields}: no such folder; give that of the displacement fields")
    prefix = Path(args.output or f"{fields}_scores")
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with tqdm.tqdm(pairs, unit="pair") as progress:
        scores = [score_pair(task, pair, fields) for pair in progress]
    write_scores(scores, task, args.subset, prefix)
    print(table_text(scores))
    print(f"{prefix}.csv: one row per pair and label\n{prefix}.json: means")


def main(argv: list[str] | None = None) -> None:
    """Run the command.

    Args:
        argv: flags; those of the process where None.
    """
    parser = build_parser()
    args, others = parser.parse_known_args(joined_window(sys.argv[1:] if argv is None else argv))
    if others and not (args.command == "export" and args.checkpoint):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if args.command == "export":
        export(args, others)
    else:
        {"import": make_set, "score": score}[args.command](args)


if __name__ == "__main__":
    sys.exit(run(main))
