"""Losses: closed forms on asymmetric values and unequal sizes, and NumPy in double precision."""

import numpy as np
import pytest
import tensorflow as tf

from network import losses
from network.affine import Affine, affine_flow, compose_affine
from network.config import CascadeConfig
from network.recursive_cascaded_networks import CascadeOutput, Stage

SIZE = (6, 9, 4)


def random(*shape, seed=0):
    return np.random.default_rng(seed).random(shape).astype(np.float32)


def test_correlation_a_pair_against_numpy():
    fixed, warped = random(3, *SIZE, 1), random(3, *SIZE, 1, seed=1)
    warped[1] = 0.5 - 2 * fixed[1]
    warped[2] = 0.7
    values = losses.correlation(tf.constant(fixed), tf.constant(warped))
    expected = np.corrcoef(fixed[0].ravel(), warped[0].ravel())[0, 1]
    np.testing.assert_allclose(values, [expected, -1, 0], atol=2e-5)
    np.testing.assert_allclose(losses.similarity_loss(fixed, warped), 1 - np.array([expected, -1, 0]), atol=2e-5)


def test_correlation_of_a_large_volume_keeps_its_digits():
    fixed = random(1, 96, 80, 112, 1) + 10
    warped = fixed + random(1, 96, 80, 112, 1, seed=1)
    expected = np.corrcoef(fixed.ravel().astype(float), warped.ravel().astype(float))[0, 1]
    assert losses.correlation(tf.constant(fixed), tf.constant(warped)).numpy()[0] == pytest.approx(expected, abs=1e-4)


def test_smoothness_of_a_linear_flow():
    x, y, z = np.indices(SIZE, dtype=np.float32)
    flow = np.stack([2 * x, 3 * x - y, 5 * z], -1)[None]
    sx, sy, sz = SIZE
    total = (sx - 1) * sy * sz * (2**2 + 3**2) + sx * (sy - 1) * sz * 1 + sx * sy * (sz - 1) * 25
    value = losses.smoothness_loss(tf.constant(np.concatenate([flow, 2 * flow])))
    np.testing.assert_allclose(value, np.array([1, 4]) * total / 2 / (3 * sx * sy * sz), rtol=1e-5)


def test_smoothness_gradient_against_the_op_by_op_formula():
    flow = tf.constant(random(2, *SIZE, 3))
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(flow)
        fast = losses.smoothness_loss(flow)
        d = [flow[:, 1:] - flow[:, :-1], flow[:, :, 1:] - flow[:, :, :-1], flow[:, :, :, 1:] - flow[:, :, :, :-1]]
        plain = sum(tf.nn.l2_loss(x) for x in d) / np.prod(SIZE) / 3
    np.testing.assert_allclose(tf.reduce_sum(fast), plain, rtol=1e-5)
    np.testing.assert_allclose(tape.gradient(fast, flow), tape.gradient(plain, flow), atol=1e-6)


def test_affine_terms():
    rotation = np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1.0]])
    stretch = np.diag([2.0, 1.0, 0.5])
    double = np.diag([2.0, 1.0, 1.0])
    matrix = np.stack([rotation, stretch, double, rotation @ double]).astype(np.float32) - np.eye(3, dtype=np.float32)
    np.testing.assert_allclose(losses.determinant_loss(matrix), [0, 0, 0.5, 0.5], atol=1e-5)
    eps = 1e-5
    expected = []
    for w in matrix.astype(float):
        k = np.linalg.eigvalsh((w + np.eye(3)).T @ (w + np.eye(3)) + eps * np.eye(3))
        expected.append(k.sum() + (1 + eps) ** 2 * (1 / k).sum() - 6 * (1 + eps))
    np.testing.assert_allclose(losses.orthogonality_loss(matrix), expected, atol=1e-4)
    assert expected[0] == pytest.approx(0, abs=1e-6)
    assert expected[1] == pytest.approx(4 + 1 + 0.25 + 0.25 + 1 + 4 - 6, abs=1e-3)


def test_affine_flow_is_row_major_and_centred():
    matrix = np.arange(9, dtype=np.float32).reshape(1, 3, 3) / 10
    shift = np.float32([[1, -2, 3]])
    flow = affine_flow(Affine(tf.constant(matrix), tf.constant(shift)), SIZE)
    for p in [(0, 0, 0), (5, 2, 1), (3, 8, 3)]:
        centred = np.array(p) - (np.array(SIZE) - 1) / 2
        np.testing.assert_allclose(flow[(0, *p)], matrix[0] @ centred + shift[0], atol=1e-5)


def test_composition_with_an_affine_flow_is_exact_also_outside():
    matrix, shift = 0.3 * random(2, 3, 3), 5 * random(2, 3)
    affine = Affine(tf.constant(matrix), tf.constant(shift))
    second = 20 * random(2, *SIZE, 3) - 10
    composed = compose_affine(affine, affine_flow(affine, SIZE), tf.constant(second))
    p = np.moveaxis(np.indices(SIZE), 0, -1)
    moved = p + second
    centred = moved - (np.array(SIZE) - 1) / 2
    expected = second + np.einsum("bij,bxyzj->bxyzi", matrix, centred) + shift[:, None, None, None]
    np.testing.assert_allclose(composed, expected, atol=1e-4)


@pytest.mark.parametrize(("n_cascades", "rep"), [(0, 1), (1, 1), (2, 2)])
def test_terms_add_up_by_their_factors(n_cascades, rep):
    config = CascadeConfig("VTN", n_cascades, rep, SIZE, det_factor=0.3, ortho_factor=0.7, reg_factor=0.2)
    stages = []
    for k in range(1 + n_cascades * rep):
        flow = tf.constant(random(2, *SIZE, 3, seed=k))
        stages.append(Stage(flow, 2 * flow, tf.constant(random(2, *SIZE, 1, seed=10 + k))))
    affine = Affine(tf.constant(0.1 * random(2, 3, 3)), tf.zeros((2, 3)))
    fixed = tf.constant(random(2, *SIZE, 1, seed=99))
    terms = losses.cascade_losses(fixed, CascadeOutput(tuple(stages), affine), config)
    expected = 0.3 * terms["0_det_loss"] + 0.7 * terms["0_ortho_loss"]
    for k in range(1, len(stages)):
        smooth = tf.reduce_sum(losses.smoothness_loss(stages[k].flow))
        assert float(terms[f"{k}_reg_loss"]) == pytest.approx(float(0.2 * smooth), rel=1e-5)
        expected += 0.2 * smooth
    with_similarity = [name for name in terms if name.endswith("raw_loss")]
    assert len(with_similarity) == rep
    for k in range(len(stages) - rep, len(stages)):
        value = tf.reduce_sum(losses.similarity_loss(fixed, stages[k].warped))
        assert float(terms[f"{k}_raw_loss"]) == pytest.approx(float(value), rel=1e-5)
        expected += value
    assert float(terms["loss"]) == pytest.approx(float(expected), rel=1e-5)
    assert float(terms["loss"]) == pytest.approx(sum(float(terms[f"{k}_loss"]) for k in range(len(stages))), rel=1e-5)
