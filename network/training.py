"""Training: the Keras model that is compiled and fitted."""

import math
import time

import keras
import tensorflow as tf

from errors import UserError

from .augmentation import augment, draw_control_points
from .kernels import ordered_sum
from .losses import cascade_losses

GRADIENT = "squared_gradient"
# In float16 small gradients vanish: those of the activations are computed so many times larger.
LOSS_SCALES = {"float32": 1.0, "mixed_bfloat16": 1.0, "mixed_float16": 16.0}
# What the backward pass keeps of a cascade in full: the inputs of its convolutions, activations or several joined.
_KEPT_OPERATIONS = ("LeakyRelu", "ConcatV2")

# How TensorFlow tells that a worker on another machine is gone.
_LOST = (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.DeadlineExceededError)


def learning_rate(step, steps_per_epoch, initial):
    """Rate of the step with this number (from 0): the initial one for three epochs, then halved at every epoch."""
    epoch = step // steps_per_epoch
    return initial * 0.5 ** max(0, epoch - 2)


def adam(network):
    """The optimizer of the original: Adam 0.9 / 0.999, epsilon 1e-8, with its slots made."""
    optimizer = keras.optimizers.Adam(beta_1=0.9, beta_2=0.999, epsilon=1e-8)
    optimizer.build(network.trainable_variables)
    return optimizer


def estimate_memory(network, pairs):
    """Bytes that a training step needs on a device with so many pairs of the batch: an estimate from the graph.

    Weights, their gradients and Adam's moments; of each cascade, the activations that the backward pass keeps (with
    `rematerialize`, of one cascade at a time) with the gradient of the largest; and the flows and images of each stage.
    """
    config, voxels = network.config, math.prod(network.config.image_size)
    weights = 4 * 4 * sum(math.prod(weight.shape) for weight in network.trainable_variables)
    kept = []
    for stem in (network.affine, *network.cascades[:1]):
        image = tf.TensorSpec((1, *config.image_size, 1))
        graph = tf.function(lambda a, b, stem=stem: stem([a, b])).get_concrete_function(image, image).graph
        outputs = [op.outputs[0] for op in graph.get_operations() if op.type in _KEPT_OPERATIONS]
        sizes = [out.dtype.size * out.shape.num_elements() for out in outputs if out.shape.is_fully_defined()]
        kept.append((sum(sizes), max(sizes)))
    cascades = config.last_stage
    at_once = min(cascades, 1) if config.rematerialize else cascades
    activations = kept[0][0] + at_once * kept[-1][0] + 2 * kept[-1][1]
    stages = (1 + cascades) * 4 * voxels * (3 + 3 + 1 + 1)
    return weights + pairs * (activations + stages)


class Trainer(keras.Model):
    """Trains a `RecursiveCascadedNetwork` without labels on Batches of `fixed`, `moving` and `seed`.

    Every step returns the terms of `cascade_losses` for the global batch, and under `GRADIENT` the sum over replicas of
    their squared gradients, which is not finite where a step goes wrong. On several replicas the loss is the sum over
    all pairs and the gradient its gradient, so that the result does not depend on their number.

    With `jit`, XLA compiles the loss and its gradient as a whole: for GPUs; on a CPU its convolutions are very slow.

    Attributes:
        step: number of steps done.
        rate: learning rate in force, as a callback set it.
        seconds_waiting: time spent so far waiting for the next batch.
    """

    def __init__(self, network, step=0, jit=False, **kwargs):
        super().__init__(**kwargs)
        self.differentiate = tf.function(self._differentiate, jit_compile=True) if jit else self._differentiate
        self.network = network
        self.step = step
        self.rate = None
        self.seconds_waiting = 0.0
        self.built = True

    def train_step(self, batch):
        config = self.network.config
        if config.augmentation is None:  # outside of what is compiled: XLA draws other numbers
            batch = augment(batch, draw_control_points(batch["seed"], config.image_size))
        terms, gradients = self.differentiate(batch)
        self.optimizer.apply_gradients(zip(gradients, self.network.trainable_variables, strict=True))
        return {**terms, GRADIENT: ordered_sum([tf.reduce_sum(tf.square(g)) for g in gradients])}

    def _differentiate(self, batch):
        """Loss terms of a replica's pairs, and the gradient of each weight."""
        config, scale = self.network.config, LOSS_SCALES[self.network.config.precision]
        with tf.GradientTape() as tape:
            output = self.network((batch["fixed"], batch["moving"]))
            terms = cascade_losses(batch["fixed"], output, config)
            scaled = terms["loss"] * scale
        gradients = tape.gradient(scaled, self.network.trainable_variables)
        return terms, [gradient / scale for gradient in gradients]

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        """Nothing is left to build; Keras would take a first batch, and fail on a dict over several machines."""

    def make_train_function(self, force=False):
        # Keras fetches the batch inside its compiled step; here it is fetched outside, so that waiting can be timed.
        strategy = self.distribute_strategy

        def step(batch):
            terms = self.train_step(batch)
            # One sum over the devices, not one a term; like that of the gradients, it has a fixed order.
            values = tf.distribute.get_replica_context().all_reduce("SUM", tf.stack(list(terms.values())))
            return dict(zip(terms, tf.unstack(values), strict=True))

        @tf.function
        def run(batch):
            terms = strategy.run(step, args=(batch,))
            return {name: strategy.experimental_local_results(values)[0] for name, values in terms.items()}

        def train_function(iterator):
            started = time.perf_counter()
            try:
                batch = next(iterator)
                self.seconds_waiting += time.perf_counter() - started
                terms = run(batch)
            except _LOST as error:
                raise UserError(
                    f"step {self.step + 1}: another worker was lost; see what it said, and start all workers again, "
                    "with -c and this run to go on from its last checkpoint if it has one"
                ) from error
            self.step += 1
            return terms

        self.train_function = train_function
