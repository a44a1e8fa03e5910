"""What is measured: each case has variants, functions that make a callable to be timed."""

import dataclasses
import functools
import itertools
import pathlib
import re
import tempfile

import numpy as np
import tensorflow as tf

from benchmarks import plain
from data_util.config import load_dataset_config
from data_util.dataset import open_scheme
from data_util.making import anatomy, known_flows, new_set
from network import evaluation, metrics, spatial_transformer, training
from network.base_networks import VTN
from network.config import CascadeConfig
from network.label_maps import carry_labels
from network.recursive_cascaded_networks import build_network

LABELS = tuple(range(1, 57))


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: what is done.
        variants: name -> function without arguments that makes the callable; 'ours' and 'plain' are always there.
        moved: bytes that must be read and written at least, or None.
        operations: floating-point operations of its convolutions, or None.
        tapes: name -> function that makes a callable giving a tape and the result it recorded; empty for most.
    """

    name: str
    variants: dict
    moved: int | None = None
    operations: int | None = None
    tapes: dict = dataclasses.field(default_factory=dict)


def cases(size):
    """Every `Case` at a volume of `size` voxels an axis, batch 1."""
    voxels = size**3
    for channels in (1, 3):
        inputs = functools.partial(_warp_inputs, size, channels)
        bare = 4 * voxels * (2 * channels + 3)
        yield Case(f"warp, C = {channels}: forward", _warps(inputs, ()), bare)
        both = bare + 4 * voxels * (channels + 3)
        yield Case(f"warp, C = {channels}: both gradients", _warps(inputs, (0, 1)), both, tapes=_warp_tapes(inputs))
        yield Case(f"warp, C = {channels}: flow gradient", _warps(inputs, (1,)), bare + 4 * voxels * 3)
    yield Case("56 labels of a pair: carried and counted", _both(functools.partial(_labels, size)), 4 * voxels * 6)
    forward = sum(_operations(layer, size) for layer in _convolutions(_vtn(size)))
    yield Case("VTN: forward", _both(functools.partial(_vtn_forward, size)), operations=forward)
    for base_network, n in (("VTN", 1), ("VTN", 2), ("VoxelMorph", 1)):
        yield Case(f"training step, {base_network}-{n}", _both(functools.partial(_step, size, base_network, n)))
    for n, labels in ((1, None), (1, LABELS), (10, None)):
        many = "1 label" if labels is None else f"{len(labels)} labels"
        yield Case(f"two pairs evaluated, VTN-{n}, {many}", _both(functools.partial(_evaluation, size, n, labels)))


def _convolutions(layer):
    """The layers with a kernel in a layer."""
    return [part for part in layer._flatten_layers(include_self=False) if hasattr(part, "kernel")]


def _both(make):
    """The variants 'ours' and 'plain' of something that is built from the toolkit's own parts."""

    def plainly():
        # Traced, and so made for good, while the plain formulations are in place.
        with plain.everywhere(LABELS):
            run = make()
            run()
        return run

    return {"ours": make, "plain": plainly}


def _warp_inputs(size, channels):
    rng = np.random.default_rng(channels)
    flow = known_flows.smooth_flow((size,) * 3, rng, size / 16)[None]
    return (*(rng.random((1, size, size, size, channels), np.float32) for _ in range(2)), flow)


def _warps(inputs, wanted):
    """Variants of the warp, or of its gradients with respect to the inputs `wanted` (0 image, 1 flow)."""

    def tensorflow(warp):
        image, upstream, flow = (tf.constant(a) for a in inputs())

        @tf.function
        def run(image, flow, upstream):
            if not wanted:
                return warp(image, flow)
            seen = [image, flow]
            with tf.GradientTape() as tape:
                tape.watch(seen)
                warped = warp(*seen)
            return warped, tape.gradient(warped, [seen[k] for k in wanted], upstream)

        return lambda: run(image, flow, upstream)

    def torch():
        import torch

        torch.set_num_threads(tf.config.threading.get_intra_op_parallelism_threads() or torch.get_num_threads())
        image, upstream, flow = inputs()
        size = flow.shape[1]
        # grid_sample counts from -1 to 1, and x last.
        grid = (2 * (np.moveaxis(np.indices(flow.shape[1:4]), 0, -1) + flow) / (size - 1) - 1)[..., ::-1]
        image, upstream = (torch.from_numpy(np.moveaxis(a, -1, 1).copy()) for a in (image, upstream))
        grid = torch.from_numpy(grid.astype(np.float32))
        image.requires_grad_(0 in wanted)
        grid.requires_grad_(1 in wanted)

        def run():
            image.grad = grid.grad = None
            warped = torch.nn.functional.grid_sample(image, grid, "bilinear", "border", align_corners=True)
            if wanted:
                warped.backward(upstream)
            return warped

        return run

    return {
        "ours": lambda: tensorflow(spatial_transformer.warp),
        "plain": lambda: tensorflow(plain.warp),
        "op by op": lambda: tensorflow(functools.partial(spatial_transformer.warp, fast=False)),
        "torch": torch,
    }


def _warp_tapes(inputs):
    def taped(warp):
        image, _, flow = (tf.constant(a) for a in inputs())

        def run():
            with tf.GradientTape() as tape:
                tape.watch([image, flow])
                warped = warp(image, flow)
            return tape, warped

        return run

    return {
        name: functools.partial(taped, warp)
        for name, warp in (("ours", spatial_transformer.warp), ("plain", plain.warp))
    }


def _blocks_of_labels(size):
    """A label map with the labels 1..56 as boxes, and 0 between them: int32 [1, size, size, size, 1]."""
    edge = size // 4
    seg = np.zeros((1, size, size, size, 1), np.int32)
    for label, corner in zip(LABELS, itertools.product(range(4), repeat=3), strict=False):
        seg[(0, *(slice(edge * i + 1, edge * (i + 1) - 1) for i in corner))] = label
    return seg


def _labels(size):
    seg, flow = tf.constant(_blocks_of_labels(size)), tf.constant(_warp_inputs(size, 1)[2])
    run = tf.function(lambda seg, flow: metrics.overlap(seg, carry_labels(seg, flow, LABELS), LABELS))
    return lambda: run(seg, flow)


def _vtn(size):
    network = VTN()
    network([tf.zeros((1, size, size, size, 1))] * 2)
    return network


def _vtn_forward(size):
    network = _vtn(size)
    images = [tf.constant(a) for a in _warp_inputs(size, 1)[:2]]
    run = tf.function(lambda images: network(images))
    return lambda: run(images)


def _operations(layer, size):
    """Floating-point operations of a VTN layer: two for each weight of the kernel and voxel of its coarse grid."""
    level = int(re.search(r"\d", layer.name).group()) + layer.name.startswith("deconv")
    return 2 * int(np.prod(layer.kernel.shape)) * (-(-size // 2**level)) ** 3


def _step(size, base_network, n):
    return training_step(CascadeConfig(base_network, n, image_size=(size,) * 3))


def training_step(config):
    """A function without arguments that does a training step of one pair of random images."""
    network = build_network(config)
    trainer = training.Trainer(network, labels=LABELS)
    trainer.compile(optimizer=training.adam(network))
    trainer.optimizer.learning_rate = 1e-6
    rng = np.random.default_rng(1)
    fixed, moving = (tf.constant(rng.random((1, *config.image_size, 1), np.float32)) for _ in range(2))
    batch = {"fixed": fixed, "moving": moving, "seed": tf.constant([[0, 1]])}
    if config.dice_factor:
        batch |= dict.fromkeys(("fixed_seg", "moving_seg"), tf.constant(_blocks_of_labels(config.image_size[0])))
    if config.landmark_factor:
        points = rng.random((1, 20, 3), np.float32) * (np.array(config.image_size) - 1)
        batch |= dict.fromkeys(("fixed_points", "moving_points"), tf.constant(points, tf.float32))
    trainer.make_train_function()
    return lambda: trainer.train_function(iter([batch]))


_DATA = tempfile.TemporaryDirectory()


def _evaluation(size, n, labels):
    """Two pairs evaluated, from the HDF5 file to the last value."""
    prefix = pathlib.Path(_DATA.name) / f"{size}-{len(labels or ())}"
    if not prefix.with_suffix(".json").exists():
        scans = [anatomy.make_phantom((size,) * 3, seed) for seed in range(2)]
        if labels:
            seg = _blocks_of_labels(size)[0, ..., 0].astype(np.uint8)
            scans = [dataclasses.replace(scan, segmentation=seg) for scan in scans]
        subsets, schemes = {"pair": range(2)}, {"1": {"pair": 1.0}, "2": {"pair": 1.0}}
        new_set.write_scans(prefix, scans, (size,) * 3, "liver", subsets, schemes)
    data = load_dataset_config(prefix.with_suffix(".json"))
    if labels:
        data = dataclasses.replace(data, labels={str(label): label for label in labels})
    scheme = open_scheme(data, "2")
    network = build_network(CascadeConfig("VTN", n, image_size=(size,) * 3))

    evaluator = evaluation.Evaluator(network, scheme.label_values)
    return lambda: list(evaluator.evaluate(scheme.evaluation(1, range(len(scheme)))))
