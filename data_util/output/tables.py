"""Tables of what was measured on each pair: the texts of the report's files, and what is said on the terminal."""

import csv
import dataclasses
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from data_util.output.records import Record
from data_util.output.settings import Settings

# The lines of the original's report: name there -> value here.
_TEXT_SUMMARY = {
    "Dice score": "dice",
    "Jacc score": "jaccard",
    "Landmark distance": "landmark_distance",
    "Jacobian determinant": "jacobian_std",
}
_NOT_MEASURED = np.array(np.nan, np.float32)
# Two computations of the same number may differ by so much, relative to its size.
_ROUNDING = 1e-5


def text_report(records: Sequence[Record], settings: Settings) -> str:
    """The original's report: a line for each pair, then the means, with standard deviations over pairs.

    Columns: fixed, moving, Dice, Jaccard, landmark distance, standard deviation of the Jacobian determinant. As there,
    0.0 stands for what was not measured, and counts as 0 in the mean of the landmark distance.
    """
    table = {name: [record.values.get(name, _NOT_MEASURED) for record in records] for name in _TEXT_SUMMARY.values()}
    means = {name: np.array([_mean(values) for values in rows], np.float32) for name, rows in table.items()}
    means["landmark_distance"] = np.nan_to_num(means["landmark_distance"])
    lines = []
    for i, record in enumerate(records):
        numbers = (str(np.nan_to_num(means[name][i])) for name in _TEXT_SUMMARY.values())
        lines.append(" ".join([record.fixed, record.moving, *numbers]))
    lines.append("Summary")
    for title, name in _TEXT_SUMMARY.items():
        per_label = (
            np.concatenate([np.atleast_1d(values) for values in table[name]])
            if settings.per(name) == "label"
            else means[name]
        )
        mean, deviation = _mean(per_label), _deviation(means[name])
        lines.append(f"{title}: {float(np.nan_to_num(mean))} ({float(np.nan_to_num(deviation))})")
    return "\n".join(lines) + "\n"


def csv_report(records: Sequence[Record], settings: Settings) -> str:
    """One row per pair (column `label` empty: means over labels and landmarks), followed by one row per label.

    What was not measured is empty. The values before registration are in columns `<name>_before`, the last ones.
    """
    results = [_with_before(record) for record in records]
    names = _value_names(results)
    rows = [row for record in results for row in _pair_rows(record, -1, names, settings)]
    return _csv_text([["index", "fixed", "moving", "label", *names], *rows])


def cascades_csv(records: Sequence[Record], settings: Settings) -> str:
    """The rows of `csv_report` for every cascade, with its number in front: 0 is before registration, 1 affine."""
    names = _value_names(records)
    rows = [
        [k, *row]
        for record in records
        for k in range(len(record.stages))
        for row in _pair_rows(record, k, names, settings)
    ]
    return _csv_text([["cascade", "index", "fixed", "moving", "label", *names], *rows])


def json_report(records: Sequence[Record], settings: Settings) -> dict[str, Any]:
    """Settings, and for each value the mean, standard deviation and number of pairs measured; per label likewise.

    `cascades`, where every one was measured, holds the same for each; `worse` names the values that got worse.
    """
    result = _summary([_with_before(record) for record in records], -1, settings)
    result["summary"]["seconds"] = _statistics([record.seconds for record in records])
    report: dict[str, Any] = {"settings": settings.to_dict(), "pairs": len(records), **result}
    if settings.per_cascade:
        stages = range(len(records[0].stages))
        report["cascades"] = [{"cascade": k, **_summary(records, k, settings)} for k in stages]
    report["worse"] = [
        {"value": c.name, "before": c.before, "after": c.after, "pairs": c.worse, "of": c.pairs}
        for c in compare(records, settings)
        if c.worse
    ]
    return report


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A value before and after registration, over the pairs where both were measured.

    Attributes:
        name: of the value.
        unit: its unit, or ''.
        before, after: means over pairs.
        got_worse: whether the mean did.
        pairs: how many pairs there are.
        worse: on how many of them the value got worse.
        worst: the pair on which it got worse by most, as "fixed <- moving", with its values; '' where there is none.
    """

    name: str
    unit: str
    before: float
    after: float
    got_worse: bool
    pairs: int
    worse: int
    worst: str


def compare(records: Sequence[Record], settings: Settings) -> list[Comparison]:
    """The values that can get better or worse, as far as they were measured both before and after registration."""
    found = []
    for name, value in settings.values.items():
        table = [
            (record, _mean(record.before[name]), _mean(record.values[name]))
            for record in records
            if name in record.before and name in record.values
        ]
        table = [row for row in table if not np.isnan(row[1:]).any()]
        if value.better is None or not table:
            continue
        before, after = np.array([row[1:] for row in table], np.float64).T
        sign = 1 if value.better == "higher" else -1

        def losses(before: Any, after: Any, sign: int = sign) -> Any:
            return np.maximum(sign * (before - after) - _ROUNDING * np.abs(before), 0)

        loss = losses(before, after)
        record, worst = table[int(loss.argmax())][0], int(loss.argmax())
        found.append(
            Comparison(
                name,
                value.unit,
                float(before.mean()),
                float(after.mean()),
                bool(losses(before.mean(), after.mean()) > 0),
                len(table),
                int((loss > 0).sum()),
                f"{record.fixed} <- {record.moving} ({before[worst]:.4f} -> {after[worst]:.4f})" if loss.any() else "",
            )
        )
    return found


def headlines(records: Sequence[Record], settings: Settings) -> list[str]:
    """Lines for the terminal: the mean Dice score and each value that can get better, before and after."""
    lines = []
    for c in compare(records, settings):
        title, unit = ("Dice score", "") if c.name == "dice" else (c.name, f" {c.unit}" if c.unit else "")
        lines.append(
            f"{title}: {c.before:.4f}{unit} before, {c.after:.4f}{unit} after registration, on {c.pairs} pairs"
        )
    if not lines or not lines[0].startswith("Dice score"):
        dice = _statistics([_mean(record.values.get("dice", _NOT_MEASURED)) for record in records])
        mean = f"{dice['mean']:.4f} after registration, on {dice['count']}" if dice["count"] else "not measured on"
        lines.insert(0, f"Dice score: {mean} {'pairs' if dice['count'] else f'{len(records)} pairs'}")
    return lines


def warnings(records: Sequence[Record], settings: Settings) -> list[str]:
    """Lines about pairs whose affine map was not found, and values that got worse: in the mean, or on some pairs."""
    lost = [f"{r.fixed} and {r.moving}" for r in records if not r.values.get("affine_found", 1)]
    unmoved = [f"No affine map was found for {len(lost)} of {len(records)} pairs, such as {lost[0]}"] if lost else []
    return unmoved + [
        f"Worse than before registration: {c.name} "
        + (f"{c.before:.4f} -> {c.after:.4f} in the mean, " if c.got_worse else "")
        + f"on {c.worse} of {c.pairs} pairs, most on {c.worst}"
        for c in compare(records, settings)
        if c.worse
    ]


def cascade_curves(records: Sequence[Record]) -> dict[str, np.ndarray]:
    """Values to draw against the cascade, as far as measured: name -> float32 [cascade, pair], means over labels."""
    stages = range(len(records[0].stages))
    curves = {
        name: np.array([[_mean(record.stages[k].get(name, _NOT_MEASURED)) for record in records] for k in stages])
        for name in ("dice", "similarity")
    }
    return {name: values for name, values in curves.items() if np.isfinite(values).all(axis=0).any()}


def _with_before(record: Record) -> Record:
    """A record of the result alone that has the values before registration among its values, as `<name>_before`."""
    before = {f"{name}_before": value for name, value in record.before.items()}
    return dataclasses.replace(record, stages=({**record.values, **{**before, **record.values}},))


def _pair_rows(record: Record, stage: int, names: Sequence[str], settings: Settings) -> Iterator[list]:
    values = {name: record.stages[stage].get(name, _NOT_MEASURED) for name in names}
    pair = [record.index, record.fixed, record.moving]
    yield [*pair, "", *(_cell(_mean(values[name])) for name in names)]
    for k, label in enumerate(settings.labels or ()):
        yield [
            *pair,
            label,
            *(_cell(_of_label(values[name], k)) if _per_label(name, settings) else "" for name in names),
        ]


def _summary(records: Sequence[Record], stage: int, settings: Settings) -> dict[str, Any]:
    table = {
        name: [record.stages[stage].get(name, _NOT_MEASURED) for record in records] for name in _value_names(records)
    }
    return {
        "summary": {name: _statistics([_mean(values) for values in rows]) for name, rows in table.items()},
        "labels": {
            label: {
                name: _statistics([_of_label(row, k) for row in rows])
                for name, rows in table.items()
                if _per_label(name, settings)
            }
            for k, label in enumerate(settings.labels or ())
        },
    }


def _per_label(name: str, settings: Settings) -> bool:
    return settings.per(name) == "label" or settings.per(name.removesuffix("_before")) == "label"


def _of_label(values: np.ndarray, k: int) -> Any:
    """The number of label k; NaN where the value is missing as a whole."""
    return values[k] if values.ndim else values[()]


def _mean(values: np.ndarray) -> Any:
    """Mean of what was measured, NaN of nothing, in the arithmetic of the original's report."""
    values = np.asarray(values, np.float32)
    return np.nanmean(values) if not np.isnan(values).all() else np.float32(np.nan)


def _deviation(values: np.ndarray) -> Any:
    return np.nanstd(values) if not np.isnan(values).all() else np.float32(np.nan)


def _statistics(values: Iterable[float]) -> dict[str, Any]:
    numbers = np.array(list(values), np.float64)
    measured = numbers[~np.isnan(numbers)]
    if not measured.size:
        return {"mean": None, "std": None, "count": 0}
    return {"mean": float(measured.mean()), "std": float(measured.std()), "count": int(measured.size)}


def _value_names(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(name for record in records for name in record.values))


def _cell(value: np.float32) -> str:
    return "" if np.isnan(value) else str(value)


def _csv_text(rows: Iterable[Sequence]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
