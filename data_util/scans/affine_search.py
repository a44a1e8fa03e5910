"""The affine map between two scans, found by their grey values alone and from any start; no network is needed.

Both scans are compared on grids of 8, 4 and 2 mm. On the coarsest one the moving scan is tried in 53 rotations of up to
50 degrees and, unless the map is rigid, some scales, each at two places: where the centres of mass meet, and where the
edges of both scans overlap best. The most similar of these are improved by descent, and the winner goes on to the finer
grids. A scan is never mirrored.

Similarity is mutual information (Mattes et al., 2003), so the two scans may be of different modalities. It is measured
where both scans show something, and a little around that: over all voxels, a map that stretches a head over a brain
without skull is better than the right one, since outlines and background outweigh what is inside.
"""

import itertools
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import SimpleITK as sitk
from numpy.typing import ArrayLike
from scipy import fft
from scipy.spatial.transform import Rotation

from data_util.scans.frame import Frame
from data_util.scans.regions import otsu
from errors import UserError

KINDS = ("rigid", "similarity", "affine")
GRIDS = (8.0, 4.0, 2.0)  # mm; of a large scan so much more that the first grid has no more than MOST_VOXELS
MOST_VOXELS = 20_000
SAMPLED = 40_000  # voxels of a grid that are compared, at most
STEPS = 60  # of descent on each grid, at most
PERCENTILES = (1, 99.5)  # of the grey values; what lies beyond is clipped
BINS = 32  # of the joint histogram, per scan
ANGLES = (25, 50)  # degrees, about each of 26 axes
SCALES = (0.8, 1.0, 1.25)  # of the moving scan, to start from
AROUND = 8.0  # mm around what a scan shows that is compared, too
MOST_THREADS = 8
FINALISTS = (16, 2, 1)  # how many of the starts, and then of what became of them, are improved on each grid
LEAST_SIMILARITY = 0.1  # mutual information in nats on the coarsest grid; two brains have 0.7 to 2, noise below 0.06
LEAST_OVERLAP = 0.25  # share of what the scan that shows less shows, that must lie in what the other one shows
PLACES = 2000  # at which that is looked at
STRETCH = (0.5, 2.0)  # what the moving scan may be stretched by along any axis

_ALONE = threading.RLock()  # SimpleITK is not safe with the threads that read the pairs of a data set


def find_affine(fixed: sitk.Image, moving: sitk.Image, kind: str = "affine") -> sitk.AffineTransform:
    """Find the affine map from places in a fixed scan to the same anatomy in a moving scan.

    Takes 3 to 6 seconds of CPU time, half as many on two cores, whatever the size of the scans: only the first
    smoothing depends on it. The same scans give the same map, whatever the number of threads.

    Args:
        fixed, moving: three-dimensional scans.
        kind: 'rigid' (rotation and shift), 'similarity' (and one scale) or 'affine'.

    Returns:
        Transform of places in mm (LPS): fixed -> moving.

    Raises:
        UserError: the kind is unknown, or the scans have nothing in common.

    Example:
        >>> blob = sitk.GaussianSource(sitk.sitkFloat32, [40] * 3, [24, 16, 10], [60] * 3, 100.0, spacing=[3] * 3)
        >>> moved = sitk.Resample(blob, sitk.TranslationTransform(3, [9, -6, 12]))
        >>> [round(part) for part in find_affine(blob, moved, "rigid").TransformPoint((60, 60, 60))]
        [51, 66, 48]
    """
    if kind not in KINDS:
        raise UserError(f"affine registration of kind {kind!r}; known are {', '.join(KINDS)}")
    fixed_grids, moving_grids = _on_grids(fixed), _on_grids(moving)
    found = _starts(fixed_grids[0], moving_grids[0], kind)
    for level, scans in enumerate(zip(fixed_grids, moving_grids, strict=True)):
        wanted = kind if kind == "rigid" or level > 0 else "similarity"
        finer = _improved(*scans, found[: FINALISTS[level]], wanted)
        if level == 0 and (not finer or finer[0][0] > -LEAST_SIMILARITY):
            raise UserError("no affine map found: the scans have nothing in common; do they show the same body part?")
        found = finer or found  # where descent leaves the scan on a finer grid, what the coarser one found stays
    return _map_of(found[0][1])


def find_voxel_affine(
    volumes: Sequence[np.ndarray], spacings: Sequence[ArrayLike], kind: str
) -> tuple[np.ndarray, np.ndarray]:
    """Find the affine map between two volumes whose axes run the same ways: `find_affine`, but in voxels.

    Args:
        volumes: the fixed and the moving one, [X, Y, Z].
        spacings: mm per voxel of each, [3].
        kind: as in `find_affine`.

    Returns:
        Matrix less the identity [3, 3], and shift [3]: a voxel at x from the middle of the fixed volume lies at
        (matrix + I) x + shift from there in the moving one.

    Raises:
        UserError: as `find_affine`.
    """
    frames = [
        Frame(volume.shape, tuple(float(mm) for mm in np.ravel(spacing)), (0.0, 0.0, 0.0), tuple(np.eye(3).ravel()))
        for volume, spacing in zip(volumes, spacings, strict=True)
    ]
    images = [frame.put(np.asarray(volume, np.float32)) for frame, volume in zip(frames, volumes, strict=True)]
    with _ALONE:
        found = find_affine(images[0], images[1], kind)
    matrix = np.linalg.solve(frames[1].matrix, np.reshape(found.GetMatrix(), (3, 3)) @ frames[0].matrix)
    middle = np.subtract(volumes[0].shape, 1) / 2
    led = frames[1].to_voxel(found.TransformPoint(frames[0].to_physical(middle).tolist()))
    return matrix - np.eye(3), led - middle


class _Level(NamedTuple):
    """A scan on one grid, and where it shows something: an image of 0 and 1 on the same grid."""

    image: sitk.Image
    shown: sitk.Image

    def copy(self) -> "_Level":
        """The same in images of its own."""
        copies = [sitk.Image(image) for image in self]
        for image in copies:
            image.MakeUnique()
        return _Level(*copies)


_Found = tuple[float, sitk.Transform]  # similarity, the smaller the better, and transform
_PARTED: _Found = (0.0, sitk.AffineTransform(3))  # no map: too little of the scans overlaps


def in_words(matrix: np.ndarray, offset: np.ndarray, frame: Frame) -> tuple[float, float, float]:
    """What a map does to a frame: the angle in degrees, how far its centre is moved in mm, and the scale.

    Args:
        matrix, offset: place in mm -> matrix @ place + offset.
        frame: the frame.

    Example:
        >>> frame = Frame((11, 11, 11), (1, 1, 1), (0, 0, 0), (1, 0, 0, 0, 1, 0, 0, 0, 1))
        >>> quarter = np.array([[0.0, -2, 0], [2, 0, 0], [0, 0, 2]])
        >>> [round(part, 3) for part in in_words(quarter, np.array([15.0, -5, 4]), frame)]
        [90.0, 9.0, 2.0]
    """
    scale = float(np.cbrt(np.linalg.det(matrix)))
    left, _, right = np.linalg.svd(matrix)
    centre = frame.to_physical(np.subtract(frame.size, 1) / 2)
    angle = np.rad2deg(np.arccos(np.clip((np.trace(left @ right) - 1) / 2, -1, 1)))
    return float(angle), float(np.linalg.norm(matrix @ centre + offset - centre)), scale


def left_over(frame: Frame, fixed: np.ndarray, warped: np.ndarray) -> tuple[float, float]:
    """How far two registered volumes are turned and shifted against each other, seen from afar.

    The coarsest grid alone is looked at, so that only a gross fault shows.

    Args:
        frame: where both lie.
        fixed, warped: volumes [X, Y, Z] on it.

    Returns:
        Angle in degrees and shift in mm of the rigid map that makes the volumes more similar by a tenth at least;
        (0, 0) where there is none.
    """
    try:
        one, other = (_on_grids(frame.put(np.asarray(volume, np.float32)))[0] for volume in (fixed, warped))
        found = _improved(one, other, _starts(one, other, "rigid")[: FINALISTS[1]], "rigid")
    except UserError:  # nothing to see
        return 0.0, 0.0
    if not found or found[0][0] > 1.1 * _similarity(one, other, sitk.AffineTransform(3)):  # both are negative
        return 0.0, 0.0
    rigid = found[0][1]
    angle, shift, _ = in_words(
        np.reshape(rigid.GetMatrix(), (3, 3)), np.array(rigid.TransformPoint((0.0, 0.0, 0.0))), frame
    )
    return angle, shift


def _on_grids(image: sitk.Image) -> list[_Level]:
    """A scan on isotropic grids of about `GRIDS` mm, its grey values clipped and mapped to 0..255."""
    levels = [sitk.Cast(image, sitk.sitkFloat32)]
    voxels = np.prod(image.GetSize()) * np.prod(image.GetSpacing()) / GRIDS[0] ** 3
    for mm in reversed(GRIDS):
        levels.insert(0, _shrunk(levels[0], mm * max(1.0, float(voxels / MOST_VOXELS) ** (1 / 3))))
    low, high = (float(value) for value in np.percentile(sitk.GetArrayViewFromImage(levels[-2]), PERCENTILES))
    if low == high:
        raise UserError(f"a scan is {low:g} nearly everywhere, so nothing can be found in it; look at the file")
    images = [sitk.IntensityWindowing(level, low, high, 0.0, 255.0) for level in levels[:-1]]
    shown = _shown(images[0])
    return [_Level(image, Frame.of(image).resample(shown, nearest=True)) for image in images]


def _shown(image: sitk.Image) -> sitk.Image:
    """Where a scan shows something, and AROUND that: above half of Otsu's threshold, without holes."""
    bright = sitk.BinaryFillhole(image > otsu(sitk.GetArrayViewFromImage(image)) / 2)
    return sitk.BinaryDilate(bright, [max(1, round(AROUND / mm)) for mm in image.GetSpacing()])


def _shrunk(image: sitk.Image, mm: float) -> sitk.Image:
    """An image smoothed and resampled to voxels of about `mm`."""
    spacing, size = np.array(image.GetSpacing()), np.array(image.GetSize())
    count = np.maximum(np.rint(size * spacing / mm), 4).astype(int)
    step = size * spacing / count
    for axis, sigma in enumerate(np.sqrt(np.maximum(step**2 - spacing**2, 0)) / 2):
        if sigma > 0.1 * spacing[axis]:
            image = sitk.RecursiveGaussian(image, sigma=float(sigma), direction=axis)
    origin = image.TransformContinuousIndexToPhysicalPoint(((step / spacing - 1) / 2).tolist())
    frame = Frame(tuple(count.tolist()), tuple(step.tolist()), tuple(origin), image.GetDirection())
    return frame.resample(image, outside=float(sitk.GetArrayViewFromImage(image).min()))


def _starts(fixed: _Level, moving: _Level, kind: str) -> list[_Found]:
    """For every rotation and scale the better of its places, the best first."""
    centre, target = _centre_of_mass(fixed.image), _centre_of_mass(moving.image)
    edges = fft.rfftn(_edges(fixed.image), _padded_shape(fixed.image))
    by_mass = target - centre

    def start_of(fixed: _Level, moving: _Level, turn: tuple[np.ndarray, float]) -> _Found:
        rotation, scale = turn
        tried: list[_Found] = [_PARTED]
        by_edges = _shift_by_edges(fixed.image, moving.image, edges, scale * rotation, centre, by_mass)
        for shift in (by_mass, by_edges):
            start = sitk.Similarity3DTransform(scale, (0, 0, 0, 1), shift.tolist(), centre.tolist())
            start.SetMatrix((scale * rotation).ravel().tolist())
            if _overlap(fixed.shown, moving.shown, start) >= LEAST_OVERLAP:
                tried.append((_similarity(fixed, moving, start), start))
        return min(tried, key=lambda found: found[0])

    return _best(start_of, fixed, moving, itertools.product(_rotations(), (1.0,) if kind == "rigid" else SCALES))


def _improved(fixed: _Level, moving: _Level, found: Sequence[_Found], kind: str) -> list[_Found]:
    """Transforms improved on one grid, as transforms of this kind, the best first."""
    return _best(lambda one, other, start: _descend(one, other, start[1], kind), fixed, moving, found)


def _best(
    function: Callable[[_Level, _Level, Any], _Found], fixed: _Level, moving: _Level, items: Iterable[Any]
) -> list[_Found]:
    """What a function of two scans finds for each item, without what parted the scans, the best first.

    Several threads share the items. Each has copies of the scans: a filter of ITK writes notes on its inputs. ITK
    itself uses one thread for each: several add up in any order, and descent makes tenths of a mm of the last digits.
    """
    given = list(items)
    count = min(len(os.sched_getaffinity(0)), MOST_THREADS, len(given))

    def share_of(first: int) -> list[_Found]:
        scans = fixed.copy(), moving.copy()
        return [function(*scans, item) for item in given[first::count]]

    with _ALONE, ThreadPoolExecutor(count or 1) as pool:
        threads = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
        try:
            shares = list(pool.map(share_of, range(count)))
        finally:
            sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
    found = [shares[k % count][k // count] for k in range(len(given))]  # in the order of the items, as for one thread
    return sorted((one for one in found if one[0] < 0), key=lambda one: one[0])


def _rotations() -> list[np.ndarray]:
    """The rotations to start from, matrices [3, 3]: none, and ANGLES about 26 axes."""
    axes = [np.divide(a, np.linalg.norm(a)) for a in itertools.product((-1, 0, 1), repeat=3) if any(a)]
    turns = [Rotation.from_rotvec(np.deg2rad(angle) * axis).as_matrix() for angle in ANGLES for axis in axes]
    return [np.eye(3), *turns]


def _centre_of_mass(image: sitk.Image) -> np.ndarray:
    """Centre [3] in mm of what is bright (Otsu's threshold)."""
    grey = sitk.GetArrayViewFromImage(image)
    return Frame.of(image).to_physical(np.argwhere(grey > otsu(grey)).mean(axis=0)[::-1])  # ITK's Otsu varies a little


def _edges(image: sitk.Image) -> np.ndarray:
    """Size of the gradient less its mean, [z, y, x]: alike in scans of two modalities."""
    size = sitk.GetArrayFromImage(sitk.GradientMagnitude(image))
    return size - size.mean()


def _padded_shape(image: sitk.Image) -> list[int]:
    return [fft.next_fast_len(2 * n, real=True) for n in image.GetSize()[::-1]]


def _shift_by_edges(
    fixed: sitk.Image, moving: sitk.Image, edges: np.ndarray, matrix: np.ndarray, centre: np.ndarray, shift: np.ndarray
) -> np.ndarray:
    """The shift in mm at which the moving scan's edges, turned by a matrix, lie best on the fixed ones.

    By one cross-correlation (FFT) over all shifts; `edges` is the transform of the fixed ones, `shift` where to begin.
    """
    begin = sitk.AffineTransform(3)
    begin.SetCenter(centre.tolist())
    begin.SetMatrix(matrix.ravel().tolist())
    begin.SetTranslation(shift.tolist())
    turned = Frame.of(fixed).resample(moving, transform=begin)
    shape = _padded_shape(fixed)
    correlation = fft.irfftn(edges * np.conj(fft.rfftn(_edges(turned), shape)), shape)
    voxels = np.array(np.unravel_index(np.argmax(correlation), correlation.shape))
    voxels = np.where(voxels > np.array(shape) // 2, voxels - shape, voxels)[::-1]
    return shift - matrix @ Frame.of(fixed).matrix @ voxels


def _overlap(fixed: sitk.Image, moving: sitk.Image, transform: sitk.Transform) -> float:
    """How far what two scans show (images of 0 and 1) overlaps: share of the smaller one that lies in the other."""
    array, other = (sitk.GetArrayViewFromImage(image).T > 0 for image in (fixed, moving))
    shown = np.argwhere(array)
    places = Frame.of(fixed).to_physical(shown[:: max(1, len(shown) // PLACES)])
    matrix, centre = np.reshape(transform.GetMatrix(), (3, 3)), np.array(transform.GetCenter())
    led = (places - centre) @ matrix.T + centre + transform.GetTranslation()
    voxels = np.rint(Frame.of(moving).to_voxel(led)).astype(int)
    inside = ((voxels >= 0) & (voxels < other.shape)).all(axis=1)
    share = other[tuple(voxels[inside].T)].sum() / len(places)
    volume = len(shown) * np.prod(fixed.GetSpacing())
    other_volume = other.sum() * np.prod(moving.GetSpacing()) / np.linalg.det(matrix)
    return float(share * volume / min(volume, other_volume))


def _metric(fixed: _Level, moving: _Level) -> sitk.ImageRegistrationMethod:
    """Mutual information of what both show; the smaller the value, the more similar."""
    method = sitk.ImageRegistrationMethod()
    method.SetNumberOfThreads(1)  # the sums of several come in another order each time
    method.SetMetricAsMattesMutualInformation(BINS)
    method.SetMetricFixedMask(fixed.shown)
    method.SetMetricMovingMask(moving.shown)
    method.SetInterpolator(sitk.sitkLinear)
    share = SAMPLED / np.prod(fixed.image.GetSize())
    if share < 1:
        method.SetMetricSamplingStrategy(method.REGULAR)
        method.SetMetricSamplingPercentage(float(share), 1)
    return method


def _similarity(fixed: _Level, moving: _Level, transform: sitk.Transform) -> float:
    """Mutual information under a transform; the smaller the value, the more similar."""
    metric = _metric(fixed, moving)
    metric.SetMetricUseFixedImageGradientFilter(False)  # the value needs no gradients of whole images
    metric.SetMetricUseMovingImageGradientFilter(False)
    metric.SetInitialTransform(transform, inPlace=False)
    try:
        return metric.MetricEvaluate(fixed.image, moving.image)
    except RuntimeError:  # ITK's, where too little of the scans overlaps
        return 0.0


def _descend(fixed: _Level, moving: _Level, start: sitk.Transform, kind: str) -> _Found:
    """Improve a transform on one grid, as one of this kind."""
    transform = _map_of(start)
    if kind != "affine":
        transform = {"rigid": sitk.VersorRigid3DTransform, "similarity": sitk.Similarity3DTransform}[kind]()
        transform.SetCenter(start.GetCenter())
        transform.SetMatrix(start.GetMatrix())
        transform.SetTranslation(start.GetTranslation())
    method = _metric(fixed, moving)
    method.SetOptimizerAsRegularStepGradientDescent(
        1.0,
        1e-3,
        STEPS,
        relaxationFactor=0.6,
        gradientMagnitudeTolerance=1e-6,
    )
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetInitialTransform(transform, inPlace=True)
    try:
        method.Execute(fixed.image, moving.image)
    except RuntimeError:  # ITK's, where too little of the scans overlaps
        return _PARTED
    stretch = np.linalg.svd(np.reshape(transform.GetMatrix(), (3, 3)), compute_uv=False)
    if stretch.min() < STRETCH[0] or stretch.max() > STRETCH[1]:
        return _PARTED
    if _overlap(fixed.shown, moving.shown, transform) < LEAST_OVERLAP:
        return _PARTED
    return method.GetMetricValue(), transform


def _map_of(transform: sitk.Transform) -> sitk.AffineTransform:
    """A transform with a matrix, as an affine one, without the last digits, in which two runs may differ."""
    affine = sitk.AffineTransform(3)
    affine.SetCenter(np.round(transform.GetCenter(), 6).tolist())
    affine.SetMatrix(np.round(transform.GetMatrix(), 9).tolist())
    affine.SetTranslation(np.round(transform.GetTranslation(), 6).tolist())
    return affine
