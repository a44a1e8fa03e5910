"""Join the records of a sharded evaluation into the report that one job would have written.

python -m data_util.report merge evaluate/RUN-model-STEP*.shard-*.records
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence

from cli import run
from data_util.output.records import Record, read_records
from data_util.output.report_files import check_replaceable, write_report
from data_util.output.settings import Settings
from errors import UserError


def merge(paths: Sequence[str | os.PathLike]) -> pathlib.Path:
    """Join the records of shards into one report, beside them. The records stay.

    Returns:
        The report's path, without ending.

    Raises:
        UserError: a file is damaged, the shards are of different evaluations, pairs are missing or double, or a
            report of another evaluation has that name.
    """
    shards = [(os.fspath(path), *read_records(path)) for path in paths]
    first_path, first, _ = shards[0]
    for path, settings, _ in shards[1:]:
        changed = settings.difference(first)
        if changed:
            raise UserError(
                f"{path} is of another evaluation than {first_path}, with {changed}; merge the shards of one"
            )
    _check_shared(shards)
    target = pathlib.Path(first_path).parent / first.report
    check_replaceable(target, first)
    write_report(target, first, [record for *_, records in shards for record in records])
    return target


def _check_shared(shards: Sequence[tuple[str, Settings, Sequence[Record]]]) -> None:
    """Raise a UserError where two shards hold the same pair."""
    seen: dict[int, tuple[str, Record]] = {}
    for path, _, records in shards:
        for record in records:
            if record.index in seen:
                other, there = seen[record.index]
                same = {**record.to_dict(), "seconds": 0} == {**there.to_dict(), "seconds": 0}
                how = "; give every shard once" if same else ", with other values; evaluate one of them again"
                raise UserError(f"pair {record.index} is in {other} and in {path}{how}")
            seen[record.index] = path, record


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command `merge FILES`."""
    parser = argparse.ArgumentParser(prog="python -m data_util.report", description="Join the shards of an evaluation.")
    merging = parser.add_subparsers(required=True, metavar="merge").add_parser("merge", help="write the joint report")
    merging.add_argument("files", nargs="+", help="the .records files of every shard")
    print(f"Report: {merge(parser.parse_args(arguments).files)}.txt")


if __name__ == "__main__":
    sys.exit(run(main))
