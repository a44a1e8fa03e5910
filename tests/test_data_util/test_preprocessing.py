import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from data_util.preprocessing import Crop, crop_box, crop_to_mask, resize, window
from errors import UserError


def ramp(size):
    x, y, z = np.indices(size, dtype=np.float32)
    return 3 * x + 5 * y + 7 * z


def test_window_maps_its_ends_to_0_and_255_and_cuts_fractions_off():
    values = np.array([-2000, -25, -24, 119, 120, 264, 265, 3000], dtype=np.int16)
    assert window(values).dtype == np.uint8
    np.testing.assert_array_equal(window(values), [0, 0, 0, 126, 127, 254, 255, 255])  # 0.88, 126.6, 127.5 and 254.1
    np.testing.assert_array_equal(window([0.0, 49.9, 100.0], level=50, width=100), [0, 127, 255])


@pytest.mark.parametrize("width", [0, -5, float("nan")])
def test_a_window_without_width_is_refused(width):
    with pytest.raises(UserError, match="width"):
        window(np.zeros(3), width=width)


def test_the_box_is_the_masks_with_a_tenth_or_five_voxels_around():
    mask = np.zeros((120, 60, 30), bool)
    mask[20, 30, 12] = mask[89, 33, 4] = True  # 70 long along x, 4 along y, 9 along z
    low, high = crop_box(mask)
    np.testing.assert_array_equal(low, [13, 25, 0])
    np.testing.assert_array_equal(high, [97, 39, 18])
    low, high = crop_box(mask, margin=0, minimum=0)
    np.testing.assert_array_equal(low, [20, 30, 4])
    np.testing.assert_array_equal(high, [90, 34, 13])


def test_the_box_stays_within_the_volume():
    mask = np.ones((7, 9, 8), np.uint8)
    low, high = crop_box(mask)
    np.testing.assert_array_equal(low, 0)
    np.testing.assert_array_equal(high, mask.shape)


def test_an_empty_mask_is_refused():
    with pytest.raises(UserError, match="mask is empty"):
        crop_box(np.zeros((4, 4, 4)))


@settings(max_examples=30, deadline=None)
@given(st.tuples(*[st.integers(2, 9)] * 3), st.tuples(*[st.integers(2, 12)] * 3))
def test_resize_keeps_the_corners_and_linear_functions(old, new):
    resized = resize(ramp(old), new)
    assert resized.shape == new
    places = np.meshgrid(*[np.linspace(0, n - 1, m) for n, m in zip(old, new, strict=True)], indexing="ij")
    np.testing.assert_allclose(resized, 3 * places[0] + 5 * places[1] + 7 * places[2], atol=1e-3)


def test_resize_agrees_with_an_independent_reading_and_keeps_labels():
    volume = np.random.default_rng(0).integers(0, 9, (7, 10, 5)).astype(np.uint8)
    places = np.meshgrid(
        *[np.linspace(0, n - 1, m) for n, m in zip(volume.shape, (12, 6, 8), strict=True)], indexing="ij"
    )
    np.testing.assert_allclose(
        resize(volume.astype(np.float32), (12, 6, 8)),
        ndimage.map_coordinates(volume.astype(float), places, order=1),
        atol=1e-4,
    )
    labels = resize(volume, (12, 6, 8), order=0)
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, ndimage.map_coordinates(volume, places, order=0))
    np.testing.assert_array_equal(resize(volume, volume.shape, order=0), volume)


def test_a_crop_shows_the_scan_at_the_mapped_places():
    scan = ramp((40, 30, 50)) - 25
    mask = np.zeros(scan.shape, np.uint8)
    mask[12:22, 8:20, 20:28] = 3 * np.random.default_rng(0).integers(0, 2, (10, 12, 8))
    mask[12, 8, 20] = mask[21, 19, 27] = 3
    crop = crop_to_mask(scan, mask, (24, 16, 32), level=300, width=1000)
    assert crop.volume.shape == crop.mask.shape == (24, 16, 32)
    assert set(np.unique(crop.mask)) == {0, 255}
    np.testing.assert_array_equal(crop.low, [7, 3, 15])
    np.testing.assert_array_equal(crop.high, [27, 25, 33])
    voxels = np.array([[0, 0, 0], [23, 15, 31], [11, 4, 20], [3, 9, 1]])
    places = crop.to_scan(voxels)
    np.testing.assert_allclose(places[0], crop.low)
    np.testing.assert_allclose(places[1], crop.high - 1)
    grey = 3 * places[:, 0] + 5 * places[:, 1] + 7 * places[:, 2] - 25
    # The scan is cut off at whole grey values, so the crop is at most one below.
    below = (grey + 200) * 255 / 1000 - crop.volume[tuple(voxels.T)]
    assert np.all((below > -1e-2) & (below < 1 + 1e-2))
    nearest = np.rint(crop.to_scan(np.argwhere(np.ones(crop.mask.shape)))).astype(int)
    np.testing.assert_array_equal(crop.mask.ravel() > 0, mask[tuple(nearest.T)] > 0)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_mapping_points_there_and_back_changes_nothing(data):
    low = np.array(data.draw(st.tuples(*[st.integers(0, 50)] * 3)))
    high = low + data.draw(st.tuples(*[st.integers(2, 100)] * 3))
    crop = Crop(np.zeros(data.draw(st.tuples(*[st.integers(2, 40)] * 3))), None, low, high)
    points = np.array(data.draw(st.lists(st.tuples(*[st.floats(-50, 200)] * 3), min_size=1, max_size=4)))
    np.testing.assert_allclose(crop.to_scan(crop.to_crop(points)), points, atol=1e-9)


def test_step_gives_the_crops_spacing():
    crop = Crop(np.zeros((11, 21, 41)), None, np.array([5, 0, 2]), np.array([26, 11, 43]))
    np.testing.assert_allclose(crop.step * np.array([3, 2, 1]), [6, 1, 1])


def test_grey_values_are_interpolated_before_they_are_clipped():
    scan = np.full((13, 12, 12), -1000.0)
    scan[6:] = 1000.0
    mask = np.ones(scan.shape, np.uint8)
    crop = crop_to_mask(scan, mask, (25, 12, 12), level=0, width=4000)
    assert crop.volume[11, 5, 5] == window([0.0], 0, 4000)[0]
    assert crop_to_mask(scan, mask, (25, 12, 12), level=800, width=100).volume[11, 5, 5] == 0


@pytest.mark.parametrize(
    ("shape", "mask_shape", "size", "message"),
    [
        ((8, 8, 8), (8, 8, 7), (8, 8, 8), "same grid"),
        ((8, 8, 1), (8, 8, 1), (8, 8, 8), "at least 2"),
        ((8, 8, 8), (8, 8, 8), (8, 1, 8), "at least 2"),
    ],
)
def test_what_cannot_be_cropped_is_refused(shape, mask_shape, size, message):
    with pytest.raises(UserError, match=message):
        crop_to_mask(np.zeros(shape), np.ones(mask_shape), size)
