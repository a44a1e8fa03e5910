"""benchmarks.registration: the pairs that it makes are what their truth says, and its Dice is Dice."""

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter

from benchmarks import registration
from data_util.scans.frame import Frame

FRAME = Frame((24, 20, 22), (4.0, 5.0, 4.5), (-40.0, 10.0, 5.0), (1, 0, 0, 0, 1, 0, 0, 0, 1))


@pytest.fixture(scope="module")
def scan():
    grey = np.zeros(FRAME.size, np.float32)
    grey[6:-6, 5:-5, 6:-6] = 50 + 150 * np.random.default_rng(0).random((12, 10, 10))
    return FRAME.put(gaussian_filter(grey, 1))


@pytest.mark.parametrize("name", ["deformed", "rotated 30 about z", "shifted 20 mm", "scaled 0.8"])
def test_a_made_pair_is_what_its_truth_says(scan, name):
    (pair,) = registration.known_pairs(scan, None, name)
    assert pair.name == name
    points = registration.places(pair.fixed)[::10]
    inside = Frame.of(pair.fixed).to_voxel(points).round().astype(int).tolist()
    true = [pair.truth.TransformPoint(point) for point in points.tolist()]
    seen = [pair.fixed.GetPixel(voxel) for voxel in inside]
    read = sitk.Resample(scan, pair.fixed, pair.truth, sitk.sitkLinear, 0.0)
    expected = [read.GetPixel(voxel) for voxel in inside]
    assert np.corrcoef(seen, expected)[0, 1] > 0.9  # other grey values and noise
    moved = np.linalg.norm(np.subtract(true, points), axis=1)
    assert 1 < moved.mean() < 60


def test_mean_dice():
    one = sitk.GetImageFromArray(np.array([[[0, 1, 1, 2, 2, 2, 0]]], np.uint8))
    other = sitk.GetImageFromArray(np.array([[[3, 1, 2, 2, 2, 1, 0]]], np.uint8))
    assert registration.mean_dice(one, one) == 1
    assert registration.mean_dice(one, other) == pytest.approx((2 / 4 + 4 / 6) / 2)


def test_without_a_pair_it_says_what_to_give():
    with pytest.raises(registration.UserError, match="give --fixed and --moving, or --known"):
        registration.main(["--fixed", "a.nii.gz"])
