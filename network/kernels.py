"""How functions are computed: as XLA kernels, again for the backward pass, and with the same bits in every run.

A volume-sized expression run op by op writes every intermediate result to memory and keeps most of them for the
gradient. Compiled, it is one pass over memory. The convolutions stay outside: on a CPU, XLA's are very slow.

Outside of a kernel, TensorFlow may add three terms or more in the order in which they arrive, so that their rounding
depends on what else the machine does. `ordered_sum` adds in a fixed order. A gradient is such a sum too, of what comes
back from each use of a tensor: whatever is used more than twice is used in a kernel or handed out by `fork`.
"""

import functools

import tensorflow as tf

xla_kernel = functools.partial(tf.function, jit_compile=True)


def compiled(function):
    """Decorate a pure function of tensors returning one tensor: one XLA kernel forward, one backward.

    The backward kernel recomputes the function from its inputs, so that no intermediate is stored, and XLA drops
    whatever the wanted gradients do not need.
    """
    forward, backward = xla_kernel(function), xla_kernel(functools.partial(_gradient, function))

    @tf.custom_gradient
    def call(*inputs):
        # Outside a tf.function a tape would look into the kernel and keep all that it computes.
        return forward(*map(tf.stop_gradient, inputs)), lambda upstream: backward(inputs, upstream)

    return functools.wraps(function)(call)


def _gradient(function, inputs, upstream):
    """Gradient of each input, from that of the output: the function is computed again."""
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        output = function(*inputs)
    return tape.gradient(output, inputs, upstream, unconnected_gradients="zero")


def ordered_sum(terms):
    """Sum of tensors of one shape, the same bits in every run."""
    return tf.reduce_sum(tf.stack(terms), axis=0)


def fork(tensors, n):
    """`n` lists of the same tensors, for `n` uses in a row; their gradients are added one by one, from the last."""
    copies = []
    for _ in range(n - 1):
        both = _twice(*tensors)
        copies.append(both[: len(tensors)])
        tensors = both[len(tensors) :]
    return [*copies, tensors]


@tf.custom_gradient
def _twice(*tensors):
    def gradient(*upstream):
        return _add(upstream[: len(tensors)], upstream[len(tensors) :])

    return [tf.identity(tensor) for tensor in 2 * tensors], gradient


@xla_kernel
def _add(some, others):  # a kernel: the optimiser makes one sum in the order of arrival out of several additions
    return [a + b for a, b in zip(some, others, strict=True)]


def rematerialized(function):
    """Of a function of tensors returning one tensor: the same, computed again for the backward pass from its inputs."""

    @tf.custom_gradient
    def call(first, *others):
        def gradient(upstream):
            # Not before its turn: a dependency of the data, since XLA respects no other.
            some = tf.reshape(upstream, [-1])[0]
            late = first + tf.where(tf.math.is_nan(some), some, 0.0)
            return _gradient(function, [late, *others], upstream)

        return function(*map(tf.stop_gradient, (first, *others))), gradient

    return call
