"""Scores of displacement fields for a task of the Learn2Reg challenge: of each pair, and over pairs."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_util.challenge import Case, Pair, Task, read_grid
from data_util.output import challenge_metrics as metrics
from data_util.output.challenge_fields import read_field, read_label_map
from data_util.scans.frame import Frame
from data_util.scans.points import read_points
from errors import UserError
from files import write_text

# In voxels, as the challenge's landmarks are: the identity as a frame.
VOXELS = Frame((1, 1, 1), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0))
PER_LABEL = ("dice", "hd95")
LOWER_IS_WORSE = 0.3  # the quantile that the challenge reports of Dice and HD95; of the others 1 - this


@dataclass(frozen=True)
class PairScores:
    """What was measured on a pair.

    Attributes:
        fixed: id of the fixed image.
        moving: id of the moving image.
        values: name -> value, those of labels as means over the labels measured; NaN where nothing was.
        labels: "dice" and "hd95" -> name of a label -> value.
    """

    fixed: str
    moving: str
    values: dict[str, float]
    labels: dict[str, dict[str, float]]


def score_pair(task: Task, pair: Pair, folder: Path) -> PairScores:
    """Score the displacement field of a pair.

    `dice` and `hd95` (voxels) are measured where both images have labels, `tre_KIND` (mm) where both have landmarks of
    that kind, `sdlogj` always and `sdlogj_mask` within the fixed image's mask. A label that one of the two images lacks
    is not measured.

    Args:
        task: the task.
        pair: the pair, of its `pairs`.
        folder: where the fields are.

    Raises:
        UserError: a file is missing, damaged or of another size, or landmarks do not correspond.
    """
    fixed, moving = (task.cases[scan] for scan in pair)
    grid, moving_grid = read_grid(fixed.image), read_grid(moving.image)
    field = read_field(folder, task.field_names(pair), grid)
    values, labels = {}, {}
    if fixed.label is not None and moving.label is not None:
        maps = read_label_map(fixed.label, grid, "label map"), read_label_map(moving.label, moving_grid, "label map")
        labels = _label_scores(*maps, field, task.labels)
        values = {name: _mean(list(labels[name].values())) for name in PER_LABEL}
    for kind, errors in _landmark_errors(fixed, moving, field, moving_grid.spacing).items():
        values[f"tre_{kind}"] = _mean(errors.tolist())
    log_determinant = metrics.log_jacobian(field)
    values["sdlogj"] = metrics.sdlogj(log_determinant)
    if fixed.mask is not None:
        values["sdlogj_mask"] = metrics.sdlogj(log_determinant, read_label_map(fixed.mask, grid, "mask"))
    return PairScores(fixed.id, moving.id, values, labels)


def _label_scores(
    fixed: np.ndarray, moving: np.ndarray, field: np.ndarray, table: Mapping[str, int]
) -> dict[str, dict[str, float]]:
    """Dice and HD95 of each label; those of the table, or else those that are in either map."""
    present = set(np.unique(fixed).tolist()), set(np.unique(moving).tolist())
    wanted = dict(table) or {f"{value:g}": value for value in sorted(present[0] | present[1]) if value != 0}
    warped = metrics.warp_labels(moving, field)
    scores: dict[str, dict[str, float]] = {name: {} for name in PER_LABEL}
    for label, value in wanted.items():
        masks = fixed == value, warped == value
        measured = value in present[0] and value in present[1]
        scores["dice"][label] = metrics.dice(*masks) if measured else np.nan
        scores["hd95"][label] = metrics.hd95(*masks) if measured else np.nan
    return scores


def _landmark_errors(fixed: Case, moving: Case, field: np.ndarray, spacing: np.ndarray) -> dict[str, np.ndarray]:
    """Distances in mm of the landmarks of each kind that both images have."""
    errors = {}
    for kind in sorted(set(fixed.landmarks) & set(moving.landmarks)):
        tables = fixed.landmarks[kind], moving.landmarks[kind]
        points = [read_points(table, "voxel", VOXELS) for table in tables]
        if len(points[0]) != len(points[1]):
            raise UserError(
                f"{tables[0]} has {len(points[0])} landmarks and {tables[1]} {len(points[1])}; both must have the "
                "same ones, row by row"
            )
        errors[kind] = metrics.landmark_errors(field, points[0], points[1], spacing)
    return errors


def summary(scores: Sequence[PairScores]) -> dict[str, dict[str, float]]:
    """Of each value the mean, standard deviation and quantile over pairs, and the number of pairs measured.

    The quantile is the one that the challenge reports: at 0.3 of Dice and HD95, at 0.7 of the others.
    """
    names = list(dict.fromkeys(name for score in scores for name in score.values))
    return {name: _statistics([score.values.get(name, np.nan) for score in scores], name) for name in names}


def label_summary(scores: Sequence[PairScores]) -> dict[str, dict[str, dict[str, float]]]:
    """The same of each label: label -> value's name -> statistics."""
    labels = dict.fromkeys(label for score in scores for label in score.labels.get("dice", {}))
    return {
        label: {
            name: _statistics([score.labels.get(name, {}).get(label, np.nan) for score in scores], name)
            for name in PER_LABEL
        }
        for label in labels
    }


def _statistics(values: Sequence[float], name: str) -> dict[str, float]:
    measured = np.array([value for value in values if not np.isnan(value)])
    if not measured.size:
        return {"mean": np.nan, "std": np.nan, "quantile": np.nan, "count": 0}
    share = LOWER_IS_WORSE if name in PER_LABEL else 1 - LOWER_IS_WORSE
    with np.errstate(invalid="ignore"):  # of infinite distances
        mean, std, quantile = measured.mean(), measured.std(), np.quantile(measured, share)
    return {"mean": float(mean), "std": float(std), "quantile": float(quantile), "count": int(measured.size)}


def _mean(values: Sequence[float]) -> float:
    measured = [value for value in values if not np.isnan(value)]
    return float(np.mean(measured)) if measured else np.nan


def table_text(scores: Sequence[PairScores]) -> str:
    """The summary as a table for the terminal."""
    rows: list[tuple[str, ...]] = [("value", "mean", "std", "30 %", "pairs")]
    for name, entry in summary(scores).items():
        rows.append((name, *(f"{entry[key]:.4f}" for key in ("mean", "std", "quantile")), str(entry["count"])))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def csv_text(scores: Sequence[PairScores]) -> str:
    """One row per pair (column `label` empty), followed by one row per label; what was not measured is empty."""
    names = list(dict.fromkeys(name for score in scores for name in score.values))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["fixed", "moving", "label", *names])
    for score in scores:
        rows = {"": score.values} | {
            label: {name: score.labels[name][label] for name in PER_LABEL} for label in score.labels.get("dice", {})
        }
        for label, values in rows.items():
            cells = [values.get(name, np.nan) for name in names]
            writer.writerow([score.fixed, score.moving, label, *("" if np.isnan(v) else repr(v) for v in cells)])
    return text.getvalue()


def write_scores(scores: Sequence[PairScores], task: Task, subset: str, prefix: Path) -> None:
    """Write PREFIX.csv, as `csv_text`, and PREFIX.json: what was scored, the summaries, and the values of each pair.

    In JSON what was not measured is null, and an infinite distance the text "inf".

    Raises:
        UserError: they cannot be written.
    """
    content = {
        "task": task.name,
        "subset": subset,
        "pairs": len(scores),
        "summary": summary(scores),
        "labels": label_summary(scores),
        "cases": [
            {"fixed": score.fixed, "moving": score.moving, **score.values, "labels": score.labels} for score in scores
        ],
    }
    write_text(f"{prefix}.csv", csv_text(scores))
    write_text(f"{prefix}.json", json.dumps(_plain(content), indent=2, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None if np.isnan(value) else "inf"
    return value
