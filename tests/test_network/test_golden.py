"""The port against numbers that the original system computed."""

import json

import make_checkpoint
import numpy as np
import pytest
import tensorflow as tf

from network import checkpoints, metrics
from network.augmentation import spline_flow
from network.config import CascadeConfig
from network.kernels import whole_step
from network.label_maps import carry_labels, label_map
from network.losses import cascade_losses
from network.recursive_cascaded_networks import build_network
from network.spatial_transformer import sample_at_points, warp
from network.training import Trainer, adam
from tests.conftest import GOLDEN
from tests.test_network.golden import recorded, rule_batch, rule_network


def relative(value, golden):
    """Largest difference over the largest golden value."""
    golden = np.asarray(golden)
    return float(np.abs(np.asarray(value) - golden).max() / np.abs(golden).max())


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(("padding", "prefix"), [(False, ""), (True, "padded_")])
def test_warp_and_both_gradients(padding, prefix, fast):
    golden = recorded("warp_small")
    image, flow = tf.constant(golden["image"]), tf.constant(golden["flow"])
    with tf.GradientTape() as tape:
        tape.watch([image, flow])
        warped = warp(image, flow, padding, fast)
    image_gradient, flow_gradient = tape.gradient(warped, [image, flow], tf.constant(golden["upstream"]))
    assert relative(warped, golden[prefix + "warped"]) < 1e-5
    assert relative(image_gradient, golden[prefix + "grad_image"]) < 1e-5
    assert relative(flow_gradient, golden[prefix + "grad_flow"]) < 1e-5


def test_flow_at_points_is_zero_outside():
    golden = recorded("warp_small")
    sampled = sample_at_points(tf.constant(golden["flow"]), tf.constant(golden["points"]))
    np.testing.assert_allclose(sampled, golden["sampled_points"], atol=1e-5)


def test_augmentation_field():
    golden = recorded("augment_32")
    flow = spline_flow(tf.constant(golden["control"]), (32, 32, 32))
    np.testing.assert_allclose(flow, golden["flow"], atol=1e-5)


FORWARD = {
    "forward_vtn2": (("VTN", 2), None),
    "forward_voxelmorph1": (("VoxelMorph", 1), None),
    "forward_vtn1_rep3": (("VTN", 1, 3), None),
    "forward_vtn1_labels": (("VTN", 1), (21, 22, 23)),
}


# Repeats: test_layers.py has a short test of them.
SLOW = ("forward_vtn1_rep3",)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in FORWARD])
def test_forward(name):
    golden, (architecture, labels) = recorded(name), FORWARD[name]
    network, batch = rule_network(*architecture), rule_batch(kind="labels" if labels else "organ")

    @whole_step
    def run():
        output = network((batch["fixed"], batch["moving"]))
        return output, cascade_losses(batch["fixed"], output, network.config)

    output, terms = run()
    assert set(terms) == {key for key in golden if key.endswith("loss")}
    for key, value in terms.items():
        assert relative(value, golden[key].item()) < 1e-4, key
    for k, stage in enumerate(output.stages):
        for key, value in (("flow", stage.flow), ("real_flow", stage.composed_flow), ("warped_moving", stage.warped)):
            assert np.abs(value[:, ::16, ::16, ::16] - golden[f"{key}_{k}"]).max() < 1e-3, (key, k)
            assert np.abs(value).max() == pytest.approx(golden[f"{key}_{k}.absmax"], rel=1e-4), (key, k)
    fixed = label_map(batch["fixed_seg"], labels)
    dice, jaccard = metrics.overlap(fixed, carry_labels(batch["moving_seg"], output.flow, labels), labels)
    np.testing.assert_allclose(dice, golden["dices"], atol=1e-5)
    np.testing.assert_allclose(jaccard, golden["jaccs"], atol=1e-5)
    offsets = metrics.landmark_offsets(batch["fixed_points"], batch["moving_points"], output.flow)
    distances = metrics.landmark_distances(offsets)
    np.testing.assert_allclose(distances[0], golden["landmark_dists"][0], rtol=1e-4)
    assert np.isnan(distances[1]).all()
    np.testing.assert_allclose(metrics.jacobian_std(output.flow), golden["jacobian_det"], rtol=1e-4)


def test_gradients_and_adam_steps():
    golden = recorded("train_vtn1")
    network, batch = rule_network("VTN", 1, augmentation="identity"), rule_batch()
    weights = network.named_weights()

    @whole_step
    def gradients():
        with tf.GradientTape() as tape:
            output = network((batch["fixed"], batch["moving"]))
            loss = cascade_losses(batch["fixed"], output, network.config)["loss"]
        return tape.gradient(loss, [weight.value for weight in weights.values()])

    norms = {name: np.linalg.norm(g.numpy().astype(float)) for name, g in zip(weights, gradients(), strict=True)}
    assert set(norms) == {str(name) for name in golden["names"]}
    for name, norm in zip(golden["names"], golden["grad_norm"], strict=True):
        assert norms[str(name)] == pytest.approx(norm, rel=1e-3), name
    losses = train_losses(network, batch, adam(network), 3)
    np.testing.assert_allclose(losses, golden["losses"][:3], rtol=1e-3)


def test_training_goes_on_from_a_published_checkpoint(tmp_path):
    make_checkpoint.write(str(tmp_path), "VTN", 1)
    network = build_network(CascadeConfig("VTN", 1, augmentation="identity"))
    checkpoints.restore(network, tmp_path / "model-99500")
    losses = train_losses(network, rule_batch((1, 2), (2, 1)), adam(network), 2)
    golden = json.loads((GOLDEN / "train_two_scans_vtn1.json").read_text())
    np.testing.assert_allclose(losses, golden["loss"][:2], rtol=1e-3)


def train_losses(network, batch, optimizer, steps):
    """The loss before each of some Adam steps at 1e-4 on one batch."""
    optimizer.learning_rate = 1e-4
    trainer = Trainer(network)
    trainer.compile(optimizer=optimizer)
    step = whole_step(trainer.train_step)
    images = {"fixed": batch["fixed"], "moving": batch["moving"]}
    return [float(step(images)["loss"]) for _ in range(steps)]


@pytest.mark.parametrize("base_network", ["VTN", "VoxelMorph"])
def test_names_and_shapes_of_the_published_variables(base_network):
    table = json.loads((GOLDEN / "variables.json").read_text())
    wanted = dict(table["affine"])
    for i in range(2):
        wanted.update({name.replace("{i}", str(i)): shape for name, shape in table[base_network].items()})
    network = build_network(CascadeConfig(base_network, 2))
    assert {name: list(weight.shape) for name, weight in network.named_weights().items()} == wanted
