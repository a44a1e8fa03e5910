"""The plain formulations that the benchmarks compare with: what one writes first, and TensorFlow's own gradients."""

import contextlib
import itertools
import math
from unittest import mock

import keras
import tensorflow as tf

from network import (
    affine,
    base_networks,
    blocks,
    few_channels,
    few_voxels,
    label_maps,
    losses,
    metrics,
    recursive_cascaded_networks,
    spatial_transformer,
    training,
)


def warp(image, flow):
    """Eight gathers by stacked indices, weighted and summed."""
    shape = tf.shape(image)
    sizes = [shape[1], shape[2], shape[3]]
    grid = tf.meshgrid(*(tf.range(n, dtype=tf.float32) for n in sizes), indexing="ij")
    places, lower, upper = [], [], []
    for axis in range(3):
        last = sizes[axis] - 1
        places.append(tf.clip_by_value(flow[..., axis] + grid[axis], 0.0, tf.cast(last, tf.float32)))
        lower.append(tf.cast(tf.floor(places[axis]), tf.int32))
        upper.append(tf.minimum(lower[axis] + 1, last))
    pair = tf.broadcast_to(tf.reshape(tf.range(shape[0]), [-1, 1, 1, 1]), tf.shape(lower[0]))
    total = 0.0
    for corner in itertools.product((0, 1), repeat=3):
        index = [(upper if high else lower)[axis] for axis, high in enumerate(corner)]
        weight = 1.0
        for axis, high in enumerate(corner):
            fraction = places[axis] - tf.cast(lower[axis], tf.float32)
            weight = weight * (fraction if high else 1.0 - fraction)
        total += weight[..., None] * tf.gather_nd(image, tf.stack([pair, *index], axis=-1))
    return total


def vote(labels):
    """Label maps carried by one warp of a 0/255 mask for each label."""

    def carry(segmentation, flow):
        elected = tf.zeros_like(segmentation)
        for label in labels:
            mask = tf.where(segmentation == label, 255.0, 0.0)
            elected = tf.where(warp(mask, flow) > label_maps.FOREGROUND, label, elected)
        return elected

    return carry


def compose(first, second):
    """The second flow and the first warped by it."""
    return second + warp(first, second)


def compose_affine(affine_map, first, second):
    """The affine flow and its matrix times the second flow."""
    rows = (affine_map.matrix + tf.eye(3))[:, None, None, None]
    return first + tf.reduce_sum(rows * second[..., None, :], axis=-1)


def jacobian_std(flow):
    """Standard deviation of the determinant, by a batch of 3x3 determinants."""
    here = flow[:, :-1, :-1, :-1]
    along = (flow[:, 1:, :-1, :-1], flow[:, :-1, 1:, :-1], flow[:, :-1, :-1, 1:])
    jacobian = tf.stack([d - here for d in along], axis=-1) + tf.eye(3)
    return tf.math.reduce_std(tf.linalg.det(jacobian), axis=[1, 2, 3])


def jacobian_determinant(flow):
    """Determinant of central differences, one-sided at the edges, each a concatenation of slices."""
    slopes = []
    for axis in (1, 2, 3):
        before, after, first, second, next_to_last, last = (
            flow[(slice(None),) * axis + (slice(*ends),)]
            for ends in ((0, -2), (2, None), (0, 1), (1, 2), (-2, -1), (-1, None))
        )
        slopes.append(tf.concat([second - first, (after - before) / 2.0, last - next_to_last], axis))
    return metrics._determinant([[slope[..., k] for slope in slopes] for k in range(3)])


def mask_above_threshold(segmentation, flow):
    """A mask warped linearly, and the voxels above the threshold."""
    values = warp(tf.cast(tf.maximum(segmentation, 0), tf.float32), flow)
    return tf.cast(values > label_maps.FOREGROUND, tf.int32)


def correlation(fixed, warped):
    """Pearson correlation with TensorFlow's sums."""
    fixed, warped = (image - tf.reduce_mean(image, [1, 2, 3, 4], keepdims=True) for image in (fixed, warped))
    of_fixed, of_both, of_warped = (
        tf.reduce_mean(product, [1, 2, 3, 4]) for product in (tf.square(fixed), fixed * warped, tf.square(warped))
    )
    return of_both / tf.sqrt((of_fixed + 1e-6) * (of_warped + 1e-6))


def smoothness_loss(flow):
    """Squared differences along each axis, summed."""
    differences = (
        flow[:, 1:] - flow[:, :-1],
        flow[:, :, 1:] - flow[:, :, :-1],
        flow[:, :, :, 1:] - flow[:, :, :, :-1],
    )
    total = sum(tf.reduce_sum(tf.square(d), [1, 2, 3, 4]) for d in differences)
    return 0.5 * total / tf.cast(tf.reduce_prod(tf.shape(flow)[1:]), tf.float32)


def beside(fixed, moving):
    """Two images joined."""
    return tf.concat([fixed, moving], -1)


@contextlib.contextmanager
def everywhere(labels=()):
    """While this is entered, whatever network is made and traced runs on plain formulations.

    Ours stay: whole graphs, the memory that is kept, the flow of the affine map, the gradient of labels, and how one
    label is counted and landmarks are read.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(losses, "_affine_losses", losses._affine_losses.__wrapped__))
        stack.enter_context(mock.patch.object(recursive_cascaded_networks, "compose_affine", compose_affine))
        for name in ("_folded", "_logarithm", "_squared_difference"):
            stack.enter_context(mock.patch.object(metrics, name, getattr(metrics, name).python_function))
        stack.enter_context(mock.patch.object(metrics, "jacobian_determinant", jacobian_determinant))
        stack.enter_context(mock.patch.object(metrics, "jacobian_std", jacobian_std))
        stack.enter_context(mock.patch.object(label_maps, "_above_threshold", mask_above_threshold))
        stack.enter_context(mock.patch.object(spatial_transformer, "_fast_warp", warp))
        stack.enter_context(mock.patch.object(spatial_transformer, "_fast_compose", compose))
        stack.enter_context(mock.patch.object(label_maps, "_vote", vote(labels)))
        stack.enter_context(mock.patch.object(losses, "_correlation", correlation))
        stack.enter_context(mock.patch.object(losses, "smoothness_loss", smoothness_loss))
        build = base_networks.BaseNetwork.build
        stack.enter_context(mock.patch.object(base_networks._PublishedNetwork, "build", build))
        stack.enter_context(mock.patch.object(affine, "_fast_affine_flow", affine._affine_flow))
        stack.enter_context(mock.patch.object(few_voxels, "MOST", 0))
        stack.enter_context(mock.patch.object(blocks, "FINE", math.inf))
        stack.enter_context(mock.patch.multiple(few_channels, IMAGES=0, RESULTS=0))
        for module in (affine, base_networks):
            stack.enter_context(mock.patch.object(module, "beside", beside))
        for module in (blocks, base_networks):
            stack.enter_context(mock.patch.object(module, "leaky_relu", tf.nn.leaky_relu))
        plain_up = blocks.UpConvolution.upsample
        stack.enter_context(mock.patch.object(blocks.FlowUpConvolution, "upsample", plain_up))
        stack.enter_context(mock.patch.object(blocks.DoublingConvolution, "is_folded", return_value=False))
        stack.enter_context(
            mock.patch.object(training, "_Adam", lambda limit, **options: keras.optimizers.Adam(**options))
        )
        yield
