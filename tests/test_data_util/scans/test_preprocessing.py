import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from data_util.scans.frame import Frame
from data_util.scans.images import to_array
from data_util.scans.preprocessing import (
    FITTING,
    LEAST_SIDE,
    crop_box,
    crop_frame,
    find_frame,
    find_region,
    fitting_size,
    prepare,
    smoothed_for,
    window,
)
from data_util.scans.view import PRESETS, View
from errors import UserError

TILTED = (0.8, -0.6, 0, 0.6, 0.8, 0, 0, 0, 1)
SPACING, ORIGIN = (0.9, 1.4, 2.5), (-40, 12, 300)


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


def test_the_margin_is_of_whole_voxels_as_in_the_original():
    mask = np.zeros((100, 100, 100), bool)
    mask[20:78, 20:79, 20:80] = True  # a tenth of 58, 59 and 60 voxels
    low, high = crop_box(mask)
    np.testing.assert_array_equal(low, [15, 15, 14])
    np.testing.assert_array_equal(high, [83, 84, 86])


def test_an_empty_mask_is_refused():
    with pytest.raises(UserError, match="mask is empty"):
        crop_box(np.zeros((4, 4, 4)))


def volume_of(scan, frame, view):
    return prepare(scan, frame, view)[0]


def scan_of(array, direction=TILTED):
    """An anisotropic, oblique scan."""
    return Frame(array.shape, SPACING, ORIGIN, direction).put(array)


@pytest.mark.parametrize("size", [(24, 16, 32), (9, 30, 14)])
def test_a_crop_shows_the_scan_at_its_frames_places(size):
    scan = scan_of((ramp((40, 30, 50)) - 25).astype(np.float32))
    mask = np.zeros(scan.GetSize(), bool)
    mask[12, 8, 20] = mask[21, 19, 27] = True
    frame = crop_frame(scan, mask, size)
    assert frame.size == size
    # From the centre of voxel (7, 3, 15) to that of (26, 24, 32), whatever the size.
    corners = Frame.of(scan).to_voxel(frame.to_physical([(0, 0, 0), np.subtract(size, 1)]))
    np.testing.assert_allclose(corners, [[7, 3, 15], [26, 24, 32]], atol=1e-9)
    volume = volume_of(scan, frame, View(window=(300, 1000)))
    assert volume.dtype == np.uint8
    places = np.meshgrid(*[np.linspace(*ends, n) for ends, n in zip(corners.T, size, strict=True)], indexing="ij")
    grey = 3 * places[0] + 5 * places[1] + 7 * places[2] - 25
    # Cut off at whole grey values, so at most one below.
    below = (grey + 200) * 255 / 1000 - volume
    assert np.all((below > -1e-2) & (below < 1 + 1e-2))


def test_a_prepared_volume_agrees_with_an_independent_reading():
    array = np.random.default_rng(0).integers(-100, 300, (17, 20, 15)).astype(np.int16)
    mask = np.zeros(array.shape, bool)
    mask[6:9, 8:12, 6:9] = True
    frame = crop_frame(scan_of(array), mask, (12, 26, 18))
    box = array[1:14, 3:17, 1:14].astype(np.float32)
    expected = ndimage.zoom(box, np.divide((12, 26, 18), box.shape), order=1, mode="nearest", grid_mode=False)
    difference = window(expected).astype(int) - volume_of(scan_of(array), frame, PRESETS["liver"])
    assert np.abs(difference).max() <= 1
    assert np.mean(difference != 0) < 1e-3


def test_grey_values_are_interpolated_before_they_are_clipped():
    array = np.full((13, 12, 12), -1000, np.int16)
    array[6:] = 1000
    scan = scan_of(array)
    frame = crop_frame(scan, np.ones(array.shape, bool), (25, 12, 12))
    assert volume_of(scan, frame, View(window=(0, 4000)))[11, 5, 5] == window([0.0], 0, 4000)[0]
    assert volume_of(scan, frame, View(window=(800, 100)))[11, 5, 5] == 0


@pytest.mark.parametrize(
    ("size", "spacing", "fewest", "most"),
    [
        ((60, 40, 50), (2.0, 1.5, 1.0), FITTING[0], FITTING[0]),  # few voxels: as many as the least
        ((170, 130, 110), (1.0, 1.1, 1.2), 170 * 130 * 110, 170 * 130 * 110),  # its own
        ((512, 512, 60), (0.7, 0.7, 5.0), FITTING[1], FITTING[1]),
    ],
)
def test_a_fitting_size_has_voxels_as_long_as_wide_and_high(size, spacing, fewest, most):
    scan = sitk.Image(size, sitk.sitkUInt8)
    scan.SetSpacing(spacing)
    found = fitting_size(scan, View())
    sides = np.multiply(spacing, np.subtract(size, 1)) / np.subtract(found, 1)
    assert np.ptp(sides) < 0.02 * sides.mean()
    assert 0.95 * fewest < np.prod(found) < 1.05 * most


def test_a_fitting_size_follows_the_region_the_spacing_and_the_least_side():
    scan = sitk.Image((60, 50, 40), sitk.sitkUInt8)
    region = np.zeros(scan.GetSize(), bool)
    region[20:40, 10:40, 5:35] = True  # the box is 30 x 40 x 40 voxels
    assert fitting_size(scan, View(spacing=(0.5, 0.3, 0.6)), region) == (59, 131, 66)
    assert fitting_size(scan, View(spacing=(2.0, 2.0, 2.0))) == (LEAST_SIDE, LEAST_SIDE, LEAST_SIDE)


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
        crop_frame(scan_of(np.zeros(shape)), np.ones(mask_shape, bool), size)


def test_a_mask_decides_the_frame_whatever_the_kind():
    scan = scan_of(ramp((30, 28, 26)))
    mask = np.zeros(scan.GetSize(), bool)
    mask[10:14, 9:12, 8:15] = True
    frames = {find_frame(scan, view, (16, 12, 20), mask) for view in PRESETS.values()}
    assert frames == {crop_frame(scan, mask, (16, 12, 20))}
    assert find_frame(scan, View(), (30, 28, 26)) == Frame.of(scan).box((0, 0, 0), (30, 28, 26), (30, 28, 26))


def test_each_kind_has_its_grey_values():
    array = np.linspace(-1000, 3000, 4001, dtype=np.float32)[:4000].reshape(20, 20, 10)
    scan = scan_of(array)
    frame = Frame.of(scan)
    np.testing.assert_array_equal(volume_of(scan, frame, PRESETS["liver"]), window(array, 120, 290))
    np.testing.assert_array_equal(volume_of(scan, frame, PRESETS["body"]), window(array, 40, 400))
    np.testing.assert_allclose(volume_of(scan, frame, PRESETS["none"]), (array + 1000) * 255 / 3999, atol=1.01)
    brain = volume_of(scan, frame, PRESETS["brain"])
    low, high = np.quantile(array, (0.01, 0.99))
    np.testing.assert_allclose(brain, np.clip((array - low) * 255 / (high - low), 0, 255), atol=1.01)
    published = np.random.default_rng(0).integers(3, 250, (6, 5, 4)).astype(np.uint8)
    kept = scan_of(published)
    np.testing.assert_array_equal(volume_of(kept, Frame.of(kept), PRESETS["none"]), published)


@pytest.mark.parametrize("kind", ["none", "brain"])
def test_a_scan_in_which_nothing_can_be_seen_is_refused(kind):
    scan = scan_of(np.full((6, 5, 4), -7, np.int16))
    with pytest.raises(UserError, match="-7 everywhere"):
        prepare(scan, Frame.of(scan), PRESETS[kind])


def test_noise_is_averaged_where_voxels_grow():
    noise = np.random.default_rng(0).normal(0, 100, (64, 60, 56)).astype(np.float32)
    scan = scan_of(noise)
    frame = find_frame(scan, View(), (16, 15, 14))
    # A mean over blocks of 4^3 voxels would leave 12.5; reading single voxels leaves about 60.
    assert np.std(to_array(frame.resample(smoothed_for(scan, frame)))) < 12.5
    assert np.std(to_array(frame.resample(scan))) > 40


def test_smoothing_moves_nothing_and_stops_at_finer_axes():
    scan = scan_of(ramp((40, 30, 50)))
    mask = np.zeros(scan.GetSize(), bool)
    mask[12:30, 8:20, 20:40] = True
    frame = crop_frame(scan, mask, (8, 40, 9))
    smooth = smoothed_for(scan, frame)
    np.testing.assert_allclose(to_array(frame.resample(smooth)), to_array(frame.resample(scan)), rtol=1e-4)
    step = scan_of(np.repeat(np.arange(20) % 2, 30 * 50).reshape(20, 30, 50).astype(np.float32))
    fine = find_frame(step, View(), (40, 15, 25))
    np.testing.assert_array_equal(to_array(smoothed_for(step, fine)), to_array(step))  # x is as fine as it was


def test_the_liver_is_sampled_as_the_original_does():
    noise = np.random.default_rng(0).normal(100, 30, (40, 36, 32)).astype(np.float32)
    scan = scan_of(noise)
    frame = find_frame(scan, View(), (10, 9, 8))
    np.testing.assert_array_equal(volume_of(scan, frame, PRESETS["liver"]), window(to_array(frame.resample(scan))))


def test_percentiles_are_of_the_scans_own_voxels():
    inner = np.random.default_rng(0).uniform(100, 200, (12, 12, 12)).astype(np.float32)
    inner[0, 0, 0] = -500  # what surrounds the scan looks like this
    scan = scan_of(inner)
    view = View(percentiles=(1, 99), spacing=SPACING)
    frame = find_frame(scan, view, (24, 24, 24))  # the scan fills an eighth of it
    _, (level, width) = prepare(scan, frame, view)
    assert 100 < level - width / 2 < 130
    assert 170 < level + width / 2 < 200


def test_a_frame_has_the_orientation_of_its_view():
    scan = scan_of(ramp((20, 18, 22)))
    frame, turned = (find_frame(scan, View(orientation), (10, 9, 11)) for orientation in ("LPS", "RPI"))
    view = View(window=(0, 4000))
    assert frame != turned
    np.testing.assert_array_equal(volume_of(scan, frame, view)[::-1, :, ::-1], volume_of(scan, turned, view))


def test_a_mask_is_asked_for_where_volumes_are_cropped_to_one():
    with pytest.raises(UserError, match="give the mask"):
        find_region(scan_of(ramp((6, 6, 6))), "mask")
