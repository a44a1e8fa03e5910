"""Reports of an evaluation: what was measured on each pair, as text, CSV and JSON.

They are made from the records of `records.py`.

    python -m data_util.report merge evaluate/RUN-model-STEP*.shard-*.records

joins the records of a sharded evaluation into the report that one job would have written.
"""

import argparse
import csv
import io
import json
import pathlib
import sys

import numpy as np

from cli import run
from data_util.output.records import as_read, difference, read_records, replace_file
from errors import UserError

# Values with one number a label; the rest are one number a pair, or one a landmark.
PER_LABEL = ("dice", "jaccard", "hd95", "surface_distance", "hd95_mm", "surface_distance_mm")
# The lines of the original's report: name there -> value here.
_TEXT_SUMMARY = {
    "Dice score": "dice",
    "Jacc score": "jaccard",
    "Landmark distance": "landmark_distance",
    "Jacobian determinant": "jacobian_std",
}


def is_finished(path, settings):
    """Whether the report `path` (without ending) is there, complete, and was made with these settings."""
    return _settings_of(path) == as_read(settings)


# What may differ between two evaluations of the same thing.
_INCIDENTAL = ("written", "batch", "figures", "versions")


def check_replaceable(path, settings):
    """Check that a report `path` (without ending), if there is one, is of the same evaluation and can be replaced.

    Raises:
        UserError: it was made with other settings.
    """
    before, now = (
        {key: value for key, value in known.items() if key not in _INCIDENTAL}
        for known in (_settings_of(path), as_read(settings))
    )
    if before and (changed := difference(before, now)):
        raise UserError(f"{path}.txt is a report with {changed}; give this one a --name, or remove that one's files")


def _settings_of(path):
    """Settings of the finished report `path`; {} where there is none."""
    file = pathlib.Path(f"{path}.json")
    try:
        return dict(json.loads(file.read_text())["settings"]) if file.exists() else {}
    except (ValueError, KeyError, TypeError):  # whatever that file is, it is not a report
        return {}


def write_report(path, settings, records):
    """Write a finished evaluation, in place of an older report of that name: `path`.txt, `path`.csv and `path`.json.

    Where every cascade was measured, `path`-cascades.csv and a figure `path`-cascades.png too.

    Args:
        path: without ending.
        settings: dict; `labels` (name -> value, or None) names the labels, `pairs` counts the pairs.
        records: the pairs, in any order.

    Raises:
        UserError: pairs are missing or double.
    """
    records = sorted(records, key=lambda record: record["index"])
    _check_complete(records, settings["pairs"])
    replace_file(f"{path}.txt", text_report(records))
    replace_file(f"{path}.csv", csv_report(records, settings))
    if settings["per_cascade"]:
        from data_util.output.figures import cascade_figure

        replace_file(f"{path}-cascades.csv", cascades_csv(records, settings))
        if curves := _cascade_curves(records):
            cascade_figure(f"{path}-cascades.png", curves)
    replace_file(f"{path}.json", json_report(records, settings))  # last: where it is, the report is complete


def _check_complete(records, pairs):
    indices = [record["index"] for record in records]
    if sorted(indices) != list(range(pairs)):
        missing = sorted(set(range(pairs)) - set(indices))
        what = f"pair {missing[0]} and {len(missing) - 1} more are missing" if missing else "some pairs are there twice"
        raise UserError(f"{len(records)} records of {pairs} pairs: {what}; evaluate all, and give every shard once")


def text_report(records):
    """The original's report: a line a pair, then the means, with standard deviations over pairs.

    Columns: fixed, moving, Dice, Jaccard, landmark distance, standard deviation of the Jacobian determinant. As there,
    0.0 stands for what was not measured, and counts as 0 in the mean of the landmark distance.
    """
    table = {name: [_array(record["stages"][-1].get(name)) for record in records] for name in _TEXT_SUMMARY.values()}
    means = {name: np.array([_mean(values) for values in rows], np.float32) for name, rows in table.items()}
    means["landmark_distance"] = np.nan_to_num(means["landmark_distance"])
    lines = []
    for i, record in enumerate(records):
        numbers = (str(np.nan_to_num(means[name][i])) for name in _TEXT_SUMMARY.values())
        lines.append(" ".join([record["fixed"], record["moving"], *numbers]))
    lines.append("Summary")
    for title, name in _TEXT_SUMMARY.items():
        per_label = np.stack(table[name]) if name in PER_LABEL else means[name]
        mean, deviation = _mean(per_label), _deviation(means[name])
        lines.append(f"{title}: {float(np.nan_to_num(mean))} ({float(np.nan_to_num(deviation))})")
    return "\n".join(lines) + "\n"


def headline(records):
    """One line for the terminal: the mean Dice score, before and after where both were measured.

    Before is stage 0 of an evaluation per cascade.
    """
    after = _statistics([_mean(_array(record["stages"][-1].get("dice"))) for record in records])
    if after["count"] == 0:
        return f"Dice score: not measured on {len(records)} pairs"
    before = ""
    if len(records[0]["stages"]) > 1:
        mean = _statistics([_mean(_array(record["stages"][0].get("dice"))) for record in records])["mean"]
        before = f"{mean:.4f} before, "
    return f"Dice score: {before}{after['mean']:.4f} after registration, on {after['count']} pairs"


def csv_report(records, settings):
    """A row a pair (column `label` empty: means over labels and landmarks), followed by a row for each label.

    What was not measured is empty.
    """
    names = _value_names(records)
    rows = [row for record in records for row in _pair_rows(record, -1, names, settings["labels"])]
    return _csv_text([["index", "fixed", "moving", "label", *names], *rows])


def cascades_csv(records, settings):
    """The rows of `csv_report` for every cascade, with its number in front: 0 is before registration, 1 affine."""
    names = _value_names(records)
    rows = [
        [k, *row]
        for record in records
        for k in range(len(record["stages"]))
        for row in _pair_rows(record, k, names, settings["labels"])
    ]
    return _csv_text([["cascade", "index", "fixed", "moving", "label", *names], *rows])


def _pair_rows(record, stage, names, labels):
    values = {name: _array(record["stages"][stage].get(name)) for name in names}
    pair = [record["index"], record["fixed"], record["moving"]]
    yield [*pair, "", *(_cell(_mean(values[name])) for name in names)]
    for k, label in enumerate(labels or ()):
        yield [*pair, label, *(_cell(values[name][k]) if name in PER_LABEL else "" for name in names)]


def json_report(records, settings):
    """Settings, and for each value the mean, standard deviation and number of pairs measured; per label likewise.

    `cascades`, where every one was measured, holds the same for each.
    """
    result = _summary(records, -1, settings["labels"])
    result["summary"]["seconds"] = _statistics([record["seconds"] for record in records])
    report = {"settings": settings, "pairs": len(records), **result}
    if settings["per_cascade"]:
        stages = range(len(records[0]["stages"]))
        report["cascades"] = [{"cascade": k, **_summary(records, k, settings["labels"])} for k in stages]
    return json.dumps(report, indent=2, allow_nan=False) + "\n"


def _summary(records, stage, labels):
    table = {name: [_array(record["stages"][stage].get(name)) for record in records] for name in _value_names(records)}
    return {
        "summary": {name: _statistics([_mean(values) for values in rows]) for name, rows in table.items()},
        "labels": {
            label: {name: _statistics([row[k] for row in rows]) for name, rows in table.items() if name in PER_LABEL}
            for k, label in enumerate(labels or ())
        },
    }


def _cascade_curves(records):
    """Values to draw against the cascade, as far as measured: name -> float32 [cascade, pair], means over labels."""
    stages = range(len(records[0]["stages"]))
    curves = {
        name: np.array([[_mean(_array(record["stages"][k].get(name))) for record in records] for k in stages])
        for name in ("dice", "similarity")
    }
    return {name: values for name, values in curves.items() if np.isfinite(values).all(axis=0).any()}


def merge(paths):
    """Join the records of shards into one report, beside them; returns its path without ending. The records stay.

    Raises:
        UserError: the shards are of different evaluations, pairs are missing or double, or a report of another
            evaluation has that name.
    """
    shards = [(path, *read_records(path)) for path in paths]
    first_path, first, _ = shards[0]
    for path, settings, _ in shards[1:]:
        changed = difference(settings, first)
        if changed:
            raise UserError(
                f"{path} is of another evaluation than {first_path}, with {changed}; merge the shards of one"
            )
    target = pathlib.Path(first_path).parent / first["report"]
    check_replaceable(target, first)
    write_report(target, first, [record for *_, found in shards for record in found])
    return target


def _array(value):
    """A record's value as float32 [n], NaN where not measured."""
    values = value if isinstance(value, list) else [value]
    return np.array([np.nan if v is None else v for v in values], np.float32)


def _mean(values):
    """Mean of what was measured, NaN of nothing, in the arithmetic of the original's report."""
    values = np.asarray(values, np.float32)
    return np.nanmean(values) if not np.isnan(values).all() else np.float32(np.nan)


def _deviation(values):
    return np.nanstd(values) if not np.isnan(values).all() else np.float32(np.nan)


def _statistics(values):
    values = np.array(values, np.float64)
    measured = values[~np.isnan(values)]
    if not measured.size:
        return {"mean": None, "std": None, "count": 0}
    return {"mean": float(measured.mean()), "std": float(measured.std()), "count": int(measured.size)}


def _value_names(records):
    return list(dict.fromkeys(name for record in records for name in record["stages"][-1]))


def _cell(value):
    return "" if np.isnan(value) else str(value)


def _csv_text(rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def main(arguments=None):
    """Run the command `merge FILES`."""
    parser = argparse.ArgumentParser(prog="python -m data_util.report", description="Join the shards of an evaluation.")
    merging = parser.add_subparsers(required=True, metavar="merge").add_parser("merge", help="write the joint report")
    merging.add_argument("files", nargs="+", help="the .records files of every shard")
    print(f"Report: {merge(parser.parse_args(arguments).files)}.txt")


if __name__ == "__main__":
    sys.exit(run(main))
