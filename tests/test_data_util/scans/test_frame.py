import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from data_util.scans.frame import Frame
from data_util.scans.images import to_array


def oblique(size=(9, 12, 7), spacing=(0.7, 1.2, 3.1), origin=(-30.0, 14.0, 250.0), angles=(25, -10, 5)):
    return Frame(size, spacing, origin, tuple(Rotation.from_euler("zyx", angles, degrees=True).as_matrix().ravel()))


def test_places_are_those_of_itk():
    frame = oblique()
    image = frame.put(np.zeros(frame.size, np.float32))
    assert Frame.of(image) == frame
    for voxel in [(0, 0, 0), (8, 11, 6), (2, 5, 1)]:
        np.testing.assert_allclose(frame.to_physical(voxel), image.TransformIndexToPhysicalPoint(voxel), atol=1e-9)
    place = (-27.5, 20.25, 260.0)
    np.testing.assert_allclose(frame.to_voxel(place), image.TransformPhysicalPointToContinuousIndex(place), atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.tuples(*[st.floats(-180, 180)] * 3), st.tuples(*[st.floats(0.2, 5)] * 3), st.integers(0, 99))
def test_to_voxel_is_the_inverse_of_to_physical(angles, spacing, seed):
    frame = oblique(spacing=spacing, angles=angles)
    points = np.random.default_rng(seed).uniform(-500, 500, (6, 3))
    np.testing.assert_allclose(frame.to_physical(frame.to_voxel(points)), points, atol=1e-8)
    np.testing.assert_allclose(frame.to_voxel(frame.to_physical(points)), points, atol=1e-8)


@pytest.mark.parametrize("size", [(5, 4, 6), (15, 3, 2), (30, 31, 32)])
def test_a_box_has_its_corners_where_the_scans_voxels_are(size):
    frame = oblique()
    box = frame.box((2, 0, 1), (8, 5, 7), size)
    assert box.size == size
    corners = frame.to_voxel(box.to_physical([(0, 0, 0), np.subtract(size, 1)]))
    np.testing.assert_allclose(corners, [(2, 0, 1), (7, 4, 6)], atol=1e-9)


@pytest.mark.parametrize("axes", [(), (0,), (0, 2), (0, 1, 2)])
def test_a_flipped_frame_has_the_same_voxels_in_the_other_order(axes):
    frame = oblique()
    array = np.random.default_rng(0).integers(0, 99, frame.size).astype(np.int16)
    flipped = frame.flipped(axes)
    np.testing.assert_allclose(flipped.flipped(axes).matrix, frame.matrix)
    np.testing.assert_allclose(flipped.flipped(axes).origin, frame.origin, atol=1e-9)
    image = frame.put(array)
    np.testing.assert_array_equal(to_array(flipped.resample(image, nearest=True)), np.flip(array, axes))
    np.testing.assert_array_equal(to_array(frame.resample(flipped.put(np.flip(array, axes)), nearest=True)), array)


def test_vectors_are_put_with_their_parts_in_order():
    frame = oblique()
    array = np.random.default_rng(0).normal(size=(*frame.size, 3)).astype(np.float32)
    image = frame.put(array)
    assert image.GetNumberOfComponentsPerPixel() == 3
    np.testing.assert_array_equal(image[3, 10, 2], array[3, 10, 2])


def test_resampling_reads_places_and_knows_an_outside():
    frame = oblique()
    x, y, z = np.indices(frame.size, dtype=np.float32)
    image = frame.put(3 * x + 5 * y + 7 * z)
    box = frame.box((1, 2, 0), (7, 9, 6), (10, 5, 8))
    voxels = frame.to_voxel(box.to_physical(np.moveaxis(np.indices(box.size), 0, -1).reshape(-1, 3)))
    np.testing.assert_allclose(to_array(box.resample(image)).ravel(), voxels @ (3, 5, 7), atol=1e-3)
    shift = sitk.TranslationTransform(3, tuple(frame.matrix @ (2, 0, 0)))
    moved = to_array(frame.resample(image, outside=-1, transform=shift))
    np.testing.assert_allclose(moved[:7], to_array(image)[2:], atol=1e-3)
    np.testing.assert_array_equal(moved[7:], -1)
