"""The files of a finished evaluation: `<report>.txt`, `.csv` and `.json`, and those of its cascades."""

import json
import os
import pathlib
from collections.abc import Sequence

from data_util.output import tables
from data_util.output.records import Record, replace_file
from data_util.output.settings import Settings
from errors import UserError


def is_finished(path: str | os.PathLike, settings: Settings) -> bool:
    """Whether the report `path` (without ending) is there, complete, and was made with these settings."""
    known = _settings_of(path)
    return known is not None and known.difference(settings) is None


def check_replaceable(path: str | os.PathLike, settings: Settings) -> None:
    """Check that a report `path` (without ending), if there is one, is of the same evaluation and can be replaced.

    Raises:
        UserError: it was made with other settings.
    """
    known = _settings_of(path)
    if known is not None and (changed := known.difference(settings, incidental=False)):
        raise UserError(f"{path}.txt is a report with {changed}; give this one a --name, or remove that one's files")


def _settings_of(path: str | os.PathLike) -> Settings | None:
    """Settings of the finished report `path`; None where there is none."""
    file = pathlib.Path(f"{path}.json")
    try:
        return Settings.from_dict(json.loads(file.read_text())["settings"]) if file.exists() else None
    except (ValueError, KeyError, TypeError, AttributeError):  # whatever that file is, it is not a report
        return None


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
    _check_complete(records, settings.pairs)
    replace_file(f"{path}.txt", tables.text_report(records, settings))
    replace_file(f"{path}.csv", tables.csv_report(records, settings))
    if settings.per_cascade:
        from data_util.output.figures import cascade_figure

        replace_file(f"{path}-cascades.csv", tables.cascades_csv(records, settings))
        if curves := tables.cascade_curves(records):
            cascade_figure(f"{path}-cascades.png", curves)
    replace_file(f"{path}.json", tables.json_report(records, settings))  # last: where it is, the report is complete


def _check_complete(records: Sequence[Record], pairs: int) -> None:
    indices = [record.index for record in records]
    if sorted(indices) != list(range(pairs)):
        missing = sorted(set(range(pairs)) - set(indices))
        what = f"pair {missing[0]} and {len(missing) - 1} more are missing" if missing else "some pairs are there twice"
        raise UserError(f"{len(records)} records of {pairs} pairs: {what}; evaluate all, and give every shard once")
