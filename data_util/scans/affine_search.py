"""The affine map between two scans, found by their grey values alone and from any start; no network is needed.

Both scans are compared on grids of 8, 4 and 2 mm. On the coarsest one the moving scan is tried in 53 rotations of up to
50 degrees, each at two places: where the centres of mass meet, and where the edges of both scans overlap best. The most
similar of these are improved by descent, and the winner goes on to the finer grids. Similarity is mutual information
(Mattes et al., 2003), so the two scans may be of different modalities. A scan is never mirrored.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import SimpleITK as sitk
from numpy.typing import ArrayLike
from scipy import fft
from scipy.spatial.transform import Rotation

from data_util.scans.frame import Frame
from errors import UserError

KINDS = ("rigid", "similarity", "affine")
GRIDS = (8.0, 4.0, 2.0)  # mm
SAMPLED = (1.0, 0.5, 0.15)  # share of the voxels of each grid that is compared
STEPS = (60, 100, 50)  # of descent on each grid, at most
PERCENTILES = (1, 99.5)  # of the grey values; what lies beyond is clipped
BINS = 32  # of the joint histogram, per scan
ANGLES = (25, 50)  # degrees, about each of 26 axes
SCALES = (0.7, 1.4)  # of the moving scan, at most
FINALISTS = (10, 3, 1)  # how many of the starts, and then of what became of them, are improved on each grid
LEAST_SIMILARITY = 1e-3  # mutual information in nats
LEAST_OVERLAP = 0.25  # share of the fixed scan that must lie in the moving scan


def find_affine(fixed: sitk.Image, moving: sitk.Image, kind: str = "affine") -> sitk.AffineTransform:
    """Find the affine map from places in a fixed scan to the same anatomy in a moving scan.

    Takes 3 to 7 seconds on two cores, whatever the size of the scans: only the first smoothing depends on it.

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
    starts = sorted(_starts(fixed_grids[0], moving_grids[0], kind), key=lambda start: start[0])[: FINALISTS[0]]
    first = "rigid" if kind == "rigid" else "similarity"
    found = [_descend(fixed_grids[0], moving_grids[0], transform, first, 0) for _, transform in starts]
    found = sorted((result for result in found if result[0] < -LEAST_SIMILARITY), key=lambda result: result[0])
    if not found:
        raise UserError("no affine map found: the scans have nothing in common; do they show the same body part?")
    for level in range(1, len(GRIDS)):
        finer = [
            _descend(fixed_grids[level], moving_grids[level], t, kind, level) for _, t in found[: FINALISTS[level]]
        ]
        # Where descent leaves the scan on a finer grid, what the coarser one found stays.
        found = sorted((result for result in finer if result[0] < 0), key=lambda result: result[0]) or found
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
    found = find_affine(*images, kind)
    matrix = np.linalg.solve(frames[1].matrix, np.reshape(found.GetMatrix(), (3, 3)) @ frames[0].matrix)
    middle = np.subtract(volumes[0].shape, 1) / 2
    led = frames[1].to_voxel(found.TransformPoint(frames[0].to_physical(middle).tolist()))
    return matrix - np.eye(3), led - middle


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
        images = [_on_grids(frame.put(np.asarray(volume, np.float32)))[0] for volume in (fixed, warped)]
        starts = sorted(_starts(images[0], images[1], "rigid"), key=lambda start: start[0])[: FINALISTS[1]]
    except UserError:  # nothing to see
        return 0.0, 0.0
    metric = _metric(1.0)
    metric.SetInitialTransform(sitk.AffineTransform(3), inPlace=False)
    now = metric.MetricEvaluate(*images)
    similarity, found = min(
        (_descend(images[0], images[1], start, "rigid", 0) for _, start in starts), key=lambda result: result[0]
    )
    if found is None or similarity > 1.1 * now:  # both are negative
        return 0.0, 0.0
    matrix = np.reshape(found.GetMatrix(), (3, 3))
    centre = frame.to_physical(np.subtract(frame.size, 1) / 2)
    shift = np.linalg.norm(np.array(found.TransformPoint(centre.tolist())) - centre)
    return float(np.rad2deg(np.arccos(np.clip((np.trace(matrix) - 1) / 2, -1, 1)))), float(shift)


def _on_grids(image: sitk.Image) -> list[sitk.Image]:
    """A scan on isotropic grids of about `GRIDS` mm, its grey values clipped and mapped to 0..255."""
    levels = [sitk.Cast(image, sitk.sitkFloat32)]
    for mm in reversed(GRIDS):
        levels.insert(0, _shrunk(levels[0], mm))
    low, high = (float(value) for value in np.percentile(sitk.GetArrayViewFromImage(levels[-2]), PERCENTILES))
    if low == high:
        raise UserError(f"a scan is {low:g} nearly everywhere, so nothing can be found in it; look at the file")
    return [sitk.IntensityWindowing(level, low, high, 0.0, 255.0) for level in levels[:-1]]


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


def _starts(fixed: sitk.Image, moving: sitk.Image, kind: str) -> Iterator[tuple[float, sitk.Transform]]:
    """For every rotation the better of its places: (similarity, the smaller the better; transform)."""
    (centre, volume), (target, other_volume) = _centre_of_mass(fixed), _centre_of_mass(moving)
    scales = {1.0} if kind == "rigid" else {1.0, float(np.clip((other_volume / volume) ** (1 / 3), *SCALES))}
    edges = fft.rfftn(_edges(fixed), _padded_shape(fixed))
    metric = _metric(1.0)
    for rotation, scale in itertools.product(_rotations(), sorted(scales)):
        tried = []
        by_mass = target - centre
        for shift in (by_mass, _shift_by_edges(fixed, moving, edges, scale * rotation, centre, by_mass)):
            start = sitk.Similarity3DTransform(scale, (0, 0, 0, 1), shift.tolist(), centre.tolist())
            start.SetMatrix((scale * rotation).ravel().tolist())
            if _overlap(fixed, moving, start) >= LEAST_OVERLAP:
                metric.SetInitialTransform(start, inPlace=False)
                tried.append((metric.MetricEvaluate(fixed, moving), start))
        if tried:
            yield min(tried, key=lambda item: item[0])


def _rotations() -> list[np.ndarray]:
    """The rotations to start from, matrices [3, 3]: none, and ANGLES about 26 axes."""
    axes = [np.divide(a, np.linalg.norm(a)) for a in itertools.product((-1, 0, 1), repeat=3) if any(a)]
    turns = [Rotation.from_rotvec(np.deg2rad(angle) * axis).as_matrix() for angle in ANGLES for axis in axes]
    return [np.eye(3), *turns]


def _centre_of_mass(image: sitk.Image) -> tuple[np.ndarray, float]:
    """Centre [3] in mm and volume of what is bright (Otsu's threshold)."""
    bright = sitk.GetArrayViewFromImage(sitk.OtsuThreshold(image, 0, 1)) > 0
    centre = np.argwhere(bright).mean(axis=0)[::-1]
    volume = bright.sum() * np.prod(image.GetSpacing())
    return Frame.of(image).to_physical(centre), float(volume)


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
    """Share of the fixed scan's box that lies in the moving scan's box."""
    frame, matrix = Frame.of(fixed), np.reshape(transform.GetMatrix(), (3, 3))
    axes = [(np.arange(8) + 0.5) / 8 * n - 0.5 for n in frame.size]
    places = frame.to_physical(np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3))
    centre = np.array(transform.GetCenter())
    voxels = Frame.of(moving).to_voxel((places - centre) @ matrix.T + centre + transform.GetTranslation())
    return float(((voxels > -0.5) & (voxels < np.array(moving.GetSize()) - 0.5)).all(axis=1).mean())


def _metric(share: float) -> sitk.ImageRegistrationMethod:
    """Mutual information over so large a share of the fixed voxels; the smaller the value, the more similar."""
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(BINS)
    method.SetInterpolator(sitk.sitkLinear)
    if share < 1:
        method.SetMetricSamplingStrategy(method.REGULAR)
        method.SetMetricSamplingPercentage(share, 1)
    return method


def _descend(
    fixed: sitk.Image, moving: sitk.Image, start: sitk.Transform, kind: str, level: int
) -> tuple[float, sitk.Transform]:
    """Improve a transform on one grid: (similarity, transform of this kind); (0, start) where the scans part."""
    transform = _map_of(start)
    if kind != "affine":
        transform = {"rigid": sitk.VersorRigid3DTransform, "similarity": sitk.Similarity3DTransform}[kind]()
        transform.SetCenter(start.GetCenter())
        transform.SetMatrix(start.GetMatrix())
        transform.SetTranslation(start.GetTranslation())
    method = _metric(SAMPLED[level])
    method.SetOptimizerAsRegularStepGradientDescent(
        GRIDS[level] / (8 if level == 0 else 4),
        1e-3,
        STEPS[level],
        relaxationFactor=0.6,
        gradientMagnitudeTolerance=1e-6,
    )
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetInitialTransform(transform, inPlace=True)
    try:
        method.Execute(fixed, moving)
    except RuntimeError:  # ITK's, where too little of the scans overlaps
        return 0.0, start
    if _overlap(fixed, moving, transform) < LEAST_OVERLAP:
        return 0.0, start
    return method.GetMetricValue(), transform


def _map_of(transform: sitk.Transform) -> sitk.AffineTransform:
    """A transform with a matrix, as an affine one."""
    affine = sitk.AffineTransform(3)
    affine.SetCenter(transform.GetCenter())
    affine.SetMatrix(transform.GetMatrix())
    affine.SetTranslation(transform.GetTranslation())
    return affine
