"""What the golden tests share: weights and inputs by rule, and the recorded numbers."""

import numpy as np
import rule
import tensorflow as tf

from network.config import CascadeConfig
from network.recursive_cascaded_networks import build_network
from tests.conftest import GOLDEN


def recorded(name):
    """The arrays of a golden file."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def rule_network(*args, **options):
    """A network whose weights are made by rule."""
    network = build_network(CascadeConfig(*args, **options))
    for name, weight in network.named_weights().items():
        weight.assign(rule.weight(name, tuple(weight.shape)))
    return network


def rule_batch(fixed=(1, 3), moving=(2, 4), kind="organ"):
    """The golden batch as a Batch."""
    batch = rule.batch(fixed, moving, kind)
    points = [np.where(batch[key] < 0, np.nan, batch[key]) for key in ("point1", "point2")]
    return {
        "fixed": tf.constant(batch["voxel1"] / 255.0, tf.float32),
        "moving": tf.constant(batch["voxel2"] / 255.0, tf.float32),
        "fixed_seg": tf.constant(batch["seg1"], tf.int32),
        "moving_seg": tf.constant(batch["seg2"], tf.int32),
        "fixed_points": tf.constant(points[0], tf.float32),
        "moving_points": tf.constant(points[1], tf.float32),
    }
