"""What a model is: one frozen dataclass, checked when built, saved beside the weights.

Imports no TensorFlow, so that a mistake in an option is reported at once.
"""

import dataclasses
import math

from cli import parse_assignments
from errors import UserError

BASE_NETWORK_NAMES = ("VTN", "VoxelMorph")
AUGMENTATIONS = (None, "identity")
PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")
SIMILARITY_NAMES = ("ncc", "lncc", "mi")

# How a model computes, which changes nothing in what it is: option -> default.
EXECUTION = {"fast_reconstruction": True, "precision": "float32", "rematerialize": False}

# The options that --net_args may set, as users of the original know them.
NET_ARGS = (
    "det_factor",
    "ortho_factor",
    "reg_factor",
    "similarity",
    "warp_gradient",
    "warp_padding",
    "channels",
    "leaky_slope",
    "augmentation",
)


@dataclasses.dataclass(frozen=True)
class CascadeConfig:
    """Architecture and training options of a recursive cascaded network.

    Attributes:
        base_network: 'VTN' or 'VoxelMorph', the network of every deformable cascade.
        n_cascades: number of deformable cascades; 0 is the affine cascade alone.
        rep: how often each deformable cascade is applied in a row with the same weights.
        image_size: (X, Y, Z) in voxels.
        det_factor, ortho_factor: weights of the affine cascade's two regularisation terms.
        reg_factor: weight of the smoothness term of every deformable cascade.
        similarity: 'ncc' (Pearson correlation, the original's), 'lncc' (local correlation) or 'mi' (mutual
            information, for two modalities): what the training loss measures on the warped image.
        warp_gradient: whether a cascade's gradient flows back through the image it was given.
        warp_padding: whether warping sees one voxel of zeros around the image instead of a repeated edge.
        channels: channels of the base network's first convolution (the affine cascade always has 16).
        leaky_slope: slope of the leaky ReLU below zero.
        augmentation: None (random deformation of the moving image in training) or 'identity' (none).
        fast_reconstruction: whether warps run as compiled kernels that recompute in the backward pass.
        precision: what the convolutions compute in, but for the one that gives a flow; all else is float32.
        rematerialize: whether the backward pass computes a cascade's activations again instead of keeping them.

    Raises:
        UserError: an option has a value outside its range.
    """

    base_network: str = "VTN"
    n_cascades: int = 1
    rep: int = 1
    image_size: tuple = (128, 128, 128)
    det_factor: float = 0.1
    ortho_factor: float = 0.1
    reg_factor: float = 1.0
    similarity: str = "ncc"
    warp_gradient: bool = True
    warp_padding: bool = False
    channels: int = 16
    leaky_slope: float = 0.1
    augmentation: str | None = None
    fast_reconstruction: bool = True
    precision: str = "float32"
    rematerialize: bool = False

    def __post_init__(self):
        _check(isinstance(self.image_size, (tuple, list)), "image_size", self.image_size, "three whole numbers from 2")
        object.__setattr__(self, "image_size", tuple(self.image_size))
        _check(self.base_network in BASE_NETWORK_NAMES, "base_network", self.base_network, BASE_NETWORK_NAMES)
        _check(_is_int(self.n_cascades, 0), "n_cascades", self.n_cascades, "a whole number from 0")
        _check(_is_int(self.rep, 1), "rep", self.rep, "a whole number from 1")
        size_ok = len(self.image_size) == 3 and all(_is_int(n, 2) for n in self.image_size)
        _check(size_ok, "image_size", self.image_size, "three whole numbers from 2")
        for name in ("det_factor", "ortho_factor", "reg_factor", "leaky_slope"):
            value = getattr(self, name)
            _check(_is_number(value) and value >= 0, name, value, "a number from 0")
        _check(self.similarity in SIMILARITY_NAMES, "similarity", self.similarity, SIMILARITY_NAMES)
        for name in ("warp_gradient", "warp_padding", "fast_reconstruction", "rematerialize"):
            _check(isinstance(getattr(self, name), bool), name, getattr(self, name), (True, False))
        _check(_is_int(self.channels, 1), "channels", self.channels, "a whole number from 1")
        _check(self.precision in PRECISIONS, "precision", self.precision, PRECISIONS)
        _check(self.augmentation in AUGMENTATIONS, "augmentation", self.augmentation, AUGMENTATIONS)

    @property
    def flow_multiplier(self):
        """Factor on every deformable cascade's flow: 1 / n_cascades, whatever `rep` is."""
        return 1.0 / max(self.n_cascades, 1)

    @property
    def warping(self):
        """Options of `spatial_transformer.warp` and `compose`."""
        return {"padding": self.warp_padding, "fast": self.fast_reconstruction}

    @property
    def last_stage(self):
        """Number of the last stage; stage 0 is the affine cascade, and every repeat of a cascade makes one."""
        return self.n_cascades * self.rep

    @property
    def similarity_stages(self):
        """Stages whose warped image enters the loss: every repeat of the last cascade."""
        first = self.last_stage - self.rep + 1
        return [0] if self.n_cascades == 0 else list(range(first, self.last_stage + 1))

    def replace(self, **changes):
        """Copy with some options changed; checks again."""
        return dataclasses.replace(self, **changes)

    def with_net_args(self, text):
        """Copy with the options of a `--net_args` string.

        Raises:
            UserError: malformed text, an unknown key or a value outside its range.
        """
        return self.replace(**parse_assignments(text, NET_ARGS, "--net_args"))

    def executed(self, **execution):
        """Copy that computes as the options of `EXECUTION` say, or else by their defaults."""
        return self.replace(**{**EXECUTION, **execution})

    def to_dict(self):
        """All options, fit for JSON."""
        return {**dataclasses.asdict(self), "image_size": list(self.image_size)}

    @classmethod
    def from_dict(cls, values, source):
        """Config from a mapping read out of the file `source`.

        Raises:
            UserError: an unknown key, or a value outside its range.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise UserError(f"{source}: unknown option {unknown[0]!r}; known are {', '.join(known)}")
        return cls(**values)


def _is_int(value, minimum):
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check(condition, name, value, allowed):
    if not condition:
        allowed = allowed if isinstance(allowed, str) else "one of " + ", ".join(str(a) for a in allowed)
        raise UserError(f"{name} is {value!r}; it must be {allowed}")
