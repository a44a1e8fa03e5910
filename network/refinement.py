"""A result improved for one pair after the network: refinement of the flow by descent, and as many repeats as help."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from errors import UserError

from . import metrics
from .affine import Affine
from .config import CascadeConfig
from .kernels import ordered_sum, whole_step
from .losses import correlation, similarity_loss, smoothness_loss
from .recursive_cascaded_networks import CascadeOutput, RecursiveCascadedNetwork, Stage
from .spatial_transformer import compose, warp
from .splines import spline_matrix, tensor_product

# Distances between the control points of the refining flow, in voxels. The flow is the sum of a spline of each: the
# wide ones carry it across the volume in a few steps, the narrow ones fit what is left.
SPACINGS = (32, 16, 8, 4)
# Step of a control point, in voxels, at the start; it falls to 0 along half a cosine.
RATE = 0.1


def identity(moving: tf.Tensor) -> CascadeOutput:
    """`CascadeOutput` of no network: no flow, and `moving` [B, X, Y, Z, 1] as it is. `refine` can start from it."""
    none = tf.zeros([*moving.shape[:4], 3])
    pairs = moving.shape[0]
    return CascadeOutput((Stage(none, none, moving),), Affine(tf.zeros([pairs, 3, 3]), tf.zeros([pairs, 3])))


def join(outputs: Sequence[CascadeOutput]) -> CascadeOutput:
    """One `CascadeOutput` of several, pair after pair: of their last stages alone, since their numbers may differ."""
    stage = Stage(*(tf.concat(parts, 0) for parts in zip(*(output.stages[-1] for output in outputs), strict=True)))
    return CascadeOutput((stage,), Affine(*(tf.concat(p, 0) for p in zip(*(o.affine for o in outputs), strict=True))))


def refine(
    output: CascadeOutput,
    fixed: tf.Tensor,
    moving: tf.Tensor,
    config: CascadeConfig,
    steps: int,
    on_step: Callable | None = None,
) -> CascadeOutput:
    """Improve a result for these very pairs: one more stage, whose flow is found by descent on the training loss.

    The new flow is a sum of cubic B-splines, from none at the start; it is composed with the result's like the flow of
    one more cascade, and its control points are fitted by Adam to similarity plus smoothness, as in training. The
    network and its weights have no part in it. Each pair of a batch is fitted by itself.

    Args:
        output: `CascadeOutput` to start from: of a network, or `identity(moving)`.
        fixed, moving: float32 [B, X, Y, Z, 1] in 0..1.
        config: `CascadeConfig` with the loss (`similarity`, `reg_factor`) and the kind of warp.
        steps: number of steps, from 1.
        on_step: function of (step, loss) called after every step: a number from 1, and the tensor float32 [B].

    Returns:
        `CascadeOutput` with one more stage.

    Raises:
        UserError: `steps` is less than 1.
    """
    if steps < 1:
        raise UserError(f"{steps} steps of refinement; give a whole number from 1")
    first = output.stages[-1].composed_flow
    splines = _splines(tuple(fixed.shape[1:4]))
    control = [tf.zeros([fixed.shape[0], *(matrix.shape[1] for matrix in spline), 3]) for spline in splines]
    state = control, [tf.zeros_like(c) for c in control], [tf.zeros_like(c) for c in control]
    for step in range(1, steps + 1):
        rate = RATE * 0.5 * (1.0 + math.cos(math.pi * (step - 1) / steps))
        loss, state = _descend(config, first, fixed, moving, state, tf.constant(float(step)), tf.constant(rate))
        if on_step is not None:
            on_step(step, loss)
    flow = _spline_flow(state[0], splines)
    composed = compose(first, flow, **config.warping)
    warped = warp(moving, composed, **config.warping)
    return CascadeOutput((*output.stages, Stage(flow, composed, warped)), output.affine)


@whole_step
def _descend(
    config: CascadeConfig,
    first: tf.Tensor,
    fixed: tf.Tensor,
    moving: tf.Tensor,
    state: tuple,
    step: tf.Tensor,
    rate: tf.Tensor,
) -> tuple[tf.Tensor, tuple]:
    """One step of Adam on the control points: the losses [B] before it, and the new (control, first, second moment)."""
    control, mean, square = state
    with tf.GradientTape() as tape:
        tape.watch(control)
        flow = _spline_flow(control, _splines(tuple(fixed.shape[1:4])))
        warped = warp(moving, compose(first, flow, **config.warping), **config.warping)
        loss = similarity_loss(config)(fixed, warped) + config.reg_factor * smoothness_loss(flow)
    gradient = tape.gradient(loss, control)
    mean = [0.9 * m + 0.1 * g for m, g in zip(mean, gradient, strict=True)]
    square = [0.999 * s + 0.001 * tf.square(g) for s, g in zip(square, gradient, strict=True)]
    size = rate * tf.sqrt(1.0 - 0.999**step) / (1.0 - 0.9**step)
    control = [c - size * m / (tf.sqrt(s) + 1e-8) for c, m, s in zip(control, mean, square, strict=True)]
    return loss, (control, mean, square)


def _spline_flow(control: list[tf.Tensor], splines: list) -> tf.Tensor:
    """Sum of tensor-product splines: float32 [B, X, Y, Z, 3]."""
    return ordered_sum([tensor_product(c, *matrices) for c, matrices in zip(control, splines, strict=True)])


@functools.lru_cache(maxsize=1)
def _splines(size: tuple[int, int, int]) -> list[list[np.ndarray]]:
    """For each of `SPACINGS` the three matrices, one an axis, from control points to voxels.

    The second control point lies at the first voxel.
    """
    return [[spline_matrix(np.arange(n) / mesh, (n - 1) // mesh + 1) for n in size] for mesh in SPACINGS]


def repeat_while_better(
    network: RecursiveCascadedNetwork,
    fixed: tf.Tensor,
    moving: tf.Tensor,
    threshold: float = 0.001,
    folding_bound: float = 0.01,
    most: int = 10,
) -> tuple[CascadeOutput, int]:
    """Repeat the cascades as often as it helps: once, twice, ... while similarity rises and the flow hardly folds.

    Args:
        network: `RecursiveCascadedNetwork`; its own `config.rep` has no part in it.
        fixed, moving: float32 [1, X, Y, Z, 1] in 0..1, one pair.
        threshold: a repeat must raise the correlation of fixed and warped image by more than this.
        folding_bound: share of folded voxels, 0..1, that the flow must stay below from the second time on.
        most: number of repeats to end at, from 1.

    Returns:
        (`CascadeOutput`, rep): the best result, and how often it applied each cascade.

    Raises:
        UserError: there is more than one pair, or `most` is less than 1.
    """
    if fixed.shape[0] != 1:
        raise UserError(f"{fixed.shape[0]} pairs; repeats are found for one pair at a time")
    if most < 1:
        raise UserError(f"at most {most} repeats; give a whole number from 1")
    best: Any = None
    for rep in range(1, most + 1):
        output = network((fixed, moving), rep=rep)
        similarity = float(correlation(fixed, output.warped)[0])
        folding = float(metrics.folding(metrics.jacobian_determinant(output.flow))[0])
        if best is not None and not (similarity > best[2] + threshold and folding < folding_bound):
            break
        best = output, rep, similarity
    return best[:2]
