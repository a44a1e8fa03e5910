"""How functions are computed: as XLA kernels, again for the backward pass, and with the same bits in every run.

A volume-sized expression that runs operation by operation writes every intermediate result to memory and keeps most of
them for the gradient. Compiled, it is one pass over memory. The convolutions are not compiled: on a CPU, XLA's are very
slow.

Outside of a kernel, TensorFlow may add three or more terms in the order in which they arrive; their rounding then
depends on what else the machine does. `ordered_sum` adds in a fixed order. The gradient of a tensor is such a sum too,
with one term for each use of the tensor: a tensor that is used more than twice is used in a kernel, or handed out by
`fork`.
"""

import functools
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.framework import ops

TensorFunction = Callable[..., tf.Tensor]

xla_kernel = functools.partial(tf.function, jit_compile=True, autograph=False)

# The graphs of which no gradient is taken.
_FORWARD_ALONE: weakref.WeakSet[tf.Graph] = weakref.WeakSet()


def is_forward_alone() -> bool:
    """Whether no gradient is taken of the graph that is being traced."""
    return ops.get_default_graph() in _FORWARD_ALONE


def forward_alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, of whose graph no gradient is taken: it is traced in fewer operations.

    This holds for its own graph. What is a `tf.function` itself may be used by other graphs, too.
    """

    @functools.wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        _FORWARD_ALONE.add(ops.get_default_graph())
        return function(*args, **kwargs)

    return traced


def own_gradient(function: Callable[..., tuple[Any, Callable[..., Any]]]) -> Callable[..., Any]:
    """Decorate a function of tensors that gives its value and its gradient, as for `tf.custom_gradient`.

    An outer tape sees nothing of what the function does; else, where that runs eagerly, it would keep all intermediate
    results. There are no second derivatives. In a graph of which no gradient is taken, there is the value alone.
    """

    @tf.custom_gradient
    def differentiable(*inputs: tf.Tensor) -> Any:
        return function(*map(tf.stop_gradient, inputs))

    @functools.wraps(function)
    def call(*inputs: tf.Tensor) -> Any:
        return function(*inputs)[0] if is_forward_alone() else differentiable(*inputs)

    return call


def whole_step(function: Callable[..., Any], **options: Any) -> Any:
    """A `tf.function` of a whole step: all gradients of what it computes are taken inside of it, none by its caller.

    For each custom gradient in a graph, TensorFlow keeps an entry in a table of its own, and with it the graph and all
    weights that it uses, for as long as the process runs. The entry is needed only by a
    caller who takes the gradient of the whole graph; nobody does here, so it is dropped once the graph is made.

    Without autograph, which would take longer than all else in tracing: where the step calls a function that decides by
    the value of a tensor, that one is to say `tf.cond`, or is a `tf.function` itself.

    Args:
        function: the step; no tape may be watching where it is called.
        options: those of `tf.function`.
    """
    entries = getattr(ops.gradient_registry, "_registry", None)
    if entries is None:
        raise ImportError("TensorFlow's table of gradients is not where it was; tested with TensorFlow 2.21")

    def traced(*args: Any, **kwargs: Any) -> Any:
        before = set(entries)
        try:
            return function(*args, **kwargs)
        finally:
            for name in set(entries) - before:
                if name.startswith("CustomGradient"):
                    del entries[name]

    return tf.function(traced, **{"autograph": False, **options})


def compiled(function: TensorFunction) -> TensorFunction:
    """Decorate a pure function of tensors returning one tensor: one XLA kernel forward, one backward.

    The backward kernel recomputes the function from its inputs, so that no intermediate is stored, and XLA drops
    whatever the wanted gradients do not need.
    """
    forward, backward = xla_kernel(function), xla_kernel(functools.partial(_gradient, function))

    @functools.wraps(function)
    def value_and_gradient(*inputs: tf.Tensor) -> Any:
        return forward(*inputs), lambda upstream: backward(inputs, upstream)

    return own_gradient(value_and_gradient)


def _gradient(function: TensorFunction, inputs: Sequence[tf.Tensor], upstream: tf.Tensor) -> list[tf.Tensor]:
    """Gradient of each input, from that of the output: the function is computed again."""
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        output = function(*inputs)
    return tape.gradient(output, inputs, upstream, unconnected_gradients="zero")


def three_in_one_loop(function: Callable[..., Sequence[tf.Tensor]]) -> TensorFunction:
    """Decorate a pure function of tensors returning three volumes [B, X, Y, Z]: kernels that give [B, X, Y, Z, 3].

    A kernel computes each of its results in a loop of its own, and for each again what they have in common; stacked as
    channels too. So one kernel makes a single result, of numbers of 16 bytes that hold the three, and another one takes
    them apart: a third of the time.
    """
    one_loop = xla_kernel(lambda *inputs: _packed(*function(*inputs)))

    @functools.wraps(function)
    def call(*inputs: tf.Tensor) -> tf.Tensor:
        return _apart(one_loop(*inputs))

    return call


def _packed(x: tf.Tensor, y: tf.Tensor, z: tf.Tensor) -> tf.Tensor:
    """Three tensors of float32 as one of complex128: x and y are the halves of the real part, z one of the other."""
    x, y, z = (tf.cast(tf.bitcast(part, tf.uint32), tf.uint64) for part in (x, y, z))
    both = tf.bitwise.bitwise_or(x, tf.bitwise.left_shift(y, tf.constant(32, tf.uint64)))
    return tf.complex(tf.bitcast(both, tf.float64), tf.bitcast(z, tf.float64))


@xla_kernel
def _apart(packed: tf.Tensor) -> tf.Tensor:
    both, z = (tf.bitcast(part, tf.float32) for part in (tf.math.real(packed), tf.math.imag(packed)))
    return tf.where(tf.range(3) < 2, tf.pad(both, [[0, 0]] * (both.shape.rank - 1) + [[0, 1]]), z[..., :1])


def ordered_sum(terms: Sequence[tf.Tensor]) -> tf.Tensor:
    """Sum of tensors of one shape, the same bits in every run."""
    return tf.reduce_sum(tf.stack(terms), axis=0)


def volume_sum(volume: tf.Tensor) -> tf.Tensor:
    """Sum over all axes but the batch. In two steps: XLA sums a whole volume in one slow thread, and less exactly."""
    return tf.reduce_sum(tf.reduce_sum(volume, [1, 2]), [1, 2])


def neighbours(volume: tf.Tensor, offset: int) -> list[tf.Tensor]:
    """A volume [B, X, Y, Z, ..] read so many voxels further along x, y and z; beyond the edge, the edge."""
    lines = [np.arange(n) for n in volume.shape[1:4]]
    return [tf.gather(volume, np.clip(k + offset, 0, k[-1]), axis=axis) for axis, k in enumerate(lines, start=1)]


def fast_volume_sum(volume: tf.Tensor) -> tf.Tensor:
    """`volume_sum` outside of a kernel: TensorFlow's own takes a tenth of the time of XLA's."""
    return tf.reduce_sum(volume, list(range(1, volume.shape.rank)))


def shape_of(tensor: tf.Tensor) -> list[Any]:
    """The lengths of all axes: numbers where they are known, with which there is less to trace; else tensors."""
    return [tf.shape(tensor)[axis] if n is None else n for axis, n in enumerate(tensor.shape)]


def size_of(volume: tf.Tensor) -> Any:
    """How many numbers each volume [B, ..] has: a float, or where an axis is unknown a float32 tensor."""
    product = math.prod(shape_of(volume)[1:])
    return tf.cast(product, tf.float32) if tf.is_tensor(product) else float(product)


def fork(value: Any, n: int) -> list[Any]:
    """Handles on a value that is used `n` times, so that the gradients of all uses are added in a fixed order.

    Args:
        value: a list or (named) tuple of tensors.
        n: how often it is used.

    Returns:
        List of `n` copies of the structure, one for each use; the gradients are added one by one, from the last use on.
    """
    tensors, copies = tf.nest.flatten(value), []
    for _ in range(n - 1):
        both = _twice(*tensors) if tensors else []
        copies.append(both[: len(tensors)])
        tensors = both[len(tensors) :]
    return [tf.nest.pack_sequence_as(value, copy) for copy in [*copies, tensors]]


@own_gradient
def _twice(*tensors: tf.Tensor) -> Any:
    def gradient(*upstream: tf.Tensor) -> list[tf.Tensor]:
        return _add(upstream[: len(tensors)], upstream[len(tensors) :])

    return [tf.identity(tensor) for tensor in 2 * tensors], gradient


@xla_kernel  # Outside of a kernel, TensorFlow's graph optimiser joins several additions into one unordered sum.
def _add(some: list[tf.Tensor], others: list[tf.Tensor]) -> list[tf.Tensor]:
    return [a + b for a, b in zip(some, others, strict=True)]


def rematerialized(
    function: Callable[..., tuple[tf.Tensor, list[tf.Tensor]]],
) -> Callable[..., tuple[tf.Tensor, list[tf.Tensor]]]:
    """The same function, but the backward pass computes its intermediates again from its inputs.

    Args:
        function: function of tensors returning (output, list of other tensors). No gradient flows back from the others,
            and computing again makes them a second time without use.

    Returns:
        A function of the same tensors with the same results.
    """

    @own_gradient
    def call(first: tf.Tensor, *others: tf.Tensor) -> Any:
        def gradient(upstream: tf.Tensor, *_: tf.Tensor) -> list[tf.Tensor]:
            # The recomputation must wait for the gradient to arrive; otherwise all cascades would be recomputed, and
            # kept, at once. XLA ignores control dependencies, so the first input is made to depend on the gradient.
            some = tf.reshape(upstream, [-1])[0]
            late = first + tf.where(tf.math.is_nan(some), some, 0.0)
            return _gradient(lambda *inputs: function(*inputs)[0], [late, *others], upstream)

        output, more = function(first, *others)
        return (output, *more), gradient

    def unpacked(*inputs: tf.Tensor) -> tuple[tf.Tensor, list[tf.Tensor]]:
        output, *more = call(*inputs)
        return output, more

    return unpacked
