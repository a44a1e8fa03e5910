"""The labels of a data set: which values of a label image are kept, and under which names."""

from pathlib import Path

import numpy as np
import SimpleITK as sitk

from data_util.scans.frame import Frame
from data_util.scans.images import read_image, read_native, to_array
from errors import UserError, listed

ALL_LABELS = "all"
LARGEST = 65535
ROUNDED = 1e-3  # what a value may differ from a whole number: a resampling writes 1.0000046 for 1

Labels = dict[str, list[int]] | str | None


def read_labels(path: str | Path, wanted: Labels) -> sitk.Image:
    """Read a label image and keep what is wanted of it.

    Args:
        path: label image.
        wanted: name -> values that become one label, the first of them; a single name becomes a mask, 255. 'all':
            values as they are. None: any value above 0 is the mask, and there must be but one.

    Returns:
        Image of uint8 or uint16 in LPS, on the file's grid.

    Raises:
        UserError: it has values that cannot be labels, or none that is wanted, or cannot be read.
    """
    image = read_image(path, is_label=True)
    array = _whole(path, to_array(image))
    values = [int(value) for value in np.unique(array) if value > 0]
    if wanted is None:
        if len(values) > 1:
            raise UserError(
                f"{path}: has the labels {listed(values, 8)}; say which to keep, as --labels liver=5,spleen=1, or "
                f"--labels {ALL_LABELS}"
            )
        wanted = {"mask": values}
    kept = array
    if isinstance(wanted, dict):
        table = np.zeros(LARGEST + 1, np.uint16)
        for merged in wanted.values():
            table[merged] = 255 if len(wanted) == 1 else merged[0]
        kept = table[array]
    if not kept.any():
        raise UserError(f"{path}: has no voxel of the labels wanted; its values are {listed(values, 8) or 'only 0'}")
    return Frame.of(image).put(kept.astype(np.uint8) if kept.max() < 256 else kept)


def read_native_labels(path: str | Path) -> np.ndarray:
    """Read all labels of a label image on its own grid, its axes as they are in its file.

    Returns:
        uint16 [i, j, k].

    Raises:
        UserError: it has values that cannot be labels, or cannot be read.
    """
    return _whole(path, to_array(read_native(path, is_label=True)))


def read_label_image(path: str | Path) -> sitk.Image:
    """Read a label image with all its labels; values that a resampling moved off a whole number are rounded.

    Returns:
        Image of uint16 in LPS.

    Raises:
        UserError: it has values that cannot be labels, or cannot be read.
    """
    image = read_image(path, is_label=True)
    return Frame.of(image).put(_whole(path, to_array(image)))


def _whole(path: str | Path, array: np.ndarray) -> np.ndarray:
    """The values of a label image as uint16, where all are whole numbers or very near to them."""
    values = np.unique(array)
    wrong = values[(np.abs(values - np.rint(values)) > ROUNDED) | (values < -ROUNDED) | (values > LARGEST + ROUNDED)]
    if len(wrong):
        raise UserError(
            f"{path}: has the value {wrong[0].item()!r}, and labels are whole numbers from 0 to {LARGEST}; give the "
            "label image as it was before it was resampled or scaled"
        )
    return np.rint(array).astype(np.uint16)


def label_table(values: set[int], wanted: Labels) -> dict[str, int]:
    """Names and values of a data set's labels, as its config has them.

    Args:
        values: those in its segmentations.
        wanted: as in `read_labels`.

    Returns:
        Name -> value; empty for a mask.

    Example:
        >>> label_table({0, 1, 5}, {"liver": [5, 6], "spleen": [1]})
        {'liver': 5, 'spleen': 1}
        >>> label_table({0, 1, 5}, "all")
        {'1': 1, '5': 5}
    """
    if wanted == ALL_LABELS:
        return {str(value): value for value in sorted(values) if value > 0}
    if not isinstance(wanted, dict) or len(wanted) == 1:
        return {}
    return {name: merged[0] for name, merged in wanted.items()}
