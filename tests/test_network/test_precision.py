"""Float16 with its scale of the loss, and the estimate of the memory of a step."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from network import checkpoints, training
from network.base_networks import BaseNetwork
from network.config import CascadeConfig
from network.recursive_cascaded_networks import build_network
from tests.test_network.test_training import batch_of, trainer_of


class Plain(BaseNetwork):
    """Two convolutions with a ReLU, or a batch normalisation and another activation, between them."""

    def __init__(self, norm=False, **kwargs):
        super().__init__(**kwargs)
        self.parts = [keras.layers.Conv3D(10, 3, padding="same"), keras.layers.Conv3D(3, 3, padding="same")]
        self.norm = keras.layers.BatchNormalization() if norm else None

    def call(self, inputs):
        net = self.parts[0](tf.concat(inputs, -1))
        net = tf.nn.relu(net) if self.norm is None else tf.nn.gelu(self.norm(net))
        return self.parts[1](net)


@pytest.mark.parametrize(("norm", "volumes"), [(False, 2 + 10), (True, 2 + 3 * 10)])
def test_the_estimate_of_memory_sees_what_any_network_keeps(norm, volumes):
    """The images, joined, the input of the second convolution, and those of the normalisation and its activation."""
    network = Plain(norm)
    network.build([(1, 8, 8, 8, 1)] * 2)
    kept = sum(training.kept_bytes(network, (8, 8, 8))) / (4 * 8**3)
    assert volumes <= kept < 2.5 * volumes


def scaled(scale):
    """A trainer in float16 at a scale of the loss, and a batch of it."""
    config = CascadeConfig("VTN", 1, image_size=(16, 16, 16), channels=2, precision="mixed_float16")
    trainer = trainer_of(config.replace(augmentation="identity"))
    trainer.optimizer.dynamic_scale.assign(scale)
    trainer.make_train_function()
    return trainer, batch_of((16, 16, 16))


def test_float16_skips_a_step_that_overflows_and_halves_its_scale():
    trainer, batch = scaled(2.0**40)
    before = trainer.network.get_weights()
    terms = trainer.train_function(iter([batch]))
    assert np.isfinite(float(terms["loss"]))
    assert float(terms[training.GRADIENT]) == 0
    for a, b in zip(before, trainer.network.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert float(trainer.optimizer.dynamic_scale) == 2.0**39
    assert int(trainer.optimizer.iterations) == 0


@pytest.mark.slow
def test_float16_without_any_scale_left_is_not_finite():
    trainer, batch = scaled(1.0)
    batch["moving"] = batch["moving"] * np.inf
    terms = trainer.train_function(iter([batch]))
    assert not np.isfinite(float(terms[training.GRADIENT]))


@pytest.mark.slow
def test_the_scale_of_float16_is_saved_and_restored(tmp_path):
    trainer, batch = scaled(64.0)
    trainer.train_function(iter([batch]))
    checkpoints.save(tmp_path, trainer.network, trainer.optimizer, 1)
    other, _ = scaled(2.0)
    checkpoints.restore(other.network, tmp_path / "model-1", other.optimizer)
    assert (float(other.optimizer.dynamic_scale), int(other.optimizer.step_counter)) == (64.0, 1)
    full = trainer_of(other.network.config.replace(precision="float32"))
    checkpoints.restore(full.network, tmp_path / "model-1", full.optimizer)  # another precision has no use for it


@pytest.mark.slow
def test_the_estimate_of_memory_follows_what_is_kept():
    def estimate(pairs, **options):
        return training.estimate_memory(build_network(CascadeConfig(image_size=(32, 32, 32), **options)), pairs)

    small = {"channels": 2, "n_cascades": 4}
    assert estimate(2, **small) > estimate(1, **small) > estimate(1, rematerialize=True, **small)
    assert estimate(1, precision="mixed_bfloat16", **small) < estimate(1, **small)
    network = build_network(CascadeConfig(image_size=(32, 32, 32), **small))
    assert estimate(1, inverse_factor=1.0, **small) == estimate(2, **small)
    assert training.estimate_memory(network, 0) == 16 * network.count_params()
