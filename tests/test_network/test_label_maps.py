"""Label maps under a flow: the vote, the nearest voxel, and the sums that a Dice is made of."""

import hypothesis
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates

from network.label_maps import carry_labels, label_numbers, label_sums, read_labels
from network.spatial_transformer import warp

SIZE, OTHER = (7, 9, 5), (5, 8, 6)


def random_labels(rng, labels, size=SIZE, batch=1):
    return rng.integers(0, labels + 1, (batch, *size, 1)).astype(np.int32)


def random_flow(rng, batch=1, amplitude=2.5):
    return rng.uniform(-amplitude, amplitude, (batch, *SIZE, 3)).astype(np.float32)


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(seed=st.integers(0, 10**6), labels=st.integers(1, 6), padding=st.booleans())
def test_the_vote_equals_warping_each_mask(seed, labels, padding):
    rng = np.random.default_rng(seed)
    segmentation, flow = random_labels(rng, labels), tf.constant(random_flow(rng))
    voted = carry_labels(tf.constant(segmentation), flow, range(1, labels + 1), padding).numpy()
    for label in range(1, labels + 1):
        mask = warp(tf.constant(np.where(segmentation == label, 255, 0).astype(np.float32)), flow, padding).numpy()
        sure = np.abs(mask - 128) > 1e-3
        np.testing.assert_array_equal((voted == label)[sure], (mask > 128)[sure])


def test_the_nearest_voxel_against_scipy():
    rng = np.random.default_rng(3)
    moving, flow = random_labels(rng, 200, OTHER, batch=2), random_flow(rng, batch=2, amplitude=9)
    found = read_labels(moving, tf.constant(flow)).numpy()
    for b in range(2):
        places = np.moveaxis(np.moveaxis(np.indices(SIZE), 0, -1) + flow[b], -1, 0)
        # Rounded here: SciPy would round a half to the even number.
        expected = map_coordinates(moving[b, ..., 0], np.floor(places + 0.5), order=0, mode="nearest")
        np.testing.assert_array_equal(found[b, ..., 0], expected)


def test_numbers_of_labels():
    label_map = np.array([-1, 0, 3, 7, 250, 4, 3]).reshape(1, 7, 1, 1, 1).astype(np.int32)
    assert label_numbers(label_map, (250, 3, 7)).numpy().ravel().tolist() == [0, 0, 1, 2, 3, 0, 1]


@pytest.mark.parametrize("padding", [False, True])
def test_sums_and_their_gradient_against_one_warp_a_label(padding):
    rng = np.random.default_rng(7)
    labels, batch = 4, 2
    fixed, moving = random_labels(rng, labels, SIZE, batch), random_labels(rng, labels, OTHER, batch)
    flow = tf.constant(random_flow(rng, batch))
    upstream = rng.normal(size=(2, batch, labels + 1)).astype(np.float32)
    upstream[:, :, 0] = 0  # what surrounds the image is none of the masks below

    def plain(flow):
        masks = [warp(tf.cast(moving == k, tf.float32), flow, padding, fast=False) for k in range(labels + 1)]
        both = [mask * tf.cast(fixed == k, tf.float32) for k, mask in enumerate(masks)]
        return [tf.stack([tf.reduce_sum(m, [1, 2, 3, 4]) for m in sums], 1) for sums in (masks, both)]

    results = []
    for function in (lambda flow: label_sums(fixed, moving, flow, labels, padding), plain):
        with tf.GradientTape() as tape:
            tape.watch(flow)
            sums = tf.stack(function(flow))
            total = tf.reduce_sum(sums * upstream)
        results.append((sums[..., 1:], tape.gradient(total, flow)))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(results[0][1], results[1][1], atol=2e-6)
    assert np.abs(results[1][1]).max() > 0.5
