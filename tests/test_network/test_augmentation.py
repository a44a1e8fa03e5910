"""The augmentation: its draws, its field, and what it does to image, labels and landmarks."""

import numpy as np
import pytest
import tensorflow as tf
from scipy import ndimage
from scipy.interpolate import BSpline
from scipy.spatial.transform import Rotation

from errors import UserError
from network.augmentation import Draws, augment, carry_points, draw, draw_affine, draw_control_points, spline_flow
from network.config import CascadeConfig
from network.contrast import recolour
from network.random_draws import uniform
from network.spatial_transformer import warp

SIZE = (16, 12, 20)


def test_draws_depend_on_the_pairs_seed_alone():
    seeds = tf.constant([[1, 2], [1, 3], [1, 2]])
    control = draw_control_points(seeds, SIZE).numpy()
    assert control.shape == (3, 5, 5, 5, 3)
    np.testing.assert_array_equal(control[0], control[2])
    assert np.abs(control[0] - control[1]).max() > 0.1
    np.testing.assert_array_equal(control[1:2], draw_control_points(seeds[1:2], SIZE))


def test_draws_are_cubed_uniforms_of_at_most_a_tenth_of_the_size():
    offsets = draw_control_points(tf.stack([tf.range(60), tf.zeros(60, tf.int32)], 1), SIZE) / (np.array(SIZE) / 4)
    u = np.cbrt(offsets.numpy().ravel())
    bound = 0.4 ** (1 / 3)
    assert np.abs(u).max() == pytest.approx(bound, rel=0.01)
    assert u.mean() == pytest.approx(0, abs=0.02)
    assert u.var() == pytest.approx(bound**2 / 3, rel=0.03)


@pytest.mark.parametrize("size", [SIZE, (13, 7, 10)])
def test_field_against_scipys_b_splines(size):
    control = np.random.default_rng(0).normal(size=(1, 5, 5, 5, 3)).astype(np.float32)
    flow = spline_flow(tf.constant(control), size)

    def weights(n):
        position = (np.arange(n) + 0.5) / n * 4
        bases = [BSpline.basis_element(np.arange(k - 2, k + 3), extrapolate=False)(position) for k in range(5)]
        return np.nan_to_num(np.stack(bases, 1))

    expected = np.einsum("xi,yj,zk,bjikc->bxyzc", *(weights(n) for n in size), control)
    np.testing.assert_allclose(flow, expected, atol=1e-5)


def images(pairs=2):
    rng = np.random.default_rng(1)
    return {name: tf.constant(rng.random((pairs, *SIZE, 1), np.float32)) for name in ("fixed", "moving")}


SEEDS = tf.constant([[5, 1], [5, 2]])


def augmented(augmentation, **options):
    """Two pairs, the same augmented, and what was drawn."""
    config = CascadeConfig(image_size=SIZE, augmentation=augmentation, **options)
    draws = draw(SEEDS, config)
    return images(), augment(images(), draws, config), draws


@pytest.mark.parametrize("name", [None, "bspline"])
def test_only_the_moving_images_are_deformed(name):
    batch, out, _ = augmented(name)
    flow = spline_flow(draw_control_points(SEEDS, SIZE), SIZE)
    assert set(out) == set(batch)
    np.testing.assert_array_equal(out["fixed"], batch["fixed"])
    np.testing.assert_array_equal(out["moving"], warp(batch["moving"], flow))
    assert np.abs(out["moving"] - batch["moving"]).max() > 0.1


def test_no_augmentation_changes_nothing():
    batch, out, draws = augmented("identity")
    assert (draws.control, draws.affine, draws.contrast) == (None, {}, {})
    for name, image in batch.items():
        np.testing.assert_array_equal(out[name], image)


def test_affine_maps_against_scipys_rotations():
    size, ranges = (8, 20, 30), {"rotation": 25, "scale": 0.5, "shear": 0.2, "shift": 0.1}
    drawn = draw_affine(SEEDS, size, **ranges)
    for k, u in enumerate(2 * np.float64(uniform(SEEDS, 12)) - 1):
        turn = Rotation.from_euler("xyz", 25 * u[:3], degrees=True).as_matrix()  # about fixed axes: x first
        shear = np.eye(3)
        shear[[0, 0, 1], [1, 2, 2]] = 0.2 * u[6:9]
        expected = turn @ shear @ np.diag(1.5 ** u[3:6])
        np.testing.assert_allclose(drawn.matrix[k] + np.eye(3), expected, atol=1e-6)
        np.testing.assert_allclose(drawn.shift[k], 0.1 * u[9:] * size, atol=1e-6)


def test_both_sides_get_affine_maps_of_their_own():
    _, _, draws = augmented("affine")
    fixed, moving = draws.affine["fixed"], draws.affine["moving"]
    assert np.abs(fixed.matrix - moving.matrix).max(axis=(1, 2)).min() > 0.01
    assert np.abs(fixed.matrix[0] - fixed.matrix[1]).max() > 0.01


def test_an_affine_map_of_no_range_is_none():
    batch, out, _ = augmented("affine", rotation=0, scale=0, shear=0, shift=0)
    for name, image in batch.items():
        np.testing.assert_allclose(out[name], image, atol=1e-5)


@pytest.mark.parametrize("augmentation", ["affine", "bspline + affine"])
def test_the_images_lie_where_the_maps_lead(augmentation):
    """Each side is read once, at A (p + deformation(p) - centre) + shift + centre."""
    batch, out, draws = augmented(augmentation)
    centre = (np.array(SIZE) - 1) / 2
    for side in ("fixed", "moving"):
        for k in range(2):
            places = np.stack(np.indices(SIZE), -1).astype(float)
            if side == "moving" and draws.control is not None:
                places = places + spline_flow(draws.control, SIZE)[k].numpy()
            matrix, shift = (np.float64(part[k]) for part in draws.affine[side])
            places = (places - centre) @ (matrix + np.eye(3)).T + shift + centre
            expected = ndimage.map_coordinates(
                batch[side][k, ..., 0].numpy(), np.moveaxis(places, -1, 0), order=1, mode="nearest"
            )
            np.testing.assert_allclose(out[side][k, ..., 0], expected, atol=1e-4)


def test_contrasts_are_seen_and_the_own_ones_compared():
    batch, out, draws = augmented("contrast")
    assert set(out) == {"fixed", "moving", "seen_fixed", "seen_moving"}
    for side, image in batch.items():
        np.testing.assert_array_equal(out[side], image)
        assert np.abs(out[f"seen_{side}"] - image).max() > 0.1
    assert np.abs(draws.contrast["fixed"].knots - draws.contrast["moving"].knots).max() > 0.1


def test_a_contrast_is_of_the_moved_image():
    _, moved, _ = augmented("bspline+affine")
    _, out, draws = augmented("bspline+affine+contrast")
    for side in ("fixed", "moving"):
        np.testing.assert_array_equal(out[side], moved[side])
        np.testing.assert_array_equal(out[f"seen_{side}"], recolour(moved[side], draws.contrast[side], 1.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augmentation": "affine+affine"}, "augmentation is 'affine[+]affine'; it must be one of"),
        ({"augmentation": "affine+identity"}, "augmentation is 'affine[+]identity'; it must be"),
        ({"augmentation": "colour"}, "some of bspline, affine, contrast, joined by [+]"),
        ({"augmentation": 3}, "augmentation is 3"),
        ({"augmentation": "affine", "rotation": 181}, "rotation is 181; it must be a number from 0 to 180"),
        ({"augmentation": "contrast", "noise": -1}, "noise is -1; it must be a number from 0 to 1"),
        ({"augmentation": "contrast", "rotation": 3}, "unknown option 'rotation'"),
        ({"rotation": 3}, "unknown option 'rotation'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        CascadeConfig(**options)


def test_a_run_keeps_its_augmentation():
    text = "augmentation='affine+contrast', rotation=5, noise=0.0"
    config = CascadeConfig().with_net_args(text)
    assert config.augmentation_options == {
        "affine": {"rotation": 5, "scale": 0.1, "shear": 0.05, "shift": 0.05},
        "contrast": {"gamma": 0.5, "blur": 1.0, "bias": 0.3, "noise": 0.0},
    }
    assert config.net_args == text
    assert CascadeConfig.from_dict(config.to_dict(), "here") == config
    assert config.replace(augmentation="affine").options == {"channels": 16, "leaky_slope": 0.1, "rotation": 5} | {
        name: config.options[name] for name in ("scale", "shear", "shift")
    }


def test_labels_and_landmarks_go_with_the_image():
    """A blob of the image, its label and the landmark in its middle are at one place before and after."""
    size, middles = (32, 28, 36), np.float32([[[11, 12, 20]], [[20, 14, 13]]])
    control = 2 * draw_control_points(tf.constant([[3, 1], [3, 2]]), size)
    grid = np.moveaxis(np.indices(size), 0, -1)
    away = np.linalg.norm(grid - middles[:, :, None, None], axis=-1)[..., None]
    batch = {
        "fixed": tf.zeros((2, *size, 1)),
        "moving": tf.constant(np.exp(-((away / 4) ** 2)).astype(np.float32)),
        "fixed_seg": tf.ones((2, *size, 1), tf.int32),
        "moving_seg": tf.constant(np.where(away < 4, 3, -1).astype(np.int32)),
        "fixed_points": tf.constant(middles),
        "moving_points": tf.constant(middles),
    }
    out = augment(batch, Draws(control, {}, {}), CascadeConfig(image_size=size))
    assert all(out[name] is batch[name] for name in ("fixed", "fixed_seg", "fixed_points"))
    for b in range(2):
        image, labels = out["moving"][b, ..., 0].numpy(), out["moving_seg"][b, ..., 0].numpy()
        landmark = out["moving_points"][b, 0].numpy()
        assert np.linalg.norm(landmark - middles[b, 0]) > 0.7  # it moved
        assert np.linalg.norm(grid[image > 0.6].mean(0) - landmark) < 0.5
        assert np.linalg.norm(grid[labels == 3].mean(0) - landmark) < 0.5
        assert set(np.unique(labels)) == {-1, 3}
        inside = image[labels == 3]
        assert inside.min() > np.exp(-1.8)


def test_a_landmark_is_where_the_field_leads_back_to_it():
    flow = spline_flow(draw_control_points(tf.constant([[8, 1], [8, 2]]), SIZE), SIZE)
    points = np.random.default_rng(2).uniform(3, 8, (2, 6, 3)).astype(np.float32)
    points[0, 2] = np.nan
    points[1, 4] = (-30, 5, 5)
    found = carry_points(tf.constant(points), flow).numpy()
    missing = np.zeros((2, 6), bool)
    missing[0, 2] = missing[1, 4] = True
    np.testing.assert_array_equal(np.isnan(found).all(-1), missing)
    for b in range(2):
        known = ~missing[b]
        at = [ndimage.map_coordinates(flow[b, ..., c].numpy(), found[b, known].T, order=1) for c in range(3)]
        np.testing.assert_allclose(found[b, known] + np.stack(at, 1), points[b, known], atol=0.01)


def test_a_landmark_that_the_field_takes_out_of_the_volume_is_missing():
    flow = tf.broadcast_to(tf.constant([5.0, 0, 0]), (1, *SIZE, 3))
    found = carry_points(tf.constant([[[2.0, 3, 4], [9, 3, 4]]]), flow).numpy()
    np.testing.assert_allclose(found, [[[np.nan] * 3, [4, 3, 4]]], atol=1e-5)


def test_both_sides_landmarks_and_labels_go_with_their_affine_maps():
    """A third of a turn, which the iteration without the map's inverse would never end at."""
    size, q = (20, 20, 20), np.float32([[[12, 7, 9]]])
    config = CascadeConfig(image_size=size, augmentation="affine", rotation=120, scale=1.5)
    draws = draw(tf.constant([[4, 9]]), config)
    labels = np.zeros((1, *size, 1), np.int32)
    labels[0, 11:14, 6:9, 8:11] = 5
    batch = {f"{side}_points": tf.constant(q) for side in ("fixed", "moving")}
    batch |= {f"{side}_seg": tf.constant(labels) for side in ("fixed", "moving")}
    out = augment(batch | {side: tf.zeros((1, *size, 1)) for side in ("fixed", "moving")}, draws, config)
    seen = 0
    for side in ("fixed", "moving"):
        matrix, shift = (np.float64(part[0]) for part in draws.affine[side])
        expected = np.linalg.solve(matrix + np.eye(3), q[0, 0] - 9.5 - shift) + 9.5
        inside = ((expected >= 0) & (expected <= 19)).all()
        found = out[f"{side}_points"][0, 0].numpy()
        np.testing.assert_allclose(found, expected if inside else [np.nan] * 3, atol=0.02)
        seen += inside
        if inside:
            assert np.linalg.norm(np.argwhere(out[f"{side}_seg"][0, ..., 0] == 5).mean(0) - expected) < 0.5
        assert np.linalg.norm(matrix) > 1  # far from none
    assert seen
