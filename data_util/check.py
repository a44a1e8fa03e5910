"""Look a data set over before it is trained on: count its scans and pairs, and name what is wrong with them.

    python -m data_util.check datasets/mine.json

Everything is read, unless with `--quick`. An error is what stops a training, or makes its results or scores wrong, and
ends the command with status 1; a warning is what may be meant. `--fix` writes a mended copy beside the files and leaves
them as they are.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cli import add_trust_flag, run
from data_util.checking import CACHE_BYTES, ERROR, WARNING, Check
from data_util.config import load_dataset_config
from data_util.making.repair import mend
from data_util.output.contact_sheet import sheet_figure
from data_util.store import ScanStore
from errors import UserError, listed

MOST_DRAWN = 48  # scans of a contact sheet


def draw(check: Check, path: str | Path) -> None:
    """Draw the mid-slices of the scans that a Check looked at, at most MOST_DRAWN of them, evenly spread."""
    faulty = {finding.where for finding in check.findings if finding.level == ERROR}
    store = ScanStore(check.config.files, CACHE_BYTES)
    readable = check.readable
    if not readable:
        raise UserError(f"{path}: there is no scan that can be drawn; mend the errors first")
    count = min(len(readable), MOST_DRAWN)
    shown = [readable[k * len(readable) // count] for k in range(count)]
    sheet_figure(path, shown, store.read, faulty)


def report_lines(check: Check) -> list[str]:
    """What a Check found, as lines: the table of schemes, the table of findings, equal ones together, and their sum."""
    lines = _table([("scheme", "subset", "scans", "pairs", "paired"), *check.rows])
    where: dict[tuple, list[str]] = {}
    for finding in check.findings:
        where.setdefault((finding.level, finding.what, bool(finding.mend)), []).append(finding.where)
    rows = [
        (level, listed(names, 3), what + " (--fix mends it)" * mendable)
        for (level, what, mendable), names in sorted(where.items(), key=lambda item: item[0][0])
    ]
    if rows:
        lines += ["", *_table([("level", "where", "what"), *rows])]
    counts = ", ".join(f"{sum(f.level == level for f in check.findings)} {level}s" for level in (ERROR, WARNING))
    lines += ["", f"{check.config.path}: {len(check.scans)} scans, {counts}"]
    if check.quick:
        lines.append("note: --quick read no image; damage and wrong values are found without it")
    if count := check.arrays_without_checksum:
        lines.append(f"note: {count} arrays have no checksum, so that damage in them may go unnoticed")
    return lines


def _table(rows: Sequence[Sequence[Any]]) -> list[str]:
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell!s:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(prog="python -m data_util.check", description="Look a data set over.")
    add = parser.add_argument
    add("config", metavar="CONFIG", help="the set's .json")
    add("-v", "--val_subset", help="schemes to look at, comma-separated (all)")
    add("--paired", action="store_true", help="the pairs are neighbouring scans, as for eval.py --paired")
    add("--quick", action="store_true", help="look at what describes the scans, and read no image")
    add_trust_flag(parser)
    add("--fix", action="store_true", help="write a mended copy, NAME_fixed.json and .h5, and look it over")
    add(
        "--figure", metavar="FILE", help=f"draw mid-slices with label outlines of up to {MOST_DRAWN} scans (.png, .pdf)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; status 1 where there is an error."""
    args = build_parser().parse_args(argv)
    names = [name.strip() for name in args.val_subset.split(",")] if args.val_subset else None
    if args.quick and (args.fix or args.figure):
        raise UserError("--quick reads no image, and --fix and --figure need them; leave it out")
    check = Check(load_dataset_config(args.config, args.trust), names, args.paired, args.quick)
    print("\n".join(report_lines(check)))
    if args.fix:
        if any(finding.mend for finding in check.findings):
            *files, config = mend(check.config, check.findings)
            print(f"mended: {', '.join(map(str, (*files, config)))}; looked over again:\n")
            check = Check(load_dataset_config(config, args.trust), names, args.paired)
            print("\n".join(report_lines(check)))
        else:
            print("--fix: nothing here can be mended without knowing what was meant; nothing was written")
    if args.figure:
        draw(check, args.figure)
        print(f"figure: {args.figure}")
    print(f"next: {next_step(check)}")
    return int(any(finding.level == ERROR for finding in check.findings))


def next_step(check: Check) -> str:
    """What to do after a look at a data set: mend what is wrong, or train."""
    config = shlex.quote(str(check.config.path))
    if any(finding.level == ERROR for finding in check.findings):
        if any(finding.mend for finding in check.findings):
            return f"python -m data_util.check {config} --fix"
        return "mend the errors above and look again with the same command"
    schemes = [scheme for scheme, *_ in check.rows]
    if "1" in schemes:
        return f"python train.py -d {config}" + ' --data_args "paired=True"' * check.paired
    return f"python eval.py -c RUN -d {config} -v {shlex.quote(schemes[0])}" + " --paired" * check.paired


if __name__ == "__main__":
    sys.exit(run(main))
