"""How small numeric functions are computed: as XLA kernels, and with sums that have the same bits in every run.

A volume-sized expression run op by op writes every intermediate result to memory and keeps most of them for the
gradient. Compiled, it is one pass over memory. The convolutions stay outside: on a CPU, XLA's are very slow.

Outside of a kernel, TensorFlow may add three terms or more in the order in which they arrive, so that their rounding
depends on what else the machine does. `ordered_sum` adds in a fixed order. A gradient is such a sum too, of what comes
back from each use of a tensor: whatever is used more than twice is handed out by `fork`.
"""

import functools

import tensorflow as tf


def compiled(function):
    """Decorate a pure function of tensors returning one tensor: one XLA kernel forward, one backward.

    The backward kernel recomputes the function from its inputs, so that no intermediate is stored, and XLA drops
    whatever the wanted gradients do not need.
    """
    forward = tf.function(function, jit_compile=True)

    @functools.partial(tf.function, jit_compile=True)
    def backward(inputs, upstream):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            output = function(*inputs)
        return tape.gradient(output, inputs, upstream, unconnected_gradients="zero")

    @tf.custom_gradient
    def call(*inputs):
        # Outside a tf.function a tape would look into the kernel and keep all that it computes.
        return forward(*map(tf.stop_gradient, inputs)), lambda upstream: backward(inputs, upstream)

    return functools.wraps(function)(call)


def ordered_sum(terms):
    """Sum of tensors of one shape, the same bits in every run."""
    return tf.reduce_sum(tf.stack(terms), axis=0)


def fork(tensors, n):
    """`n` lists of the same tensors, for `n` uses, whose gradients are added by `ordered_sum`."""
    if n == 1:
        return [tensors]
    count = len(tensors)

    @tf.custom_gradient
    def call(*tensors):
        def gradient(*upstream):
            return [ordered_sum(upstream[k::count]) for k in range(count)]

        return [tf.identity(tensor) for _ in range(n) for tensor in tensors], gradient

    copies = call(*tensors)
    return [copies[start : start + count] for start in range(0, n * count, count)]
