"""The flow along a velocity field, by scaling and squaring."""

import tensorflow as tf

from .kernels import rematerialized
from .spatial_transformer import compose

# Halvings of the velocity, and so squarings of the flow (Dalca et al., Medical Image Analysis 57, 2019).
SQUARINGS = 7


def integrate(velocity: tf.Tensor, fast: bool = True) -> tf.Tensor:
    """Flow of one unit of time along a velocity that stands still: float32 [B, X, Y, Z, 3], in voxels.

    Scaling and squaring (Arsigny et al., MICCAI 2006): the flow of a 128th of the time is the 128th part of the
    velocity; composed with itself it is that of a 64th, and so on, seven times. Where the velocity is smooth the flow
    does not fold, and `integrate(-velocity)` is its inverse. Outside the volume the edge's velocity goes on.

    Args:
        velocity: float32 [B, X, Y, Z, 3], in voxels.
        fast: compiled kernels; the velocity alone is kept for the backward pass, which computes the rest again.
            Otherwise the same formula op by op.
    """

    def squared(velocity: tf.Tensor) -> tuple[tf.Tensor, list[tf.Tensor]]:
        flow = velocity / 2.0**SQUARINGS
        for _ in range(SQUARINGS):
            flow = compose(flow, flow, fast=fast)
        return flow, []

    return (rematerialized(squared) if fast else squared)(velocity)[0]
