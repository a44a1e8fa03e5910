"""Evaluation: the network applied to batches of pairs, one `PairResult` for each valid pair."""

import dataclasses
import time

import numpy as np
import tensorflow as tf

from . import metrics
from .recursive_cascaded_networks import Stage

DEFAULT_METRICS = ("overlap", "landmarks", "jacobian", "flow_error")


@dataclasses.dataclass(frozen=True)
class PairResult:
    """What was measured on one pair.

    Attributes:
        index: place of the pair in its scheme.
        fixed_id, moving_id: the scans, as reports name them.
        values: name -> NumPy value: a scalar, or an array with a value a label or landmark. NaN is 'not measured'.
            By the metrics chosen: `dice`, `jaccard` [K]; `landmark_distance` [L] in voxels; `jacobian_std`;
            `flow_error` in voxels, where the flow is known.
        seconds: time the pair took, its share of the batch's.
    """

    index: int
    fixed_id: str
    moving_id: str
    values: dict
    seconds: float


def evaluate(network, batches, labels=None, chosen=DEFAULT_METRICS, strategy=None):
    """Apply the network to every batch and measure the chosen metrics.

    Args:
        network: `RecursiveCascadedNetwork`.
        batches: iterable of Batches with segmentations, landmarks, `valid`, `ids` and `index`.
        labels: the label values to measure, or None for 0/255 masks.
        chosen: names out of `METRICS`.
        strategy: `tf.distribute.Strategy` that the network was built under; its replicas share each batch.

    Yields:
        `PairResult` for each valid pair, in order.
    """
    strategy = strategy or tf.distribute.get_strategy()

    def measure(batch):
        output = network((batch["fixed"], batch["moving"]))
        return measure_stage(batch, output.stages[-1], labels, chosen, network.config.warp_padding)

    run = tf.function(lambda batch: strategy.run(measure, args=(batch,)))
    for batch in batches:
        started = time.perf_counter()
        host = {name: batch[name].numpy() for name in ("valid", "ids", "index")}
        tensors = {name: value for name, value in batch.items() if name not in host}
        values = _gather(run(_split(tensors, strategy)), strategy)
        seconds = (time.perf_counter() - started) / max(host["valid"].sum(), 1)
        for i in np.flatnonzero(host["valid"]):
            fixed_id, moving_id = (text.decode() for text in host["ids"][i])
            pair = {name: value[i] for name, value in values.items()}
            yield PairResult(int(host["index"][i]), fixed_id, moving_id, pair, seconds)


def measure_stage(batch, stage, labels, chosen, padding=False):
    """The chosen metrics of one stage of the network: dict name -> tensor [B] or [B, K]."""
    fixed = metrics.label_map(batch["fixed_seg"], labels)
    warped = metrics.carry_labels(batch["moving_seg"], stage.composed_flow, labels, padding)
    scene = Scene(batch, stage, fixed, warped, labels)
    return {name: value for metric in chosen for name, value in METRICS[metric](scene).items()}


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a metric looks at: a batch, a stage of the network on it, and the label maps of both sides."""

    batch: dict
    stage: Stage
    fixed_labels: tf.Tensor
    warped_labels: tf.Tensor
    labels: tuple | None


def _overlap(scene):
    dice, jaccard = metrics.overlap(scene.fixed_labels, scene.warped_labels, scene.labels)
    return {"dice": dice, "jaccard": jaccard}


def _landmarks(scene):
    points = scene.batch["fixed_points"], scene.batch["moving_points"]
    return {"landmark_distance": metrics.landmark_distances(*points, scene.stage.composed_flow)}


def _jacobian(scene):
    return {"jacobian_std": metrics.jacobian_std(scene.stage.composed_flow)}


def _flow_error(scene):
    if "true_flow" not in scene.batch:
        return {}
    true_flow, foreground = scene.batch["true_flow"], scene.fixed_labels > 0
    return {"flow_error": metrics.flow_error(scene.stage.composed_flow, true_flow, foreground)}


# name -> function of a Scene giving the named values.
METRICS = {"overlap": _overlap, "landmarks": _landmarks, "jacobian": _jacobian, "flow_error": _flow_error}


def _split(tensors, strategy):
    """Each replica's share of a batch, in order."""
    n = strategy.num_replicas_in_sync

    def share(context):
        return {name: tf.split(value, n)[context.replica_id_in_sync_group] for name, value in tensors.items()}

    return strategy.experimental_distribute_values_from_function(share)


def _gather(values, strategy):
    """The replicas' values as NumPy arrays over the whole batch."""
    return {
        name: np.concatenate([part.numpy() for part in strategy.experimental_local_results(value)])
        for name, value in values.items()
    }
