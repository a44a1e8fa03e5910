"""Refinement and adaptive repeats: splines against SciPy, known deformations, and a network with a known course."""

import numpy as np
import pytest
import tensorflow as tf
from scipy.interpolate import BSpline
from scipy.ndimage import gaussian_filter

from data_util.making import anatomy, known_flows
from errors import UserError
from network import losses, metrics, refinement
from network.config import CascadeConfig
from network.recursive_cascaded_networks import build_network
from network.registry import SIMILARITIES, Extension
from network.spatial_transformer import warp
from network.splines import SplineSmoothness, spline_matrix, spline_volumes, tensor_product
from tests.test_network.golden import rule_network

SIZE = (26, 22, 18)
CONFIG = CascadeConfig(image_size=SIZE)


def blobs(seed, pairs=1):
    """Smooth images 0..1 of low contrast at the edge: float32 [pairs, X, Y, Z, 1]."""
    rng = np.random.default_rng(seed)
    x = [np.linspace(0, 1, n) for n in SIZE]
    waves = [np.sin(np.pi * np.outer(np.arange(1, 6), axis)) for axis in x]
    image = np.einsum("pabc,ax,by,cz->pxyz", rng.normal(0, 1, (pairs, 5, 5, 5)), *waves)
    return tf.constant((0.5 + 0.1 * image)[..., None].clip(0, 1).astype(np.float32))


def bump(*length):
    """A flow of that many voxels in the middle, none at the edge: float32 [1, X, Y, Z, 3]."""
    x, y, z = (np.sin(np.pi * np.linspace(0, 1, n)) for n in SIZE)
    return tf.constant(np.einsum("x,y,z,k->xyzk", x, y, z, length)[None].astype(np.float32))


@pytest.fixture(scope="module")
def network():
    """One cascade whose flow is some voxels long; its weights stay as they are."""
    return rule_network("VoxelMorph", 1, image_size=SIZE, channels=2)


@pytest.mark.parametrize("spacing", [4, 7])
def test_splines_against_scipy(spacing):
    control = np.random.default_rng(0).normal(size=40)
    matrix = spline_matrix(np.arange(22) / spacing, 21 // spacing + 1)
    # Point k lies at (k - 1) * spacing.
    knots = (np.arange(44) - 3) * spacing
    expected = BSpline(knots, control, 3)(np.arange(22))
    np.testing.assert_allclose(matrix @ control[: matrix.shape[1]], expected, atol=1e-5)
    np.testing.assert_allclose(matrix @ (np.arange(matrix.shape[1]) - 1.0) * spacing, np.arange(22), atol=1e-4)


def test_smoothness_of_a_flow_and_a_spline_against_numpy():
    """From control points alone, as from the sum of both flows at every fourth voxel; the gradient by differences."""
    stride, pairs = 4, 2
    rng = np.random.default_rng(0)
    matrices = [tf.constant(m) for m in refinement._matrices(SIZE, stride, 1)]
    flow = rng.normal(size=(pairs, *SIZE, 3)).astype(np.float32)
    control = rng.normal(size=(3, pairs, *(m.shape[1] for m in matrices))).astype(np.float32)

    def plain(control):
        both = np.moveaxis(flow, -1, 0).astype(np.float64) + spline_volumes(tf.constant(control), *matrices).numpy()
        sparse = both[:, :, ::stride, ::stride, ::stride]
        total = sum((np.diff(sparse, axis=axis) ** 2).sum((0, 2, 3, 4)) for axis in (2, 3, 4)) / stride**2
        return 0.5 * total / sparse[:, 0].size

    value, gradient = SplineSmoothness(tf.constant(flow), matrices, stride)(tf.constant(control))
    np.testing.assert_allclose(value, plain(control), rtol=1e-4)
    for place in [(0, 0, 0, 0, 0), (1, 1, 3, 2, 4), (2, 0, -1, -1, -1), (0, 1, 1, 4, 2)]:
        ends = []
        for step in (0.5, -0.5):  # a square: differences are exact
            moved = control.copy()
            moved[place] += step
            ends.append(plain(moved)[place[1]])
        assert gradient[place].numpy() == pytest.approx(ends[0] - ends[1], rel=1e-3, abs=1e-6)


def test_refinement_finds_a_known_flow():
    moving, true_flow = blobs(0), bump(1.5, -1.0, 0.5)
    fixed = warp(moving, true_flow)
    start = refinement.identity(moving)
    output = refinement.refine(start, fixed, moving, CONFIG, 60)
    before, after = (float(metrics.flow_error(flow, true_flow)[0]) for flow in (start.flow, output.flow))
    assert after < 0.35 * before
    assert float(losses.correlation(fixed, output.warped)[0]) > 0.995


def test_a_refined_result_is_the_networks_and_one_more_stage(network):
    fixed, moving = blobs(0), blobs(1)
    kept = network.get_weights()
    first = network((fixed, moving))
    output = refinement.refine(first, fixed, moving, network.config, 5)
    assert len(output.stages) == 3
    for one, other in zip(output.stages, first.stages, strict=False):
        np.testing.assert_array_equal(one.composed_flow, other.composed_flow)
    flow = output.stages[-1].flow
    composed = flow + warp(first.flow, flow)
    np.testing.assert_allclose(output.flow, composed, atol=1e-5)
    np.testing.assert_allclose(output.warped, warp(moving, composed), atol=1e-5)
    np.testing.assert_array_equal(output.affine.matrix, first.affine.matrix)
    for one, other in zip(kept, network.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert losses.correlation(fixed, output.warped)[0] > losses.correlation(fixed, first.warped)[0]


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_every_step_reports_the_training_loss_which_falls(similarity):
    config = CONFIG.replace(similarity=similarity, reg_factor=0.5)
    moving = blobs(2)
    fixed = warp(moving, bump(1.0, 1.0, -1.0))
    seen = []
    refinement.refine(refinement.identity(moving), fixed, moving, config, 12, lambda *step: seen.append(step))
    assert [step for step, _ in seen] == list(range(1, 13))
    assert float(seen[0][1][0]) == pytest.approx(float(SIMILARITIES[similarity].load()(fixed, moving)[0]), rel=1e-4)
    assert seen[-1][1][0] < 0.9 * seen[0][1][0]


def test_mutual_information_registers_two_modalities_where_correlation_cannot():
    """The MR's grey values neither rise nor fall with the CT's: fat is bright, bone and vessels are dark."""
    size = (32, 32, 32)
    source = anatomy.make_phantom(size, 3)
    true_flow = known_flows.smooth_flow(size, 7, amplitude=2.9)
    deformed = known_flows.deform(source, true_flow)
    organ = tf.constant(deformed.segmentation[None, ..., None] > 128)
    ct = tf.constant(deformed.volume[None, ..., None] / np.float32(255))
    grey = np.interp(source.volume, [0, 30, 55, 75, 105, 150, 185, 205, 255], [5, 20, 230, 60, 90, 120, 30, 35, 5])
    mr = tf.constant((grey[None, ..., None] / 255).astype(np.float32))
    start = refinement.identity(mr)
    errors = {"none": float(metrics.flow_error(start.flow, true_flow, organ)[0])}
    for similarity in ("ncc", "mi"):
        config = CascadeConfig(image_size=size, similarity=similarity)
        output = refinement.refine(start, ct, mr, config, 50)
        errors[similarity] = float(metrics.flow_error(output.flow, true_flow, organ)[0])
    assert errors["mi"] < 0.6 * errors["none"] < 0.6 * errors["ncc"], errors


def test_pairs_of_a_batch_are_refined_by_themselves():
    moving = blobs(3, pairs=2)
    fixed = warp(moving, tf.concat([bump(1, 0, 0), bump(0, -1, 0.5)], 0))
    together = refinement.refine(refinement.identity(moving), fixed, moving, CONFIG, 8)
    for i in range(2):
        one = slice(i, i + 1)
        alone = refinement.refine(refinement.identity(moving[one]), fixed[one], moving[one], CONFIG, 8)
        np.testing.assert_allclose(together.flow[one], alone.flow, atol=2e-3)


@pytest.mark.parametrize("steps", [0, -1, "many", 2.5])
def test_other_steps_are_refused(steps):
    moving = blobs(0)
    with pytest.raises(UserError, match=f"{steps} steps of refinement; give a whole number from 1, or 'auto'"):
        refinement.refine(refinement.identity(moving), moving, moving, CONFIG, steps)


def test_a_similarity_without_masks_is_refused(monkeypatch):
    moving = blobs(0)
    monkeypatch.setitem(SIMILARITIES, "mine", Extension(lambda fixed, warped: fixed - warped))
    config = CONFIG.replace(similarity="mi+mine")
    with pytest.raises(UserError, match="similarity 'mine' takes no mask"):
        refinement.refine(refinement.identity(moving), moving, moving, config, 1, mask=tf.ones_like(moving))


def test_a_warp_by_one_spline_is_recovered():
    """What the splines can express is found to a tenth of a voxel, by either similarity."""
    moving = tf.constant(gaussian_filter(np.random.default_rng(0).random(SIZE), 1.5)[None, ..., None], tf.float32)
    moving = (moving - tf.reduce_min(moving)) / (tf.reduce_max(moving) - tf.reduce_min(moving))
    matrices = [spline_matrix(np.arange(n) / 8, (n - 1) // 8 + 1) for n in SIZE]
    control = np.random.default_rng(1).uniform(-2.5, 2.5, (1, *(m.shape[1] for m in matrices), 3)).astype(np.float32)
    true_flow = tensor_product(tf.constant(control), *matrices)
    fixed = warp(moving, true_flow)
    inside = tf.constant(np.pad(np.ones([n - 8 for n in SIZE], bool), 4)[None, ..., None])
    for config in (CONFIG, CONFIG.replace(similarity="lncc", window=5)):
        output = refinement.refine(refinement.identity(moving), fixed, moving, config, 150, smoothness=0.002)
        assert float(metrics.flow_error(output.flow, true_flow, inside)[0]) < 0.1
    assert float(metrics.flow_error(tf.zeros_like(true_flow), true_flow, inside)[0]) > 0.7


def noise_pair():
    """Two images that have nothing in common, which only a wild flow makes alike: some large blobs each."""
    rng = np.random.default_rng(0)
    smooth = [gaussian_filter(rng.random(SIZE), 2) for _ in range(2)]
    return (tf.constant(((s - s.min()) / np.ptp(s))[None, ..., None], tf.float32) for s in smooth)


def test_a_diffeomorphic_flow_never_folds_and_a_free_one_does(monkeypatch):
    monkeypatch.setattr(refinement, "PASSES", (refinement._Pass(1, 8, 40, 0.4), refinement._Pass(1, 4, 40, 0.4)))
    fixed, moving = noise_pair()
    folded = {}
    for bounded in (True, False):
        output = refinement.refine(
            refinement.identity(moving), fixed, moving, CONFIG, 80, smoothness=0.0, diffeomorphic=bounded
        )
        folded[bounded] = int((metrics.jacobian_determinant(output.flow).numpy() <= 0).sum())
        assert float(losses.correlation(fixed, output.warped)[0]) > 0.3
    assert folded[True] == 0 < folded[False]


@pytest.mark.parametrize("spacing", [4, 8])
def test_no_control_points_within_the_bound_fold(spacing):
    rng = np.random.default_rng(spacing)
    matrices = refinement._matrices((33, 33, 33), spacing, 1)
    bound = refinement._BOUND * spacing
    for _ in range(20):
        control = bound * rng.choice([-1.0, 1.0], (1, *(m.shape[1] for m in matrices), 3)).astype(np.float32)
        flow = tensor_product(tf.constant(control), *matrices)
        assert metrics.jacobian_determinant(flow).numpy().min() > 0


def test_more_smoothness_makes_a_smoother_flow():
    fixed, moving = noise_pair()
    start = refinement.identity(moving)
    rough, default, smooth = (
        float(losses.smoothness_loss(refinement.refine(start, fixed, moving, CONFIG, 40, smoothness=s).flow)[0])
        for s in (0.1, None, 10.0)
    )
    assert smooth < 0.5 * default < 0.5 * rough
    same = refinement.refine(start, fixed, moving, CONFIG.replace(reg_factor=10.0), 40)
    assert float(losses.smoothness_loss(same.flow)[0]) == pytest.approx(smooth)


def test_auto_ends_early_where_nothing_is_to_be_gained():
    moving = blobs(0)
    taken = []
    for fixed in (moving, warp(moving, bump(1.5, -1.0, 0.5))):
        seen = []
        output = refinement.refine(
            refinement.identity(moving), fixed, moving, CONFIG, on_step=lambda *step, seen=seen: seen.append(step)
        )
        taken.append(len(seen))
        assert [step for step, _ in seen] == list(range(1, len(seen) + 1))
        assert float(losses.correlation(fixed, output.warped)[0]) > 0.995
        assert bool(tf.reduce_any(output.flow != 0)) == (fixed is not moving)
    assert refinement.MOST_STEPS == 155  # as docs/commands.md says
    passes = len(refinement._shared_out(SIZE, "auto"))
    assert taken[0] == passes * (2 * refinement._WINDOW + 1)  # the first time that it looks
    assert taken[0] < taken[1] < refinement.MOST_STEPS


@pytest.mark.parametrize("steps", [1, 2, 7, 100, 1000])
@pytest.mark.parametrize("size", [SIZE, (128, 128, 128), (64, 40, 200)])
def test_a_number_of_steps_is_shared_out_whole(size, steps):
    passes = refinement._shared_out(size, steps)
    assert sum(each.steps for each in passes) == steps
    assert all(min(size) >= 12 * each.shrink or each.shrink == 1 for each in passes)


def test_images_of_a_thin_slab_are_made_smaller_too():
    shrinks = [[each.shrink for each in refinement._shared_out(size, 155)] for size in ((300, 230, 45), (63, 64, 65))]
    assert shrinks[0] == [2, 2, 2, 2, 1]
    assert shrinks[1] == [1, 1, 1, 1]  # less than 64 x 64 x 64 in all


def test_what_lies_outside_the_mask_of_the_fixed_image_has_no_influence():
    moving = tf.concat([blobs(0)] * 2, 1)[:, :32]
    moving = tf.concat([moving] * 2, 2)[:, :, :32]
    moving = tf.tile(moving, [1, 2, 2, 4, 1])[:, :64, :64, :64]
    fixed = tf.roll(moving, 1, 1)
    mask = tf.constant((np.indices((64, 64, 64)).sum(0) < 110).astype(np.float32)[None, ..., None])
    flows = [
        refinement.refine(
            refinement.identity(moving), tf.where(mask > 0, fixed, other), moving, CONFIG, 10, mask=mask
        ).flow.numpy()
        for other in (fixed, 0.0, np.nan)
    ]
    assert [each.shrink for each in refinement._shared_out((64, 64, 64), 10)] == [2, 2, 2, 2, 1]
    assert np.abs(flows[0]).max() > 0.1
    for flow in flows[1:]:
        np.testing.assert_array_equal(flow, flows[0])


def test_the_same_pair_gives_the_same_bits():
    moving = blobs(1)
    fixed = warp(moving, bump(1.0, 1.0, -1.0))
    config = CONFIG.replace(similarity="lncc")
    one, other = (refinement.refine(refinement.identity(moving), fixed, moving, config, 8).flow for _ in range(2))
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("size", [(8, 8, 8), (9, 8, 11)])
def test_a_smaller_image_lies_where_its_places_say(size):
    """A linear image stays linear: voxel i of the half lies at 2 i + 1/2, but at the edge, which is repeated."""
    image = np.einsum("kxyz,k->xyz", np.indices(size), [3.0, 5.0, 7.0]).astype(np.float32)[None, ..., None]
    half = refinement._halved(tf.constant(image)).numpy()[0, ..., 0]
    places = np.indices(half.shape) * 2 + 0.5
    inside = (slice(1, 3),) * 3
    np.testing.assert_allclose(half[inside], np.einsum("kxyz,k->xyz", places, [3.0, 5.0, 7.0])[inside], rtol=1e-5)


# Adaptive repeats


class Course:
    """Stands for a network whose flow after `rep` repeats is the share `shares[rep - 1]` of the true one."""

    def __init__(self, true_flow, shares, folded=()):
        self.true_flow, self.shares, self.folded, self.asked = true_flow, shares, folded, []

    def __call__(self, images, rep):
        self.asked.append(rep)
        flow = self.shares[rep - 1] * self.true_flow
        if rep in self.folded:
            flow *= np.where(np.indices(SIZE).sum(0) % 8 < 4, 1.0, -2.0)[None, ..., None].astype(np.float32) * 2
        stage = refinement.Stage(flow, flow, warp(images[1], flow))
        return refinement.CascadeOutput((stage,), None)


@pytest.mark.parametrize(
    ("shares", "options", "rep", "asked"),
    [
        ((0.3, 0.7, 1.0, 0.4, 1.0), {}, 3, 4),
        ((0.3, 0.7, 0.7005, 1.0), {}, 2, 3),
        ((0.3, 0.7, 0.7005, 1.0), {"threshold": -1.0, "most": 4}, 4, 4),
        ((0.3, 0.5, 0.7, 1.0), {"most": 2}, 2, 2),
        ((1.0, 0.5), {}, 1, 2),
        ((0.3,), {"most": 1}, 1, 1),
    ],
)
def test_repeats_go_on_while_the_similarity_rises(shares, options, rep, asked):
    moving, true_flow = blobs(4), bump(2.0, 1.0, -1.0)
    network = Course(true_flow, shares)
    output, found = refinement.repeat_while_better(network, warp(moving, true_flow), moving, **options)
    assert found == rep
    assert network.asked == list(range(1, asked + 1))
    np.testing.assert_allclose(output.flow, shares[rep - 1] * true_flow)


@pytest.mark.parametrize(("bound", "rep"), [(0.01, 1), (1.0, 2)])
def test_repeats_end_where_the_flow_folds(bound, rep):
    moving, true_flow = blobs(4), bump(2.0, 1.0, -1.0)
    network = Course(true_flow, (0.5, 1.0, 0.1), folded=(2,))
    fixed = network((moving, moving), 2).warped
    assert refinement.repeat_while_better(network, fixed, moving, folding_bound=bound)[1] == rep


def test_a_networks_repeats_share_its_weights(network):
    twice = build_network(network.config.replace(rep=2))
    twice.set_weights(network.get_weights())
    images = blobs(5), blobs(6)
    repeated, plain = network(images, rep=2), network(images)
    assert len(repeated.stages) == 3
    assert len(plain.stages) == 2
    np.testing.assert_allclose(repeated.flow, twice(images).flow, atol=1e-4)
    np.testing.assert_allclose(plain.flow, twice(images, rep=1).flow, atol=1e-4)


def test_repeats_of_several_pairs_or_none_are_refused():
    images = blobs(5, pairs=2), blobs(6, pairs=2)
    with pytest.raises(UserError, match="2 pairs"):
        refinement.repeat_while_better(None, *images)
    with pytest.raises(UserError, match="at most 0 repeats"):
        refinement.repeat_while_better(None, images[0][:1], images[1][:1], most=0)
