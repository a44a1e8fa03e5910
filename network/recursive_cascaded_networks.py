"""The recursive cascaded network (paper, section 3): each cascade warps the moving image a little further."""

import contextlib
import typing
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from .affine import Affine, AffineNetwork, affine_flow, compose_affine, inverse_affine
from .blocks import undrawn
from .config import CascadeConfig
from .inverse import inverse
from .kernels import fork
from .registry import BASE_NETWORKS
from .repeats import CascadeFunction, repeats
from .spatial_transformer import compose, warp
from .variable_names import variable_names
from .velocities import integrate


class Stage(typing.NamedTuple):
    """Result of one application of a cascade; stage 0 is the affine cascade.

    Attributes:
        flow: this cascade's own flow, float32 [B, X, Y, Z, 3], in voxels.
        composed_flow: the flow of all cascades up to and including this one.
        warped: the moving image warped once by `composed_flow`, float32 [B, X, Y, Z, 1].
    """

    flow: tf.Tensor
    composed_flow: tf.Tensor
    warped: tf.Tensor


class CascadeOutput(typing.NamedTuple):
    """Result of the whole network.

    Attributes:
        stages: of all cascades, the affine one first.
        affine: the map of stage 0.
        velocities: of every stage but the affine one, float32 [B, X, Y, Z, 3], where `config.flow` is 'velocity'; the
            stage's own flow is one unit of time along it. Else ().
    """

    stages: tuple[Stage, ...]
    affine: Affine
    velocities: tuple[tf.Tensor, ...] = ()

    @property
    def flow(self) -> tf.Tensor:
        """Composed flow of all cascades, float32 [B, X, Y, Z, 3]."""
        return self.stages[-1].composed_flow

    @property
    def warped(self) -> tf.Tensor:
        """Moving image warped by `flow`, float32 [B, X, Y, Z, 1]."""
        return self.stages[-1].warped


@keras.saving.register_keras_serializable("registration")
class RecursiveCascadedNetwork(keras.Model):
    """An affine cascade and `config.n_cascades` deformable cascades: (fixed, moving) -> `CascadeOutput`.

    Both images are float32 [B, X, Y, Z, 1] in 0..1. A cascade sees the fixed image and the moving image warped by the
    composed flow so far. Each deformable cascade is applied `config.rep` times, one after the other, with the same
    weights.
    """

    def __init__(self, config: CascadeConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs, dtype="float32")
        self.config = config
        self.affine = AffineNetwork(
            config.affine_channels, config.affine_slope, name="affine_stem", dtype=config.precision
        )
        base_network = BASE_NETWORKS.find(config.base_network).load()
        self.cascades = [
            base_network(
                **config.base_network_options,
                flow_multiplier=config.flow_multiplier,
                name=f"deform_stem_{i}",
                dtype=config.precision,
            )
            for i in range(config.n_cascades)
        ]

    def build(self, input_shape: Any) -> None:
        for stem in (self.affine, *self.cascades):
            stem.build(input_shape)

    def call(
        self,
        inputs: Sequence[tf.Tensor],
        rep: int | None = None,
        training: bool = False,
        compared: tf.Tensor | None = None,
    ) -> CascadeOutput:
        """Apply the cascades (paper, equations 1 to 4).

        Args:
            inputs: (fixed, moving), float32 [B, X, Y, Z, 1] in 0..1; in a graph, X, Y and Z are known.
            rep: how often each deformable cascade is applied; None is `config.rep`.
            training: whether layers that act otherwise in training do so, such as a batch normalisation.
            compared: the moving image in another contrast than the one that the cascades see, [B, X, Y, Z, 1]: what
                `warped` is of the stages that the loss looks at.

        Returns:
            `CascadeOutput`.
        """
        fixed, moving = inputs
        config, options = self.config.replace(rep=rep or self.config.rep), self.config.warping
        for_flow, for_composition, affine = fork(self.affine([fixed, moving]), 3)
        flow = affine_flow(for_flow, fixed.shape[1:4])
        seen, warped = warp_views(moving, compared, flow, 0, config)
        stages, velocities = [Stage(flow, flow, warped)], []
        functions: dict[tuple[bool, ...], CascadeFunction] = {}  # one, unless some cascades are frozen
        for cascade in self.cascades:
            trained = tuple(variable.trainable for variable in cascade.variables)
            if trained not in functions:
                functions[trained] = CascadeFunction(cascade, training, config.rematerialize)
            for flow_of in repeats(cascade, functions[trained], config.rep, training):
                last = stages[-1]
                flow = flow_of(fixed, seen if config.warp_gradient else tf.stop_gradient(seen))
                if config.flow == "velocity":
                    velocities.append(flow)
                    flow = integrate(flow, config.fast_reconstruction)
                if last is stages[0]:
                    composed = compose_affine(for_composition, last.composed_flow, flow)
                else:
                    composed = compose(last.composed_flow, flow, **options)
                seen, warped = warp_views(moving, compared, composed, len(stages), config)
                stages.append(Stage(flow, composed, warped))
        return CascadeOutput(tuple(stages), affine, tuple(velocities))

    def inverse(self, output: CascadeOutput) -> tf.Tensor:
        """The flow from the moving image back to the fixed one, of a result of this network.

        The cascades are inverted one by one, in reverse order: the affine one exactly, one with a velocity by the
        negative velocity, and any other by iteration (`network.inverse`), as far as it does not fold.

        Args:
            output: what the network gave for a pair.

        Returns:
            float32 [B, X, Y, Z, 3] on the moving grid, in voxels: point q of the moving image lies at q + flow(q) in
            the fixed one. Where the way leads through the outside of the volume, it is only near.
        """
        back = affine_flow(inverse_affine(output.affine), output.stages[0].flow.shape[1:4])
        for k, stage in enumerate(output.stages[1:]):
            one = integrate(-output.velocities[k]) if output.velocities else inverse(stage.flow)[0]
            back = compose(one, back)
        return back

    def named_weights(self) -> dict[str, keras.Variable]:
        """Every variable under its name in checkpoints, such as 'gaffdfrm/affine_stem/conv1/W' (`variable_names`).

        Raises:
            ValueError: a variable has no name, or one that another variable has too.
        """
        names = {}
        for stem in (self.affine, *self.cascades):
            for name, variable in variable_names(stem).items():
                names[f"gaffdfrm/{stem.name}/{name}"] = variable
        return names

    def get_config(self) -> dict[str, Any]:
        return {"config": self.config.to_dict(), "name": self.name}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "RecursiveCascadedNetwork":
        return cls(CascadeConfig.from_dict(config["config"], "config"), name=config["name"])


def warp_views(
    moving: tf.Tensor, compared: tf.Tensor | None, flow: tf.Tensor, stage: int, config: CascadeConfig
) -> tuple[tf.Tensor, tf.Tensor]:
    """What the cascade after a stage sees of the moving image, and the stage's warped image.

    They are the same but for an image to be `compared` in another contrast. Both of these are then warped at once: a
    flow that was used once more would have a gradient of three terms, and one that nobody needs is left out.
    """
    if compared is None:
        warped = warp(moving, flow, **config.warping)
        return warped, warped
    needed = [(moving, stage < config.last_stage), (compared, stage in config.similarity_stages)]
    views = warp(tf.concat([image for image, is_needed in needed if is_needed], -1), flow, **config.warping)
    return views[..., :1], views[..., -1:]


def after_affine(
    register: Callable[[tuple[tf.Tensor, tf.Tensor]], CascadeOutput],
    affine: Affine,
    fixed: tf.Tensor,
    moving: tf.Tensor,
    config: CascadeConfig,
) -> CascadeOutput:
    """Register after an affine map that is known already: the flow of this map becomes one more, first stage.

    Args:
        register: the network, or another function of (fixed, moving) that gives a `CascadeOutput`.
        affine: the map in voxels; it leads from the fixed image to the moving one.
        fixed, moving: float32 [B, X, Y, Z, 1] in 0..1.
        config: the kind of warp.

    Returns:
        `CascadeOutput` of the whole map: `register` saw the image moved by the affine map, but every composed flow
        leads into `moving`, which is interpolated once.
    """
    flow = affine_flow(affine, fixed.shape[1:4])
    stages = [Stage(flow, flow, warp(moving, flow, **config.warping))]
    output = register((fixed, stages[0].warped))
    for stage in output.stages:
        composed = compose_affine(affine, flow, stage.composed_flow)
        stages.append(Stage(stage.flow, composed, warp(moving, composed, **config.warping)))
    linear = affine.matrix + tf.eye(3)
    shift = tf.linalg.matvec(linear, output.affine.shift) + affine.shift
    return CascadeOutput(tuple(stages), Affine(affine.matrix + linear @ output.affine.matrix, shift))


def build_network(config: CascadeConfig, drawn: bool = True) -> RecursiveCascadedNetwork:
    """A `RecursiveCascadedNetwork` with its weights initialised as the original draws them.

    Args:
        config: what it is.
        drawn: where not, most weights have no values yet, as all are to be read from a file.
    """
    network = RecursiveCascadedNetwork(config)
    with contextlib.nullcontext() if drawn else undrawn():
        network.build([(1, *config.image_size, 1)] * 2)
    return network
