"""The recursive cascaded network (paper, section 3): each cascade warps the moving image a little further."""

import typing

import keras
import tensorflow as tf

from .affine import Affine, AffineNetwork, affine_flow, compose_affine
from .base_networks import BASE_NETWORKS
from .config import CascadeConfig
from .kernels import fork, rematerialized
from .spatial_transformer import compose, warp


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
    """Result of the whole network: its stages and the affine map of stage 0."""

    stages: tuple
    affine: Affine

    @property
    def flow(self):
        """Composed flow of all cascades, float32 [B, X, Y, Z, 3]."""
        return self.stages[-1].composed_flow

    @property
    def warped(self):
        """Moving image warped by `flow`, float32 [B, X, Y, Z, 1]."""
        return self.stages[-1].warped


@keras.saving.register_keras_serializable("registration")
class RecursiveCascadedNetwork(keras.Model):
    """An affine cascade and `config.n_cascades` deformable cascades: (fixed, moving) -> `CascadeOutput`.

    Both images are float32 [B, X, Y, Z, 1] in 0..1. A cascade sees the fixed image and the moving image warped by the
    composed flow so far. `config.rep` applies each deformable cascade several times in a row, with the same weights.
    """

    def __init__(self, config, **kwargs):
        super().__init__(**kwargs, dtype="float32")
        self.config = config
        self.affine = AffineNetwork(config.leaky_slope, name="affine_stem", dtype=config.precision)
        self.cascades = [
            BASE_NETWORKS[config.base_network](
                channels=config.channels,
                flow_multiplier=config.flow_multiplier,
                leaky_slope=config.leaky_slope,
                name=f"deform_stem_{i}",
                dtype=config.precision,
            )
            for i in range(config.n_cascades)
        ]

    def build(self, input_shape):
        for stem in (self.affine, *self.cascades):
            stem.build(input_shape)

    def call(self, inputs, rep=None):
        """Apply the cascades, each of them `rep` times in a row (`config.rep` where it is None)."""
        fixed, moving = inputs
        options = self.config.warping
        affine = self.affine([fixed, moving])
        at_first, onward, affine = (affine._replace(matrix=matrix) for (matrix,) in fork([affine.matrix], 3))
        shape = tf.shape(fixed)
        flow = affine_flow(at_first, [shape[1], shape[2], shape[3]])
        stages = [Stage(flow, flow, warp(moving, flow, **options))]
        rep = self.config.replace(rep=rep or self.config.rep).rep
        for cascade in self.cascades:
            for weights in fork([variable.value for variable in cascade.variables], rep):
                last = stages[-1]
                seen = last.warped if self.config.warp_gradient else tf.stop_gradient(last.warped)
                flow = self._flow(cascade, weights, fixed, seen)
                if len(stages) == 1:
                    composed = compose_affine(onward, last.composed_flow, flow)
                else:
                    composed = compose(last.composed_flow, flow, **options)
                stages.append(Stage(flow, composed, warp(moving, composed, **options)))
        return CascadeOutput(tuple(stages), affine)

    def _flow(self, cascade, weights, fixed, seen):
        """The flow that a cascade gives with these values of its weights."""

        def flow(seen, fixed, *weights):
            with keras.StatelessScope(state_mapping=list(zip(cascade.variables, weights, strict=True))):
                return tf.cast(cascade([fixed, seen]), tf.float32)

        return (rematerialized(flow) if self.config.rematerialize else flow)(seen, fixed, *weights)

    def named_weights(self):
        """Every weight under its name in the published checkpoints, such as 'gaffdfrm/affine_stem/conv1/W'."""
        names = {}
        for stem in (self.affine, *self.cascades):
            for layer in stem.convolutions:
                prefix = f"gaffdfrm/{stem.name}/{layer.name}"
                names[f"{prefix}/W"] = layer.kernel
                if getattr(layer, "bias", None) is not None:
                    names[f"{prefix}/b"] = layer.bias
        return names

    def get_config(self):
        return {"config": self.config.to_dict(), "name": self.name}

    @classmethod
    def from_config(cls, config):
        return cls(CascadeConfig.from_dict(config["config"], "config"), name=config["name"])


def build_network(config):
    """A `RecursiveCascadedNetwork` with its weights initialised as the original draws them."""
    network = RecursiveCascadedNetwork(config)
    network.build([(1, *config.image_size, 1)] * 2)
    return network
