"""The metrics of `registry.METRICS` applied to a scene, and what holds for all: what cannot be measured is NaN."""

from collections.abc import Iterable, Mapping

import numpy as np
import tensorflow as tf

from errors import UserError

from .label_maps import NO_LABEL
from .registry import Metric
from .scene import PairScene, Scene

# Label values of structures in a segmentation (int32): 0 is the background.
_LABEL_RANGE = range(1, 2**31)


def measurable_labels(labels: Iterable[int] | None) -> tuple[int, ...] | None:
    """Label values as `Scene.labels`: one that no structure can have becomes a value that no scan has.

    >>> measurable_labels([4, 0, 2**40])
    (4, -2, -2)
    """
    if labels is None:
        return None
    return tuple(label if label in _LABEL_RANGE else NO_LABEL for label in labels)


def measure_in_graph(rows: Mapping[str, Metric], scene: Scene) -> dict[str, tf.Tensor]:
    """Values of graph metrics for a batch: name -> float32 [B], or [B, number of labels or landmarks].

    All values of a pair of which an image or the flow is not finite are NaN, and so are those of labels that cannot
    be measured.

    Args:
        rows: the metrics by name.
        scene: what they look at.

    Raises:
        UserError: a metric gives a value that its row does not name, or one of another shape.
    """
    values = {}
    finite = scene.is_finite, scene.is_finite[:, None]
    for metric, row in rows.items():
        for name, value in row.load()(scene).items():
            count = _count(metric, row, name, scene.labels, scene.batch["fixed_points"].shape[1])
            if value.shape.rank != (1 if count is None else 2) or (count is not None and value.shape[1] != count):
                raise _wrong_shape(metric, row, name, tuple(value.shape)[1:])
            measured = finite[value.shape.rank - 1]
            if row.values[name].per == "label":
                measured &= tf.constant(_is_measurable(scene.labels))
            values[name] = tf.where(measured, tf.cast(value, tf.float32), float("nan"))
    return values


def measure_in_numpy(
    rows: Mapping[str, Metric], pair: PairScene, landmarks: int, is_finite: bool
) -> dict[str, np.ndarray]:
    """Values of NumPy metrics for a pair: name -> float32, a scalar or [number of labels or landmarks].

    Args:
        rows: the metrics by name.
        pair: what they look at.
        landmarks: number of landmarks in the batch.
        is_finite: whether the images and the flow are finite; if not, all values are NaN.

    Raises:
        UserError: as in `measure_in_graph`.
    """
    values = {}
    for metric, row in rows.items():
        given = row.load()(pair) if is_finite else dict.fromkeys(row.values)
        for name, value in given.items():
            count = _count(metric, row, name, pair.labels, landmarks)
            shape = () if count is None else (count,)
            array = np.full(shape, np.nan, np.float32) if value is None else np.array(value, np.float32)
            if array.shape != shape:
                raise _wrong_shape(metric, row, name, array.shape)
            if row.values[name].per == "label":
                array[~np.array(_is_measurable(pair.labels))] = np.nan
            values[name] = array
    return values


def _is_measurable(labels: Iterable[int] | None) -> list[bool]:
    return [True] if labels is None else [label != NO_LABEL for label in labels]


def _count(metric: str, row: Metric, name: str, labels: tuple[int, ...] | None, landmarks: int) -> int | None:
    """How many numbers a value has for each pair; None where it is a single one."""
    if name not in row.values:
        raise UserError(f"metric {metric!r} gives {name!r}, which its row does not name; add it to the row's values")
    return {"label": 1 if labels is None else len(labels), "landmark": landmarks}.get(row.values[name].per)


def _wrong_shape(metric: str, row: Metric, name: str, shape: tuple) -> UserError:
    per = row.values[name].per
    return UserError(f"metric {metric!r}: {name!r} has shape {shape} for a pair; its row says one number per {per}")
