"""How a network sees scans: where the axes of its volumes run, what they show, and which grey values become 0 and 255.

This belongs to a data set: its JSON holds it, training copies it into the run's config.json, and the demo prepares raw
scans by it. What is not known is None, and is never guessed.
"""

import dataclasses
from collections.abc import Mapping
from reprlib import repr as short
from typing import Any

from checked import is_finite
from errors import UserError

CROPS = ("liver", "body", "brain", "mask", "none")
ENDS = ("LR", "PA", "SI")  # the two ends of each axis; the first is where LPS runs to


@dataclasses.dataclass(frozen=True)
class View:
    """How volumes are made of scans.

    Attributes:
        orientation: where the axes x, y, z run to in the patient, such as 'LPS' (left, back, head) or 'RPI'.
        crop: what a volume shows, one of `CROPS`: an organ that is found in the scan, 'mask' for what its labels mark,
            or 'none' for the whole scan.
        window: (level, width) of the grey values that are shown.
        percentiles: (low, high) of a scan's own grey values in the crop, which become 0 and 255, in place of a window.
        spacing: mm per voxel along x, y, z; None where a volume spans the crop, whatever that gives.

    Raises:
        UserError: a value is not of its kind.
    """

    orientation: str | None = None
    crop: str | None = None
    window: tuple[float, float] | None = None
    percentiles: tuple[float, float] | None = None
    spacing: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        if self.orientation is not None:
            flipped_axes(self.orientation)
        if self.crop not in (None, *CROPS):
            raise UserError(f"crop is {short(self.crop)}; it must be one of {', '.join(CROPS)}")
        for name, count in (("window", 2), ("percentiles", 2), ("spacing", 3)):
            values = getattr(self, name)
            if values is None:
                continue
            if not _are_numbers(values, count):
                raise UserError(f"{name} is {short(values)}; it must be {'two' if count == 2 else 'three'} numbers")
            object.__setattr__(self, name, tuple(float(value) for value in values))
        if self.window is not None and not self.window[1] > 0:
            raise UserError(f"window is {list(self.window)}; its second number, the width, must be above 0")
        if self.percentiles is not None and not 0 <= self.percentiles[0] < self.percentiles[1] <= 100:
            raise UserError(f"percentiles are {list(self.percentiles)}; give two of 0..100, the lower one first")
        if self.spacing is not None and not min(self.spacing) > 0:
            raise UserError(f"spacing is {list(self.spacing)}; it must be three numbers above 0, in mm")
        if self.window is not None and self.percentiles is not None:
            raise UserError("window and percentiles are both given; leave one of them out")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: Any) -> "View":
        """The view in a mapping read out of the file `source`; keys of other things are passed over.

        Raises:
            UserError: a value is not of its kind; the message begins with the source.
        """
        try:
            return cls(**{name: values[name] for name in KEYS if values.get(name) is not None})
        except UserError as error:
            raise UserError(f"{source}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """What is known, fit for JSON.

        >>> View("RPI", "liver", (120, 290)).to_dict()
        {'orientation': 'RPI', 'crop': 'liver', 'window': [120.0, 290.0]}
        """
        values = {name: getattr(self, name) for name in KEYS}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if v is not None}

    def completed(self, other: "View") -> "View":
        """This view, with what it leaves open taken from another one.

        >>> View("LPS").completed(View("RPI", "brain")).crop
        'brain'
        """
        missing = {name: getattr(other, name) for name in KEYS if getattr(self, name) is None}
        if self.window or self.percentiles:
            missing.update(window=self.window, percentiles=self.percentiles)
        return dataclasses.replace(self, **missing)

    def differences(self, other: "View") -> list[str]:
        """What both views know and say differently, as texts "orientation LPS, not RPI"."""
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in KEYS}
        return [f"{k} {a}, not {b}" for k, (a, b) in pairs.items() if None not in (a, b) and a != b]


KEYS = tuple(field.name for field in dataclasses.fields(View))


def flipped_axes(orientation: str) -> list[int]:
    """Axes of LPS that run the other way in an orientation.

    >>> flipped_axes("RPI")
    [0, 2]

    Raises:
        UserError: it is not three letters, L or R, P or A, S or I.
    """
    known = isinstance(orientation, str) and len(orientation) == 3
    if not (known and all(letter in ends for letter, ends in zip(orientation, ENDS, strict=True))):
        raise UserError(f"orientation {short(orientation)} is not L or R, P or A, S or I; write for example LPS or RPI")
    return [axis for axis in range(3) if orientation[axis] == ENDS[axis][1]]


def _are_numbers(values: Any, count: int) -> bool:
    return isinstance(values, (list, tuple)) and len(values) == count and all(map(is_finite, values))


# What a scan can be prepared as where no data set says it: name -> view.
PRESETS = {
    "liver": View(crop="liver", window=(120, 290)),
    "body": View(crop="body", window=(40, 400)),
    "brain": View(crop="brain", percentiles=(1, 99)),
    "none": View(crop="none"),
}
