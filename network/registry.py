"""The tables of what is chosen by name: base networks, similarities and metrics, one row for each.

A row names its function or class, which is imported when it is first used: this module imports no TensorFlow, so that
`--help` and a mistake in a flag are quick. An extension is one definition and one row here, or in a file of one's own
that `--plugin` imports (docs/extending.md).
"""

import dataclasses
import importlib
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar

from checked import MOST, is_finite
from errors import UserError, shortened


@dataclasses.dataclass(frozen=True)
class Option:
    """An option of a base network or a similarity, which `--net_args` takes and the run keeps.

    Attributes:
        default: the value where none is given: a number, a word, True, False, None, or a tuple of these.
        check: function of a value that tells whether it is allowed.
        allowed: what is allowed, in words that continue "it must be".
    """

    default: Any
    check: Callable[[Any], bool]
    allowed: str

    def checked(self, name: str, value: Any) -> Any:
        """The value, if it is allowed.

        Raises:
            UserError: it is not.
        """
        if not self.check(value):
            raise UserError(f"{name} is {shortened(repr(value))}; it must be {self.allowed}")
        return value


def whole_number(default: int, minimum: int = 1, maximum: int = MOST) -> Option:
    """Option whose value is a whole number from `minimum` to `maximum`.

    >>> whole_number(16).checked("channels", 8)
    8
    """
    allowed = f"a whole number from {minimum}" + (f" to {maximum}" if maximum < MOST else "")
    return Option(default, lambda value: is_whole_number(value, minimum, maximum), allowed)


def number(default: float, minimum: float = 0, maximum: float = math.inf) -> Option:
    """Option whose value is a finite number from `minimum` to `maximum`."""
    allowed = f"a number from {minimum}" + (f" to {maximum}" if maximum < math.inf else "")
    return Option(default, lambda value: is_finite(value) and minimum <= value <= maximum, allowed)


def one_of(default: Any, values: Iterable[Any]) -> Option:
    """Option whose value is one of some values, of the same type (1 is not True)."""
    values = tuple(values)
    allowed = [(type(value), value) for value in values]
    return Option(default, lambda v: (type(v), v) in allowed, "one of " + ", ".join(map(str, values)))


def is_whole_number(value: Any, minimum: int, maximum: int = MOST) -> bool:
    """Whether a value is an int (not a bool) from `minimum` to `maximum`."""
    return isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= maximum


@dataclasses.dataclass(frozen=True)
class Extension:
    """Row of a base network or a similarity.

    Attributes:
        target: the class or function, or where it is, such as "network.losses:correlation_loss".
        options: its options by name; each is passed to it as a keyword.
    """

    target: str | Callable[..., Any]
    options: Mapping[str, Option] = dataclasses.field(default_factory=dict)

    def load(self) -> Callable[..., Any]:
        """The class or function itself, imported now if it is not yet."""
        return resolve(self.target)


@dataclasses.dataclass(frozen=True)
class Value:
    """A value that a metric gives for every pair.

    Attributes:
        unit: 'voxel', 'mm', '' for a number without a unit, ...
        per: 'pair', 'label' or 'landmark': what it is measured on; one number for each.
        better: 'higher' or 'lower' where that means a better registration, else None. A value of a graph metric that
            has it is also measured before registration, and eval.py says where it got worse.
    """

    unit: str = ""
    per: str = "pair"
    better: str | None = None


@dataclasses.dataclass(frozen=True)
class Metric:
    """Row of a metric.

    Attributes:
        target: the function, or where it is. In the graph, it takes a `network.scene.Scene` and returns a dict
            name -> float32 tensor [B], or [B, number of labels or landmarks]; in NumPy, a `network.scene.PairScene`,
            and the dict has a number, or an array [number of labels or landmarks]. NaN means 'not measured'.
        values: the names of the values that it gives, and what each is.
        where: 'graph' (a function of TensorFlow, computed with the network) or 'numpy' (afterwards, on the CPU).
        default: whether it is measured where no metrics are asked for.
        needs: the images out of `IMAGES` that a NumPy metric looks at.
        member: what both scans of a pair must have, beside their volumes, for it to be measured: 'seg', 'points'
            or None.
    """

    target: str | Callable[..., Any]
    values: Mapping[str, Value]
    where: str = "graph"
    default: bool = True
    needs: tuple[str, ...] = ()
    member: str | None = None

    def load(self) -> Callable[..., Any]:
        """The function itself, imported now if it is not yet."""
        return resolve(self.target)


@dataclasses.dataclass(frozen=True)
class Image:
    """Row of an image that an evaluation can give with each pair: an attribute of `network.scene.Scene`.

    Attributes:
        kind: 'grey' (0..1), 'labels' (int32, -1 everywhere where the scan has no segmentation), 'flow' (voxels) or
            'scalar' (any number).
        side: 'fixed' or 'moving': the scan on whose grid it lies.
        item: the name under which `--save` offers it; several images may share one.
        of_stage: whether it depends on the flow, and so differs from cascade to cascade.
    """

    kind: str
    side: str
    item: str
    of_stage: bool = False


def resolve(target: str | Callable[..., Any]) -> Callable[..., Any]:
    """What a row's target means: itself, or what "module:name" names.

    >>> resolve("math:sqrt")(9)
    3.0
    """
    if not isinstance(target, str):
        return target
    module, _, name = target.partition(":")
    if module not in sys.modules:
        importlib.import_module(module)
    return getattr(sys.modules[module], name)


Row = TypeVar("Row")


class Table(dict[str, Row], Generic[Row]):
    """Rows by name, each name once. `table[name] = row` adds one; `table.find(name)` is the row that a user names.

    Args:
        kind: what the rows are, for messages: 'base_network'.
        rows: those that are built in.
    """

    def __init__(self, kind: str, rows: Mapping[str, Row]) -> None:
        super().__init__(rows)
        self.kind = kind

    def __setitem__(self, name: str, row: Row) -> None:
        if name in self:
            raise UserError(f"{self.kind} {name!r} is registered already; give yours another name")
        super().__setitem__(name, row)

    def find(self, name: Any) -> Row:
        """The row of a name.

        Raises:
            UserError: there is none; the message lists those that are known.
        """
        if not isinstance(name, str) or name not in self:
            known = ", ".join(self)
            raise UserError(
                f"{self.kind} is {shortened(repr(name))}; it must be one of {known}, or one that --plugin registers"
            )
        return self[name]


_WINDOW = Option(
    9, lambda value: is_whole_number(value, 3, 255) and value % 2 == 1, "an odd whole number from 3 to 255"
)
_CONVOLUTIONAL = {"channels": whole_number(16, maximum=1024), "leaky_slope": number(0.1)}

# Class of a Keras layer ([fixed, moving] -> flow) with the keywords `flow_multiplier` and its options.
BASE_NETWORKS: Table[Extension] = Table(
    "base_network",
    {
        "VTN": Extension("network.base_networks:VTN", _CONVOLUTIONAL),
        "VoxelMorph": Extension("network.base_networks:VoxelMorph", _CONVOLUTIONAL),
    },
)

# Function (fixed, warped, **options), both images [B, X, Y, Z, 1] in 0..1, giving a loss float32 [B] from 0 (alike) up.
SIMILARITIES: Table[Extension] = Table(
    "similarity",
    {
        "ncc": Extension("network.losses:correlation_loss"),
        "lncc": Extension("network.local_similarity:local_correlation_loss", {"window": _WINDOW}),
        "mi": Extension(
            "network.losses:mutual_information_loss",
            {"bins": whole_number(32, 8, 256), "sampling": whole_number(1, maximum=4096)},
        ),
        "mind": Extension(
            "network.local_similarity:mind_loss", {"radius": whole_number(1), "dilation": whole_number(2)}
        ),
    },
)


def names_in_sum(text: str) -> list[str]:
    """What stands for names of similarities in a text that may be such a sum."""
    return [part.rpartition("*")[2].strip() for part in text.split("+")]


def similarity_terms(text: Any) -> tuple[tuple[float, str], ...]:
    """The similarities that a config names, each with its weight: one name, or a weighted sum of several.

    >>> similarity_terms("ncc + 0.5*mind")
    ((1.0, 'ncc'), (0.5, 'mind'))

    Raises:
        UserError: the text is no such sum, has a weight that is not above 0, or names one twice or that is unknown.
    """
    if not isinstance(text, str) or text in SIMILARITIES:
        SIMILARITIES.find(text)
        return ((1.0, text),)
    terms: list[tuple[float, str]] = []
    for part in text.split("+"):
        factor, star, name = (piece.strip() for piece in part.rpartition("*"))
        weight = _weight(factor) if star else 1.0
        if weight is None or name in [other for _, other in terms]:
            raise UserError(
                f"similarity is {shortened(repr(text))}; it must be a name, or a sum of several with weights above 0, "
                "such as 'ncc+0.5*mind'"
            )
        SIMILARITIES.find(name)
        terms.append((weight, name))
    return tuple(terms)


def _weight(text: str) -> float | None:
    """The number above 0 that a text is, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if is_finite(value) and value > 0 else None


# The augmentations of training, and the options of each (`network.augmentation`, `network.contrast`).
AUGMENTATIONS: dict[str, Mapping[str, Option]] = {
    "bspline": {},
    "affine": {
        "rotation": number(10, maximum=180),
        "scale": number(0.1, maximum=3),
        "shear": number(0.05, maximum=1),
        "shift": number(0.05, maximum=1),
    },
    "contrast": {
        "gamma": number(0.5, maximum=9),
        "blur": number(1.0, maximum=8),
        "bias": number(0.3, maximum=3),
        "noise": number(0.05, maximum=1),
    },
}


def augmentations(text: str | None) -> tuple[str, ...]:
    """The augmentations that a config names, joined by +; None is the original's, 'identity' is none at all.

    >>> augmentations("bspline+contrast")
    ('bspline', 'contrast')

    Raises:
        UserError: the text is no such names, or one is there twice.
    """
    if text is None or text == "identity":
        return () if text else ("bspline",)
    names = [name.strip() for name in text.split("+")] if isinstance(text, str) else []
    if not names or len(set(names)) < len(names) or not set(names) <= set(AUGMENTATIONS):
        raise UserError(
            f"augmentation is {shortened(repr(text))}; it must be one of None, identity, or some of "
            f"{', '.join(AUGMENTATIONS)}, joined by +"
        )
    return tuple(names)


_SCORE = Value(per="label", better="higher")
_VOXELS, _MILLIMETRES = (Value(unit, "label", "lower") for unit in ("voxel", "mm"))

# What eval.py can measure on a pair. docs/metrics.md defines every value.
METRICS: Table[Metric] = Table(
    "metric",
    {
        "overlap": Metric("network.scene:measure_overlap", {"dice": _SCORE, "jaccard": _SCORE}, member="seg"),
        "landmarks": Metric(
            "network.scene:measure_landmarks",
            {
                "landmark_distance": Value("voxel", "landmark", "lower"),
                "landmark_distance_mm": Value("mm", "landmark", "lower"),
            },
            member="points",
        ),
        "jacobian": Metric("network.scene:measure_jacobian", {"jacobian_std": Value()}),
        "folding": Metric("network.scene:measure_folding", {"folding": Value()}),
        "sdlogj": Metric("network.scene:measure_sdlogj", {"sdlogj": Value()}),
        "similarity": Metric(
            "network.scene:measure_similarity",
            {"similarity_before": Value(), "similarity": Value(better="higher")},
        ),
        "flow_error": Metric("network.scene:measure_flow_error", {"flow_error": Value("voxel", better="lower")}),
        "surface": Metric(
            "network.scene:measure_surface",
            {
                "hd95": _VOXELS,
                "surface_distance": _VOXELS,
                "hd95_mm": _MILLIMETRES,
                "surface_distance_mm": _MILLIMETRES,
            },
            where="numpy",
            default=False,  # much the slowest
            needs=("fixed_seg", "warped_seg"),
            member="seg",
        ),
    },
)


def default_metrics() -> tuple[str, ...]:
    """The metrics that are measured where none are asked for."""
    return tuple(name for name, row in METRICS.items() if row.default)


# What eval.py can save of a pair.
IMAGES: Table[Image] = Table(
    "image",
    {
        "flow": Image("flow", "fixed", "flow", of_stage=True),
        "warped": Image("grey", "fixed", "warped", of_stage=True),
        "fixed_seg": Image("labels", "fixed", "seg"),
        "moving_seg": Image("labels", "moving", "seg"),
        "warped_seg": Image("labels", "fixed", "seg", of_stage=True),
        "moving": Image("grey", "moving", "moving"),
        "fixed": Image("grey", "fixed", "fixed"),
        "jacobian": Image("scalar", "fixed", "jacobian", of_stage=True),
    },
)


def images_of(items: Iterable[str]) -> tuple[str, ...]:
    """Names of the images that some items of `--save` stand for, each once; a flow brings the image that it warps.

    >>> images_of(["flow", "seg"])
    ('flow', 'moving', 'fixed_seg', 'moving_seg', 'warped_seg')
    """
    found: dict[str, None] = {}
    for item in items:
        found.update(dict.fromkeys(name for name, image in IMAGES.items() if image.item == item))
        if item == "flow":
            found["moving"] = None
    return tuple(found)
