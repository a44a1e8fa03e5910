import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from data_util.scans.carrying import carry_image, is_label_image
from data_util.scans.frame import Frame, cast_rounded
from data_util.scans.images import to_array
from errors import UserError

FRAME = Frame((12, 10, 8), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))


def smooth(seed=0, size=FRAME.size):
    return ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=size), 2)


def test_labels_are_told_from_grey_values():
    rank = smooth(size=(30, 30, 20))
    labels = np.digitize(rank, np.quantile(rank, [0.2, 0.5, 0.8])).astype(np.int16)
    for values in (labels, labels * 1000, (labels > 1).astype(np.uint8) * 255):
        assert is_label_image(FRAME.put(values))
    noisy = np.random.default_rng(0).integers(1, 200, (30, 30, 20)).astype(np.uint8)
    for values in (noisy, (rank * 1e4).astype(np.int16), labels.astype(np.float32), labels - 1):
        assert not is_label_image(FRAME.put(values))


def test_an_image_of_zeros_is_one_of_labels_without_any():
    assert is_label_image(FRAME.put(np.zeros(FRAME.size, np.uint8)))


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64])
def test_whole_numbers_stay_in_their_range(kind):
    """B-splines swing over an edge between the least and the largest value of a type, and must not wrap around."""
    info = np.iinfo(kind)
    low, high = max(info.min, -(2**40)), min(info.max, 2**40)
    array = np.full(FRAME.size, low, kind)
    array[6:] = high
    half = sitk.TranslationTransform(3, (0.25, 0, 0))
    carried = to_array(carry_image(FRAME.put(array), FRAME, half, "bspline"))
    assert carried.dtype == kind
    edge = carried[3:9, 5, 4].astype(float)
    exact = to_array(sitk.Resample(FRAME.put(array.astype(np.float64)), FRAME.put(array), half, sitk.sitkBSpline))
    assert (exact > high).any()
    np.testing.assert_allclose(edge, np.clip(np.floor(exact[3:9, 5, 4] + 0.5), info.min, info.max), rtol=1e-6, atol=1)


def test_large_whole_numbers_keep_their_last_digit():
    array = (np.arange(960).reshape(FRAME.size) + 2**30).astype(np.int32)
    carried = carry_image(FRAME.put(array), FRAME, sitk.Transform(), "linear")
    np.testing.assert_array_equal(to_array(carried), array)
    assert to_array(cast_rounded(FRAME.put(np.full(FRAME.size, 2.0**40)), sitk.sitkInt64)).max() == 2**40


def test_a_vote_is_smoother_than_the_nearest_voxel_and_keeps_the_type():
    labels = FRAME.put(((smooth() > 0) * 300).astype(np.uint16))
    turn = sitk.Euler3DTransform((5.5, 4.5, 3.5), 0.2, 0.1, 0.3)
    voted = carry_image(labels, FRAME, turn, "labels")
    share = carry_image(sitk.Cast(labels, sitk.sitkFloat32), FRAME, turn, "linear", 0)
    assert voted.GetPixelID() == sitk.sitkUInt16
    inside = to_array(carry_image(FRAME.put(np.ones(FRAME.size, np.uint8)), FRAME, turn, "nearest")) == 1
    np.testing.assert_array_equal(to_array(voted)[inside], ((to_array(share) > 150) * 300)[inside])


def test_grey_values_are_not_voted_on():
    with pytest.raises(UserError, match="the image has 960 values, and labels are at most 512"):
        carry_image(FRAME.put(smooth()), FRAME, sitk.Transform(), "labels")
