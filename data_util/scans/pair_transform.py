"""What a network found on two frames, as a transform between two scans in the patient's millimetres.

ITK's convention: a transform and a displacement field lead from a place in the fixed scan to the one in the moving scan
that shows the same. So a fixed landmark p lies at p + displacement(p) in the moving scan, and reading the moving scan
there gives the warped scan. A moving landmark is carried to the fixed scan by the inverse. Points are [n, 3] in mm.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from data_util.scans.frame import Frame, cast_rounded
from data_util.scans.transform_chain import chain, field_transform, linear

INVERSE_STEPS = 200
INVERSE_TOLERANCE = 1e-4  # mm
LARGEST_FIELD = 2**22  # voxels up to which a field that ITK is given goes on beyond the frame: 50 MB
FALL = (4, 16)  # voxels over which such a field falls to zero, at least and at most


@dataclass(frozen=True, eq=False)
class PairTransform:
    """Leads from places in a fixed scan to places in a moving scan.

    fixed, moving  frames of the volumes that the network saw.
    matrix, shift  affine cascade, [3, 3] and [3] in voxels: W and b of x -> (W + I) x + b, x from the fixed centre.
    flow           composed flow [X, Y, Z, 3] of all cascades in voxels: warped(p) = moving(p + flow(p)).

    Outside the fixed frame the affine part goes on exactly and the rest of the flow repeats its edge.
    """

    fixed: Frame
    moving: Frame
    matrix: np.ndarray
    shift: np.ndarray
    flow: np.ndarray

    @cached_property
    def _affine(self) -> tuple[np.ndarray, np.ndarray]:
        """Matrix [3, 3] and offset [3] in mm: place -> matrix @ place + offset."""
        linear = self.matrix.astype(np.float64) + np.eye(3)
        centre = (np.array(self.fixed.size) - 1) / 2
        # Fixed voxel p -> moving voxel linear p + constant.
        constant = centre + self.shift - linear @ centre
        matrix = self.moving.matrix @ linear @ np.linalg.inv(self.fixed.matrix)
        return matrix, self.moving.matrix @ constant + self.moving.origin - matrix @ np.array(self.fixed.origin)

    @cached_property
    def _rest(self) -> np.ndarray:
        """What the deformable cascades add to the affine one, in mm of the moving scan: float32 [3, X, Y, Z]."""
        size = self.flow.shape[:3]
        centred = [np.arange(n) - (n - 1) / 2 for n in size]
        rest = np.moveaxis(self.flow, -1, 0) - sum(_linear(self.shift, self.matrix, centred))
        return np.tensordot(self.moving.matrix, rest, axes=1).astype(np.float32)

    @property
    def affine(self) -> sitk.AffineTransform:
        """The affine cascade alone: SimpleITK transform from fixed to moving places."""
        return linear(*self._affine)

    def composite(self, scan: Frame) -> sitk.CompositeTransform:
        """The transform as ITK has it: a displacement field on the fixed frame's grid, then the affine part.

        Outside its grid a field of ITK is zero at once, while the rest of the flow here repeats its edge. So the grid
        goes on, with the edge repeated, until it holds the whole scan, and then the field falls to zero. Where that
        takes more than `LARGEST_FIELD` voxels, it falls to zero within the scan, as far from the frame as possible.

        Args:
            scan: frame of the fixed scan, whose axes lie along the fixed frame's.

        Returns:
            SimpleITK composite of a displacement field transform and an affine one, from fixed to moving places.
        """
        field = np.tensordot(np.linalg.inv(self._affine[0]).astype(np.float32), self._rest, axes=1)
        last = np.subtract(self.fixed.size, 1)
        edges = [np.moveaxis(field, axis + 1, 0)[[0, -1]] for axis in range(3)]
        largest = max(float(np.abs(edge).max()) for edge in edges) / min(self.fixed.spacing)
        fall = int(np.clip(np.ceil(2 * largest), *FALL))  # at most half a voxel per voxel, so that nothing folds
        corners = self.fixed.to_voxel(scan.to_physical(list(product(*((0, n - 1) for n in scan.size)))))
        missing = np.maximum([-corners.min(axis=0), corners.max(axis=0) - last], 0)
        for share in np.linspace(1, 0, 33):
            before, after = np.ceil(share * missing).astype(int) + fall
            grid = self.fixed.widened(before, after)
            if np.prod(grid.size) <= LARGEST_FIELD:
                break
        field = np.pad(field, [(0, 0), *zip(before, after, strict=True)], "edge")
        for axis, n in enumerate(grid.size):
            ramp = np.minimum(np.minimum(np.arange(n), np.arange(n)[::-1]) / fall, 1).astype(np.float32)
            field *= np.expand_dims(ramp, [k for k in range(3) if k != axis])
        return chain([field_transform(grid, np.moveaxis(field, 0, -1)), self.affine])

    def to_moving(self, points: np.ndarray) -> np.ndarray:
        """Places in the moving scan of places in the fixed scan."""
        points = np.asarray(points, np.float64)
        matrix, offset = self._affine
        return points @ matrix.T + offset + self._rest_at(points)

    def to_fixed(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places in the fixed scan of places in the moving scan, and the error of each: ([n, 3], [n] in mm).

        By fixed-point iteration. The error is how far the place found, led to the moving scan, is from its point: near
        zero but where the flow is so steep that the iteration does not settle. Where the flow folds, several places
        lead to a point, and one of them is found.
        """
        points = np.asarray(points, np.float64)
        matrix, offset = self._affine
        found = np.linalg.solve(matrix, (points - offset).T).T
        for _ in range(INVERSE_STEPS):
            error = self.to_moving(found) - points
            if np.abs(error).max(initial=0) < INVERSE_TOLERANCE:
                break
            found -= np.linalg.solve(matrix, error.T).T
        return found, np.linalg.norm(self.to_moving(found) - points, axis=1)

    def _rest_at(self, points: np.ndarray) -> np.ndarray:
        voxels = self.fixed.to_voxel(points).T
        parts = [ndimage.map_coordinates(part, voxels, order=1, mode="nearest") for part in self._rest]
        return np.stack(parts, axis=-1)

    def displacement(self, frame: Frame) -> np.ndarray:
        """Displacement field on a frame whose axes lie along the fixed frame's, in whatever order and direction.

        The rest of the flow is interpolated axis by axis, so that a whole scan takes about a second.

        Args:
            frame: where the displacements are wanted.

        Returns:
            Displacements in mm (LPS) on the frame's voxels: float32 [x, y, z, 3].

        Raises:
            ValueError: the axes of the two frames are not parallel.
        """
        along = np.abs(np.linalg.solve(self.fixed.matrix, frame.matrix)).argmax(axis=0)  # fixed axis of each axis
        ordered = frame.permuted([int(axis) for axis in np.argsort(along)])
        first = self.fixed.to_voxel(ordered.to_physical((0, 0, 0)))
        steps = np.linalg.solve(self.fixed.matrix, ordered.matrix)
        if not np.allclose(steps, np.diag(np.diag(steps)), atol=1e-4):
            raise ValueError("the axes of the two frames are not parallel")
        x, y, z = (
            _linear_weights(first[axis] + steps[axis, axis] * np.arange(n), self.fixed.size[axis])
            for axis, n in enumerate(ordered.size)
        )
        field = y @ (self._rest @ z.T)
        field = (x @ field.reshape(3, len(x.T), -1)).reshape(3, *ordered.size)
        matrix, offset = self._affine
        linear = matrix - np.eye(3)
        counted = [np.arange(n) for n in ordered.size]
        for part in _linear(linear @ ordered.origin + offset, linear @ ordered.matrix, counted):
            field += part
        return np.moveaxis(field, 0, -1).transpose(*along, 3)

    def warp(self, image: sitk.Image, frame: Frame, outside: float | None = None) -> tuple[sitk.Image, sitk.Image]:
        """Read the moving scan on a frame whose axes lie along the fixed frame's, linearly, once: (warped, field).

        Both are SimpleITK images on that frame: of the scan's pixel type, and of displacements in mm. What lies outside
        the moving scan gets its lowest grey value, or `outside`.
        """
        field = frame.put(self.displacement(frame))
        if outside is None:
            outside = float(sitk.GetArrayViewFromImage(image).min())
        warped = _read_at(sitk.Cast(image, sitk.sitkFloat32), field, sitk.sitkLinear, outside)
        return cast_rounded(warped, image.GetPixelID()), field


def resample_labels(labels: sitk.Image, field: sitk.Image) -> sitk.Image:
    """Carry a label image of the moving scan along a displacement field, to its grid: nearest voxel, 0 outside."""
    return _read_at(labels, field, sitk.sitkNearestNeighbor, 0)


def _read_at(image: sitk.Image, field: sitk.Image, interpolator: int, outside: float | None) -> sitk.Image:
    frame = Frame.of(field)
    return sitk.Warp(image, field, interpolator, frame.size, frame.origin, frame.spacing, frame.direction, outside)


def _linear_weights(places: np.ndarray, count: int) -> np.ndarray:
    """Matrix [n, count], float32, that reads `count` values linearly at places in voxels, the edge repeated."""
    places = np.clip(places, 0, count - 1)
    distance = np.abs(places[:, None] - np.arange(count))
    return np.maximum(1 - distance, 0).astype(np.float32)


def _linear(
    constant: Any, matrix: np.ndarray, axes: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Four float32 arrays [3, X or 1, Y or 1, Z or 1] with the sum constant + matrix @ (x, y, z) on a grid's axes."""
    x, y, z = (np.outer(matrix[:, k], axis).astype(np.float32) for k, axis in enumerate(axes))
    first = np.asarray(constant, np.float32)[:, None, None, None]
    return first, x[:, :, None, None], y[:, None, :, None], z[:, None, None, :]
