"""Losses: closed forms on asymmetric values and unequal sizes, and NumPy in double precision."""

import numpy as np
import pytest
import tensorflow as tf
from scipy import ndimage

from errors import UserError
from network import losses
from network.affine import Affine, affine_flow, compose_affine, inverse_affine
from network.config import CascadeConfig
from network.recursive_cascaded_networks import CascadeOutput, Stage
from network.registry import SIMILARITIES as TABLE
from network.registry import Extension

SIZE = (6, 9, 4)


def random(*shape, seed=0):
    return np.random.default_rng(seed).random(shape).astype(np.float32)


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


def plain_bending(flow):
    """Bending energy of one flow [X, Y, Z, 3] in double precision."""
    flow = flow.astype(np.float64)
    total = 0
    for a in range(3):
        for b in range(3):
            total += (np.diff(np.diff(flow, axis=a), axis=b) ** 2).sum()
    return total / flow.size


def test_bending_energy():
    x, y, z = np.indices(SIZE, dtype=np.float32)
    affine = np.stack([2 * x - y, 3 * z + 4, y], -1)
    bent = np.stack([2 * x * x, 3 * x * z, y * y + z], -1)
    sx, sy, sz = SIZE
    energy = (sx - 2) * sy * sz * 4**2 + 2 * (sx - 1) * sy * (sz - 1) * 3**2 + sx * (sy - 2) * sz * 2**2
    expected = np.array([0, energy, 4 * energy]) / (3 * sx * sy * sz)
    value = losses.bending_loss(tf.constant(np.stack([affine, bent + affine, 2 * bent])))
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-8)
    assert expected[1] == pytest.approx(plain_bending(bent))
    assert float(losses.bending_loss(tf.zeros((1, 1, 2, 5, 3)))[0]) == 0


def test_bending_gradient_along_directions():
    flow, way = random(1, *SIZE, 3), random(1, *SIZE, 3, seed=1) - 0.5
    with tf.GradientTape() as tape:
        tape.watch(variable := tf.constant(flow))
        value = losses.bending_loss(variable)
    ends = [plain_bending(flow[0] + h * way[0]) for h in (0.1, -0.1)]  # exact: the energy is a square
    assert float(value[0]) == pytest.approx(plain_bending(flow[0]), rel=1e-5)
    assert np.vdot(tape.gradient(value, variable), way) == pytest.approx((ends[0] - ends[1]) / 0.2, rel=1e-4)


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


@pytest.mark.parametrize(("n_cascades", "rep", "on"), [(0, 1, "last"), (1, 1, "all"), (2, 2, "last")])
def test_terms_add_up_by_their_factors(n_cascades, rep, on):
    factors = {"det_factor": 0.3, "ortho_factor": 0.7, "reg_factor": 0.2, "bending_factor": 0.1}
    config = CascadeConfig("VTN", n_cascades, rep, SIZE, similarity_on=on, **factors)
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
        bent = tf.reduce_sum(losses.bending_loss(stages[k].flow))
        assert float(terms[f"{k}_bending_loss"]) == pytest.approx(float(0.1 * bent), rel=1e-5)
        expected += 0.2 * smooth + 0.1 * bent
    with_similarity = [name for name in terms if name.endswith("raw_loss")]
    assert len(with_similarity) == (rep if on == "last" else len(stages))
    for k in range(len(stages) - len(with_similarity), len(stages)):
        value = tf.reduce_sum(losses.correlation_loss(fixed, stages[k].warped))
        assert float(terms[f"{k}_raw_loss"]) == pytest.approx(float(value), rel=1e-5)
        expected += value
    assert float(terms["loss"]) == pytest.approx(float(expected), rel=1e-5)
    assert float(terms["loss"]) == pytest.approx(sum(float(terms[f"{k}_loss"]) for k in range(len(stages))), rel=1e-5)


def affine_flows(size):
    """The flows of an affine map there and back, [2, X, Y, Z, 3]."""
    affine = Affine(tf.constant([np.diag([0.2, -0.1, 0.3])], tf.float32), tf.constant([[0.5, 1.0, -0.5]]))
    return tf.concat([affine_flow(affine, size), affine_flow(inverse_affine(affine), size)], 0)


def test_inverse_consistency_of_flows_that_are_inverse_and_of_others():
    size = (9, 12, 10)
    flows = affine_flows(size).numpy()
    np.testing.assert_allclose(losses.inverse_loss(flows), [0, 0], atol=1e-9)
    there, back = np.zeros((1, *size, 3), np.float32), np.zeros((1, *size, 3), np.float32)
    there[..., 0], back[..., 0], back[..., 1] = 2, -1.5, 3
    expected = 0.5 * (0.5**2 + 3**2) / 3  # whatever leaves the volume does not count
    np.testing.assert_allclose(losses.inverse_loss(np.concatenate([there, back])), [expected] * 2, rtol=1e-5)
    far = np.full((2, *size, 3), 100, np.float32)
    np.testing.assert_array_equal(losses.inverse_loss(far), [0, 0])


@pytest.mark.parametrize("fast", [True, False])
def test_inverse_consistency_against_scipy_and_its_gradient_along_a_direction(fast):
    flow = ndimage.gaussian_filter(random(4, *SIZE, 3) - 0.5, (0, 1, 1, 1, 0)) * 8

    def plain(flow):
        found = []
        for back, there in ((0, 2), (1, 3), (2, 0), (3, 1)):
            places = np.moveaxis(np.indices(SIZE) + np.moveaxis(flow[there], -1, 0), 0, -1)
            read = [ndimage.map_coordinates(flow[back, ..., k], np.moveaxis(places, -1, 0), order=1) for k in range(3)]
            kept = ((places >= 0) & (places <= np.array(SIZE) - 1)).all(-1)
            found.append(0.5 * ((np.stack(read, -1) + flow[there])[kept] ** 2).mean())
        return np.array(found)

    with tf.GradientTape() as tape:
        tape.watch(variable := tf.constant(flow))
        value = losses.inverse_loss(variable, fast=fast)
    np.testing.assert_allclose(value, plain(flow.astype(np.float64)), rtol=1e-4)
    way = random(*flow.shape, seed=1) - 0.5
    ends = [plain(flow.astype(np.float64) + h * way).sum() for h in (1e-5, -1e-5)]
    assert np.vdot(tape.gradient(value, variable), way) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=0.01)


def test_both_ways_of_a_batch():
    batch = {
        name: tf.constant(random(2, 3, seed=k))
        for k, name in enumerate(("fixed", "moving", "seen_fixed", "seen_moving"))
    }
    both = losses.both_ways({**batch, "seed": tf.zeros((2, 2))})
    assert both["seed"].shape == (2, 2)
    for name in ("", "seen_"):
        there, back = batch[f"{name}fixed"].numpy(), batch[f"{name}moving"].numpy()
        np.testing.assert_array_equal(both[f"{name}fixed"], np.concatenate([there, back]))
        np.testing.assert_array_equal(both[f"{name}moving"], np.concatenate([back, there]))


def output_of(flow, warped):
    """`CascadeOutput` of one cascade."""
    affine = Affine(tf.zeros((len(flow), 3, 3)), tf.zeros((len(flow), 3)))
    return CascadeOutput((Stage(flow, flow, warped), Stage(0.5 * flow, flow, warped)), affine)


def test_with_an_inverse_factor_the_terms_are_the_mean_of_both_ways():
    flow, warped, fixed = (tf.constant(random(4, *SIZE, n, seed=n)) for n in (3, 1, 2))
    config = CascadeConfig(image_size=SIZE, inverse_factor=0.7)
    both = losses.cascade_losses(fixed[..., :1], output_of(flow, warped), config)
    plain = losses.cascade_losses(fixed[..., :1], output_of(flow, warped), config.replace(inverse_factor=0.0))
    apart = 0.5 * 0.7 * float(tf.reduce_sum(losses.inverse_loss(flow)))
    assert float(both["1_inverse_loss"]) == pytest.approx(apart, rel=1e-5)
    assert float(both["loss"]) == pytest.approx(0.5 * float(plain["loss"]) + apart, rel=1e-5)
    assert float(both["1_raw_loss"]) == pytest.approx(0.5 * float(plain["1_raw_loss"]), rel=1e-5)


@pytest.mark.parametrize("which", ["inside", "scan", "both"])
def test_the_similarity_of_a_mask(which):
    flow, warped, fixed = (tf.constant(random(2, *SIZE, n, seed=n)) for n in (3, 1, 2))
    flow, fixed = 8 * flow - 4, fixed[..., :1]
    masks = {
        f"{side}_mask": tf.cast(random(2, *SIZE, 1, seed=k) > 0.3, tf.float32)
        for k, side in enumerate(("fixed", "moving"))
    }
    config = CascadeConfig(image_size=SIZE, similarity_mask=which)
    places = np.moveaxis(np.indices(SIZE), 0, -1) + flow.numpy()
    kept = ((places >= 0) & (places <= np.array(SIZE) - 1)).all(-1)
    weights = np.ones((2, *SIZE))
    if which in ("inside", "both"):
        weights *= kept
    if which in ("scan", "both"):
        moving = [
            ndimage.map_coordinates(m, np.moveaxis(p, -1, 0), order=1, mode="nearest")
            for m, p in zip(masks["moving_mask"].numpy()[..., 0], places, strict=True)
        ]
        weights *= masks["fixed_mask"][..., 0] * np.array(moving)
    with tf.GradientTape() as tape:
        tape.watch(flow)
        found = losses.compared_voxels(masks, flow, config)
    np.testing.assert_allclose(found[..., 0], weights, atol=1e-5)
    assert tape.gradient(found, flow) is None  # the loss does not fall by looking away
    terms = losses.cascade_losses(fixed, output_of(flow, warped), config, masks=masks)
    expected = tf.reduce_sum(losses.correlation_loss(fixed, warped, tf.constant(weights[..., None], tf.float32)))
    assert float(terms["1_raw_loss"]) == pytest.approx(float(expected), rel=1e-4)


def test_a_pair_of_which_no_voxel_counts_is_compared_everywhere():
    flow = tf.concat([tf.fill((1, *SIZE, 3), 100.0), tf.zeros((1, *SIZE, 3))], 0)
    weights = losses.compared_voxels({}, flow, CascadeConfig(image_size=SIZE, similarity_mask="inside"))
    np.testing.assert_array_equal(weights, np.ones((2, *SIZE, 1)))
    assert losses.compared_voxels({}, flow, CascadeConfig(image_size=SIZE)) is None


def test_a_mask_of_a_similarity_that_takes_none(monkeypatch):
    monkeypatch.setitem(TABLE, "mine", Extension(lambda fixed, warped: fixed))
    with pytest.raises(UserError, match="similarity 'mine' takes no mask; choose ncc"):
        losses.similarity_loss(CascadeConfig(similarity="ncc+mine"), masked=True)
    losses.similarity_loss(CascadeConfig(similarity="ncc+mine"))
