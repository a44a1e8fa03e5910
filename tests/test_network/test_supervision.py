"""Supervised terms of the loss: closed forms, SciPy in double precision, directional derivatives, mixed pairs."""

import numpy as np
import pytest
import tensorflow as tf
from scipy.ndimage import map_coordinates

from network import metrics
from network.config import CascadeConfig
from network.supervision import dice_loss, landmark_loss, supervised_losses

SIZE = (9, 7, 8)


def boxes(*corners, size=SIZE):
    """Labels 1, 2, .. as boxes from one corner to another: int32 [1, X, Y, Z, 1]."""
    found = np.zeros((1, *size, 1), np.int32)
    for number, (low, high) in enumerate(corners, start=1):
        found[(0, *(slice(a, b) for a, b in zip(low, high, strict=True)))] = number
    return found


def constant_flow(*shift):
    return tf.broadcast_to(tf.constant(shift, tf.float32), (1, *SIZE, 3))


def test_dice_of_shifted_boxes():
    """Half a voxel along x: of each box of n voxels along x, n - 1 stay whole, and two planes have half a voxel."""
    fixed = boxes(((2, 1, 1), (6, 3, 4)), ((2, 4, 1), (5, 6, 7)), ((7, 0, 0), (8, 1, 1)))
    moving = boxes(((2, 1, 1), (6, 3, 4)), ((2, 4, 1), (5, 6, 7)))  # the third label is not there
    loss = dice_loss(fixed, moving, constant_flow(0.5, 0, 0), 3)
    dice = [(2 * (n - 0.5)) / (2 * n) for n in (4, 3)]
    assert float(loss[0]) == pytest.approx(1 - np.mean(dice), abs=1e-6)
    assert float(dice_loss(fixed, fixed, constant_flow(0, 0, 0), 3)[0]) == pytest.approx(0, abs=1e-6)
    assert float(dice_loss(moving, moving, constant_flow(0, 100, 0), 2)[0]) == pytest.approx(1)
    assert np.isnan(dice_loss(fixed, np.where(fixed == 3, 0, 3).astype(np.int32) * 0, constant_flow(0, 0, 0), 3)[0])


def reference_dice(fixed, moving, flow, labels):
    """1 - mean soft Dice of one pair in double precision, by SciPy."""
    places = np.moveaxis(np.moveaxis(np.indices(SIZE), 0, -1) + flow, -1, 0)
    scores = []
    for label in range(1, labels + 1):
        f, m = fixed[..., 0] == label, moving[..., 0] == label
        if f.any() and m.any():
            w = map_coordinates(m.astype(float), places, order=1, mode="nearest")
            scores.append(2 * (f * w).sum() / (f.sum() + w.sum()))
    return 1 - np.mean(scores)


def test_dice_and_its_directional_derivative_against_scipy():
    rng = np.random.default_rng(0)
    labels = 5
    fixed, moving = rng.integers(0, labels + 1, (2, 2, *SIZE, 1)).astype(np.int32)
    moving[1][moving[1] == 2] = 0  # one label less
    flow, way = rng.normal(size=(2, 2, *SIZE, 3)) * 1.5
    with tf.GradientTape() as tape:
        at = tf.constant(flow, tf.float32)
        tape.watch(at)
        loss = dice_loss(fixed, moving, at, labels)
    gradient = tape.gradient(loss, at).numpy().astype(float)
    for b in range(2):
        assert float(loss[b]) == pytest.approx(reference_dice(fixed[b], moving[b], flow[b], labels), abs=1e-6)
        near = [reference_dice(fixed[b], moving[b], flow[b] + s * 1e-6 * way[b], labels) for s in (1, -1)]
        assert (gradient[b] * way[b]).sum() == pytest.approx((near[0] - near[1]) / 2e-6, rel=2e-3)


def points(*rows):
    return np.array([rows], np.float32)


NONE = (np.nan,) * 3


def test_landmarks_closed_form():
    fixed, moving = points((1, 2, 3), (4, 4, 4), NONE, (2, 2, 2)), points((1, 2, 3), (4, 5, 6), (1, 1, 1), NONE)
    flow = constant_flow(3, -1, 4)
    expected = (np.sqrt(9 + 1 + 16) + np.sqrt(9 + 4 + 4)) / 2
    np.testing.assert_allclose(landmark_loss(fixed, moving, flow), [expected], rtol=1e-6)
    by_metric = metrics.landmark_distances(metrics.landmark_offsets(fixed, moving, flow)).numpy()
    np.testing.assert_allclose(landmark_loss(fixed, moving, flow), [np.nanmean(by_metric)], rtol=1e-6)
    assert np.isnan(landmark_loss(points(NONE, (1, 1, 1)), points((1, 1, 1), NONE), flow)[0])


def test_landmarks_directional_derivative_against_scipy():
    rng = np.random.default_rng(1)
    flow, way = rng.normal(size=(2, 1, *SIZE, 3))
    fixed, moving = rng.uniform(0, 6, (2, 1, 5, 3)).astype(np.float32)

    def reference(flow):
        at = [map_coordinates(flow[0, ..., c], fixed[0].T.astype(float), order=1) for c in range(3)]
        return np.linalg.norm(fixed[0] + np.stack(at, 1) - moving[0], axis=1).mean()

    with tf.GradientTape() as tape:
        at = tf.constant(flow, tf.float32)
        tape.watch(at)
        loss = landmark_loss(fixed, moving, at)
    slope = (reference(flow + 1e-5 * way) - reference(flow - 1e-5 * way)) / 2e-5
    assert float(loss[0]) == pytest.approx(reference(flow), rel=1e-5)
    assert (tape.gradient(loss, at).numpy() * way).sum() == pytest.approx(slope, rel=1e-3)


def test_a_landmark_that_is_met_has_no_gradient():
    flow = constant_flow(1, 0, 0)
    with tf.GradientTape() as tape:
        tape.watch(flow)
        loss = landmark_loss(points((2, 3, 3), NONE), points((3, 3, 3), (1, 1, 1)), flow)
    assert loss.numpy().tolist() == [0]
    assert not tape.gradient(loss, flow).numpy().any()


def test_terms_that_are_asked_for_and_pairs_without_them():
    """Of three pairs the first has masks alone, the second landmarks alone, and the third both."""
    mask, none = boxes(((2, 2, 2), (6, 5, 5))) * 255, np.full((1, *SIZE, 1), -1, np.int32)
    batch = {
        "fixed_seg": np.concatenate([mask, none, mask]),
        "moving_seg": np.concatenate([mask, mask, mask]),
        "fixed_points": np.concatenate([points(NONE), points((1, 1, 1)), points((1, 1, 1))]),
        "moving_points": np.concatenate([points(NONE), points((1, 1, 3)), points((4, 1, 1))]),
    }
    flow = tf.zeros((3, *SIZE, 3))
    config = CascadeConfig(dice_factor=2.0, landmark_factor=0.5)
    found = supervised_losses(batch, None, config)(flow)
    assert {name: factor for name, (factor, _) in found.items()} == {"dice": 2.0, "landmark": 0.5}
    np.testing.assert_allclose(found["dice"][1], [0, np.nan, 0], atol=1e-6)
    np.testing.assert_allclose(found["landmark"][1], [np.nan, 2, 3])
    assert list(supervised_losses(batch, None, config.replace(dice_factor=0.0))(flow)) == ["landmark"]
    assert supervised_losses({}, None, CascadeConfig()) is None
