"""Sums in a fixed order, and that TensorFlow's optimiser leaves no other in training; graphs without gradients."""

import contextlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from scipy.ndimage import gaussian_filter
from tensorflow.python.eager import context  # the one way to see a graph as the optimiser leaves it

from network import refinement
from network.config import CascadeConfig
from network.kernels import fork, forward_alone, ordered_sum, three_in_one_loop, whole_step
from network.recursive_cascaded_networks import build_network
from network.spatial_transformer import compose, warp
from tests.test_network.test_training import batch_of, trainer_of


@pytest.mark.parametrize("graph", [False, True])
def test_fork_adds_the_gradients_of_all_uses(graph):
    def gradients(a, b):
        with tf.GradientTape() as tape:
            tape.watch([a, b])
            (a0, b0), (a1, _), (a2, b2) = fork([a, b], 3)
            loss = tf.reduce_sum(a0 * b0) + 5 * a1[0] + tf.reduce_sum(tf.square(a2)) + 7 * b2[1]
        return tape.gradient(loss, [a, b])

    a, b = tf.constant([2.0, -3.0]), tf.constant([11.0, 13.0])
    for_a, for_b = (tf.function(gradients) if graph else gradients)(a, b)
    np.testing.assert_array_equal(for_a, [11 + 5 + 4, 13 - 6])
    np.testing.assert_array_equal(for_b, [2, -3 + 7])


def test_a_single_use_is_the_tensors_themselves():
    tensors = [tf.constant(1.0), tf.constant(2.0)]
    assert fork(tensors, 1) == [tensors]


def test_the_ordered_sum_adds_tensor_by_tensor():
    terms = [tf.constant([1e8, 1.0]), tf.constant([3.0, 2.0]), tf.constant([-1e8, 4.0])]
    np.testing.assert_array_equal(ordered_sum(terms), [0, 7])  # 1e8 + 3 is 1e8 in float32


def test_three_volumes_are_channels_with_their_bits():
    parts = np.random.default_rng(0).normal(size=(3, 2, 3, 4, 5)).astype(np.float32)
    parts[:, 0, 0, 0, :4] = [[np.nan, -0.0, np.inf, 1e-38], [-np.inf, np.nan, 3.0, -0.0], [-0.0, -1.0, np.nan, np.inf]]
    found = three_in_one_loop(lambda x, y, z: (y, z, x))(*map(tf.constant, parts)).numpy()
    np.testing.assert_array_equal(found.view(np.int32), np.stack(parts[[1, 2, 0]], -1).view(np.int32))


@pytest.mark.parametrize("base_network", ["VTN", "VoxelMorph"])
def test_a_graph_without_gradients_has_the_same_values_and_nothing_for_gradients(base_network):
    network = build_network(CascadeConfig(base_network, 2, image_size=(16, 18, 20), channels=2))
    images = [tf.random.stateless_uniform((2, 16, 18, 20, 1), (side, 5)) for side in (0, 1)]
    graphs = [whole_step(step) for step in (network.call, forward_alone(network.call))]
    values, alone = (tf.nest.flatten(graph(images)) for graph in graphs)
    for value, other in zip(values, alone, strict=True):
        np.testing.assert_array_equal(value, other)
    kinds = [{op for graph in _with_calls(step.get_concrete_function(images).graph) for op in graph} for step in graphs]
    assert {"IdentityN", "StopGradient"} <= kinds[0]
    assert not {"IdentityN", "StopGradient"} & kinds[1]


def _with_calls(graph):
    """Kinds of the operations of a graph, and of each function in its library but the kernels."""
    yield [op.type for op in graph.get_operations()]
    for function in graph.as_graph_def().library.function:
        if not function.attr["_XlaMustCompile"].b:
            yield [node.op for node in function.node_def]


def test_kernels_that_a_graph_without_gradients_traced_first_have_their_gradients():
    size = (5, 7, 6)  # of no other test: the kernels are traced here
    image, first, second = (tf.random.stateless_normal((2, *size, channels), (channels, 7)) for channels in (1, 3, 3))

    def step(first, second, fast=True):
        with tf.GradientTape() as tape:
            tape.watch([first, second])
            total = tf.reduce_sum(tf.square(warp(image, compose(first, second, fast=fast), fast=fast)))
        return tape.gradient(total, [first, second])

    whole_step(forward_alone(lambda *flows: warp(image, compose(*flows))))(first, second)
    found, expected = whole_step(step)(first, second), step(first, second, fast=False)
    for gradient, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(gradient, other, rtol=1e-4, atol=1e-4)


@contextlib.contextmanager
def arrivals():
    """Collects the number of terms of each sum, outside of kernels, that may be made in the order of arrival."""
    context.context().enable_graph_collection()
    found = []
    try:
        yield found
        for graphs in context.context().export_run_metadata().function_graphs:
            graph = graphs.post_optimization_graph
            kernels = {f.signature.name for f in graph.library.function if f.attr["_XlaMustCompile"].b}
            scopes = [f.node_def for f in graph.library.function if f.signature.name not in kernels]
            for node in (node for scope in (graph.node, *scopes) for node in scope):
                if node.op in ("AddN", "AccumulateNV2"):
                    found.append(node.attr["N"].i)
                elif node.op == "TemporaryVariable":  # what the optimiser makes of some of them
                    found.append(node.name)
    finally:
        context.context().disable_graph_collection()


@pytest.mark.parametrize(
    ("base_network", "options"),
    [
        pytest.param("VTN", {"n_cascades": 3}, marks=pytest.mark.slow),
        ("VoxelMorph", {"n_cascades": 2, "rep": 3, "augmentation": "identity"}),
        pytest.param("VTN", {"rep": 3, "rematerialize": True, "similarity": "mi"}, marks=pytest.mark.slow),
        pytest.param(
            "VTN",
            {"n_cascades": 3, "warp_padding": True, "precision": "mixed_bfloat16", "similarity": "lncc"},
            marks=pytest.mark.slow,
        ),
        ("VTN", {"n_cascades": 2, "warp_gradient": False}),
        ("VTN", {"n_cascades": 0}),
    ],
)
def test_no_sum_of_a_step_depends_on_the_order_of_arrival(base_network, options):
    config = CascadeConfig(base_network, image_size=(16, 20, 12), channels=2, **options)
    trainer, batch = trainer_of(config), batch_of(config.image_size, 2)
    trainer.make_train_function()
    with arrivals() as found:
        trainer.train_function(iter([batch]))
    assert found  # sums of two
    assert set(found) == {2}


def test_no_sum_of_a_refinement_depends_on_the_order_of_arrival():
    batch = batch_of((20, 16, 12))
    start = refinement.identity(batch["moving"])
    with arrivals() as found:
        refinement.refine(start, batch["fixed"], batch["moving"], CascadeConfig(image_size=(20, 16, 12)), 1)
    assert set(found) <= {2}


@pytest.mark.slow
def test_a_busy_machine_trains_the_same_bits():
    config = CascadeConfig("VTN", 2, image_size=(64, 64, 64), augmentation="identity")
    batch = batch_of(config.image_size)
    for side in ("fixed", "moving"):  # noise has hardly a gradient
        smooth = gaussian_filter(batch[side], (0, 2, 2, 2, 0))
        batch[side] = tf.constant((smooth - smooth.min()) / np.ptp(smooth))

    def weights():
        trainer = trainer_of(config)
        trainer.make_train_function()
        for _ in range(8):
            trainer.train_function(iter([batch]))
        return {name: variable.numpy() for name, variable in trainer.network.named_weights().items()}

    quiet = weights()
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    try:
        beside = weights()
    finally:
        for process in busy:
            process.kill()
            process.wait()
    for name, value in quiet.items():
        np.testing.assert_array_equal(beside[name], value, name)
