"""A cascade applied several times with the same weights: where the values of its variables come from and go to."""

from collections.abc import Callable, Iterator

import keras
import tensorflow as tf

from .kernels import fork, rematerialized

FlowFunction = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


def repeats(cascade: keras.layers.Layer, times: int, training: bool, rematerialize: bool) -> Iterator[FlowFunction]:
    """A cascade's function (fixed, moving) -> flow, once for each of the `times` that it is applied.

    Each is to be called before the next is asked for. The gradients of all uses are added in a fixed order, so that
    training gives the same bits in every run. What a layer changes in training beside its weights (the moving
    statistics of a batch normalisation, the state of a dropout) goes from each use to the next, and is kept at the end.

    Args:
        cascade: base network, which is built.
        times: how often it is applied.
        training: whether its layers train; where not, nothing that they change is kept.
        rematerialize: whether the backward pass computes its activations again instead of keeping them.

    Yields:
        Function of two images [B, X, Y, Z, 1] giving the flow, float32 [B, X, Y, Z, 3] in voxels.
    """
    weights = cascade.trainable_variables
    others = [v for v in cascade.variables if all(v is not weight for weight in weights)]
    before = [tf.convert_to_tensor(variable.value) for variable in others]
    state = list(before)
    for values in fork([variable.value for variable in weights], times):
        use = _Use(cascade, weights, values, others, state, training, rematerialize)
        yield use
    if training:
        for variable, old, new in zip(others, before, state, strict=True):
            if new is not old:
                variable.assign(new)


class _Use:
    """One application of a cascade with given values of its variables.

    Attributes:
        state: values of the variables that are no weights; after the call, what the call made of them.
    """

    def __init__(
        self,
        cascade: keras.layers.Layer,
        weights: list[keras.Variable],
        values: list[tf.Tensor],
        others: list[keras.Variable],
        state: list[tf.Tensor],
        training: bool,
        rematerialize: bool,
    ) -> None:
        self.cascade, self.weights, self.values, self.others = cascade, weights, values, others
        self.state, self.training, self.rematerialize = state, training, rematerialize

    def __call__(self, fixed: tf.Tensor, moving: tf.Tensor) -> tf.Tensor:
        changed: list[int] = []
        before = list(self.state)

        def apply(moving: tf.Tensor, fixed: tf.Tensor, *values: tf.Tensor) -> tuple[tf.Tensor, list[tf.Tensor]]:
            mapping = [*zip(self.weights, values, strict=True), *zip(self.others, before, strict=True)]
            with keras.StatelessScope(state_mapping=mapping) as scope:
                flow = tf.cast(self.cascade([fixed, moving], training=self.training), tf.float32)
            after = [scope.get_current_value(variable) for variable in self.others]
            changed[:] = [k for k, value in enumerate(after) if value is not before[k]]
            return flow, [after[k] for k in changed]

        flow, values = (rematerialized(apply) if self.rematerialize else apply)(moving, fixed, *self.values)
        for k, value in zip(changed, values, strict=True):
            self.state[k] = tf.stop_gradient(value)
        return flow
