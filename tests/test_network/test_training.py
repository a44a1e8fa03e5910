"""Training steps: the rate, sizes, devices and seeds."""

import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from errors import UserError
from network import training
from network.augmentation import augment, draw
from network.config import CascadeConfig
from network.kernels import whole_step
from network.losses import correlation_loss
from network.recursive_cascaded_networks import build_network
from network.registry import SIMILARITIES, Extension
from network.spatial_transformer import warp
from tests.examples import example

ROOT = pathlib.Path(__file__).parents[2]


def batch_of(size, pairs=1):
    rng = np.random.default_rng(0)
    seeds = np.stack([np.full(pairs, 7), np.arange(pairs)], 1)
    images = {side: tf.constant(rng.random((pairs, *size, 1), np.float32)) for side in ("fixed", "moving")}
    return {**images, "seed": tf.constant(seeds, tf.int32)}


def trainer_of(config):
    keras.utils.set_random_seed(5)
    network = build_network(config)
    trainer = training.Trainer(network)
    trainer.compile(optimizer=training.adam(network))
    trainer.optimizer.learning_rate = 1e-3
    return trainer


@pytest.mark.parametrize("options", [pytest.param({"rep": 2}, marks=pytest.mark.slow), {"n_cascades": 0}], ids=str)
def test_the_loss_compares_the_images_in_their_own_contrast(options):
    """The network is shown two contrasts; its flows are judged on the images as they are."""
    size = (16, 18, 20)
    config = CascadeConfig("VTN", **{"n_cascades": 1, **options}, image_size=size, channels=2, augmentation="contrast")
    trainer, batch = trainer_of(config), batch_of(size, 2)
    terms = trainer.train_step(batch)
    network, shown = trainer_of(config).network, augment(batch, draw(batch["seed"], config), config)
    output = network((shown["seen_fixed"], shown["seen_moving"]))
    for k in config.similarity_stages:
        warped = warp(batch["moving"], output.stages[k].composed_flow)
        expected = tf.reduce_sum(correlation_loss(batch["fixed"], warped))
        assert float(terms[f"{k}_raw_loss"]) == pytest.approx(float(expected), rel=1e-4)
        other = correlation_loss(shown["seen_fixed"], output.stages[k].warped)
        assert float(tf.reduce_sum(other)) != pytest.approx(float(expected), rel=1e-2)


def test_the_rate_halves_from_the_fourth_epoch_on_without_end():
    rates = [training.learning_rate(epoch * 20 + 19, 20, 1.0) for epoch in range(12)]
    assert rates == [1, 1, 1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256, 1 / 512]


@pytest.mark.parametrize("limit", [0.0, 30.0, 1e6], ids="limit {:g}".format)
def test_adam_by_its_formula(limit):
    """Moments and weights of three steps by the last lines of section 2 of Kingma and Ba (2015).

    The gradients of the three have norms from 94 to 276: the lesser limit scales all, the greater none.
    """
    rng = np.random.default_rng(3)
    weights = [rng.normal(size=shape) for shape in ((3, 5, 7), (4,), (33,))]
    variables = [keras.Variable(w.astype(np.float32)) for w in weights]
    weights = [variable.numpy().astype(float) for variable in variables]
    optimizer = training._Adam(limit, name="adam", beta_1=0.9, beta_2=0.999, epsilon=1e-8)
    optimizer.build(variables)
    moments = [(np.zeros_like(w), np.zeros_like(w)) for w in weights]
    first, second = float(np.float32(0.9)), float(np.float32(0.999))
    for step, rate in enumerate((0.1, 0.05, 0.3), start=1):
        optimizer.learning_rate = rate
        gradients = [
            (10.0 ** rng.uniform(-9, 2, w.shape) * rng.normal(size=w.shape)).astype(np.float32) for w in weights
        ]
        tf.function(lambda g: optimizer.apply(g))([tf.constant(g) for g in gradients])
        norm = np.linalg.norm(np.concatenate([g.ravel().astype(float) for g in gradients]))
        factor = limit / norm if 0 < limit < norm else 1.0
        for k, g in enumerate(gradients):
            g = g.astype(float) * factor
            m, v = moments[k]
            moments[k] = m, v = first * m + (1 - first) * g, second * v + (1 - second) * g**2
            alpha = rate * np.sqrt(1 - second**step) / (1 - first**step)
            weights[k] = weights[k] - alpha * m / (np.sqrt(v) + 1e-8)
    assert int(optimizer.iterations) == 3
    for k, variable in enumerate(variables):
        np.testing.assert_allclose(optimizer._momentums[k], moments[k][0], rtol=1e-5, atol=1e-12)
        np.testing.assert_allclose(optimizer._velocities[k], moments[k][1], rtol=2e-6)
        np.testing.assert_allclose(variable, weights[k], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("base_network", ["VTN", "VoxelMorph"])
@pytest.mark.parametrize("size", [(64, 64, 64), (24, 20, 28), (17, 33, 12)], ids=str)
def test_a_step_at_any_size_lowers_the_loss(base_network, size):
    config = CascadeConfig(base_network, 1, image_size=size, channels=2, augmentation="identity")
    trainer, batch = trainer_of(config), batch_of(size)
    step = whole_step(trainer.train_step)
    losses = [float(step(batch)["loss"]) for _ in range(4)]
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("base_network", ["VTN", "VoxelMorph"])
@pytest.mark.parametrize("size", [(96, 80, 112), (160, 192, 224)], ids=str)
def test_a_step_at_full_sizes(base_network, size):
    trainer = trainer_of(CascadeConfig(base_network, 1, image_size=size))
    assert np.isfinite(float(whole_step(trainer.train_step)(batch_of(size))["loss"]))


def test_the_affine_cascade_trains_alone():
    trainer = trainer_of(CascadeConfig(n_cascades=0, image_size=(16, 20, 24)))
    terms = trainer.train_step(batch_of((16, 20, 24)))
    assert set(terms) == {"loss", "0_det_loss", "0_ortho_loss", "0_raw_loss", "0_loss", training.GRADIENT}
    assert float(terms[training.GRADIENT]) > 0


def test_augmentation_is_off_when_asked_and_follows_the_seed():
    size = (16, 16, 16)
    losses = {}
    for augmentation in (None, "identity"):
        for seed in (1, 2):
            trainer = trainer_of(CascadeConfig(n_cascades=0, image_size=size, augmentation=augmentation))
            batch = batch_of(size) | {"seed": tf.constant([[seed, 0]])}
            losses[augmentation, seed] = float(trainer.train_step(batch)["loss"])
    assert losses["identity", 1] == losses["identity", 2]
    assert len(set(losses.values())) == 3


OPTIONS = {
    "flow": "velocity",
    "bending_factor": 0.1,
    "inverse_factor": 0.1,
    "similarity": "ncc+0.5*lncc+0.1*mi",
    "similarity_on": "all",
    "similarity_mask": "inside",
    "sampling": 4,
}


@pytest.mark.parametrize("options", [{}, pytest.param(OPTIONS, marks=pytest.mark.slow)], ids=["plain", "options"])
def test_two_trainings_with_one_seed_give_the_same_bits(options):
    every = "bspline+affine+contrast"
    config = CascadeConfig("VTN", 1, 2, image_size=(32, 32, 32), channels=4, augmentation=every, **options)
    ends = []
    for _ in range(2):
        trainer = trainer_of(config)
        data = tf.data.Dataset.from_tensors(batch_of((32, 32, 32), 2)).repeat(3)
        trainer.fit(data, verbose=0, shuffle=False)
        assert trainer.step == 3
        ends.append(trainer.network.get_weights())
    for a, b in zip(*ends, strict=True):
        np.testing.assert_array_equal(a, b)


def supervised_batch(size, pairs):
    """Labels 0..3 and three landmarks a scan; the second pair has no labels, the third no landmarks."""
    rng = np.random.default_rng(4)
    batch = batch_of(size, pairs)
    for side in ("fixed", "moving"):
        labels = rng.integers(0, 4, (pairs, *size, 1)).astype(np.int32)
        points = rng.uniform(3, 12, (pairs, 3, 3)).astype(np.float32)
        labels[1], points[2] = -1, np.nan
        batch |= {f"{side}_seg": tf.constant(labels), f"{side}_points": tf.constant(points)}
    return batch


SUPERVISED = {"image_size": (16, 16, 16), "channels": 2, "dice_factor": 0.7, "landmark_factor": 0.2}


def supervised_trainer(config):
    trainer = trainer_of(config)
    trainer.labels = (1, 2, 3)
    return trainer


@pytest.mark.slow
def test_supervised_terms_are_sums_over_the_pairs_that_have_them():
    """The loss of a batch is the sum of its pairs' losses: a pair without labels counts without that term."""
    config = CascadeConfig("VTN", 0, **SUPERVISED)
    batch = supervised_batch(config.image_size, 4)
    terms = supervised_trainer(config).differentiate(batch)[0]
    alone = [
        supervised_trainer(config).differentiate({name: value[k : k + 1] for name, value in batch.items()})[0]
        for k in range(4)
    ]
    assert [float(pair["dice_pairs"]) for pair in alone] == [1, 0, 1, 1]
    assert [float(pair["landmark_pairs"]) for pair in alone] == [1, 1, 0, 1]
    assert float(alone[1]["0_dice_loss"]) == float(alone[2]["0_landmark_loss"]) == 0
    for name, value in terms.items():
        assert float(value) == pytest.approx(sum(float(pair[name]) for pair in alone), rel=1e-5), name
    plain = trainer_of(config.replace(dice_factor=0.0, landmark_factor=0.0)).differentiate(batch)[0]
    added = 0.7 * float(terms["0_dice_loss"]) + 0.2 * float(terms["0_landmark_loss"])
    assert float(terms["loss"]) == pytest.approx(float(plain["loss"]) + added, rel=1e-6)
    assert set(terms) - set(plain) == {"0_dice_loss", "dice_pairs", "0_landmark_loss", "landmark_pairs"}


@pytest.mark.slow
def test_two_supervised_trainings_with_one_seed_give_the_same_bits():
    config = CascadeConfig("VTN", 1, 2, **SUPERVISED)
    ends = []
    for _ in range(2):
        trainer = supervised_trainer(config)
        data = tf.data.Dataset.from_tensors(supervised_batch(config.image_size, 3)).repeat(3)
        trainer.fit(data, verbose=0, shuffle=False)
        ends.append(trainer.network.get_weights())
    for a, b in zip(*ends, strict=True):
        np.testing.assert_array_equal(a, b)


TWO_DEVICES = """
import sys, network, keras, numpy as np, tensorflow as tf
from network import checkpoints, training
from network.config import CascadeConfig
from network.recursive_cascaded_networks import build_network
n, folder = int(sys.argv[1]), sys.argv[2]
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * n)
strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(n)]) if n > 1 else tf.distribute.get_strategy()
keras.utils.set_random_seed(0)
with strategy.scope():
    every = "bspline+affine+contrast"
    net = build_network(CascadeConfig("VTN", 1, 2, image_size=(16, 16, 16), channels=2, augmentation=every))
    trainer = training.Trainer(net)
    trainer.compile(optimizer=training.adam(net, ema=0.5))
trainer.optimizer.learning_rate = 1e-3
rng = np.random.default_rng(0)
batch = {side: rng.random((4, 16, 16, 16, 1), np.float32) for side in ("fixed", "moving")}
batch["seed"] = np.stack([np.zeros(4, np.int32), np.arange(4, dtype=np.int32)], 1)
data = tf.data.Dataset.from_tensor_slices(batch).batch(4, drop_remainder=True).repeat(3)
trainer.fit(data, verbose=0, shuffle=False)
checkpoints.save(folder, net, trainer.optimizer, trainer.step)
"""


TWO_DEVICES_NORMALISED = (
    TWO_DEVICES.replace("import sys, network", "import sys, cli; cli.load_plugin(sys.argv[3])\nimport network")
    .replace('CascadeConfig("VTN", 1, 2', 'CascadeConfig("Small", 1, 2')
    .replace("channels=2", "width=2")
)


@pytest.mark.slow
def test_statistics_of_two_devices_are_the_mean_over_both(tmp_path):
    plugin = tmp_path / "small.py"
    plugin.write_text(example("A base network"))
    saved = []
    for n in (1, 2):
        folder = tmp_path / str(n)
        folder.mkdir()
        command = [sys.executable, "-c", TWO_DEVICES_NORMALISED, str(n), str(folder), str(plugin)]
        subprocess.run(command, check=True, cwd=ROOT)
        saved.append(tf.train.load_checkpoint(str(folder / "model-3")))
    name = "gaffdfrm/deform_stem_0/norm/moving_mean"
    one, two = (reader.get_tensor(name) for reader in saved)
    assert np.abs(one).max() > 1e-3
    np.testing.assert_allclose(two, one, rtol=0.1)  # the mean of the halves' means, but they train apart by a little


TWO_DEVICES_SUPERVISED = TWO_DEVICES.replace("channels=2", "channels=2, dice_factor=1.0, landmark_factor=0.5").replace(
    "data = tf.data",
    """trainer.labels = (1, 2)
for side in ("fixed", "moving"):
    batch[f"{side}_seg"] = rng.integers(0, 3, (4, 16, 16, 16, 1)).astype(np.int32)
    batch[f"{side}_points"] = rng.uniform(3, 12, (4, 2, 3)).astype(np.float32)
batch["fixed_seg"][1], batch["moving_points"][2:] = -1, np.nan
data = tf.data""",
)


def assert_two_devices_train_as_one(program, tmp_path, within):
    """Of every variable, the norm of the difference is at most such a share."""
    saved = []
    for n in (1, 2):
        folder = tmp_path / str(n)
        folder.mkdir()
        subprocess.run([sys.executable, "-c", program, str(n), str(folder)], check=True, cwd=ROOT)
        saved.append(tf.train.load_checkpoint(str(folder / "model-3")))
    for name in saved[0].get_variable_to_shape_map():
        one, two = (np.asarray(reader.get_tensor(name), float).ravel() for reader in saved)
        assert np.linalg.norm(one - two) <= within * np.linalg.norm(one), name


@pytest.mark.slow
def test_two_devices_with_supervision_train_as_one(tmp_path):
    """Two pairs a device: one device has a pair without labels, the other none with landmarks."""
    assert_two_devices_train_as_one(TWO_DEVICES_SUPERVISED, tmp_path, 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("options", "clip"), [({}, 0), (OPTIONS, 0), ({}, 0.5)], ids=["plain", "options", "clipped"])
def test_two_devices_train_and_save_the_same_weights_as_one(tmp_path, options, clip):
    program = TWO_DEVICES.replace("channels=2", f"channels=2, **{options}").replace("ema=0.5", f"ema=0.5, clip={clip}")
    # The second moments of velocities' smallest gradients, 1e-17, differ by up to 5e-4.
    assert_two_devices_train_as_one(program, tmp_path, 1e-3 if options else 1e-4)


def test_a_mask_that_the_similarity_does_not_take_is_an_error_before_the_first_step(monkeypatch):
    monkeypatch.setitem(SIMILARITIES, "mine", Extension(lambda fixed, warped: fixed))
    with pytest.raises(UserError, match="similarity 'mine' takes no mask; choose"):
        trainer_of(SMALLEST.replace(similarity="mine", similarity_mask="inside"))


SMALLEST = CascadeConfig(n_cascades=0, image_size=(16, 16, 16), channels=2, augmentation="identity")


def several(trainer, monkeypatch):
    """The function of a step, of a trainer that takes itself for one of several workers."""
    monkeypatch.setattr(training, "has_several_workers", lambda strategy: True)
    trainer.make_train_function()
    return trainer.train_function


def test_several_workers_stop_after_the_first_step_that_begins_once_one_was_asked(monkeypatch):
    trainer, batch = trainer_of(SMALLEST), batch_of((16, 16, 16))
    step = several(trainer, monkeypatch)
    names = set(step(iter([batch])))
    assert not trainer.stops
    trainer.asked_to_stop = True  # after the step, as by a signal in a validation
    assert not trainer.stops
    assert set(step(iter([batch]))) == names  # what the workers tell each other is no term of the loss
    assert trainer.stops


def test_several_workers_end_after_the_first_step_that_begins_once_one_found_the_run_over(monkeypatch):
    trainer, batch = trainer_of(SMALLEST), batch_of((16, 16, 16))
    step = several(trainer, monkeypatch)
    step(iter([batch]))
    trainer.found_over = True  # in a validation, of the first worker
    assert not trainer.is_over
    step(iter([batch]))
    assert trainer.is_over
    assert not trainer.stops


def test_one_process_stops_after_the_step_that_is_under_way():
    trainer = trainer_of(SMALLEST)
    trainer.make_train_function()
    trainer.train_function(iter([batch_of((16, 16, 16))]))
    assert not trainer.stops
    trainer.asked_to_stop = True
    assert trainer.stops


@pytest.mark.parametrize("asked", [False, True])
def test_a_lost_worker_is_told_from_a_stop(monkeypatch, asked):
    trainer = trainer_of(SMALLEST)
    step = several(trainer, monkeypatch)
    trainer.asked_to_stop = asked

    def lost():
        raise tf.errors.UnavailableError(None, None, "gone")
        yield

    expected = "step 1: another worker was lost" + (" before all had stopped; see" if asked else "; see")
    with pytest.raises(UserError, match=expected):
        step(lost())
    strategy = trainer.distribute_strategy
    assert trainer.leaves_together()
    monkeypatch.setattr(strategy, "reduce", lambda *_, **__: next(lost()))
    assert not trainer.leaves_together()
    with pytest.raises(UserError, match="lost before the first step"), training.no_lost_worker(strategy):
        next(lost())


def one_step(jit=False, **options):
    """Loss terms of two steps from the same weights, and the trainer."""
    keras.utils.set_random_seed(0)
    network = build_network(CascadeConfig("VTN", 2, image_size=(16, 16, 16), channels=2, **options))
    trainer = training.Trainer(network, jit=jit)
    trainer.compile(optimizer=training.adam(network))
    rng = np.random.default_rng(0)
    batch = {side: tf.constant(rng.random((1, 16, 16, 16, 1), np.float32)) for side in ("fixed", "moving")}
    batch["seed"] = tf.constant([[0, 1]])
    trainer.make_train_function()
    return [{k: float(v) for k, v in trainer.train_function(iter([batch])).items()} for _ in range(2)], trainer


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        pytest.param({"rematerialize": True}, 1e-5, marks=pytest.mark.slow),
        pytest.param({"rematerialize": True, **OPTIONS}, 1e-5, marks=pytest.mark.slow),
        pytest.param({"jit": True}, 1e-4, marks=pytest.mark.slow),
        pytest.param({"precision": "mixed_bfloat16"}, 0.05, marks=pytest.mark.slow),
        pytest.param({"precision": "mixed_float16"}, 0.01, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_ways_to_compute_give_the_same_losses(options, tolerance):
    expected, _ = one_step(**{name: value for name, value in options.items() if name in OPTIONS})
    found, trainer = one_step(**options)
    for before, after in zip(expected, found, strict=True):
        assert after["loss"] == pytest.approx(before["loss"], rel=tolerance)
        assert after[training.GRADIENT] == pytest.approx(before[training.GRADIENT], rel=10 * tolerance)
    assert {weight.dtype for weight in trainer.network.weights} == {"float32"}
    flow = trainer.network([tf.zeros((1, 16, 16, 16, 1))] * 2).flow
    assert flow.dtype == tf.float32


def test_a_step_with_the_masks_of_the_scans():
    trainer, batch = trainer_of(SMALLEST.replace(similarity_mask="scan")), batch_of((16, 16, 16))
    step = whole_step(lambda batch: trainer._differentiate(batch)[0])
    losses = []
    for share in (0.0, 0.5):
        masks = {f"{side}_mask": tf.cast(batch[side] > share, tf.float32) for side in ("fixed", "moving")}
        losses.append(float(step({**batch, **masks})["loss"]))
    plain = trainer_of(SMALLEST)._differentiate(batch)[0]
    assert losses[0] == pytest.approx(float(plain["loss"]), rel=1e-4)
    assert abs(losses[1] - losses[0]) > 1e-3
