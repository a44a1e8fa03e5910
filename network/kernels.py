"""Small numeric functions as XLA kernels that keep nothing but their inputs for the backward pass.

A volume-sized expression run op by op writes every intermediate result to memory and keeps most of them for the
gradient. Compiled, it is one pass over memory. The convolutions stay outside: on a CPU, XLA's are very slow.
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
