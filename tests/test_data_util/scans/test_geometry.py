import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_util.scans.frame import Frame
from data_util.scans.geometry import doubts_about_grey_values, doubts_about_labels, doubts_about_points
from data_util.scans.images import orient

IDENTITY = (1, 0, 0, 0, 1, 0, 0, 0, 1)
FRAME = Frame((20, 22, 24), (2, 2, 3), (-30, -25, -40), IDENTITY)
SCAN = FRAME.put(np.arange(20 * 22 * 24).reshape(FRAME.size).astype(np.float32))
ORGAN = np.zeros(FRAME.size, np.uint8)
ORGAN[5:12, 6:14, 8:16] = 3
inside = st.tuples(st.floats(-30, 8), st.floats(-25, 17), st.floats(-40, 29))


@given(st.lists(inside, min_size=1, max_size=6), st.data())
def test_landmarks_are_doubted_where_most_of_them_lie_outside(places, data):
    points = np.array([*places, [np.nan] * 3])
    assert doubts_about_points(points, SCAN) == []
    outside = data.draw(st.integers(0, len(places)))
    axis = data.draw(st.integers(0, 2))
    points[:outside, axis] += 300
    (*reasons,) = doubts_about_points(points, SCAN)
    assert len(reasons) == (2 * outside > len(places))
    for reason in reasons:
        counted = f"all {outside}" if outside == len(places) else f"{outside} of {len(places)}"
        what = "the only landmark lies" if len(places) == 1 else f"{counted} landmarks lie"
        assert reason.startswith(f"{what} outside the scan")


def test_landmarks_in_another_space_are_told_with_the_flag_that_places_them():
    voxels = np.array([[15, 16, 17], [10, 19, 20], [2, 21, 3]])
    far = Frame(FRAME.size, FRAME.spacing, (100, 200, -40), IDENTITY)
    assert "--points_space voxel?" in doubts_about_points(voxels, far.put(ORGAN))[0]
    (reason,) = doubts_about_points(far.to_physical(voxels) * (-1, -1, 1), far.put(ORGAN))
    assert "--points_space ras?" in reason
    (reason,) = doubts_about_points([[1000, 0, 0]], SCAN)
    assert reason.endswith("the first at (1000, 0, 0) mm; are they of this scan, in mm (LPS)?")
    assert doubts_about_points([[np.nan] * 3], SCAN) == []


def labels_on(size=FRAME.size, spacing=FRAME.spacing, origin=FRAME.origin, direction=IDENTITY, array=ORGAN):
    return orient(Frame(size, spacing, origin, direction).put(array))


@pytest.mark.parametrize(
    "labels",
    [
        labels_on(),
        labels_on(origin=np.add(FRAME.origin, 0.4)),  # rounded places
        labels_on(origin=(8, 17, 29), direction=(-1, 0, 0, 0, -1, 0, 0, 0, -1), array=ORGAN[::-1, ::-1, ::-1]),
        labels_on((8, 9, 10), array=np.ones((8, 9, 10), np.uint8)),  # on a grid of their own
        labels_on((10, 11, 12), (4, 4, 6), array=ORGAN[::2, ::2, ::2]),
        labels_on(array=0 * ORGAN),
    ],
)
def test_labels_of_the_scan_are_not_doubted(labels):
    assert doubts_about_labels(labels, SCAN) == []


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (labels_on(spacing=(1, 1, 1), origin=(0, 0, 0)), "saved without the scan's geometry?"),
        (labels_on(spacing=(1, 1, 1), origin=(0, 0, 0), direction=(-1, 0, 0, 0, -1, 0, 0, 0, 1)), "without the scan's"),
        (labels_on((24, 22, 20), (1, 1, 1), (0, 0, 0), array=ORGAN.T), "saved without the scan's geometry?"),
        (
            labels_on((12, 9, 7), (1, 1, 1), (0, 0, 0), array=np.ones((12, 9, 7), np.uint8)),
            "voxels of 1 mm from 0, 0, 0",
        ),
        (labels_on(origin=(-30, -25, -10)), "lies up to 30 mm elsewhere"),
        (labels_on(spacing=(2, 2, 5)), "lies up to 46 mm elsewhere"),
        (labels_on((8, 9, 10), origin=(6, 0, 0), array=np.ones((8, 9, 10), np.uint8)), "% of the labelled voxels lie"),
        (labels_on(origin=(900, 0, 0)), "100 % of the labelled voxels lie outside the scan"),
    ],
)
def test_labels_that_lie_elsewhere_are_doubted(labels, told):
    assert any(told in reason for reason in doubts_about_labels(labels, SCAN))


def test_an_image_of_few_whole_values_may_be_a_label_image():
    assert doubts_about_grey_values(SCAN) == []
    assert doubts_about_grey_values(FRAME.put(ORGAN * np.float32(1.5))) == []
    assert doubts_about_grey_values(FRAME.put(ORGAN)) == ["the scan's only grey values are 0, 3; is it a label image?"]
