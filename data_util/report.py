"""Reports of an evaluation: what was measured on each pair, as text, CSV and JSON.

While an evaluation runs, each finished pair is a line of `<report>.records`, so that a stopped one can go on and
several jobs can share one scheme. The first line holds the settings; each further line one pair:

    {"index": 3, "fixed": "yanx_1", "moving": "yanx_4", "seconds": 0.7, "stages": [{"dice": [0.91], ...}]}

`stages` holds the values after every cascade that was measured, the last one being the result. A value is a number, or
a list with one a label or landmark; null is 'not measured'.

    python -m data_util.report merge evaluate/RUN-model-STEP.shard-*.records

joins the records of a sharded evaluation into the report that one job would have written.
"""

import csv
import io
import json
import os
import pathlib
import sys

import numpy as np

from errors import UserError

# Values with one number a label; the rest are one number a pair, or one a landmark.
PER_LABEL = ("dice", "jaccard", "hd95", "surface_distance")
# The lines of the original's report: name there -> value here.
_TEXT_SUMMARY = {
    "Dice score": "dice",
    "Jacc score": "jaccard",
    "Landmark distance": "landmark_distance",
    "Jacobian determinant": "jacobian_std",
}


class Records:
    """The records file of a running evaluation.

    Args:
        path: the file; its folder is made.
        settings: dict that says what is evaluated; a run goes on only with the same settings.
        resume: keep the pairs that are there already; otherwise start anew.

    Attributes:
        done: indices of the pairs that the file holds.

    Raises:
        UserError: `resume`, but the file was written with other settings.
    """

    def __init__(self, path, settings, resume=False):
        self.path = pathlib.Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if resume and self.path.exists():
            before, kept = read_records(self.path)
            changed = [key for key in settings if before.get(key) != settings[key]]
            if changed:
                key = changed[0]
                raise UserError(
                    f"{self.path} was written with {key} {before.get(key)!r}, not {settings[key]!r}; "
                    "give the same flags to go on, or leave out --resume to start anew"
                )
        self.done = {record["index"] for record in kept}
        # A kill may have cut the last line: what is whole is written anew before going on.
        replacement = self.path.with_name(self.path.name + ".new")
        lines = [settings, *kept]
        replacement.write_text("".join(json.dumps(line) + "\n" for line in lines))
        os.replace(replacement, self.path)
        self.file = self.path.open("a")

    def add(self, record):
        """Append one pair; it is on disk when this returns."""
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def close(self):
        """Close the file."""
        self.file.close()


def read_records(path):
    """Settings and whole records of a records file; a cut last line is left out.

    Raises:
        UserError: the file is missing or is not a records file.
    """
    try:
        text = pathlib.Path(path).read_text()
        lines = [json.loads(line) for line in text.split("\n")[:-1]]
        return lines[0], lines[1:]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (ValueError, IndexError) as error:
        raise UserError(f"{path} is not a file of evaluation records; give the .records files of eval.py") from error


def write_report(path, settings, records):
    """Write a finished evaluation: `path`.txt, `path`.csv and `path`.json.

    Args:
        path: without ending.
        settings: dict; `labels` (name -> value, or None) names the labels.
        records: the pairs, in any order.
    """
    records = sorted(records, key=lambda record: record["index"])
    for ending, text in (
        (".txt", text_report(records)),
        (".csv", csv_report(records, settings)),
        (".json", json_report(records, settings)),
    ):
        file = pathlib.Path(f"{path}{ending}")
        new = file.with_name(file.name + ".new")
        new.write_text(text)
        os.replace(new, file)


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


def csv_report(records, settings):
    """A row a pair (column `label` empty: means over labels and landmarks), followed by a row for each label.

    What was not measured is empty.
    """
    names = _value_names(records)
    rows = [["index", "fixed", "moving", "label", *names]]
    for record in records:
        values = record["stages"][-1]
        pair = [record["index"], record["fixed"], record["moving"]]
        rows.append([*pair, "", *(_cell(_mean(_array(values.get(name)))) for name in names)])
        for k, label in enumerate(settings["labels"] or ()):
            cells = (_cell(_array(values.get(name))[k]) if name in PER_LABEL else "" for name in names)
            rows.append([*pair, label, *cells])
    return _csv_text(rows)


def json_report(records, settings):
    """Settings, and for each value the mean, standard deviation and number of pairs measured; per label likewise."""
    names = _value_names(records)
    final = [record["stages"][-1] for record in records]
    summary = {name: _statistics([_mean(_array(values.get(name))) for values in final]) for name in names}
    summary["seconds"] = _statistics([record["seconds"] for record in records])
    labels = {
        label: {
            name: _statistics([_array(values.get(name))[k] for values in final]) for name in names if name in PER_LABEL
        }
        for k, label in enumerate(settings["labels"] or ())
    }
    report = {"settings": settings, "pairs": len(records), "summary": summary, "labels": labels}
    return json.dumps(report, indent=2) + "\n"


def merge(paths):
    """Join the records of shards into one report, beside them; returns its path without ending.

    Raises:
        UserError: the shards are of different evaluations, or pairs are missing or double.
    """
    shards = [(path, *read_records(path)) for path in paths]
    first_path, first, _ = shards[0]
    for path, settings, _ in shards[1:]:
        changed = [key for key in first if settings.get(key) != first[key]]
        if changed:
            raise UserError(
                f"{path} and {first_path} are of different evaluations: {changed[0]} is {settings.get(changed[0])!r} "
                f"and {first[changed[0]]!r}; merge the shards of one evaluation"
            )
    records = [record for *_, found in shards for record in found]
    indices = [record["index"] for record in records]
    if sorted(indices) != list(range(first["pairs"])):
        missing = sorted(set(range(first["pairs"])) - set(indices))
        what = f"pair {missing[0]} and {len(missing) - 1} more are missing" if missing else "some pairs are there twice"
        raise UserError(f"{len(records)} records of {first['pairs']} pairs: {what}; give every shard once, finished")
    target = pathlib.Path(first_path).parent / first["report"]
    write_report(target, first, records)
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


def main(arguments):
    """The command `merge FILES`: exit status 0, or 1 with a message."""
    if len(arguments) < 2 or arguments[0] != "merge":
        print("usage: python -m data_util.report merge FILE.records [FILE.records ...]", file=sys.stderr)
        return 2
    try:
        print(f"Report: {merge(arguments[1:])}.txt")
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
