"""Metrics of a registration: pure functions, one value (or one a label or landmark) a pair. NaN is 'not measured'.

Formulas, units and empty cases of every value are in docs/metrics.md.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import tensorflow as tf

from .kernels import fast_volume_sum, neighbours, size_of, xla_kernel
from .label_maps import NO_LABEL, has_labels, label_numbers
from .spatial_transformer import sample_at_points

# A folded voxel has a determinant of 0 or less, which has no logarithm: this value is taken instead.
LEAST_DETERMINANT = 1e-9


def overlap(fixed: tf.Tensor, warped: tf.Tensor, labels: Sequence[int] | None = None) -> tuple[tf.Tensor, tf.Tensor]:
    """Dice and Jaccard of two label maps.

    Args:
        fixed, warped: int32 [B, X, Y, Z, 1], as of `label_maps.label_map` and `label_maps.carry_labels`.
        labels: the K label values to measure, or None for a mask (K = 1).

    Returns:
        dice, jaccard: float32 [B, K]. NaN where a segmentation is missing or a label is in neither image.
    """
    counts = _label_counts(fixed, warped, [1] if labels is None else labels)
    fixed_count, warped_count, both = (tf.cast(n, tf.float32) for n in counts)
    union = fixed_count + warped_count - both
    measured = (has_labels(fixed) & has_labels(warped))[:, None] & (union > 0)
    dice = tf.math.divide_no_nan(2.0 * both, fixed_count + warped_count)
    jaccard = tf.math.divide_no_nan(both, union)
    return tf.where(measured, dice, float("nan")), tf.where(measured, jaccard, float("nan"))


def _label_counts(fixed: tf.Tensor, warped: tf.Tensor, labels: Sequence[int]) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Voxels of each label in two label maps and in both at once: three int32 [B, K]."""
    values = sorted(set(labels))
    if len(values) == 1:
        counts = _count_of_one(fixed, warped, values[0] if values[0] >= 0 else NO_LABEL)
        return tuple(count if len(labels) == 1 else tf.tile(count, [1, len(labels)]) for count in counts)
    order = [values.index(label) + 1 for label in labels]
    if values[-1] >= _LONGEST_TABLE:
        fixed, warped = label_numbers(fixed, values), label_numbers(warped, values)
        values = list(range(1, len(values) + 1))
    table = np.zeros(max(values[-1], 0) + 2, np.int32)  # the last one is for all values that are not in the table
    for place, value in enumerate(values, start=1):
        if value >= 0:  # no scan has another
            table[value] = place
    n = len(values) + 1
    # All places are below n * n, which tf.math.bincount would make sure of in more time than it counts.
    place = _joint_place(fixed, warped, table, n)
    pairs = tf.raw_ops.DenseBincount(input=place, size=n * n, weights=tf.constant([], tf.int32))
    pairs = tf.reshape(pairs, [-1, n, n])
    counts = tf.reduce_sum(pairs, 2), tf.reduce_sum(pairs, 1), tf.linalg.diag_part(pairs)
    return tuple(tf.gather(count, order, axis=1) for count in counts)  # type: ignore[return-value]


@xla_kernel
def _count_of_one(fixed: tf.Tensor, warped: tf.Tensor, label: int) -> list[tf.Tensor]:
    """Voxels of one label in two label maps and in both at once: three int32 [B, 1].

    The three are added along z as parts of one number, in half the time that a count of places takes.
    """
    here, there = (tf.cast(label_map == label, tf.int64) for label_map in (fixed, warped))
    lines = tf.reduce_sum(here + _LONGEST * there + _LONGEST**2 * here * there, 3)
    parts = [lines // _LONGEST**k % _LONGEST for k in range(3)]
    return [tf.cast(tf.reduce_sum(part, [1, 2]), tf.int32) for part in parts]


_LONGEST = 2**21  # above the length of any axis; its third power still fits

# Label values from here on are not looked up in a table.
_LONGEST_TABLE = 2**16


@xla_kernel
def _joint_place(fixed: tf.Tensor, warped: tf.Tensor, table: tf.Tensor, n: int) -> tf.Tensor:
    """n i + j for every voxel, where a table gives i for its label in one map and j for that in the other: [B, XYZ]."""
    last = table.shape[0] - 1
    i, j = (tf.gather(table, tf.where((seg < 0) | (seg > last), last, seg)) for seg in (fixed, warped))
    return tf.reshape(n * i + j, [tf.shape(fixed)[0], -1])


def landmark_offsets(fixed_points: tf.Tensor, moving_points: tf.Tensor, flow: tf.Tensor) -> tf.Tensor:
    """From each moving landmark to the fixed one carried to p + flow(p): float32 [B, L, 3], in voxels.

    NaN marks a landmark that either scan lacks.

    Args:
        fixed_points, moving_points: float32 [B, L, 3], in voxels of their own scan, NaN where missing.
        flow: float32 [B, X, Y, Z, 3], in voxels.
    """
    if fixed_points.shape[1] == 0:
        return fixed_points
    missing = tf.reduce_any(tf.math.is_nan(fixed_points), axis=-1, keepdims=True)
    points = tf.where(missing, 0.0, fixed_points)
    return fixed_points + sample_at_points(flow, points) - moving_points


def landmark_distances(offsets: tf.Tensor, spacing: tf.Tensor | None = None) -> tf.Tensor:
    """Lengths of `landmark_offsets` [B, L, 3]: float32 [B, L].

    Args:
        offsets: in voxels.
        spacing: float32 [B, 3], mm a voxel of the moving scan, for distances in mm; None for distances in voxels.
    """
    return tf.norm(offsets if spacing is None else offsets * spacing[:, None], axis=-1)


def _determinant(slopes: Iterable[Sequence[tf.Tensor]]) -> tf.Tensor:
    """det(I + J) [...] from the slopes of the three parts of a flow, each along x, y and z."""
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = slopes
    xx, yy, zz = 1.0 + xx, 1.0 + yy, 1.0 + zz
    return xx * (yy * zz - zy * yz) - yx * (xy * zz - zy * xz) + zx * (xy * yz - yy * xz)


def _mean(volume: tf.Tensor) -> tf.Tensor:
    """Mean of each volume [B, X, Y, Z]: [B]; NaN where it has no voxel."""
    return fast_volume_sum(volume) / size_of(volume)


def _deviation(volume: tf.Tensor) -> tf.Tensor:
    """Standard deviation of each volume [B, X, Y, Z]: [B]."""
    return tf.sqrt(_mean(_squared_difference(volume, _mean(volume))))


@xla_kernel
def _squared_difference(volume: tf.Tensor, mean: tf.Tensor) -> tf.Tensor:
    return tf.square(volume - mean[:, None, None, None])


def jacobian_std(flow: tf.Tensor) -> tf.Tensor:
    """Standard deviation of det(I + forward differences of the flow) over the volume: float32 [B].

    The determinant is taken where all three differences exist: (X - 1)(Y - 1)(Z - 1) voxels.
    """
    return _deviation(_forward_determinant(flow))


@xla_kernel
def _forward_determinant(flow: tf.Tensor) -> tf.Tensor:
    here = flow[:, :-1, :-1, :-1]
    slopes = flow[:, 1:, :-1, :-1] - here, flow[:, :-1, 1:, :-1] - here, flow[:, :-1, :-1, 1:] - here
    return _determinant(zip(*(tf.unstack(slope, axis=-1) for slope in slopes), strict=True))


@xla_kernel
def jacobian_determinant(flow: tf.Tensor) -> tf.Tensor:
    """Determinant of the Jacobian of p + flow(p), by central differences: float32 [B, X, Y, Z].

    On the outermost voxels the difference across the edge is one-sided.
    """
    # Slices and their concatenation would each be a pass over memory; read by place, all differences are in one.
    return _determinant([_central_differences(part) for part in tf.unstack(flow, axis=-1)])


def _central_differences(volume: tf.Tensor) -> list[tf.Tensor]:
    differences = []
    for axis, ahead, behind in zip((1, 2, 3), neighbours(volume, 1), neighbours(volume, -1), strict=True):
        apart = np.full(volume.shape[axis], 2.0, np.float32)
        apart[[0, -1]] = 1.0
        differences.append((ahead - behind) / apart.reshape([-1] + [1] * (3 - axis)))
    return differences


def folding(determinant: tf.Tensor) -> tf.Tensor:
    """Share of interior voxels where a determinant [B, X, Y, Z] is not positive, 0..1: float32 [B].

    NaN where the determinant is not a number somewhere, or where no voxel is interior.
    """
    return _mean(_folded(determinant))


@xla_kernel
def _folded(determinant: tf.Tensor) -> tf.Tensor:
    inner = _interior(determinant)
    return tf.where(inner > 0.0, 0.0, tf.where(inner <= 0.0, 1.0, float("nan")))


def sd_log_jacobian(determinant: tf.Tensor) -> tf.Tensor:
    """Standard deviation of the logarithm of a determinant [B, X, Y, Z], clipped below at 1e-9: float32 [B].

    Over interior voxels; NaN as in `folding`.
    """
    return _deviation(_logarithm(determinant))


@xla_kernel
def _logarithm(determinant: tf.Tensor) -> tf.Tensor:
    inner = _interior(determinant)
    # Not tf.maximum: compiled by XLA, it gives the other number where one is NaN.
    return tf.math.log(tf.where(inner < LEAST_DETERMINANT, LEAST_DETERMINANT, inner))


def _interior(volume: tf.Tensor) -> tf.Tensor:
    return volume[:, 1:-1, 1:-1, 1:-1]


def flow_error(flow: tf.Tensor, true_flow: tf.Tensor, mask: tf.Tensor | None = None) -> tf.Tensor:
    """Mean length of flow - true_flow in voxels, over `mask` (bool [B, X, Y, Z, 1]) or everywhere: float32 [B].

    NaN where the true flow is unknown (NaN) or the mask is empty.
    """
    error = tf.norm(flow - true_flow, axis=-1, keepdims=True)
    if mask is None:
        return tf.reduce_mean(error, [1, 2, 3, 4])
    total = tf.reduce_sum(tf.where(mask, error, 0.0), [1, 2, 3, 4])
    return total / tf.reduce_sum(tf.cast(mask, tf.float32), [1, 2, 3, 4])


def surface_distances(
    fixed: np.ndarray,
    warped: np.ndarray,
    labels: Sequence[int],
    spacing: Sequence[float] | np.ndarray = (1.0, 1.0, 1.0),
) -> tuple[np.ndarray, np.ndarray]:
    """How far the surfaces of each label lie apart in two label maps of one pair, in NumPy and SciPy.

    A label's surface is its voxels with one of the six neighbours outside of it, or outside of the volume. Each surface
    voxel has a distance to the nearest one, centre to centre, of the same label in the other map.

    Args:
        fixed, warped: integer arrays [X, Y, Z].
        labels: the K label values.
        spacing: size of a voxel along x, y, z; the distances are in its unit.

    Returns:
        hd95, mean: float32 [K]; the 95th percentile of the distances, the larger one of the two directions, and the
        mean over the surface voxels of both maps. NaN where a label is missing from either map.
    """
    sides = [_surface(label_map) for label_map in (fixed, warped)]
    hd95, mean = np.full((2, len(labels)), np.nan, np.float32)
    for k, label in enumerate(labels):
        surfaces = [places[values == label] * np.asarray(spacing, np.float64) for places, values in sides]
        if all(len(surface) for surface in surfaces):
            there, back = _nearest(*surfaces), _nearest(*surfaces[::-1])
            hd95[k] = max(np.percentile(there, 95), np.percentile(back, 95))
            mean[k] = np.concatenate([there, back]).mean()
    return hd95, mean


def _surface(label_map: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places [N, 3] and label values [N] of the voxels that differ from a neighbour or lie at the volume's edge."""
    outer = np.zeros(label_map.shape, bool)
    for axis in range(3):
        along, edge = np.moveaxis(label_map, axis, 0), np.moveaxis(outer, axis, 0)
        changes = along[1:] != along[:-1]
        edge[1:] |= changes
        edge[:-1] |= changes
        edge[[0, -1]] = True
    return np.argwhere(outer), label_map[outer]


def _nearest(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Distance from each of `points` [N, 3] to the nearest of `others` [M, 3]: [N]."""
    from scipy.spatial import KDTree  # nothing else needs it, and it takes a while to import

    return KDTree(others).query(points)[0]
