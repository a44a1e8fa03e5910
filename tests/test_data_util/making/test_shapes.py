import numpy as np

from data_util.making.shapes import REGIONS, shape_pair

SIZE = (72, 56, 64)


def test_both_individuals_have_the_same_regions_elsewhere_and_in_the_same_grey():
    first, second = shape_pair(SIZE, [0, 3])
    for scan in (first, second):
        assert scan.volume.shape == scan.segmentation.shape == SIZE
        assert scan.volume.dtype == scan.segmentation.dtype == np.uint8
        assert scan.segmentation.max() <= REGIONS
    assert 0.2 < np.mean(first.segmentation > 0) < 0.6
    assert 0.02 < np.mean(first.segmentation != second.segmentation) < 0.5
    values = [k for k in range(1, REGIONS + 1) if min(np.sum(s.segmentation == k) for s in (first, second)) > 400]
    means = np.array([[s.volume[s.segmentation == k].mean() for k in values] for s in (first, second)])
    assert len(values) > 3
    assert np.corrcoef(means)[0, 1] > 0.85
    assert np.ptp(means[0]) > 50


def test_a_seed_gives_one_anatomy_and_another_one_another():
    (first, _), (again, _), (other, _) = (shape_pair(SIZE, seed) for seed in ([0, 3], [0, 3], [0, 4]))
    np.testing.assert_array_equal(first.volume, again.volume)
    assert np.mean(first.segmentation != other.segmentation) > 0.3
