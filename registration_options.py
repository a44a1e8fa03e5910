"""What can be asked of a registration: the scans to read, and how to register them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from cli import AUTO
from data_util.scans import affine_search
from data_util.scans.view import PRESETS, View
from errors import UserError

if TYPE_CHECKING:
    from network.config import CascadeConfig

AFFINE_KINDS = ("none", *affine_search.KINDS)
GIVEN = "given"  # an initial transform in place of one of these


@dataclass(frozen=True)
class Input:
    """What to read of one scan.

    Attributes:
        scan: DICOM folder or image file (str or Path), or SimpleITK image.
        mask: label image (file or SimpleITK image), the organ where it is not 0; None to find it.
        series: id of a series in the DICOM folder; None for the one with most slices.
    """

    scan: Any
    mask: Any = None
    series: str | None = None


@dataclass(frozen=True)
class Options:
    """How to register.

    Attributes:
        affine: map found by grey values before anything else: 'rigid', 'similarity', 'affine' or 'none'. None is
            'affine' without a network, and 'none' with one, which has an affine cascade of its own.
        initial_transform: a linear map to start from in place of one that is found: transform file or SimpleITK
            transform, from places in the fixed scan to places in the moving one, in mm (LPS).
        rep: how often each deformable cascade is applied, or 'auto': as often as it helps.
        refine: steps of optimisation of the result for this very pair, after the network or without one; 'auto': until
            it no longer improves. None is 'auto' without a network, and 0 with one.
        smoothness: weight of the smoothness in the optimisation: more makes the flow smoother, less lets it follow the
            images more closely. None is the model's `reg_factor`, and 2 without one.
        exclude_mask: label image (file or SimpleITK image) of what is to be left out of the comparison in the fixed
            scan, where it is not 0: a lesion, for instance. Used in the optimisation, as the mask of the fixed `Input`.
        both_ways: optimise the other way round too, and tell how far the two flows are from being each other's inverse;
            without a network only.
        image_size: (X, Y, Z) to work at; None is the run's, or without a run a size that fits the
            fixed scan, by `preprocessing.fitting_size`.
        net_args: options of the network and its loss, as on the command line.
        precision, fast_reconstruction: how to compute, as on the command line.
    """

    affine: str | None = None
    initial_transform: Any = None
    rep: int | str = 1
    refine: int | str | None = None
    smoothness: float | None = None
    exclude_mask: Any = None
    both_ways: bool = False
    image_size: tuple[int, int, int] | None = None
    net_args: str | None = ""
    precision: str = "float32"
    fast_reconstruction: bool = True


def options_of(checkpoint: Any, given: dict[str, Any]) -> Options:
    """The options that are given by name, and the number of steps of refinement where it is not.

    Raises:
        UserError: there is no option of a name.
    """
    known = [field.name for field in fields(Options)]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise UserError(
            f"register() has no option {unknown[0]!r}; known are {', '.join(known)}; a mask and a series "
            "go into Input, what the network sees into view"
        )
    options = Options(**given)
    if options.refine is None:
        return replace(options, refine=AUTO if checkpoint is None else 0)
    return options


def kind_of_map(checkpoint: Any, view: View | str | None, options: Options) -> str:
    """The kind of affine map to find first, `GIVEN` for an initial transform.

    Raises:
        UserError: an option is outside its range, or there is nothing to register with.
    """
    if isinstance(view, str) and view not in PRESETS:
        raise UserError(f"unknown kind of scan {view!r}; known are {', '.join(PRESETS)}")
    if options.affine not in (None, *AFFINE_KINDS):
        raise UserError(f"unknown kind of affine map {options.affine!r}; known are {', '.join(AFFINE_KINDS)}")
    if isinstance(options.refine, int) and options.refine < 0:
        raise UserError(f"{options.refine} steps of refinement; give a whole number from 0, or auto")
    if options.smoothness is not None and not 0 <= options.smoothness < math.inf:
        raise UserError(f"the smoothness is {options.smoothness}; it must be a number from 0")
    for name in ("smoothness", "exclude_mask", "both_ways"):
        if getattr(options, name) not in (None, False) and not options.refine:
            raise UserError(f"{name} is of the optimisation, and there are no steps of it; give some by --refine")
    if options.both_ways and checkpoint is not None:
        raise UserError("both ways are compared without a network only; leave out the checkpoint, or both_ways")
    if options.initial_transform is not None and options.affine is not None:
        raise UserError(f"an initial transform, and an affine map of kind {options.affine!r} to find; give one of them")
    if options.initial_transform is not None:
        return GIVEN
    kind = options.affine or ("none" if checkpoint is not None else "affine")
    if checkpoint is None and not options.refine and kind == "none":
        raise UserError("nothing to register with: give a checkpoint, steps of refinement, or a kind of affine map")
    return kind


def used_without_network(config: CascadeConfig) -> dict[str, Any]:
    """The options of a config that have a part in the optimisation alone."""
    names = ("image_size", "similarity", "reg_factor", "warp_padding", "precision")
    options = config.to_dict()
    return {**{name: options[name] for name in names}, **config.similarity_options}


def check_used(config: CascadeConfig, before: Mapping[str, Any]) -> None:
    """Check that what `net_args` changed has a part without a network; `before`: the options before that.

    Raises:
        UserError: an option has none.
    """
    used = used_without_network(config)
    idle = [name for name, value in config.to_dict().items() if before.get(name, value) != value and name not in used]
    if idle:
        raise UserError(
            f"net_args: {', '.join(idle)} would change nothing without a model (-c); "
            f"without one there are {', '.join(sorted(used.keys() - {'image_size', 'precision'}))}"
        )
