"""Evaluation of a small network: what a pair's result holds, stage by stage, against plain computations."""

import concurrent.futures
import gc
import subprocess
import sys
import textwrap
import threading
import time
import weakref

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from errors import UserError
from network import losses, metrics
from network.evaluation import EvaluationPlan, Evaluator, _one_ahead
from network.label_maps import carry_labels, label_map
from network.registry import IMAGES, METRICS, Metric, Value, default_metrics
from network.spatial_transformer import warp
from tests.conftest import GOLDEN
from tests.test_network.golden import rule_network

SIZE = (32, 28, 24)
SPACING = np.array([0.8, 1.5, 2.5], np.float32)


@pytest.fixture(scope="module")
def network():
    """Two cascades whose flows are some voxels long."""
    return rule_network("VTN", 2, image_size=SIZE, channels=4)


def smooth(rng, n):
    """n smooth images 0..1: float32 [n, X, Y, Z, 1]."""
    coarse = rng.uniform(0, 1, (n, 8, 7, 6, 1)).astype(np.float32)
    return np.repeat(np.repeat(np.repeat(coarse, 4, 1), 4, 2), 4, 3)


def make_batch(seed=0):
    """Three pairs: all is known of pair 0, little of pair 1, and pair 2 only fills the batch up."""
    rng = np.random.default_rng(seed)
    fixed, moving = smooth(rng, 3), smooth(rng, 3)
    fixed_seg, moving_seg = (np.where(image > 0.6, 255, 0).astype(np.int32) for image in (fixed, moving))
    fixed_points, moving_points = rng.uniform(4, 20, (2, 3, 4, 3)).astype(np.float32)
    fixed_seg[1], moving_points[1] = -1, np.nan
    fixed_points[0, 2] = np.nan
    spacing = np.stack([SPACING, np.full(3, np.nan, np.float32), SPACING])
    true_flow = rng.normal(0, 1, (3, *SIZE, 3)).astype(np.float32)
    true_flow[1] = np.nan
    batch = {
        "fixed": fixed,
        "moving": moving,
        "fixed_seg": fixed_seg,
        "moving_seg": moving_seg,
        "fixed_points": fixed_points,
        "moving_points": moving_points,
        "fixed_spacing": spacing,
        "moving_spacing": spacing * 2,
        "true_flow": true_flow,
        "valid": np.array([True, True, False]),
        "ids": np.array([["a_1", "b_2"], ["a_1", "c"], ["", ""]], object),
        "index": np.array([7, 12, -1]),
    }
    return {name: tf.convert_to_tensor(value) for name, value in batch.items()}


@pytest.fixture(scope="module")
def batch():
    return make_batch()


def evaluate(network, batches, metrics=None, labels=None, images_of=None, **plan):
    """The results of an evaluation of such a plan."""
    return list(Evaluator(network, labels, EvaluationPlan(metrics, **plan)).evaluate(batches, images_of))


@pytest.fixture(scope="module")
def results(network, batch):
    return evaluate(network, [batch], tuple(METRICS), per_cascade=True, images=tuple(IMAGES))


@pytest.fixture(scope="module")
def output(network, batch):
    return network((batch["fixed"], batch["moving"]))


def test_a_result_for_each_valid_pair(results):
    assert [(r.index, r.fixed_id, r.moving_id) for r in results] == [(7, "a_1", "b_2"), (12, "a_1", "c")]
    assert all(r.seconds > 0 for r in results)
    np.testing.assert_array_equal(results[0].fixed_spacing, SPACING)
    np.testing.assert_array_equal(results[0].moving_spacing, SPACING * 2)
    assert np.isnan(results[1].fixed_spacing).all()


def test_before_registration(results, batch):
    before = results[0].stages[0]
    fixed, moving = (batch[f"{side}_seg"].numpy()[0, ..., 0] > 128 for side in ("fixed", "moving"))
    np.testing.assert_allclose(before["dice"], [2 * (fixed & moving).sum() / (fixed.sum() + moving.sum())], rtol=1e-6)
    apart = batch["fixed_points"].numpy()[0] - batch["moving_points"].numpy()[0]
    np.testing.assert_allclose(before["landmark_distance"], np.linalg.norm(apart, axis=-1), rtol=1e-5)
    np.testing.assert_allclose(before["landmark_distance_mm"], np.linalg.norm(apart * SPACING * 2, axis=-1), rtol=1e-5)
    images = [batch[side].numpy()[0].ravel().astype(np.float64) for side in ("fixed", "moving")]
    np.testing.assert_allclose(before["similarity"], np.corrcoef(*images)[0, 1], atol=1e-4)
    assert before["similarity"] == before["similarity_before"]
    assert before["jacobian_std"] == before["folding"] == before["sdlogj"] == 0
    length = np.linalg.norm(batch["true_flow"].numpy()[0], axis=-1)
    np.testing.assert_allclose(before["flow_error"], length[fixed].mean(), rtol=1e-5)
    expected = metrics.surface_distances(fixed.astype(int), moving.astype(int), (1,), SPACING)
    np.testing.assert_array_equal([before["hd95_mm"], before["surface_distance_mm"]], expected)
    expected = metrics.surface_distances(fixed.astype(int), moving.astype(int), (1,))
    np.testing.assert_array_equal([before["hd95"], before["surface_distance"]], expected)


def test_every_stage_is_measured_on_its_own_flow(results, output, batch):
    assert len(results[0].stages) == 4
    for values, stage in zip(results[0].stages[1:], output.stages, strict=True):
        flow = stage.composed_flow
        np.testing.assert_allclose(values["jacobian_std"], metrics.jacobian_std(flow)[0], rtol=1e-3, atol=1e-7)
        determinant = metrics.jacobian_determinant(flow)
        np.testing.assert_allclose(values["sdlogj"], metrics.sd_log_jacobian(determinant)[0], rtol=1e-2, atol=1e-4)
        similarity = losses.correlation(batch["fixed"], stage.warped)[0]
        np.testing.assert_allclose(values["similarity"], similarity, rtol=1e-3)
        assert values["similarity_before"] == results[0].stages[0]["similarity"]
        labels = [
            label_map(batch["fixed_seg"]).numpy(),
            carry_labels(batch["moving_seg"], flow).numpy(),
        ]
        np.testing.assert_allclose(values["dice"], metrics.overlap(*labels)[0][0], rtol=1e-3)
        hd95, mean = metrics.surface_distances(*(side[0, ..., 0] for side in labels), (1,))
        np.testing.assert_allclose(values["surface_distance"], mean, rtol=1e-2)
        np.testing.assert_allclose(values["hd95"], hd95, rtol=0.05)
        assert hd95 > 0


def test_the_stages_differ(results):
    for name in ("dice", "similarity", "surface_distance", "landmark_distance", "jacobian_std"):
        values = [str(stage[name]) for stage in results[0].stages]
        assert len(set(values)) == 4, name


def test_the_last_stage_is_the_plain_evaluation(network, batch, results):
    plain = evaluate(network, [batch], tuple(METRICS))
    for one, other in zip(plain, results, strict=True):
        assert len(one.stages) == 1
        assert set(one.values) == set(other.values)
        for name, value in one.values.items():
            np.testing.assert_allclose(value, other.stages[-1][name], rtol=1e-4, atol=1e-6, err_msg=name)


AFFINE = np.array([[0.04, -0.1, 0.02], [0.08, -0.03, 0.05], [-0.02, 0.06, 0.05]], np.float32)
SHIFT = np.array([2.5, -1.0, 0.75], np.float32)


def led_by_affine(places):
    """Where the affine map leads voxels [..., 3]; it turns and scales about the middle of the volume."""
    middle = (np.array(SIZE) - 1) / 2
    return (places - middle) @ (AFFINE + np.eye(3)).T + middle + SHIFT


@pytest.mark.parametrize("plan", [{}, pytest.param({"adaptive": True}, marks=pytest.mark.slow), {"refine_steps": 2}])
def test_after_an_affine_map_everything_is_of_the_whole_map(network, batch, plan):
    maps = {"affine_matrix": [AFFINE] * 3, "affine_shift": [SHIFT] * 3, "affine_found": [1.0, 0.0, 1.0]}
    with_maps = batch | {name: tf.constant(np.array(value, np.float32)) for name, value in maps.items()}
    chosen = ("landmarks", "similarity", "overlap"), None
    images = {"images": ("flow", "warped", "moving"), **plan}
    results = evaluate(network, [with_maps], *chosen, after_affine=True, **images)
    (plain, _) = evaluate(network, [batch], *chosen, **images)
    # By hand: the network sees the moved image; its flow u leads p to p + u(p), and the affine map from there.
    grid = np.moveaxis(np.indices(SIZE), 0, -1).astype(float)
    moved = warp(batch["moving"][:1], tf.constant((led_by_affine(grid) - grid)[None].astype(np.float32)))
    (seen, _) = evaluate(network, [{**batch, "moving": tf.concat([moved] * 3, 0)}], *chosen, **images)
    result = results[0]
    if not plan.get("refine_steps"):
        by_hand = led_by_affine(grid + seen.images["flow"].array) - grid
        np.testing.assert_allclose(result.images["flow"].array, by_hand, atol=1e-4)
    flow = tf.constant(result.images["flow"].array[None])
    np.testing.assert_allclose(result.images["warped"].array, warp(batch["moving"][:1], flow)[0, ..., 0], atol=1e-5)
    np.testing.assert_array_equal(result.images["moving"].array, batch["moving"][0, ..., 0])
    assert result.values["similarity_before"] == plain.values["similarity_before"]
    for name, value in plain.before.items():
        np.testing.assert_array_equal(result.before[name], value)
    assert [r.values["affine_found"] for r in results] == [1, 0]
    offsets = metrics.landmark_offsets(batch["fixed_points"][:1], batch["moving_points"][:1], flow)
    expected = metrics.landmark_distances(offsets)[0]
    np.testing.assert_allclose(result.values["landmark_distance"], expected, rtol=1e-5)


def test_the_affine_map_is_the_first_cascade(network, batch):
    maps = {"affine_matrix": np.tile(AFFINE, (3, 1, 1)), "affine_shift": np.tile(SHIFT, (3, 1))}
    with_maps = batch | {name: tf.constant(value) for name, value in maps.items()}
    with_maps["affine_found"] = tf.ones(3)
    (result, _) = evaluate(network, [with_maps], ("jacobian", "landmarks"), per_cascade=True, after_affine=True)
    (plain, _) = evaluate(network, [batch], ("jacobian", "landmarks"), per_cascade=True)
    assert len(result.stages) == len(plain.stages) + 1
    assert result.stages[1]["jacobian_std"] == pytest.approx(0, abs=1e-4)
    fixed, moving = batch["fixed_points"][0].numpy(), batch["moving_points"][0].numpy()
    np.testing.assert_allclose(
        result.stages[1]["landmark_distance"], np.linalg.norm(led_by_affine(fixed) - moving, axis=1), rtol=1e-3
    )


def test_what_cannot_be_measured_is_nan(results):
    values = results[1].values
    measured = {name for name, value in values.items() if not np.isnan(value).all()}
    assert measured == {"jacobian_std", "folding", "sdlogj", "similarity", "similarity_before"}
    np.testing.assert_array_equal(np.isnan(results[0].values["landmark_distance"]), [False, False, True, False])


def test_similarity_of_a_constant_image_is_not_measured(network, batch):
    flat = {**batch, "fixed": tf.fill(batch["fixed"].shape, 0.25)}
    (result, _) = evaluate(network, [flat], ("similarity",))
    assert np.isnan(result.values["similarity"])
    assert np.isnan(result.values["similarity_before"])


def test_only_what_was_chosen(network, batch):
    (result, _) = evaluate(network, [batch], ("folding",))
    assert list(result.values) == ["folding"]
    assert result.images == {}
    assert set(default_metrics()) == set(METRICS) - {"surface"}


def test_labels_are_measured_one_by_one(network, batch):
    segs = {f"{side}_seg": batch[f"{side}_seg"] // 255 * 4 for side in ("fixed", "moving")}
    (result, _) = evaluate(network, [{**batch, **segs}], ("overlap", "surface"), [9, 4])
    for name in ("dice", "jaccard", "hd95", "surface_distance", "hd95_mm", "surface_distance_mm"):
        np.testing.assert_array_equal(np.isnan(result.values[name]), [True, False], err_msg=name)


def test_images(results, output, batch):
    images, fixed_missing = ({name: image.array for name, image in r.images.items()} for r in results)
    np.testing.assert_allclose(images["flow"], output.flow[0], atol=1e-3)
    np.testing.assert_allclose(images["warped"], output.warped[0, ..., 0], atol=1e-3)
    np.testing.assert_array_equal(images["fixed"], batch["fixed"][0, ..., 0])
    np.testing.assert_array_equal(images["moving"], batch["moving"][0, ..., 0])
    np.testing.assert_array_equal(images["fixed_seg"], batch["fixed_seg"][0, ..., 0] // 255)
    np.testing.assert_array_equal(images["moving_seg"], batch["moving_seg"][0, ..., 0] // 255)
    a, b = images["fixed_seg"] == 1, images["warped_seg"] == 1
    np.testing.assert_allclose(results[0].values["dice"], [2 * (a & b).sum() / (a.sum() + b.sum())], rtol=1e-6)
    folding = (images["jacobian"][1:-1, 1:-1, 1:-1] <= 0).mean()
    np.testing.assert_allclose(results[0].values["folding"], folding, rtol=1e-5)
    assert (fixed_missing["fixed_seg"] == -1).all()
    assert fixed_missing["moving_seg"].min() == 0


def test_images_of_some_pairs(network, batch):
    found = evaluate(network, [batch], ("jacobian",), images=("flow", "warped_seg"), images_of={12, 40})
    assert [set(result.images) for result in found] == [set(), {"flow", "warped_seg"}]


def test_a_later_evaluation_sees_changed_weights(network, batch):
    evaluator = Evaluator(network, plan=EvaluationPlan(("similarity",)))

    def similarity():
        return [result.values["similarity"] for result in evaluator.evaluate([batch])]

    head = network.cascades[-1].head.kernel
    before, kept = similarity(), head.numpy()
    head.assign(np.zeros_like(kept))
    changed = similarity()
    head.assign(kept)
    assert before == similarity()
    assert not np.allclose(before, changed)


def test_a_graph_that_is_made_before_is_the_one_that_is_used(network, batch):
    evaluator = Evaluator(network)
    evaluator.prepare({name: tf.TensorSpec(value.shape, value.dtype) for name, value in batch.items()})
    prepared = [result.values for result in evaluator.evaluate([batch])]
    assert evaluator._run.experimental_get_tracing_count() == 1
    for one, other in zip(prepared, evaluate(network, [batch], evaluator.plan.metrics), strict=True):
        np.testing.assert_equal(one, other.values)


def test_the_next_batch_runs_while_the_last_is_used_but_never_two_at_once():
    running, seen = threading.Lock(), []

    def function(item):
        assert running.acquire(blocking=False), "two at once"
        time.sleep(0.05)
        running.release()
        seen.append(item)
        return 10 * item

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        results = _one_ahead(pool, function, range(4))
        assert next(results) == 0
        time.sleep(0.2)
        assert seen == [0, 1]
        assert [*results] == [10, 20, 30]


@pytest.mark.slow
def test_two_devices_share_a_batch(results, tmp_path):
    """In a process of its own: devices are set before TensorFlow starts."""
    script = f"""
        import sys
        sys.path.insert(0, {str(GOLDEN)!r})
        import numpy as np
        import tensorflow as tf
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
        from tests.test_network.golden import rule_network
        from tests.test_network.test_evaluation import SIZE, make_batch
        from network.evaluation import EvaluationPlan, Evaluator

        batch = {{name: tf.concat([value, value[:1]], 0) for name, value in make_batch().items()}}
        strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
        with strategy.scope():
            network = rule_network("VTN", 2, image_size=SIZE, channels=4)
        plan = EvaluationPlan(("overlap", "surface"), images=("flow", "moving_seg"))
        found = list(Evaluator(network, None, plan, strategy).evaluate([batch]))
        assert [r.index for r in found] == [7, 12, 7]
        for k, r in enumerate(found):
            np.savez({str(tmp_path)!r} + f"/{{k}}.npz", fixed=r.fixed_id, moving=r.moving_id, **r.values,
                     **{{name: image.array for name, image in r.images.items()}})
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, cwd=GOLDEN.parents[1]
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for k, alone in enumerate([*results, results[0]]):
        with np.load(tmp_path / f"{k}.npz") as shared:
            assert (shared["fixed"], shared["moving"]) == (alone.fixed_id, alone.moving_id)
            for name in ("dice", "jaccard", "surface_distance", "hd95_mm"):
                np.testing.assert_allclose(shared[name], alone.values[name], rtol=1e-3, err_msg=name)
            for name in ("flow", "moving_seg"):
                np.testing.assert_allclose(shared[name], alone.images[name].array, atol=1e-3, err_msg=name)


# Before registration


def test_before_registration_is_measured_whatever_the_plan(network, batch, results):
    (alone, _) = evaluate(network, [batch])
    assert list(alone.before) == [
        "dice",
        "jaccard",
        "landmark_distance",
        "landmark_distance_mm",
        "similarity",
        "flow_error",
    ]
    for name, value in alone.before.items():
        np.testing.assert_allclose(value, results[0].stages[0][name], rtol=1e-6, err_msg=name)
        assert not np.array_equal(value, alone.values[name]), name
    (folding, _) = evaluate(network, [batch], ("folding",))
    assert folding.before == {}


def test_refined_results_have_their_before_too(network, batch):
    (one, _) = evaluate(network, [batch], ("similarity",), refine_steps=1)
    assert one.before["similarity"] == one.values["similarity_before"]
    assert "unrefined_similarity" in one.values


# What cannot be measured


NOWHERE = [np.nan, np.inf, -np.inf]


@pytest.mark.parametrize("side", ["fixed", "moving"])
@pytest.mark.parametrize("value", NOWHERE)
def test_nothing_is_measured_on_a_pair_with_a_voxel_that_is_not_finite(network, batch, results, side, value):
    image = batch[side].numpy()
    image[0, 3, 4, 5, 0] = value
    found = evaluate(network, [{**batch, side: tf.constant(image)}], tuple(METRICS))
    values = {**found[0].values, **{f"{name}_before": v for name, v in found[0].before.items()}}
    assert {name for name, v in values.items() if not np.isnan(v).all()} == set()
    for name, other in found[1].values.items():  # the pair beside it is measured as ever
        np.testing.assert_allclose(other, results[1].values[name], rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("value", NOWHERE)
def test_nothing_is_measured_where_the_networks_flow_is_not_finite(batch, value):
    network = rule_network("VTN", 1, image_size=SIZE, channels=4)
    kernel = network.cascades[0].head.kernel
    kernel.assign(tf.fill(kernel.shape, value))
    (found, _) = evaluate(network, [batch], tuple(METRICS), per_cascade=True)
    measured = {
        stage: {name for name, v in values.items() if not np.isnan(v).all()}
        for stage, values in enumerate(found.stages)
    }
    assert measured[2] == set()
    assert {"dice", "landmark_distance", "hd95"} <= measured[0] & measured[1]
    assert found.before["dice"] > 0


UNUSABLE = st.one_of(st.integers(max_value=0), st.integers(min_value=2**31))


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(unusable=st.lists(UNUSABLE, min_size=1, max_size=3), place=st.integers(0, 2))
def test_labels_that_are_no_structure_are_not_measured(network, batch, unusable, place):
    segs = {f"{side}_seg": batch[f"{side}_seg"] // 255 * 4 for side in ("fixed", "moving")}
    labels = [*unusable[:place], 4, *unusable[place:]]
    (result, _) = evaluate(network, [{**batch, **segs}], ("overlap", "surface"), labels)
    (alone, _) = evaluate(network, [{**batch, **segs}], ("overlap", "surface"), [4])
    for name, value in result.values.items():
        np.testing.assert_array_equal(value[np.equal(labels, 4)], alone.values[name], err_msg=name)
        assert np.isnan(value[np.not_equal(labels, 4)]).all(), name
    assert np.isnan(result.before["dice"][np.not_equal(labels, 4)]).all()


# A metric of one's own


@pytest.fixture
def register(monkeypatch):
    """Add rows to the table of metrics for one test."""

    def add(name, *args, **options):
        monkeypatch.setitem(METRICS, name, Metric(*args, **options))

    return add


def test_a_metric_of_ones_own_is_one_function_and_one_row(network, batch, results, register):
    register(
        "size",
        lambda scene: {"mean_length": tf.reduce_mean(tf.norm(scene.flow, axis=-1), [1, 2, 3])},
        {"mean_length": Value("voxel")},
    )
    register(
        "volume",
        lambda pair: {"volume": [(pair.images["warped_seg"] == label).sum() for label in pair.labels]},
        {"volume": Value("voxel", "label")},
        where="numpy",
        needs=("warped_seg",),
    )
    (found, _) = evaluate(network, [batch], per_cascade=True)
    flow, seg = (results[0].images[name].array for name in ("flow", "warped_seg"))
    np.testing.assert_allclose(found.values["mean_length"], np.linalg.norm(flow, axis=-1).mean(), rtol=1e-4)
    assert found.stages[0]["mean_length"] == 0
    np.testing.assert_allclose(found.values["volume"], [(seg == 1).sum()], atol=3)
    assert list(EvaluationPlan().values())[-2:] == ["mean_length", "volume"]


@pytest.mark.parametrize("where", ["graph", "numpy"])
def test_a_row_that_does_not_fit_its_function_is_named(network, batch, register, where):
    constant = tf.zeros([3]) if where == "graph" else 0.0
    register("mine", lambda _: {"a": constant}, {"b": Value()}, where)
    with pytest.raises(UserError, match="metric 'mine' gives 'a', which its row does not name"):
        evaluate(network, [batch], ("mine",))
    register("per_label", lambda _: {"a": constant}, {"a": Value(per="label")}, where)
    with pytest.raises(UserError, match=r"metric 'per_label': 'a' has shape \(\) for a pair; .* one number per label"):
        evaluate(network, [batch], ("per_label",))
    with pytest.raises(UserError, match="metric is 'none'; it must be one of overlap"):
        evaluate(network, [batch], ("none",))


def test_an_evaluation_keeps_no_network_alive(batch):
    network = rule_network("VTN", 1, image_size=SIZE, channels=4)
    evaluate(network, [batch], ("similarity",))
    weight = weakref.ref(network.cascades[0].head)
    del network
    gc.collect()
    assert weight() is None
