"""The files of a finished evaluation: `<report>.txt`, `.csv` and `.json`, and those of its cascades."""

import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from checked import parse_json
from checksums import checksum, is_whole, sealed
from data_util.output import tables
from data_util.output.records import Record
from data_util.output.settings import Settings
from errors import UserError, listed
from files import write_text


def is_finished(path: str | os.PathLike, settings: Settings) -> bool:
    """Whether the report `path` (without ending) was made with these settings, and all its files are there and whole.

    Where only files are missing or damaged, it says which.
    """
    file = pathlib.Path(f"{path}.json")
    try:
        known, content = _read_report(file)
    except UserError as error:
        print(f"{error}: evaluated again", file=sys.stderr)
        return False
    if known is None or known.difference(settings) is not None:
        return False
    if {"sum", "files"} & set(content) and not is_whole(file.read_bytes().removesuffix(b"\n")):
        faulty = [file.name]
    else:  # old reports know their files by name alone
        endings = (".txt", ".csv", *(("-cascades.csv",) if settings.per_cascade else ()))
        sums = content.get("files", dict.fromkeys(endings))
        beside = {pathlib.Path(f"{path}{ending}"): known_sum for ending, known_sum in sums.items()}
        faulty = [
            other.name
            for other, known_sum in beside.items()
            if not other.is_file() or known_sum not in (None, checksum(other.read_bytes()))
        ]
    if faulty:
        print(f"{file.parent}: missing or changed: {listed(faulty)}; evaluated again", file=sys.stderr)
    return not faulty


def check_replaceable(path: str | os.PathLike, settings: Settings) -> None:
    """Check that a report `path` (without ending), if there is one, is of the same evaluation and can be replaced.

    Raises:
        UserError: it was made with other settings.
    """
    try:
        known, _ = _read_report(pathlib.Path(f"{path}.json"))
    except UserError as error:
        print(f"{error}: replaced", file=sys.stderr)
        return
    if known is not None and (changed := known.difference(settings, incidental=False)):
        raise UserError(f"{path}.txt is a report with {changed}; give this one a --name, or remove that one's files")


def _read_report(file: pathlib.Path) -> tuple[Settings | None, dict[str, Any]]:
    """Settings and content of a finished report's JSON; (None, {}) where there is none.

    Raises:
        UserError: it is damaged.
    """
    if not file.exists():
        return None, {}
    remedy = "it is no report, or damaged"
    content = parse_json(file.read_bytes(), str(file), remedy)
    of_report = content.get("settings") if isinstance(content, dict) else None
    return Settings.from_dict(of_report, f"{file}: settings", remedy), content


def write_report(path: str | os.PathLike, settings: Settings, records: Sequence[Record]) -> None:
    """Write a finished evaluation, in place of an older report of that name: `path`.txt, `path`.csv and `path`.json.

    Where every cascade was measured, `path`-cascades.csv and a figure `path`-cascades.png too.

    Args:
        path: without ending.
        settings: what was evaluated.
        records: the pairs, in any order.

    Raises:
        UserError: pairs are missing or double.
    """
    records = sorted(records, key=lambda record: record.index)
    _check_complete(records, settings)
    texts = {".txt": tables.text_report(records, settings), ".csv": tables.csv_report(records, settings)}
    if settings.per_cascade:
        texts["-cascades.csv"] = tables.cascades_csv(records, settings)
    for ending, text in texts.items():
        write_text(f"{path}{ending}", text)
    endings = list(texts)
    if settings.per_cascade and (curves := tables.cascade_curves(records)):
        from data_util.output.figures import cascade_figure

        cascade_figure(f"{path}-cascades.png", curves)
        endings.append("-cascades.png")
    files = {ending: checksum(pathlib.Path(f"{path}{ending}").read_bytes()) for ending in endings}
    report = {**tables.json_report(records, settings), "files": files}
    write_text(f"{path}.json", sealed(report, indent=2) + "\n")  # last: where it is, the report is complete


def _check_complete(records: Sequence[Record], settings: Settings) -> None:
    """Raise a UserError unless each pair is there once, with as many cascades as the others."""
    indices, pairs = {record.index for record in records}, settings.pairs
    if len(indices) < pairs:
        missing = next(index for index in range(pairs) if index not in indices)
        what = f"pair {missing} and {pairs - len(indices) - 1} more are missing"
        raise UserError(f"{len(records)} records of {pairs} pairs: {what}; evaluate all, and give every shard once")
    if len(records) > pairs:
        raise UserError(f"{len(records)} records of {pairs} pairs: some are there twice; give every shard once")
    cascades = {len(record.stages): record for record in records}
    if len(cascades) > 1:
        counts = ", ".join(f"{count} of {record.fixed} <- {record.moving}" for count, record in cascades.items())
        raise UserError(f"pairs have different numbers of cascades ({counts}); evaluate all again")
