"""What can be done with SimpleITK transforms: taken apart, composed, applied to many points, inverted.

A transform leads from a place in the fixed scan to the one in the moving scan (mm, LPS). What it consists of is either
linear, or a displacement field, or something that only leads single points (such as a B-spline). Outside its grid a
displacement field of ITK leaves a place where it is. Points are [n, 3].
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from data_util.scans.frame import Frame
from errors import UserError

STEPS = 50  # of an inversion, at most
TOLERANCE = 1e-3  # of the inverse of a point: in voxels of a field, or mm
GRID_TOLERANCE = 0.02  # of the inverse as a field before its last correction: less than it is off between its voxels
COARSEST = 8  # voxels from one that is inverted first to the next; those between start from there, by halves
ROUNDING = 1e-4  # voxels by which a field may lead out of its grid without a wider one for its inverse
SMALLEST_STEP = 1 / 16  # of the correction that an inversion would make; below, it has not settled
FEW = 10_000  # points that are led one by one, sooner than a field is made ready for many
AT_ONCE = 2**17  # points, so that intermediate arrays stay small

Move = Callable[[np.ndarray], np.ndarray]


def parts(transform: sitk.Transform) -> list[sitk.Transform]:
    """The parts of a transform, that first which a place goes through first."""
    transform = transform.Downcast()
    if not isinstance(transform, sitk.CompositeTransform):
        return [transform]
    # ITK goes through the last one first.
    numbers = reversed(range(transform.GetNumberOfTransforms()))
    return [part for k in numbers for part in parts(transform.GetNthTransform(k))]


def chain(transforms: Sequence[sitk.Transform]) -> sitk.CompositeTransform:
    """One transform that leads a place through the first of these, then through the second, and so on."""
    flat = [part for transform in transforms for part in parts(transform)]
    return sitk.CompositeTransform(flat[::-1])


def is_field(part: sitk.Transform) -> bool:
    """Whether a part is a displacement field."""
    return isinstance(part, sitk.DisplacementFieldTransform)


def linear(matrix: np.ndarray, offset: np.ndarray) -> sitk.AffineTransform:
    """The transform place -> matrix @ place + offset."""
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(np.ravel(matrix).tolist())
    transform.SetTranslation(np.asarray(offset, np.float64).tolist())
    return transform


def linear_map(transform: sitk.Transform) -> tuple[np.ndarray, np.ndarray]:
    """Matrix [3, 3] and offset [3] of a transform all of whose parts are linear.

    Raises:
        UserError: one of them is not.
    """
    matrix, offset = np.eye(3), np.zeros(3)
    for part in parts(transform):
        if is_field(part) or not part.IsLinear():
            raise UserError(f"a {part.GetName()} is not linear; give a rigid or affine map")
        first = np.array(part.TransformPoint((0.0, 0.0, 0.0)))
        columns = np.array([part.TransformPoint(row) for row in np.eye(3).tolist()]).T - first[:, None]
        matrix, offset = columns @ matrix, columns @ offset + first
    return matrix, offset


def map_points(transform: sitk.Transform, points: np.ndarray) -> np.ndarray:
    """Lead places through a transform: float64 [n, 3], as ITK does it point by point."""
    points = np.array(points, np.float64).reshape(-1, 3)
    if len(points) <= FEW:
        return _one_by_one(transform)(points)
    for part in parts(transform):
        points = _mover(part)(points)
    return points


def inverse_points(transform: sitk.Transform, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the places that a transform leads to given points.

    Args:
        transform: any transform.
        points: where the places are to be led, [n, 3] in mm.

    Returns:
        The places [n, 3], and how far from its point each of them is led, [n] in mm: near zero unless the transform
        folds there, or never leads to the point.
    """
    found = np.array(points, np.float64)
    for part in reversed(parts(transform)):
        found = _moved_back(part, found)
    return found, np.linalg.norm(map_points(transform, found) - points, axis=1)


def inverse(transform: sitk.Transform) -> sitk.CompositeTransform:
    """The inverse of a transform: exact for its linear parts, by iteration for displacement fields.

    Args:
        transform: of linear parts and displacement fields.

    Raises:
        UserError: a part is neither.
    """
    return chain([_inverse_part(part) for part in reversed(parts(transform))])


def inverse_error(transform: sitk.Transform, inverted: sitk.Transform, places: np.ndarray) -> np.ndarray:
    """How far places come back from where they were after a transform and its inverse: [n] in mm."""
    places = np.asarray(places, np.float64)
    return np.linalg.norm(map_points(inverted, map_points(transform, places)) - places, axis=1)


def sample(frame: Frame, most: int) -> np.ndarray:
    """Places of a frame's voxels, at regular distances, about `most` of them at the most: [n, 3] in mm."""
    step = max(1, int(np.ceil((np.prod(np.array(frame.size, float)) / most) ** (1 / 3))))
    axes = [np.arange(n)[(n - 1) % step // 2 :: step] for n in frame.size]
    return frame.to_physical(np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3))


def is_inside(places: np.ndarray, frame: Frame) -> np.ndarray:
    """Whether places in mm [n, 3] lie in a voxel of a frame: bool [n]."""
    voxels = frame.to_voxel(places)
    return np.asarray(((voxels >= -0.5) & (voxels <= np.array(frame.size) - 0.5)).all(axis=1))


class _Field:
    """A displacement field in voxels of its own grid."""

    def __init__(self, part: sitk.Transform) -> None:
        self._image = sitk.DisplacementFieldTransform(part).GetDisplacementField()
        self.frame = Frame.of(self._image)

    @cached_property
    def parts(self) -> np.ndarray:
        """The field in voxels, float32 [3, X, Y, Z], one part after the other in memory and x fastest in each."""
        vectors = sitk.GetArrayViewFromImage(self._image).reshape(-1, 3)
        planes = np.linalg.inv(self.frame.matrix).astype(np.float32) @ np.array(vectors.T, np.float32, order="C")
        return planes.reshape(3, *self.frame.size[::-1]).transpose(0, 3, 2, 1)

    def read(self, voxels: np.ndarray) -> np.ndarray:
        """Displacements in voxels at points in voxels, linearly, the edge repeated."""
        return _read(self.parts, voxels)

    def holds(self, voxels: np.ndarray) -> np.ndarray:
        """Whether points in voxels lie on the grid, or at most half a voxel beside it: bool [n]."""
        return np.asarray(((voxels >= -0.5) & (voxels <= np.array(self.frame.size) - 0.5)).all(axis=1))

    def move(self, places: np.ndarray) -> np.ndarray:
        """The places in mm to which places in mm are led."""
        voxels = self.frame.to_voxel(places)
        moved = _read(sitk.GetArrayViewFromImage(self._image).T, voxels)  # in mm as they are
        return places + np.where(self.holds(voxels)[:, None], moved, 0)

    def moved_back(
        self, voxels: np.ndarray, start: np.ndarray | None = None, tolerance: float = TOLERANCE
    ) -> np.ndarray:
        """The points in voxels that the field leads to given ones; what lies beside the grid then stays as it is."""
        found = _solve(lambda points: points + self.read(points), voxels, start, tolerance)
        return np.where(self.holds(found)[:, None], found, voxels)

    def inverse(self) -> sitk.DisplacementFieldTransform:
        """The inverse as a field on the grid, made wider by as far as the field leads out of it."""
        reached = [part + np.indices(part.shape, np.float32, sparse=True)[k] for k, part in enumerate(self.parts)]
        last = np.subtract(self.frame.size, 1)
        beyond = [-part.min() for part in reached], [part.max() for part in reached] - last
        before, after = (np.ceil(np.clip(np.subtract(part, ROUNDING), 0, last)).astype(int) for part in beyond)
        grid = self.frame.widened(before, after)
        found = self._inverse_on(grid.size, before, 1)
        vectors = np.moveaxis(found, 0, -1) @ self.frame.matrix.T.astype(np.float32)
        return field_transform(grid, vectors.swapaxes(0, 2))

    def _inverse_on(self, size: tuple[int, ...], before: np.ndarray, step: int) -> np.ndarray:
        """Displacements in voxels, [3, Z, Y, X], that lead back from every `step`-th voxel from -before on."""
        found = np.zeros((3, *size[::-1]), np.float32)
        start = found
        if step < COARSEST:
            start = _finer(self._inverse_on(tuple(-(-n // 2) for n in size), before, 2 * step), found.shape)
        found, start = found.reshape(3, -1), start.reshape(3, -1)

        def find(first: int) -> None:
            numbers = slice(first, first + AT_ONCE)
            counted = np.unravel_index(np.arange(*numbers.indices(found.shape[1])), size, order="F")
            voxels = (step * np.array(counted, np.float32) - before.astype(np.float32)[:, None]).T
            back = self.moved_back(voxels, voxels + start[:, numbers].T, GRID_TOLERANCE)
            found[:, numbers] = (back - voxels).T

        with ThreadPoolExecutor() as pool:  # SciPy and NumPy let go of Python's lock meanwhile
            list(pool.map(find, range(0, found.shape[1], AT_ONCE)))
        return found.reshape(3, *size[::-1])


def _finer(volumes: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Volumes [3, Z, Y, X] read linearly at every half voxel, the edge repeated, to give an array of a shape."""
    for axis in (1, 2, 3):
        places = np.arange(shape[axis])
        low, high = places // 2, np.minimum((places + 1) // 2, volumes.shape[axis] - 1)
        volumes = (volumes.take(low, axis) + volumes.take(high, axis)) / 2
    return volumes


def _read(field: np.ndarray, voxels: np.ndarray) -> np.ndarray:
    """Vectors [n, 3] at points in voxels of a field [3, X, Y, Z], linearly, the edge repeated."""
    return np.array([ndimage.map_coordinates(part, voxels.T, order=1, mode="nearest") for part in field]).T


def field_transform(frame: Frame, vectors: np.ndarray) -> sitk.DisplacementFieldTransform:
    """The transform place -> place + vector of a displacement field in mm (LPS), [X, Y, Z, 3] on a frame."""
    return sitk.DisplacementFieldTransform(sitk.Cast(frame.put(vectors), sitk.sitkVectorFloat64))


def field_frame(part: sitk.Transform) -> Frame:
    """The grid of a displacement field."""
    return Frame.of(sitk.DisplacementFieldTransform(part).GetDisplacementField())


def _mover(part: sitk.Transform) -> Move:
    """The function that leads places through a part."""
    if is_field(part):
        return _Field(part).move
    if part.IsLinear():
        matrix, offset = linear_map(part)
        return lambda places: places @ matrix.T + offset
    return _one_by_one(part)


def _one_by_one(transform: sitk.Transform) -> Move:
    return lambda places: np.array([transform.TransformPoint(place) for place in places.tolist()]).reshape(-1, 3)


def _moved_back(part: sitk.Transform, places: np.ndarray) -> np.ndarray:
    """The places that a part leads to given ones."""
    if is_field(part):
        field = _Field(part)
        return field.frame.to_physical(field.moved_back(field.frame.to_voxel(places)))
    if part.IsLinear():
        matrix, offset = linear_map(part)
        return np.linalg.solve(matrix, (places - offset).T).T
    return _solve(_mover(part), places)


def _inverse_part(part: sitk.Transform) -> sitk.Transform:
    if is_field(part):
        return _Field(part).inverse()
    if not part.IsLinear():
        raise UserError(f"a {part.GetName()} cannot be inverted for images; convert it to a displacement field first")
    matrix, offset = linear_map(part)
    return linear(np.linalg.inv(matrix), -np.linalg.solve(matrix, offset))


def _solve(move: Move, wanted: np.ndarray, start: np.ndarray | None = None, tolerance: float = TOLERANCE) -> np.ndarray:
    """Points that `move` leads to the wanted ones, by iteration: each is corrected by its own error.

    A correction that does not make the error smaller is taken back and the next one is half as long, else twice, up to
    all of it. So where the flow folds the nearest that was found stays.
    """
    found = (wanted if start is None else start).copy()
    off = move(found) - wanted
    error = _lengths(off)
    length = np.ones(len(found), found.dtype)
    for _ in range(STEPS):
        left = np.flatnonzero((error > tolerance) & (length >= SMALLEST_STEP))
        if not len(left):
            break
        tried = found[left] - length[left, None] * off[left]
        tried_off = move(tried) - wanted[left]
        tried_error = _lengths(tried_off)
        is_better = tried_error < error[left]
        better = left[is_better]
        found[better], off[better], error[better] = tried[is_better], tried_off[is_better], tried_error[is_better]
        length[left] = np.where(is_better, np.minimum(2 * length[left], 1), length[left] / 2)
    return np.where((error <= tolerance)[:, None], found - off, found)  # a last one, which is small, unseen


def _lengths(vectors: np.ndarray) -> np.ndarray:
    """Lengths of vectors [n, 3]; NumPy's norm takes several times as long."""
    return np.sqrt(np.einsum("nk,nk->n", vectors, vectors))
