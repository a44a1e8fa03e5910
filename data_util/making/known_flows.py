"""Known flows: drawn at random, smooth and invertible, and the scans that they deform.

    individual(p) = source(p + flow(p))        p in voxels

Flows are [x, y, z, 3] in voxels, points [n, 3] in voxels.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy import ndimage

from data_util.grey_values import to_uint8
from data_util.hdf5 import Scan

MAX_SLOPE = 0.6  # of a smooth flow; with the placement's 0.28 the sum stays below 1, so that it can be inverted


def slope(flow: np.ndarray) -> float:
    """Return how much a flow changes from one place to another at the most, in voxel per voxel.

    Read linearly between voxels, the flow's derivative along an axis is, within a cell of eight voxels, a mean of the
    differences along the cell's four edges, so the largest of these bounds it: the result is a true bound, not an
    estimate. Below 1, p + flow(p) folds nowhere and can be inverted.
    """
    squares = np.zeros(1)
    for axis in range(3):
        steepest = np.linalg.norm(np.diff(flow, axis=axis), axis=-1)
        for other in {0, 1, 2} - {axis}:
            n = steepest.shape[other]
            steepest = np.maximum(steepest.take(range(n - 1), other), steepest.take(range(1, n), other))
        squares = squares + steepest**2
    return float(np.sqrt(squares.max()))


def smooth_flow(size: Sequence[int], seed: Any, amplitude: float) -> np.ndarray:
    """Draw a smooth flow [X, Y, Z, 3], float32, in voxels, that folds nowhere and is zero on the border.

    The three lowest sine waves of each axis are mixed at random; being zero on the border, the flow maps the volume
    onto itself and nothing has to be invented outside. The longest displacement is `amplitude` voxels, or shorter
    where that would need a slope above MAX_SLOPE. `seed` is anything that numpy.random.default_rng takes.
    """
    rng = np.random.default_rng(seed)
    frequency = np.arange(1, 4)
    waves = [np.sin(np.pi * np.outer(frequency, np.linspace(0, 1, n))) for n in size]
    energy = sum(np.meshgrid(frequency**2, frequency**2, frequency**2, indexing="ij"))
    weights = rng.standard_normal((3, 3, 3, 3)) / energy
    flow = np.einsum("kabc,ax,by,cz->xyzk", weights, *waves, optimize=True)
    flow *= amplitude / np.linalg.norm(flow, axis=-1).max()
    return (flow * min(1, MAX_SLOPE / max(slope(flow), MAX_SLOPE))).astype(np.float32)


def placement_flow(
    size: Sequence[int], seed: Any, shift: float = 0.08, scale: float = 0.1, degrees: float = 10
) -> np.ndarray:
    """Draw a mild affine flow [X, Y, Z, 3], float32, in voxels, about the volume's centre.

    Along each axis a shift of at most `shift` of the size and a factor within 1 +- `scale`; a turn of at most
    `degrees` about a random axis.
    """
    rng = np.random.default_rng(seed)
    axis = rng.standard_normal(3)
    turn = np.cross(np.eye(3), axis / np.linalg.norm(axis)) * np.sin(np.deg2rad(rng.uniform(-degrees, degrees)))
    rotation = np.eye(3) + turn + turn @ turn / (1 + np.sqrt(1 - (turn**2).sum() / 2))
    matrix = rotation * rng.uniform(1 - scale, 1 + scale, 3)
    offset = rng.uniform(-shift, shift, 3) * np.asarray(size)
    from_centre = np.moveaxis(np.indices(size), 0, -1) - (np.asarray(size) - 1) / 2
    return (from_centre @ (matrix - np.eye(3)).T + offset).astype(np.float32)


def individual_flow(size: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """Draw what makes one body of another: a placement and a smooth flow, [X, Y, Z, 3], float32, in voxels."""
    return placement_flow(size, rng) + smooth_flow(size, rng, amplitude=0.09 * min(size))


def warp(volume: Any, flow: np.ndarray, nearest: bool = False) -> np.ndarray:
    """Return volume(p + flow(p)), float32 [X, Y, Z]: linear or the nearest voxel, the edge repeated outside."""
    places = np.indices(volume.shape, dtype=np.float32) + np.moveaxis(flow, -1, 0)
    return ndimage.map_coordinates(volume, places, order=0 if nearest else 1, mode="nearest", output=np.float32)


def carry_points(points: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """Return where the points of a source lie in the scan deformed by `flow`: q with q + flow(q) = point.

    Args:
        points: [n, 3] in voxels of the source.
        flow: [X, Y, Z, 3] in voxels.

    Returns:
        [n, 3] float32, exact to 0.001 voxel for the flow read linearly between voxels.

    Raises:
        ValueError: the flow cannot be inverted at a point.
    """
    points = np.asarray(points, dtype=np.float64)

    def flow_at(places: np.ndarray) -> np.ndarray:
        channels = [
            ndimage.map_coordinates(flow[..., k], places.T, np.float64, order=1, mode="nearest") for k in range(3)
        ]
        return np.stack(channels, axis=-1)

    carried = points
    for _ in range(200):  # each round shrinks the error by the flow's slope
        carried = points - flow_at(carried)
    error = np.abs(carried + flow_at(carried) - points).max(initial=0)
    if error > 1e-3:
        raise ValueError(
            f"flow cannot be inverted at the points: {error:.3g} voxel left, its slope is {slope(flow):.3g}"
        )
    return carried.astype(np.float32)


def deform(scan: Scan, flow: np.ndarray) -> Scan:
    """Return the Scan that `scan` becomes under a flow: this(p) = scan(p + flow(p)), landmarks carried along.

    A mask, 0 and 255, is warped linearly and kept where it is above 128, as the Dice score does, so that the very same
    flow finds a perfect score. Several labels are read at the nearest voxel.
    """
    segmentation = scan.segmentation
    if segmentation is not None and np.isin(segmentation, (0, 255)).all():
        segmentation = np.where(warp(segmentation, flow) > 128, 255, 0).astype(np.uint8)
    elif segmentation is not None:
        segmentation = warp(segmentation, flow, nearest=True).astype(segmentation.dtype)
    return replace(
        scan,
        volume=to_uint8(warp(scan.volume, flow)),
        segmentation=segmentation,
        points=None if scan.points is None else carry_points(scan.points, flow),
        flow=None,
        flow_source=None,
    )


def known_pair(scan: Scan, flow: np.ndarray, source: str) -> tuple[Scan, Scan]:
    """Return `scan` and what it becomes under a flow, which is kept in the second, with `source`, the first's full id.

    The flow is kept in half precision, as it is written, and it is exactly this one that deforms: what a file holds is
    the truth, to the rounding of the grey values.
    """
    flow = flow.astype(np.float16)
    return scan, replace(deform(scan, flow.astype(np.float32)), flow=flow, flow_source=source)
