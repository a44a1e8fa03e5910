"""What a model is: one frozen dataclass, checked when built, saved beside the weights.

Imports no TensorFlow, so that a mistake in an option is reported at once.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from cli import parse_assignments
from errors import UserError, shortened

from .registry import (
    AUGMENTATIONS,
    BASE_NETWORKS,
    SIMILARITIES,
    Option,
    augmentations,
    is_whole_number,
    number,
    one_of,
    similarity_terms,
    whole_number,
)

_SWITCH = (True, False)
_MOST_CASCADES = 100  # making the graph of more takes hours
_MOST_VOXELS = 4096  # along an axis

# The options of every model: name -> default, and what is allowed. What a base network and a similarity take beside
# these is in their rows (`registry`).
_OPTIONS: dict[str, Option] = {
    "n_cascades": whole_number(1, minimum=0, maximum=_MOST_CASCADES),
    "rep": whole_number(1, maximum=_MOST_CASCADES),
    "det_factor": number(0.1),
    "ortho_factor": number(0.1),
    "reg_factor": number(1.0),
    "bending_factor": number(0.0),
    "dice_factor": number(0.0),
    "landmark_factor": number(0.0),
    "similarity_on": one_of("last", ("last", "all")),
    "similarity_mask": one_of(None, (None, "inside", "scan", "both")),
    "inverse_factor": number(0.0),
    "flow": one_of("displacement", ("displacement", "velocity")),
    "warp_gradient": one_of(True, _SWITCH),
    "warp_padding": one_of(False, _SWITCH),
    "fast_reconstruction": one_of(True, _SWITCH),
    "affine_channels": whole_number(16),
    "precision": one_of("float32", ("float32", "mixed_bfloat16", "mixed_float16")),
    "rematerialize": one_of(False, _SWITCH),
}

# The options that say how a model computes, and change nothing in what it is.
EXECUTION = ("fast_reconstruction", "precision", "rematerialize")

# The options that --net_args may set, as users of the original know them; and those of the base network and similarity.
NET_ARGS = (
    "det_factor",
    "ortho_factor",
    "reg_factor",
    "bending_factor",
    "dice_factor",
    "landmark_factor",
    "similarity",
    "similarity_on",
    "similarity_mask",
    "inverse_factor",
    "flow",
    "warp_gradient",
    "warp_padding",
    "affine_channels",
    "augmentation",
)


@dataclasses.dataclass(frozen=True, init=False)
class CascadeConfig:
    """Architecture and training options of a recursive cascaded network.

    Attributes:
        base_network: name in `registry.BASE_NETWORKS`, the network of every deformable cascade.
        n_cascades: number of deformable cascades; 0 is the affine cascade alone.
        rep: how often each deformable cascade is applied, one time after the other with the same weights.
        image_size: (X, Y, Z) in voxels.
        det_factor: weight of the affine cascade's loss of determinant.
        ortho_factor: weight of the affine cascade's loss of orthogonality.
        reg_factor: weight of the smoothness term of every deformable cascade: of its flow, or of its velocity.
        bending_factor: weight of the bending energy of the same.
        dice_factor: weight of the soft Dice of the labels in training, which then reads segmentations (`supervision`).
        landmark_factor: weight of the mean distance of the landmarks in training, in voxels.
        similarity: what the training loss measures on the warped image: a name in `registry.SIMILARITIES`, or a
            weighted sum of several, such as 'ncc+0.5*mind'. Built in are 'ncc' (Pearson correlation, the original's),
            'lncc' (local correlation), and for two modalities 'mi' (mutual information) and 'mind'.
        similarity_on: which warped images are measured: the 'last' cascade's, or those of 'all', the affine one's too.
        similarity_mask: which voxels it looks at (`masks.compared_voxels`): None for all; those whose place is 'inside'
            the moving volume; by each scan's mask, with 'scan'; or 'both'.
        inverse_factor: weight of the inverse consistency. Where it is not 0, every pair is registered both ways, and
            the loss is the mean of both.
        flow: what a base network gives: a 'displacement', the flow itself, or a 'velocity', along which the flow is one
            unit of time (`velocities.integrate`), which hardly folds and has an inverse.
        warp_gradient: whether a cascade's gradient flows back through the image it was given.
        warp_padding: whether warping sees one voxel of zeros around the image instead of a repeated edge.
        affine_channels: of the affine cascade's first layer; the published 16 are 14 million weights.
        augmentation: in training. None or 'bspline': a random deformation of the moving image; 'affine': a random
            affine map of each image; 'contrast': grey values of each image changed at random; several joined by +;
            'identity': none at all.
        fast_reconstruction: whether warps run as compiled kernels that recompute in the backward pass.
        precision: what the convolutions compute in, but for the one that gives a flow; all else is float32.
        rematerialize: whether the backward pass computes a cascade's activations again instead of keeping them.
        options: the options that the base network, the similarity and the augmentation declare, such as `channels`,
            with their values.

    Raises:
        UserError: an option is unknown or has a value outside its range.

    >>> CascadeConfig("VTN", n_cascades=2, channels=8).options
    {'channels': 8, 'leaky_slope': 0.1}
    """

    base_network: str
    n_cascades: int
    rep: int
    image_size: tuple[int, int, int]
    det_factor: float
    ortho_factor: float
    reg_factor: float
    bending_factor: float
    dice_factor: float
    landmark_factor: float
    similarity: str
    similarity_on: str
    similarity_mask: str | None
    inverse_factor: float
    flow: str
    warp_gradient: bool
    warp_padding: bool
    affine_channels: int
    augmentation: str | None
    fast_reconstruction: bool
    precision: str
    rematerialize: bool
    declared: tuple[tuple[str, Any], ...]

    def __init__(
        self,
        /,
        base_network: str = "VTN",
        n_cascades: int = 1,
        rep: int = 1,
        image_size: tuple[int, int, int] = (128, 128, 128),
        *,
        similarity: str = "ncc",
        augmentation: str | None = None,
        **options: Any,
    ) -> None:
        values = {**options, "n_cascades": n_cascades, "rep": rep}
        declared = declared_options(base_network, similarity, augmentation)
        unknown = [name for name in options if name not in _OPTIONS and name not in declared]
        if unknown:
            known = ", ".join([*_known_names(), *declared])
            raise UserError(f"unknown option {unknown[0]!r}; known are {known}")
        fields = {name: option.checked(name, values.get(name, option.default)) for name, option in _OPTIONS.items()}
        fields |= {"base_network": base_network, "similarity": similarity, "image_size": _image_size(image_size)}
        fields["augmentation"] = augmentation
        fields["declared"] = tuple(
            (name, _frozen(option.checked(name, _frozen(values.get(name, option.default)))))
            for name, option in declared.items()
        )
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        # An option of the base network or the similarity reads like any other: `config.channels`.
        try:
            return dict(self.__dict__["declared"])[name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no option {name!r}") from None

    @property
    def options(self) -> dict[str, Any]:
        """The options that the base network, the similarity and the augmentation declare, with their values."""
        return dict(self.declared)

    @property
    def base_network_options(self) -> dict[str, Any]:
        """The keywords of the base network."""
        return {name: self.options[name] for name in BASE_NETWORKS.find(self.base_network).options}

    @property
    def similarities(self) -> list[str]:
        """Name of the similarity, or of each in the sum."""
        return [name for _, name in similarity_terms(self.similarity)]

    @property
    def similarity_options(self) -> dict[str, Any]:
        """The keywords of the similarity, or of all in the sum."""
        return {name: self.options[name] for each in self.similarities for name in SIMILARITIES.find(each).options}

    @property
    def augmentation_options(self) -> dict[str, dict[str, Any]]:
        """The augmentations of training, each with its keywords."""
        return {
            name: {option: self.options[option] for option in AUGMENTATIONS[name]}
            for name in augmentations(self.augmentation)
        }

    @property
    def affine_slope(self) -> float:
        """Slope of the leaky ReLU of the affine cascade: that of the base network, or 0.1 where it has none."""
        return self.options.get("leaky_slope", 0.1)

    @property
    def flow_multiplier(self) -> float:
        """Factor on every deformable cascade's flow: 1 / n_cascades, whatever `rep` is."""
        return 1.0 / max(self.n_cascades, 1)

    @property
    def warping(self) -> dict[str, bool]:
        """Options of `spatial_transformer.warp` and `compose`."""
        return {"padding": self.warp_padding, "fast": self.fast_reconstruction}

    @property
    def last_stage(self) -> int:
        """Number of the last stage; stage 0 is the affine cascade, and every repeat of a cascade makes one."""
        return self.n_cascades * self.rep

    @property
    def similarity_stages(self) -> list[int]:
        """Stages whose warped image enters the loss: every repeat of the last cascade, or all stages."""
        first = 0 if self.n_cascades == 0 or self.similarity_on == "all" else self.last_stage - self.rep + 1
        return list(range(first, self.last_stage + 1))

    def replace(self, **changes: Any) -> "CascadeConfig":
        """Copy with some options changed; checks again.

        Options of the base network, the similarity or the augmentation that another one, chosen here, does not have are
        dropped.
        """
        chosen = {**self.to_dict(), **changes}
        declared = declared_options(chosen["base_network"], chosen["similarity"], chosen["augmentation"])
        dropped = set(self.options) - set(declared) - set(changes)
        return CascadeConfig(**{name: value for name, value in chosen.items() if name not in dropped})

    def with_net_args(self, text: str | None) -> "CascadeConfig":
        """Copy with the options of a `--net_args` string.

        Raises:
            UserError: malformed text, an unknown key or a value outside its range.

        >>> CascadeConfig().with_net_args("channels=8, similarity='mi'").similarity
        'mi'
        """

        def allowed(values: Mapping[str, Any]) -> list[str]:
            chosen = (values.get(name, getattr(self, name)) for name in ("similarity", "augmentation"))
            return [*NET_ARGS, *declared_options(self.base_network, *chosen)]

        return self.replace(**parse_assignments(text, allowed, "--net_args"))

    @property
    def net_args(self) -> str:
        """The text of `--net_args` that makes this config out of the defaults.

        >>> CascadeConfig(channels=8, reg_factor=0.5).net_args
        'reg_factor=0.5, channels=8'
        """
        values = {name: getattr(self, name) for name in NET_ARGS} | self.options
        chosen = {name: getattr(self, name) for name in ("similarity", "augmentation")}
        default, plain = CascadeConfig(self.base_network, **chosen), CascadeConfig(self.base_network)
        changed = [name for name in values if values[name] != getattr(plain if name in chosen else default, name)]
        return ", ".join(f"{name}={values[name]!r}" for name in changed)

    def executed(self, **execution: Any) -> "CascadeConfig":
        """Copy that computes as the options of `EXECUTION` say, or else by their defaults."""
        return self.replace(**{name: execution.pop(name, _OPTIONS[name].default) for name in EXECUTION}, **execution)

    def to_dict(self) -> dict[str, Any]:
        """All options, fit for JSON."""
        fields = {name: getattr(self, name) for name in _known_names()}
        return json.loads(json.dumps({**fields, **self.options}))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: Any) -> "CascadeConfig":
        """Config from a mapping read out of the file `source`.

        Raises:
            UserError: an unknown key, or a value outside its range.
        """
        try:
            return cls(**values)
        except UserError as error:
            raise UserError(f"{source}: {error}") from error
        except RecursionError:
            raise UserError(f"{source}: a value is nested too deeply; restore the file from its source") from None


def declared_options(base_network: str, similarity: str, augmentation: str | None) -> dict[str, Option]:
    """The options that a base network, a similarity, or several in a sum, and the augmentations declare.

    Raises:
        UserError: one of them is unknown, or an option's name means something else already.
    """
    found: dict[str, Option] = {}
    rows = [(f"augmentation {name!r}", AUGMENTATIONS[name]) for name in augmentations(augmentation)]
    for table, names in ((BASE_NETWORKS, [base_network]), (SIMILARITIES, [n for _, n in similarity_terms(similarity)])):
        rows += [(f"{table.kind} {name!r}", table.find(name).options) for name in names]
    for who, options in rows:
        for option, row in options.items():
            if option in found or option in _known_names():
                raise UserError(f"{who} declares the option {option!r}, a name that is taken: rename it")
            found[option] = row
    return found


def _known_names() -> list[str]:
    return ["base_network", "n_cascades", "rep", "image_size", "similarity", "augmentation", *list(_OPTIONS)[2:]]


def _image_size(size: Any) -> tuple[int, int, int]:
    allowed = (
        isinstance(size, (tuple, list)) and len(size) == 3 and all(is_whole_number(n, 2, _MOST_VOXELS) for n in size)
    )
    if not allowed:
        raise UserError(
            f"image_size is {shortened(repr(size))}; it must be three whole numbers from 2 to {_MOST_VOXELS}"
        )
    return tuple(size)


def _frozen(value: Any) -> Any:
    """A list, as JSON gives it, as a tuple, which can be hashed."""
    return tuple(map(_frozen, value)) if isinstance(value, (tuple, list)) else value
