import itertools

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage
from scipy.spatial.transform import Rotation

from data_util.scans.frame import Frame
from data_util.scans.images import to_array
from data_util.scans.pair_transform import PairTransform, resample_labels

SIZE = (14, 18, 11)


def oblique(size, spacing, origin, angles):
    return Frame(size, spacing, origin, tuple(Rotation.from_euler("zyx", angles, degrees=True).as_matrix().ravel()))


FIXED_SCAN = oblique((30, 26, 19), (1.1, 0.9, 2.4), (-20, 31, 100), (20, -8, 12))
MOVING_SCAN = oblique((28, 30, 21), (1.0, 1.3, 2.0), (5, -3, 50), (-15, 6, 3))


def pair(flips=(), amplitude=1.5, seed=0):
    """A transform between two oblique, anisotropic scans: affine and smooth parts, and the frames' flips."""
    rng = np.random.default_rng(seed)
    fixed = FIXED_SCAN.box((4, 3, 2), (25, 22, 16), SIZE).flipped(flips)
    moving = MOVING_SCAN.box((3, 4, 1), (24, 27, 18), SIZE).flipped(flips)
    matrix, shift = rng.normal(0, 0.06, (3, 3)), rng.normal(0, 1, 3)
    voxels = np.moveaxis(np.indices(SIZE), 0, -1)
    flow = (voxels - (np.array(SIZE) - 1) / 2) @ matrix.T + shift
    smooth = np.stack([ndimage.gaussian_filter(rng.normal(size=SIZE), 3) for _ in range(3)], axis=-1)
    flow += amplitude * smooth / np.abs(smooth).max()
    return PairTransform(fixed, moving, matrix.astype(np.float32), shift.astype(np.float32), flow.astype(np.float32))


def centres(frame):
    return frame.to_physical(np.moveaxis(np.indices(frame.size), 0, -1).reshape(-1, 3))


def scan_on(frame, seed=1):
    texture = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=frame.size), 2)
    return frame.put((texture * 1000).astype(np.float32))


@pytest.mark.parametrize("flips", [(), (0, 2)])
def test_voxels_of_the_fixed_frame_go_where_the_flow_says(flips):
    transform = pair(flips)
    voxels = np.moveaxis(np.indices(SIZE), 0, -1).reshape(-1, 3)
    found = transform.moving.to_voxel(transform.to_moving(transform.fixed.to_physical(voxels)))
    np.testing.assert_allclose(found, voxels + transform.flow.reshape(-1, 3), atol=1e-4)


def test_the_affine_part_is_an_itk_transform_that_knows_no_edge():
    transform = pair(amplitude=0)
    places = np.concatenate([centres(FIXED_SCAN), [[500, -300, 80]]])
    expected = [transform.affine.TransformPoint(place) for place in places]
    np.testing.assert_allclose(transform.to_moving(places), expected, atol=1e-3)
    # By hand, for one place outside the frame.
    centre = (np.array(SIZE) - 1) / 2
    voxel = transform.fixed.to_voxel([500, -300, 80])
    moved = (transform.matrix + np.eye(3)) @ (voxel - centre) + centre + transform.shift
    np.testing.assert_allclose(transform.affine.TransformPoint((500, -300, 80)), transform.moving.to_physical(moved))


def test_beyond_the_frame_the_rest_of_the_flow_repeats_its_edge():
    transform = pair()
    edge = transform.fixed.to_physical([[13.0, 7.3, 4.6]])
    beyond = transform.fixed.to_physical([[19.0, 7.3, 4.6]])
    rest = [transform.to_moving(p)[0] - transform.affine.TransformPoint(p[0]) for p in (edge, beyond)]
    assert np.abs(rest[0]).max() > 0.05
    np.testing.assert_allclose(rest[1], rest[0], atol=1e-5)


@pytest.mark.parametrize("flips", [(), (0, 2), (1,)])
def test_the_displacement_field_is_the_transform_at_every_voxel_of_the_scan(flips):
    transform = pair(flips)
    field = transform.displacement(FIXED_SCAN)
    assert field.shape == (*FIXED_SCAN.size, 3)
    places = centres(FIXED_SCAN)
    np.testing.assert_allclose(field.reshape(-1, 3), transform.to_moving(places) - places, atol=2e-4)


def test_a_field_on_a_frame_with_other_axes_is_refused():
    with pytest.raises(ValueError, match="not parallel"):
        pair().displacement(MOVING_SCAN)


def test_the_warped_scan_is_what_itks_resampler_makes_of_the_field():
    moving = scan_on(MOVING_SCAN)
    warped, field = pair().warp(moving, FIXED_SCAN)
    assert Frame.of(warped) == Frame.of(field) == FIXED_SCAN
    through = sitk.DisplacementFieldTransform(sitk.Cast(field, sitk.sitkVectorFloat64))
    lowest = float(to_array(moving).min())
    expected = to_array(FIXED_SCAN.resample(moving, outside=lowest, transform=through))
    assert np.mean(expected != lowest) > 0.3
    np.testing.assert_allclose(to_array(warped), expected, atol=1e-3)
    outside, _ = pair().warp(moving, FIXED_SCAN, outside=-7)
    np.testing.assert_array_equal(to_array(outside)[expected == lowest], -7)


def test_whole_numbers_are_rounded():
    moving = sitk.Cast(scan_on(MOVING_SCAN), sitk.sitkInt16)
    warped, _ = pair().warp(moving, FIXED_SCAN)
    exact, _ = pair().warp(sitk.Cast(moving, sitk.sitkFloat32), FIXED_SCAN)
    assert warped.GetPixelID() == sitk.sitkInt16
    assert np.abs(to_array(warped) - to_array(exact)).max() <= 0.5


def test_the_warped_scan_agrees_with_an_independent_reading():
    transform, moving = pair(), scan_on(MOVING_SCAN)
    warped, _ = transform.warp(moving, FIXED_SCAN)
    voxels = MOVING_SCAN.to_voxel(transform.to_moving(centres(FIXED_SCAN)))
    expected = ndimage.map_coordinates(to_array(moving), voxels.T, order=1, mode="nearest")
    inside = np.all((voxels >= 0) & (voxels <= np.subtract(MOVING_SCAN.size, 1)), axis=1)
    assert inside.mean() > 0.3
    np.testing.assert_allclose(to_array(warped).ravel()[inside], expected[inside], atol=0.5)


def test_points_led_there_and_back_are_where_they_were():
    transform = pair()
    places = centres(FIXED_SCAN)[::37]
    back, error = transform.to_fixed(transform.to_moving(places))
    np.testing.assert_allclose(back, places, atol=1e-3)
    assert error.max() < 1e-3


def test_points_agree_with_itks_transform_of_the_field():
    transform = pair()
    _, field = transform.warp(scan_on(MOVING_SCAN), FIXED_SCAN)
    through = sitk.DisplacementFieldTransform(sitk.Cast(field, sitk.sitkVectorFloat64))
    places = centres(FIXED_SCAN).reshape(*FIXED_SCAN.size, 3)[2:-2:3, 1:-1:4, 3:-3:2].reshape(-1, 3)
    expected = [through.TransformPoint(place) for place in places]
    np.testing.assert_allclose(transform.to_moving(places), expected, atol=1e-3)


def test_where_the_inverse_does_not_settle_its_error_tells():
    transform = pair(amplitude=0)
    x = np.arange(SIZE[0])[:, None, None, None]
    steep = (transform.flow + 3.0 * (x - 6) * (1, 0, 0)).astype(np.float32)
    stretched = PairTransform(transform.fixed, transform.moving, transform.matrix, transform.shift, steep)
    places = centres(transform.fixed)[::50]
    _, error = stretched.to_fixed(stretched.to_moving(places))
    assert np.median(error) > 1


def test_labels_are_carried_by_nearest_voxel():
    transform = pair()
    _, field = transform.warp(scan_on(MOVING_SCAN), FIXED_SCAN)
    array = np.random.default_rng(3).integers(0, 4, MOVING_SCAN.size).astype(np.uint8) * 50
    carried = to_array(resample_labels(MOVING_SCAN.put(array), field))
    voxels = MOVING_SCAN.to_voxel(centres(FIXED_SCAN) + np.moveaxis(to_array_of_vectors(field), 0, -1).reshape(-1, 3))
    nearest = np.rint(voxels).astype(int)
    inside = np.all((nearest >= 0) & (nearest < MOVING_SCAN.size), axis=1)
    expected = np.where(inside, array[tuple(np.clip(nearest, 0, np.subtract(MOVING_SCAN.size, 1)).T)], 0)
    assert set(np.unique(carried)) == {0, 50, 100, 150}
    assert np.mean(carried.ravel() != expected) < 1e-3


def to_array_of_vectors(field):
    return np.moveaxis(np.swapaxes(sitk.GetArrayFromImage(field), 0, 2), -1, 0)


@pytest.mark.parametrize("oblique_too", [False, True])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("flips", list(itertools.product((False, True), repeat=3)))
def test_a_scan_is_warped_onto_the_voxels_of_its_own_file_in_every_orientation(order, flips, oblique_too):
    """The 48 ways to lay out a file's axes: array by array, what is in the file is what a plain reading gives."""
    rng = np.random.default_rng(0)
    frame = oblique((9, 8, 7), (1.2, 1.0, 1.6), (-4, 6, 9), (12, -8, 5) if oblique_too else (0, 0, 0))
    moving = oblique((12, 11, 10), (1.0, 1.1, 1.3), (-5, 5, 7), (3, 2, -4))
    scan = moving.put(rng.uniform(0, 100, moving.size).astype(np.float32))
    matrix, shift = rng.normal(0, 0.03, (3, 3)), rng.normal(0, 0.5, 3)
    transform = PairTransform(frame, moving, matrix, shift, rng.normal(0, 0.5, (*frame.size, 3)).astype(np.float32))
    on_frame = to_array(transform.warp(scan, frame)[0])
    file_frame = frame.permuted(order).flipped(np.flatnonzero(flips))
    warped, field = transform.warp(scan, file_frame)
    assert Frame.of(warped) == Frame.of(field) == file_frame

    def as_in_file(array):
        return np.flip(array.transpose(*order, *range(3, array.ndim)), np.flatnonzero(flips))

    np.testing.assert_allclose(to_array(warped), as_in_file(on_frame), atol=2e-3)
    vectors = sitk.GetArrayFromImage(field).transpose(2, 1, 0, 3)
    expected = sitk.GetArrayFromImage(transform.warp(scan, frame)[1]).transpose(2, 1, 0, 3)
    np.testing.assert_allclose(vectors, as_in_file(expected), atol=1e-4)
