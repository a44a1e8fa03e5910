"""Training: the Keras model that is compiled and fitted."""

import time

import keras
import tensorflow as tf

from .augmentation import augment, draw_control_points
from .losses import cascade_losses

GRADIENT = "squared_gradient"


def learning_rate(step, steps_per_epoch, initial):
    """Rate of the step with this number (from 0): the initial one for three epochs, then halved at every epoch."""
    epoch = step // steps_per_epoch
    return initial * 0.5 ** max(0, epoch - 2)


def adam(network):
    """The optimizer of the original: Adam 0.9 / 0.999, epsilon 1e-8, with its slots made."""
    optimizer = keras.optimizers.Adam(beta_1=0.9, beta_2=0.999, epsilon=1e-8)
    optimizer.build(network.trainable_variables)
    return optimizer


class Trainer(keras.Model):
    """Trains a `RecursiveCascadedNetwork` without labels on Batches of `fixed`, `moving` and `seed`.

    Every step returns the terms of `cascade_losses` for the global batch, and under `GRADIENT` the sum over replicas of
    their squared gradients, which is not finite where a step goes wrong. On several replicas the loss is the sum over
    all pairs and the gradient its gradient, so that the result does not depend on their number.

    Attributes:
        step: number of steps done.
        rate: learning rate in force, as a callback set it.
        seconds_waiting: time spent so far waiting for the next batch.
    """

    def __init__(self, network, step=0, **kwargs):
        super().__init__(**kwargs)
        self.network = network
        self.step = step
        self.rate = None
        self.seconds_waiting = 0.0
        self.built = True

    def train_step(self, batch):
        config = self.network.config
        if config.augmentation is None:
            batch = augment(batch, draw_control_points(batch["seed"], config.image_size))
        with tf.GradientTape() as tape:
            output = self.network((batch["fixed"], batch["moving"]))
            terms = cascade_losses(batch["fixed"], output, config)
        weights = self.network.trainable_variables
        gradients = tape.gradient(terms["loss"], weights)
        self.optimizer.apply_gradients(zip(gradients, weights, strict=True))
        return {**terms, GRADIENT: tf.add_n([tf.reduce_sum(tf.square(g)) for g in gradients])}

    def make_train_function(self, force=False):
        # Keras fetches the batch inside its compiled step; here it is fetched outside, so that waiting can be timed.
        strategy = self.distribute_strategy

        @tf.function
        def run(batch):
            terms = strategy.run(self.train_step, args=(batch,))
            return {name: strategy.reduce("SUM", term, axis=None) for name, term in terms.items()}

        def train_function(iterator):
            started = time.perf_counter()
            batch = next(iterator)
            self.seconds_waiting += time.perf_counter() - started
            terms = run(batch)
            self.step += 1
            return terms

        self.train_function = train_function
