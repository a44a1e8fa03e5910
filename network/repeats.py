"""The cascades of a network: one function for all of them, and where the values of their variables come from and go to.

The cascades differ in the values of their variables alone. So in a graph they are calls of one function, whose
arguments are the images and these values: ten cascades are traced in the time of one.
"""

from collections.abc import Callable, Iterator

import keras
import tensorflow as tf

from .kernels import fork, forward_alone, is_forward_alone, rematerialized

FlowFunction = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


class CascadeFunction:
    """What the cascades of a network do, as a function of the values of their variables.

    In a graph it is traced when it is first called, and belongs to that graph.

    Args:
        cascade: any of the cascades, which is built; its own values are not used.
        training: whether its layers train.
        rematerialize: whether the backward pass computes its activations again instead of keeping them.
    """

    def __init__(self, cascade: keras.layers.Layer, training: bool, rematerialize: bool) -> None:
        self._cascade, self._training = cascade, training
        self._variables = variables(cascade)
        self._changed: list[int] = []
        apply = self._apply
        if not tf.executing_eagerly():
            # Outside of training, the graph optimiser sees one function too. In training that would cost memory: a call
            # keeps its arguments to its end, and those of the backward pass are all activations.
            attributes = {} if training else {"_noinline": True}
            apply = forward_alone(apply) if is_forward_alone() else apply
            apply = tf.function(apply, autograph=False, experimental_attributes=attributes)
        self._function = rematerialized(apply) if rematerialize else apply

    def __call__(
        self, fixed: tf.Tensor, moving: tf.Tensor, weights: list[tf.Tensor], state: list[tf.Tensor]
    ) -> tf.Tensor:
        """The flow of two images, float32 [B, X, Y, Z, 3], by values of the `variables`; `state` gets new ones."""
        flow, values = self._function(moving, fixed, *weights, *state)
        for k, value in zip(self._changed, values, strict=True):
            state[k] = tf.stop_gradient(value)
        return flow

    def _apply(self, moving: tf.Tensor, fixed: tf.Tensor, *values: tf.Tensor) -> tuple[tf.Tensor, list[tf.Tensor]]:
        weights, others = self._variables
        before = values[len(weights) :]
        with keras.StatelessScope(state_mapping=[*zip([*weights, *others], values, strict=True)]) as scope:
            flow = tf.cast(self._cascade([fixed, moving], training=self._training), tf.float32)
        after = [scope.get_current_value(variable) for variable in others]
        self._changed = [k for k, value in enumerate(after) if value is not before[k]]
        return flow, [after[k] for k in self._changed]


def variables(cascade: keras.layers.Layer) -> tuple[list[keras.Variable], list[keras.Variable]]:
    """The variables of a cascade: those that are trained, and the others."""
    weights = cascade.trainable_variables
    return weights, [v for v in cascade.variables if all(v is not weight for weight in weights)]


def repeats(
    cascade: keras.layers.Layer, function: CascadeFunction, times: int, training: bool
) -> Iterator[FlowFunction]:
    """A cascade's function (fixed, moving) -> flow, once for each of the `times` that it is applied.

    Each is to be called before the next is asked for. The gradients of all uses are added in a fixed order, so that
    training gives the same bits in every run. What a layer changes in training beside its weights (the moving
    statistics of a batch normalisation, the state of a dropout) goes from each use to the next, and is kept at the end.

    Args:
        cascade: base network, which is built.
        function: what the cascades of its network do.
        times: how often it is applied.
        training: whether its layers train; where not, nothing that they change is kept.

    Yields:
        Function of two images [B, X, Y, Z, 1] giving the flow, float32 [B, X, Y, Z, 3] in voxels.
    """
    weights, others = variables(cascade)
    before = [tf.convert_to_tensor(variable.value) for variable in others]
    state = list(before)
    for values in fork([tf.convert_to_tensor(variable.value) for variable in weights], times):
        yield lambda fixed, moving, values=values: function(fixed, moving, values, state)  # type: ignore[misc]
    if training:
        for variable, old, new in zip(others, before, state, strict=True):
            if new is not old:
                variable.assign(new)
