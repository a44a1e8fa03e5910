"""The measures of the Learn2Reg challenge, as its evaluation computes them (evaluation/ in MDL-UzL/L2R, 2022 to 2025).

They differ from those of `docs/metrics.md`, which follow the original system, in the ways that are said below, and are
for comparison with the challenge's leaderboards. A displacement field is [H, W, D, 3] in voxels, as `challenge_fields`
says; label maps and masks are [H, W, D], points [n, 3] in voxels of their own image.
"""

from functools import cache

import numpy as np
from scipy import ndimage

EDGE = 2  # voxels at each end of each axis where the Jacobian is not looked at
SHIFT, LOWEST, HIGHEST = 3.0, 1e-9, 1e9  # of the determinant before its logarithm
PERCENT = 95
# Corners of a cube of eight voxels, and the area within the cube of the surface around those that are marked, by how
# these hang together along edges: number of corners, of edges between them, and the most edges at one corner.
CORNERS = np.indices((2, 2, 2)).reshape(3, 8).T
PIECES = {
    (1, 0, 0): np.sqrt(3) / 8,  # a triangle
    (2, 1, 1): np.sqrt(2) / 2,  # a rectangle
    (3, 2, 2): 1 / 2 + np.sqrt(27) / 8,  # three corners of a face
    (4, 4, 2): 1.0,  # a whole face
    (4, 3, 3): np.sqrt(27) / 4,  # a corner and its three neighbours: a hexagon
    (4, 3, 2): np.sqrt(2) / 2 + np.sqrt(3) / 2,  # a path that turns twice
}


def warp_labels(labels: np.ndarray, field: np.ndarray) -> np.ndarray:
    """Read a label map where a field leads: the nearest label, 0 outside the volume."""
    places = np.indices(field.shape[:3]) + np.moveaxis(field, -1, 0)
    return ndimage.map_coordinates(labels, places, order=0)


def dice(fixed: np.ndarray, warped: np.ndarray) -> float:
    """Dice score of two masks, bool [H, W, D]; NaN where both are empty."""
    total = int(fixed.sum()) + int(warped.sum())
    return 2 * int((fixed & warped).sum()) / total if total else np.nan


def log_jacobian(field: np.ndarray) -> np.ndarray:
    """Logarithm of the Jacobian determinant of p + field(p), as the challenge takes it.

    The derivatives are central differences. To the determinant 3 is added before the logarithm, and the sum is clipped
    to 1e-9 .. 1e9; so the values are smaller than those of the determinant itself.

    Returns:
        float [H - 4, W - 4, D - 4]: without two voxels at each end of each axis.
    """
    inner = [max(n - 2 * EDGE, 0) for n in field.shape[:3]]
    logs = np.empty(inner)
    for k in range(inner[0] if logs.size else 0):  # plane by plane: the matrices of a whole field are gigabytes
        behind, plane, ahead = field[EDGE + k - 1 : EDGE + k + 2]
        matrix = np.empty((*inner[1:], 3, 3))
        matrix[..., 0] = (ahead - behind)[EDGE:-EDGE, EDGE:-EDGE]
        matrix[..., 1] = (plane[2:] - plane[:-2])[EDGE - 1 : 1 - EDGE, EDGE:-EDGE]
        matrix[..., 2] = (plane[:, 2:] - plane[:, :-2])[EDGE:-EDGE, EDGE - 1 : 1 - EDGE]
        logs[k] = np.log(np.clip(np.linalg.det(matrix / 2 + np.eye(3)) + SHIFT, LOWEST, HIGHEST))
    return logs


def sdlogj(log_determinant: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Standard deviation of what `log_jacobian` gives, where the mask [H, W, D] is 1; NaN where there is no voxel."""
    inside = log_determinant.ravel()
    if mask is not None:
        inside = log_determinant[mask[EDGE:-EDGE, EDGE:-EDGE, EDGE:-EDGE] == 1]
    return float(inside.std()) if inside.size else np.nan


def landmark_errors(field: np.ndarray, fixed: np.ndarray, moving: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Distances in mm between fixed landmarks, carried over by the field, and the moving ones: float64 [n].

    The field is read by cubic splines (0 outside the volume).

    Args:
        field: displacement field.
        fixed: landmarks of the fixed image.
        moving: the same ones in the moving image.
        spacing: mm per voxel of the moving image [3].
    """
    shift = np.stack([ndimage.map_coordinates(field[..., axis], fixed.T) for axis in range(3)], axis=-1)
    return np.linalg.norm((fixed + shift - moving) * spacing, axis=1)


def hd95(fixed: np.ndarray, warped: np.ndarray) -> float:
    """Distance between the surfaces of two masks, bool [H, W, D], in voxels: the larger 95th percentile of both ways.

    A surface goes through the cubes of 2 x 2 x 2 voxels that are in part inside; each counts by the area of the surface
    in it, and lies at the cube's centre. Outside the volume no voxel is inside. Voxels count as cubes of one unit,
    whatever the spacing.

    Returns:
        The distance; infinite where one mask is empty, NaN where both are.
    """
    both = np.argwhere(fixed | warped)
    if not len(both):
        return np.nan
    box = tuple(map(slice, both.min(axis=0), both.max(axis=0) + 1))
    areas = [_surface_areas(mask[box]) for mask in (fixed, warped)]
    if not all(area.any() for area in areas):
        return np.inf
    distances = [ndimage.distance_transform_edt(area == 0) for area in areas]
    return max(_weighted_percentile(distances[1 - k][areas[k] > 0], areas[k][areas[k] > 0]) for k in (0, 1))


def _surface_areas(mask: np.ndarray) -> np.ndarray:
    """Area of the surface in each cube of eight voxels that touches a mask, one cube more than voxels on each axis."""
    padded = np.pad(mask, 1).astype(np.uint8)
    codes = np.zeros(np.add(mask.shape, 1), np.uint8)
    for bit, corner in enumerate(CORNERS):
        codes |= padded[tuple(slice(c, c + n) for c, n in zip(corner, codes.shape, strict=True))] << np.uint8(bit)
    return _area_table()[codes]


@cache
def _area_table() -> np.ndarray:
    """Area of the surface in a cube, by the bits of the corners that are inside: float64 [256].

    Inside and outside part the same surface, so the smaller set of corners is looked at, piece by piece.
    """
    neighbours = np.abs(CORNERS[:, None] - CORNERS[None]).sum(-1) == 1
    areas = np.zeros(256)
    for code in range(256):
        inside = (code >> np.arange(8) & 1).astype(bool)
        corners = set(np.flatnonzero(inside if inside.sum() <= 4 else ~inside).tolist())
        while corners:
            piece, reached = set[int](), {corners.pop()}
            while reached:
                piece |= reached
                reached = {c for c in corners if neighbours[c, list(piece)].any()}
                corners -= reached
            degrees = neighbours[np.ix_(list(piece), list(piece))].sum(0)
            areas[code] += PIECES[len(piece), int(degrees.sum()) // 2, int(degrees.max())]
    return areas


def _weighted_percentile(distances: np.ndarray, areas: np.ndarray) -> float:
    """The smallest distance that, with all shorter ones, makes up `PERCENT` of the area."""
    order = np.lexsort((areas, distances))
    share = np.cumsum(areas[order]) / np.sum(areas[order])
    place = min(int(np.searchsorted(share, PERCENT / 100)), len(order) - 1)
    return float(distances[order][place])
