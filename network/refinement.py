"""A result improved for one pair after the network: refinement of the flow by descent, and as many repeats as help."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from errors import UserError

from . import metrics
from .affine import Affine
from .config import CascadeConfig
from .kernels import neighbours, whole_step, xla_kernel
from .losses import correlation, similarity_loss
from .recursive_cascaded_networks import CascadeOutput, Stage
from .spatial_transformer import compose, pad, warp, warp_by_parts
from .splines import SplineSmoothness, spline_matrix, spline_sums, spline_volumes

AUTO = "auto"  # steps: as many as help


class _Pass(NamedTuple):
    """One of the descents, coarse to fine; each starts where the one before ended.

    Attributes:
        shrink: the images are this many times smaller along each axis.
        spacing: voxels of the full image from one control point to the next.
        steps: of descent, at most.
        rate: step of a control point at the start, in voxels of the smaller image; it falls to 0 along half a cosine.
    """

    shrink: int
    spacing: int
    steps: int
    rate: float


PASSES = (
    _Pass(4, 32, 30, 0.3),
    _Pass(4, 16, 40, 0.3),
    _Pass(2, 8, 40, 0.2),
    _Pass(2, 4, 30, 0.1),
    _Pass(1, 4, 15, 0.2),
)
MOST_STEPS = sum(each.steps for each in PASSES)
# A smaller image has at least so many voxels along each axis, and as many as a cube of the second number.
_LEAST_SIZE = 12, 32
# A cubic spline is one to one if no control point moves by more than 0.403 of their spacing along an axis (Choi and
# Lee, 2000); the flow is a chain of such splines. Less, since det(J) is taken of differences between voxels.
_BOUND = 0.38
# Where `AUTO` ends a pass: its last `_WINDOW` steps brought less than this share of what the pass has brought so far.
_LEAST_GAIN = 0.02
_WINDOW = 5
_ROUNDING = 1e-6  # of a loss
# Share of the second moment that Adam keeps from step to step.
_MOMENTUM = 0.99


def default_config() -> CascadeConfig:
    """The loss that registers best without a network, where both scans are of one modality (docs/measured.md).

    A smoother flow overlaps the same regions of two brains better and is nearer to being the inverse of the flow of the
    other way round; a less smooth one follows the edges of tissues more closely. Two is between both.
    """
    return CascadeConfig(similarity="lncc", window=5, reg_factor=2.0)


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
    steps: int | str = AUTO,
    on_step: Callable | None = None,
    *,
    smoothness: float | None = None,
    mask: tf.Tensor | None = None,
    diffeomorphic: bool = True,
) -> CascadeOutput:
    """Improve a result for these very pairs: one more stage, whose flow is found by descent on the training loss.

    The new flow is a chain of cubic B-splines, composed with each other and with the result's like the flows of more
    cascades. Each is fitted by Adam to similarity plus smoothness (half the mean square of the flow's slopes): the
    first with control points far apart, on images of a quarter of the size, the last on the whole images (`PASSES`).
    The network and its weights have no part in it. Each pair of a batch is fitted by itself.

    On two CPU cores, a pair of 128 x 128 x 128 voxels takes at most `MOST_STEPS` steps, 15 of them of the full size at
    about 0.15 s of CPU time each: with compilation about 10 s of CPU time.

    Args:
        output: `CascadeOutput` to start from: of a network, or `identity(moving)`.
        fixed, moving: float32 [B, X, Y, Z, 1] in 0..1.
        config: `CascadeConfig` with the loss (`similarity`, `reg_factor`) and the kind of warp.
        steps: `AUTO`, where each pass ends when its last steps brought next to nothing, and at most `MOST_STEPS` are
            taken; or the number of all steps together, from 1, which are shared out among the passes.
        on_step: function of (step, loss) called after every step: a number from 1, and the tensor float32 [B]: the loss
            before that step, on the images of that pass.
        smoothness: weight of the smoothness; None is the config's `reg_factor`. Ten times as much halves the flow's
            slopes or so; a tenth follows the images, and their noise, more closely.
        mask: weights float32 [B, X, Y, Z, 1] from 0 on the fixed image; similarity is measured where they are not 0.
        diffeomorphic: bound the control points so that the new flow nowhere folds.

    Returns:
        `CascadeOutput` with one more stage.

    Raises:
        UserError: `steps` is neither `AUTO` nor a number from 1, or the similarity takes no mask.
    """
    passes = _shared_out(tuple(fixed.shape[1:4]), steps)
    weight = config.reg_factor if smoothness is None else smoothness
    first, done = output.stages[-1].composed_flow, 0
    fixed_levels = _Levels(fixed, mask)
    total, composed, warped = tf.zeros_like(first), first, output.stages[-1].warped
    for each in passes:
        seen = _Levels(warped, None)
        descent = _Descent(each, config, weight, diffeomorphic, total)
        control, taken = descent.run(
            fixed_levels.image(each.shrink),
            seen.image(each.shrink),
            fixed_levels.weights(each.shrink),
            _LEAST_GAIN if steps == AUTO else None,
            lambda step, loss, done=done: on_step(done + step, loss) if on_step is not None else None,
        )
        done += taken
        flow = tf.transpose(spline_volumes(control, *descent.full), [1, 2, 3, 4, 0])
        total = _followed(total, flow, config)
        composed = _followed(first, total, config)
        warped = warp(moving, composed, **config.warping)
    return CascadeOutput((*output.stages, Stage(total, composed, warped)), output.affine)


def _followed(first: tf.Tensor, second: tf.Tensor, config: CascadeConfig) -> tf.Tensor:
    """`compose`, which is the second flow alone where there is no first one."""
    return compose(first, second, **config.warping) if tf.reduce_any(first != 0.0) else second


def _shared_out(size: tuple[int, ...], steps: int | str) -> list[_Pass]:
    """The passes for images of a size, with the number of steps that each may take.

    Raises:
        UserError: the number of steps is not allowed.
    """
    if steps != AUTO and (not isinstance(steps, int) or steps < 1):
        raise UserError(f"{steps} steps of refinement; give a whole number from 1, or '{AUTO}'")
    passes: list[_Pass] = []
    for each in PASSES:
        shrink = each.shrink
        while shrink > 1 and (min(size) < _LEAST_SIZE[0] * shrink or math.prod(size) < (_LEAST_SIZE[1] * shrink) ** 3):
            shrink //= 2
        if not passes or passes[-1][:2] != (shrink, each.spacing):
            passes.append(each._replace(shrink=shrink))
    if steps == AUTO:
        return passes
    ends = np.cumsum([each.steps for each in passes])
    ends = np.rint(ends / ends[-1] * int(steps)).astype(int)
    shares = np.diff(ends, prepend=0).tolist()
    return [each._replace(steps=n) for each, n in zip(passes, shares, strict=True) if n]


class _Levels:
    """Smaller copies of images [B, X, Y, Z, 1], each made when it is first asked for, and of their mask."""

    def __init__(self, image: tf.Tensor, mask: tf.Tensor | None) -> None:
        if mask is not None:
            image = tf.where(mask > 0, image, 0.0)
        self._images, self._masks = {1: image}, {1: mask}

    def image(self, shrink: int) -> tf.Tensor:
        """The image, `shrink` times smaller."""
        if shrink not in self._images:
            image, mask = self.image(shrink // 2), self._masks[shrink // 2]
            if mask is None:
                self._images[shrink], self._masks[shrink] = _halved(image), None
            else:  # what lies outside the mask does not shine in
                weights = _halved(mask)
                self._images[shrink] = tf.math.divide_no_nan(_halved(image * mask), weights)
                self._masks[shrink] = weights
        return self._images[shrink]

    def weights(self, shrink: int) -> tf.Tensor | None:
        """The mask, `shrink` times smaller."""
        self.image(shrink)
        return self._masks[shrink]


@xla_kernel
def _halved(image: tf.Tensor) -> tf.Tensor:
    """An image at half the size, smoothed by 1 3 3 1: voxel i lies between voxels 2 i and 2 i + 1."""
    for axis in (1, 2, 3):
        n = image.shape[axis]
        line = np.clip(np.arange(-1, n + n % 2 + 1), 0, n - 1)
        image = tf.gather(image, line, axis=axis)
        parts = [tf.gather(image, np.arange(k, k + n + n % 2 - 1, 2), axis=axis) for k in range(4)]
        image = (parts[0] + 3.0 * parts[1] + 3.0 * parts[2] + parts[3]) / 8.0
    return image


def _matrices(size: Sequence[int], spacing: int, shrink: int) -> list[np.ndarray]:
    """Weights of the control points at the voxels of a smaller image: [n, control points] for each axis.

    The second control point lies at the first voxel of the full image.
    """
    found = []
    for n in size:
        segments = (n - 1) // spacing + 1
        place = np.arange(math.ceil(n / shrink)) * shrink + (shrink - 1) / 2
        found.append(spline_matrix(np.minimum(place / spacing, segments), segments))
    return found


class _Descent:
    """Fits the control points [3, B, i, j, k] of one spline, in voxels of the full image."""

    def __init__(
        self, each: _Pass, config: CascadeConfig, weight: float, diffeomorphic: bool, total: tf.Tensor
    ) -> None:
        size = total.shape[1:4]
        self.each, self.config = each, config
        self.similarity = _similarity(config)
        x, *others = _matrices(size, each.spacing, each.shrink)
        self.matrices = [tf.constant(m) for m in (x / each.shrink, *others)]
        self.full = [tf.constant(m) for m in _matrices(size, each.spacing, 1)]
        # The smoothness is that of the flow so far and the new one together, at the places of the control points.
        self.smoothness = SplineSmoothness(total, self.full, each.spacing)
        self.weight, self.bound = weight, _BOUND * each.spacing if diffeomorphic else math.inf

    def run(
        self,
        fixed: tf.Tensor,
        moving: tf.Tensor,
        mask: tf.Tensor | None,
        least_gain: float | None,
        on_step: Callable,
    ) -> tuple[tf.Tensor, int]:
        """The control points, and the number of steps that it took.

        With `least_gain`, a pair whose last steps brought less than this share of all its gain stands still, and the
        descent ends when all do. A pair that gained nothing at all is left as it was.
        """
        padding = float(self.config.warp_padding)
        if padding:
            moving = pad(moving)
        control = tf.zeros([3, fixed.shape[0], *(matrix.shape[1] for matrix in self.matrices)])
        state = control, tf.zeros_like(control), tf.zeros_like(control)
        moves, losses = tf.ones([fixed.shape[0]]), []
        for step in range(1, self.each.steps + 1):
            flow = spline_volumes(state[0], *self.matrices)
            flow = flow + padding if padding else flow
            warped = warp_by_parts(moving, flow)
            loss, upstream = self.similarity(fixed, warped, mask)
            gradient = spline_sums(_slopes(warped, upstream), *self.matrices)
            smooth, of_smooth = self.smoothness(state[0])
            gradient += self.weight * of_smooth
            rate = self.each.rate * self.each.shrink * 0.5 * (1.0 + math.cos(math.pi * (step - 1) / self.each.steps))
            control, *moments = _adam(state, gradient, step, rate * moves[None, :, None, None, None])
            state = tf.clip_by_value(control, -self.bound, self.bound), *moments
            losses.append(loss + self.weight * smooth)
            on_step(step, losses[-1])
            if least_gain is not None and step > 2 * _WINDOW:
                moves *= _still_gains(losses, least_gain)
                if not tf.reduce_any(moves > 0):
                    break
        control = state[0]
        if least_gain is not None:
            control = tf.where((losses[-1] < losses[0] - _ROUNDING)[None, :, None, None, None], control, 0.0)
        return control, step


def _still_gains(losses: list[tf.Tensor], least_gain: float) -> tf.Tensor:
    """1 for each pair whose loss fell in the last steps by more than a share of its whole fall, else 0: float32 [B]."""
    now, before = (tf.reduce_mean(tf.stack(part), 0) for part in (losses[-_WINDOW:], losses[-2 * _WINDOW : -_WINDOW]))
    gain = losses[0] - now
    return tf.cast((gain > _ROUNDING) & (before - now > least_gain * gain), tf.float32)


@functools.cache
def _similarity(config: CascadeConfig) -> Callable[..., tuple[tf.Tensor, tf.Tensor]]:
    """Function (fixed, warped, mask) -> the similarity [B] and its gradient with respect to `warped`."""
    similarity = similarity_loss(config)

    def measure(fixed: tf.Tensor, warped: tf.Tensor, mask: tf.Tensor | None) -> tuple[tf.Tensor, tf.Tensor]:
        options = {} if mask is None else {"mask": mask}
        with tf.GradientTape() as tape:
            tape.watch(warped)
            loss = similarity(fixed, warped, **options)
        return loss, tape.gradient(loss, warped)

    measured = whole_step(measure, autograph=False)

    def checked(fixed: tf.Tensor, warped: tf.Tensor, mask: tf.Tensor | None) -> tuple[tf.Tensor, tf.Tensor]:
        if mask is not None:
            similarity_loss(config, masked=True)  # raises where it takes none
        return measured(fixed, warped, mask)

    return checked


@xla_kernel
def _slopes(warped: tf.Tensor, upstream: tf.Tensor) -> tf.Tensor:
    """Gradient of the flow [3, B, X, Y, Z] from that of the warped image, by the slopes of that image, as in demons.

    They are central differences. The exact slopes of linear interpolation jump at every voxel, take longer, and
    register worse: docs/architecture.md.
    """
    pairs = zip(neighbours(warped[..., 0], 1), neighbours(warped[..., 0], -1), strict=True)
    return tf.stack([0.5 * (ahead - behind) * upstream[..., 0] for ahead, behind in pairs])


def _adam(
    state: tuple[tf.Tensor, tf.Tensor, tf.Tensor], gradient: tf.Tensor, step: int, rate: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Control points and their first and second moment after one step of Adam."""
    control, mean, square = state
    mean = 0.9 * mean + 0.1 * gradient
    square = _MOMENTUM * square + (1.0 - _MOMENTUM) * tf.square(gradient)
    size = rate * math.sqrt(1.0 - _MOMENTUM**step) / (1.0 - 0.9**step)
    return control - size * mean / (tf.sqrt(square) + 1e-8), mean, square


def repeat_while_better(
    network: Callable[..., CascadeOutput],
    fixed: tf.Tensor,
    moving: tf.Tensor,
    threshold: float = 0.001,
    folding_bound: float = 0.01,
    most: int = 10,
) -> tuple[CascadeOutput, int]:
    """Repeat the cascades as often as it helps: once, twice, ... while similarity rises and the flow hardly folds.

    Args:
        network: `RecursiveCascadedNetwork`, or another function of (images, rep=) that does the same; its own
            `config.rep` has no part in it.
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
