import numpy as np
import pytest
from matplotlib.image import imread

from data_util.making.anatomy import make_phantom
from data_util.making.known_flows import deform, smooth_flow, warp
from data_util.output.figures import (
    PLANES,
    _centre,
    flow_colours,
    mid_slices,
    pair_figure,
    places,
    warped_grid_image,
)
from errors import UserError

SIZE = (20, 26, 32)


def test_slices_are_shown_as_radiologists_look_at_them():
    volume = np.random.default_rng(0).random((4, 5, 6))
    axial, coronal, sagittal = mid_slices(volume, centre=(1, 2, 3))
    assert axial.shape == (5, 4)  # x to the right, y down
    assert axial[0, 3] == volume[3, 0, 3]
    assert coronal.shape == (6, 4)  # x to the right, z up
    assert coronal[0, 1] == volume[1, 2, 5]
    assert sagittal.shape == (6, 5)  # y to the right, z up
    assert sagittal[5, 4] == volume[1, 4, 0]


def test_slices_go_through_the_middle_and_keep_channels():
    volume = np.random.default_rng(0).random((4, 5, 6, 3))
    axial, coronal, sagittal = mid_slices(volume)
    np.testing.assert_array_equal(axial[2, 1], volume[1, 2, 3])
    np.testing.assert_array_equal(coronal[1, 1], volume[1, 2, 4])
    np.testing.assert_array_equal(sagittal[1, 3], volume[2, 3, 4])


def test_flow_colours_are_grey_at_rest_and_a_channel_an_axis():
    flow = np.zeros((2, 2, 2, 3))
    flow[0, 0, 0] = (4, -4, 2)
    flow[1, 1, 1] = (-2, 0, 8)
    assert flow_colours(flow).dtype == np.uint8
    np.testing.assert_array_equal(flow_colours(flow, limit=4)[0, 0, 0], [255, 0, 191])
    np.testing.assert_array_equal(flow_colours(flow, limit=4)[1, 1, 1], [64, 128, 255])
    np.testing.assert_array_equal(flow_colours(flow, limit=4)[0, 1, 0], [128, 128, 128])
    np.testing.assert_array_equal(flow_colours(flow)[1, 1, 1], [96, 128, 255])  # the largest part, 8, is the limit
    np.testing.assert_array_equal(flow_colours(np.zeros((2, 2, 2, 3))), 128)


def test_the_grid_at_rest_has_lines_every_step_along_both_axes():
    picture = warped_grid_image(np.zeros((*SIZE, 3)), step=8)
    assert picture.dtype == np.uint8
    assert picture.shape == (26, 20)
    rows = np.flatnonzero((picture == 255).all(axis=1))
    columns = np.flatnonzero((picture == 255).all(axis=0))
    np.testing.assert_array_equal(rows, [4, 12, 20])
    np.testing.assert_array_equal(columns, [4, 12])
    assert picture[0, 0] == picture[8, 8] == 0


def test_places_are_where_a_slice_reads_the_moving_image():
    flow = np.random.default_rng(2).normal(size=(5, 6, 7, 3))
    read = np.moveaxis(np.indices(flow.shape[:3]), 0, -1) + flow
    for plane in PLANES:
        across, along = places(flow, plane, 3)
        cut = plane.cut(read, 3)
        np.testing.assert_allclose(across, cut[..., plane.across])
        np.testing.assert_allclose(along, cut[..., plane.along])


def test_the_grid_moves_as_the_moving_image_does():
    flow = np.zeros((*SIZE, 3))
    flow[..., 0], flow[..., 1], flow[..., 2] = 3, -2, 5
    moved, still = warped_grid_image(flow), warped_grid_image(np.zeros_like(flow))
    np.testing.assert_array_equal(moved[2:, :-3], still[:-2, 3:])
    coronal = warped_grid_image(flow, plane=PLANES[1])
    assert coronal.shape == (32, 20)
    np.testing.assert_array_equal(np.flatnonzero((coronal == 255).all(axis=1)), [32 - 1 - z for z in (31, 23, 15, 7)])
    # A line painted on the moving image, warped, lies where the picture has its line.
    curved = smooth_flow(SIZE, 3, 3)
    painted = np.zeros(SIZE, np.float32)
    painted[12] = 1
    warped = mid_slices(warp(painted, curved))[0]
    assert warped.max() > 0.9
    assert np.all(warped_grid_image(curved)[warped > 0.95] > 200)


@pytest.fixture(scope="module")
def pair():
    moving = make_phantom((24, 28, 32), 1)
    flow = smooth_flow((24, 28, 32), 2, 3)
    return deform(moving, flow), moving, flow


def test_a_pair_figure_is_written_with_and_without_labels(tmp_path, pair):
    fixed, moving, flow = pair
    masks = (fixed.segmentation, moving.segmentation, warp(moving.segmentation, flow) > 128)
    images = (fixed.volume, moving.volume, warp(moving.volume, flow), flow)
    plain, labelled, flat = tmp_path / "plain.png", tmp_path / "labelled.png", tmp_path / "flat.png"
    pair_figure(plain, *images)
    pair_figure(labelled, *images, *masks, spacing=(1, 1, 1), title="a pair")
    pair_figure(flat, *images, *masks, spacing=(1.5, 1.5, 0.2))
    shapes = [imread(path).shape for path in (plain, labelled, flat)]
    assert shapes[0][1] == shapes[1][1] == shapes[2][1]
    assert shapes[2][0] < 0.7 * shapes[0][0]  # the head-feet direction is short
    red = imread(labelled)[..., :3]
    outlines = (red[..., 0] > 0.8) & (red[..., 1] < 0.4) & (red[..., 2] < 0.4)
    assert outlines.sum() > 50


def pair_of(volume):
    """Images of a pair of which nothing moved."""
    return volume, volume, volume, np.zeros((*volume.shape, 3)), volume, volume, volume


def test_a_pair_figure_of_nothing_moved_and_an_empty_label_is_written(tmp_path):
    empty = np.zeros((8, 9, 10), np.uint8)
    pair_figure(tmp_path / "a.png", *pair_of(empty))
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_planes_go_through_the_centre_of_the_fixed_label():
    label = np.zeros((8, 9, 10), np.uint8)
    assert _centre(label, None) == _centre(label, label) == [5, 4, 4]  # axial, coronal, sagittal: z, y, x
    label[1:4, 6:9, 8] = 1
    assert _centre(label, label) == [8, 7, 2]


@pytest.mark.parametrize("name", ["gone/a.png", "a.ending"])
def test_a_figure_that_cannot_be_written_is_an_error(tmp_path, name):
    with pytest.raises(UserError, match=r"cannot write .*(No such file|check its ending)"):
        pair_figure(tmp_path / name, *pair_of(np.zeros((8, 9, 10), np.uint8)))
