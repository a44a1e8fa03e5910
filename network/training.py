"""Training: the Keras model that is compiled and fitted."""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from errors import UserError

from .augmentation import augment, draw
from .kernels import ordered_sum, whole_step
from .losses import both_ways, cascade_losses, similarity_loss
from .measuring import measurable_labels
from .recursive_cascaded_networks import RecursiveCascadedNetwork
from .supervision import supervised_losses

Batch = dict[str, tf.Tensor]
GRADIENT = "squared_gradient"
# What the workers of a run tell each other in each step: whether they were asked to stop, and whether the run is over.
_STOP = ("stop", "over")
# In float16 small gradients vanish. The loss is scaled by a factor that starts here, where no gradient overflows yet,
# and doubles after so many steps without an overflow.
_FIRST_SCALE, _STEPS_TO_DOUBLE = 16.0, 500
# Operations whose output is their input, perhaps under another shape.
_ALIASES = ("Identity", "IdentityN", "StopGradient", "Reshape", "Squeeze", "ExpandDims")

if not hasattr(keras.Model, "_maybe_symbolic_build"):  # a method that does something else would be overridden in vain
    raise ImportError(f"Keras {keras.__version__} is not supported: keras.Model has no _maybe_symbolic_build any more")

# What TensorFlow raises when a worker on another machine is gone.
_LOST = (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.DeadlineExceededError)


def has_several_workers(strategy: tf.distribute.Strategy) -> bool:
    """Whether other processes compute with this one."""
    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)


@contextlib.contextmanager
def no_lost_worker(strategy: tf.distribute.Strategy) -> Iterator[None]:
    """Around what all workers do together before the first step.

    Raises:
        UserError: one of them ended meanwhile.
    """
    try:
        yield
    except _LOST as error:
        if not has_several_workers(strategy):
            raise
        raise UserError(
            "another worker was lost before the first step; see what it said, and start all again"
        ) from error


def learning_rate(step: int, steps_per_epoch: int, initial: float) -> float:
    """Learning rate of a step, counted from 0: the initial one for three epochs, then halved at every epoch.

    >>> learning_rate(step=4 * 100, steps_per_epoch=100, initial=1.0)
    0.25
    """
    epoch = step // steps_per_epoch
    return initial * 0.5 ** max(0, epoch - 2)


class _Adam(keras.optimizers.Adam):
    """Keras's Adam, a weight and its moments updated in one pass over memory by TensorFlow's own kernel.

    Keras updates them operation by operation, in ten passes. The kernel's factors 1 - beta are differences of float32
    numbers, as in the original, and as in the correction of the bias here and there; Keras rounds them once. So a
    second moment differs from Keras's by 5e-5 of its size, and a step by 2e-5.

    With `limit` above 0 a gradient whose norm, over all weights together, is greater is scaled down to it. It is the
    gradient summed over all devices: Keras's `global_clipnorm` scales each device's share on its own, so that the
    result would depend on their number.
    """

    def __init__(self, limit: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        self.limit = limit

    def _all_reduce_sum_gradients(self, grads_and_vars: Any) -> Any:
        summed = super()._all_reduce_sum_gradients(grads_and_vars)
        if not self.limit:
            return summed
        norm = tf.sqrt(2.0 * ordered_sum([tf.nn.l2_loss(tf.cast(gradient, tf.float32)) for gradient, _ in summed]))
        factor = self.limit / tf.maximum(norm, self.limit)
        return [(gradient * tf.cast(factor, gradient.dtype), weight) for gradient, weight in summed]

    def _distributed_tf_update_step(self, distribution: Any, grads_and_vars: Any, learning_rate: tf.Tensor) -> None:
        # Keras's method, but what is the same for all weights is made once: a graph of hundreds is traced far sooner.
        steps = tf.cast(self.iterations + 1, tf.float32)
        beta1, beta2, epsilon = map(tf.constant, (self.beta_1, self.beta_2, self.epsilon))
        same = {
            "beta1_power": tf.pow(beta1, steps),
            "beta2_power": tf.pow(beta2, steps),
            "lr": tf.cast(learning_rate, tf.float32),
            "beta1": beta1,
            "beta2": beta2,
            "epsilon": epsilon,
        }
        for gradient, weight in grads_and_vars:
            distribution.extended.update(weight, self._update, args=(gradient, same), group=False)

    def _update(self, weight: tf.Variable, gradient: tf.Tensor, same: dict[str, tf.Tensor]) -> None:
        """Update one weight and its moments."""
        i = self._get_variable_index(weight)
        moments = {"m": self._momentums[i].value.handle, "v": self._velocities[i].value.handle}
        tf.raw_ops.ResourceApplyAdam(var=weight.handle, grad=tf.cast(gradient, weight.dtype), **moments, **same)


def adam(network: RecursiveCascadedNetwork, ema: float = 0.0, clip: float = 0.0) -> keras.optimizers.Optimizer:
    """The optimizer of the original: Adam 0.9 / 0.999, epsilon 1e-8, with its slots made.

    In float16 it is within Keras's `LossScaleOptimizer`, which skips the steps whose scaled gradient overflows. With
    `ema` between 0 and 1 it keeps an average of each weight: after each step, ema * average + (1 - ema) * weight.
    With `clip` above 0 it takes no gradient of a greater norm (Pascanu et al., 2013, algorithm 1).
    """
    averaging = {"use_ema": True, "ema_momentum": ema} if ema else {}
    optimizer = _Adam(clip, name="adam", beta_1=0.9, beta_2=0.999, epsilon=1e-8, **averaging)
    if network.config.precision == "mixed_float16":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, _FIRST_SCALE, _STEPS_TO_DOUBLE)
    optimizer.build(network.trainable_variables)
    return optimizer


def estimate_memory(network: RecursiveCascadedNetwork, pairs: int) -> int:
    """Estimate, from the graph, of the bytes that a training step needs on a device with so many pairs of the batch.

    Weights, their gradients and Adam's moments; of each cascade, what its backward pass keeps (with `rematerialize`, of
    one cascade at a time) with the gradient of the largest tensor; and the flows and images of each stage.
    """
    config, voxels = network.config, math.prod(network.config.image_size)
    pairs *= 2 if config.inverse_factor else 1  # both ways
    weights = 4 * 4 * sum(math.prod(weight.shape) for weight in network.trainable_variables)
    kept = [kept_bytes(stem, config.image_size) for stem in (network.affine, *network.cascades[:1])]
    cascades = config.last_stage
    at_once = min(cascades, 1) if config.rematerialize else cascades
    activations = sum(kept[0]) + at_once * sum(kept[-1]) + 2 * max(kept[-1], default=0)
    stages = (1 + cascades) * 4 * voxels * (3 + 3 + 1 + 1)
    return weights + pairs * (activations + stages)


def kept_bytes(stem: keras.layers.Layer, image_size: tuple[int, int, int]) -> list[int]:
    """Sizes in bytes of the tensors that the backward pass of a network keeps for one pair.

    They are the results of the forward pass that the gradient's operations use, each counted once.
    """
    sizes: list[int] = []

    def step(fixed: tf.Tensor, moving: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            tape.watch([fixed, moving])
            output = tf.nest.flatten(stem([fixed, moving]))
        forward = set()  # what is computed from the images: not the weights, nor their copies in another precision
        for op in fixed.graph.get_operations():
            if op in (fixed.op, moving.op) or any(source.op in forward for source in op.inputs):
                forward.add(op)
        before = len(fixed.graph.get_operations())
        tape.gradient(output, [fixed, moving, *(v.value for v in stem.trainable_variables)])
        backward = fixed.graph.get_operations()[before:]
        used = {t.name: t for op in backward for t in map(_origin, op.inputs) if t.op in forward}
        sizes.extend(t.dtype.size * t.shape.num_elements() for t in used.values() if t.shape.is_fully_defined())

    image = tf.TensorSpec((1, *image_size, 1))
    whole_step(step).get_concrete_function(image, image)
    return sizes


def _origin(tensor: tf.Tensor) -> tf.Tensor:
    """The tensor whose memory another one shares."""
    while tensor.op.type in _ALIASES:
        tensor = tensor.op.inputs[0]
    return tensor


class Trainer(keras.Model):
    """Trains a `RecursiveCascadedNetwork` on Batches of `fixed`, `moving` and `seed`.

    Where its config asks for supervision, the Batches have segmentations or landmarks too (`supervised_losses`), and
    `labels` are the values of the labels, None where the segmentations are masks.

    Every step returns the terms of `cascade_losses` for the global batch, and under `GRADIENT` the sum over replicas of
    their squared gradients, which is not finite where a step goes wrong, and 0 where
    float16 overflowed and the step is skipped. On several replicas the loss is the sum over
    all pairs and the gradient its gradient, so that the result does not depend on their number.

    With `jit`, XLA compiles the loss and its gradient as a whole: for GPUs; on a CPU its convolutions are very slow.

    Attributes:
        step: number of steps done.
        rate: learning rate in force, as a callback set it.
        asked_to_stop: whether this process was asked to end the run; the workers of a run tell each other in each step.
        found_over: whether this process found that the run need not go on; they tell each other likewise.
        seconds_waiting: time spent so far waiting for the next batch.

    Raises:
        UserError: a mask is asked for that the similarity does not take.
    """

    def __init__(
        self,
        network: RecursiveCascadedNetwork,
        step: int = 0,
        jit: bool = False,
        labels: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.differentiate = whole_step(self._differentiate, jit_compile=True) if jit else self._differentiate
        self.network = network
        similarity_loss(network.config, network.config.similarity_mask is not None)  # raises before the first step
        self.labels = measurable_labels(labels)
        self.step = step
        self.rate: float | None = None
        self.asked_to_stop = self.found_over = False
        self._told = [False, False]
        self.seconds_waiting = 0.0
        self.built = True

    def train_step(self, batch: Batch) -> dict[str, tf.Tensor]:
        config = self.network.config
        if config.augmentation_options:  # outside of what is compiled: XLA draws other numbers
            batch = augment(batch, draw(batch["seed"], config), config)
        terms, gradients = self.differentiate(batch)
        self._share_statistics()
        squared = 2.0 * ordered_sum([tf.nn.l2_loss(g) for g in gradients])
        scale = self._loss_scale
        if scale is not None:
            # The optimizer looks at one replica's gradient to see an overflow: every replica gets that of any.
            overflow = tf.distribute.get_replica_context().all_reduce("SUM", squared)
            gradients = [gradient + 0.0 * overflow for gradient in gradients]
            skipped = ~tf.math.is_finite(squared) & (scale > 1.0)
            squared = tf.where(skipped, 0.0, squared / tf.square(scale))
        self.optimizer.apply_gradients(zip(gradients, self.network.trainable_variables, strict=True))
        return {**terms, GRADIENT: squared}

    @property
    def _loss_scale(self) -> tf.Tensor | None:
        """Factor on the loss in force, a tensor; None in other precisions than float16."""
        if not isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer):
            return None
        return tf.convert_to_tensor(self.optimizer.dynamic_scale.value)

    def _differentiate(self, batch: Batch) -> tuple[dict[str, tf.Tensor], list[tf.Tensor]]:
        """Loss terms of a replica's pairs, and the (scaled) gradient of each weight."""
        config = self.network.config
        batch = both_ways(batch) if config.inverse_factor else batch
        with tf.GradientTape() as tape:
            seen = [batch.get(f"seen_{side}", batch[side]) for side in ("fixed", "moving")]
            compared = batch["moving"] if "seen_moving" in batch else None
            output = self.network(seen, training=True, compared=compared)
            terms = cascade_losses(batch["fixed"], output, config, supervised_losses(batch, self.labels, config), batch)
            loss = terms["loss"] if self._loss_scale is None else terms["loss"] * self._loss_scale
        return terms, tape.gradient(loss, self.network.trainable_variables)

    def _share_statistics(self) -> None:
        """Give every replica the mean of what each made of the variables that are not trained.

        Those are the moving statistics of a batch normalisation, whose batch is a replica's share.
        """
        context = tf.distribute.get_replica_context()
        shared = [v for v in self.network.non_trainable_variables if tf.as_dtype(v.dtype).is_floating]
        if context.num_replicas_in_sync > 1 and shared:
            means = context.all_reduce("MEAN", [tf.convert_to_tensor(variable.value) for variable in shared])
            for variable, mean in zip(shared, means, strict=True):
                variable.assign(mean)

    @property
    def stops(self) -> bool:
        """Whether the run is to end with the step that is done.

        With several workers, whether any of them was asked to before that step: the same for all.
        """
        return self._told[0] if has_several_workers(self.distribute_strategy) else self.asked_to_stop

    @property
    def is_over(self) -> bool:
        """Whether the run ends with the step that is done, as it need not go on; as `stops`."""
        return self._told[1] if has_several_workers(self.distribute_strategy) else self.found_over

    def leaves_together(self) -> bool:
        """Wait until the other workers, which end with the same step, are done with it; False where one was lost."""
        strategy = self.distribute_strategy
        if has_several_workers(strategy):
            try:
                strategy.reduce("SUM", 0.0, axis=None)
            except tf.errors.OpError:
                return False
        return True

    def _maybe_symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        """Do nothing: all is built, and Keras's method takes a batch and fails for one over several machines."""

    def make_train_function(self, force: bool = False) -> None:
        # Keras fetches the batch inside its compiled step; here it is fetched outside, so that waiting can be timed.
        strategy = self.distribute_strategy
        several = has_several_workers(strategy)

        def step(batch: Batch, asked: tf.Tensor | None) -> dict[str, tf.Tensor]:
            terms = self.train_step(batch)
            if asked is not None:
                terms |= dict(zip(_STOP, tf.unstack(asked), strict=True))
            # All terms are summed over the devices at once; like the sum of the gradients, it has a fixed order.
            values = tf.distribute.get_replica_context().all_reduce("SUM", tf.stack(list(terms.values())))
            return dict(zip(terms, tf.unstack(values), strict=True))

        def run(batch: Batch, asked: tf.Tensor | None) -> dict[str, tf.Tensor]:
            terms = strategy.run(step, args=(batch, asked))
            return {name: strategy.experimental_local_results(values)[0] for name, values in terms.items()}

        whole_run = whole_step(run)

        def train_function(iterator: Iterator[Batch]) -> dict[str, tf.Tensor]:
            started = time.perf_counter()
            try:
                batch = next(iterator)
                self.seconds_waiting += time.perf_counter() - started
                asked = tf.constant([float(self.asked_to_stop), float(self.found_over)]) if several else None
                terms = whole_run(batch, asked)
                self._told = [float(terms.pop(name, 0.0)) > 0 for name in _STOP]
            except _LOST as error:
                when = " before all had stopped" if self.asked_to_stop else ""
                raise UserError(
                    f"step {self.step + 1}: another worker was lost{when}; see what it said, and start all workers "
                    "again, with -c and this run to go on from its last checkpoint if it has one"
                ) from error
            self.step += 1
            return terms

        self.train_function = train_function
