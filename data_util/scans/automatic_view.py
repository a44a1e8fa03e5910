"""How two scans are prepared where neither a run nor the user says it: by their modality, values and size."""

import numpy as np
import SimpleITK as sitk

from data_util.scans.dicom import MODALITY
from data_util.scans.frame import Frame
from data_util.scans.regions import DARKEST, body_mask
from data_util.scans.view import PRESETS, View
from errors import UserError

CT_RANGE = 500  # HU; a CT that shows air and anything else spans more
MOST_HEAD = 8000  # ml; a head with its neck is smaller, a trunk larger


def modality_of(image: sitk.Image) -> str | None:
    """The modality of a scan: what its DICOM header says, or 'CT' where its values are Hounsfield units, or None."""
    if image.HasMetaDataKey(MODALITY):
        return image.GetMetaData(MODALITY)
    values = sitk.GetArrayViewFromImage(image)
    lowest, highest = float(values.min()), float(values.max())
    return "CT" if lowest < DARKEST and highest - lowest > CT_RANGE else None


def automatic_view(fixed: sitk.Image, moving: sitk.Image) -> tuple[View, str]:
    """Choose how to see two scans.

    Two CTs are seen as bodies. Of others, two heads (what is bright has less than 8 litres) are seen as brains, which
    is their uppermost 20 cm between the 1st and 99th percentile of their values. Anything else is seen as a whole,
    between these percentiles or in the window of a body.

    Args:
        fixed, moving: the scans, in LPS.

    Returns:
        The `View`, and a sentence that says what was chosen and why.
    """
    kinds = [modality_of(image) for image in (fixed, moving)]
    named = " and ".join(dict.fromkeys(kind or "scans of no known modality" for kind in kinds))
    volumes = [_bright_volume(image) for image in (fixed, moving)]
    if kinds == ["CT", "CT"] and None not in volumes:
        return PRESETS["body"], "the scans are CT: prepared as bodies (--preprocess)"
    if all(volume is not None and volume < MOST_HEAD for volume in volumes):
        sizes = " and ".join(f"{volume / 1000:.1f}" for volume in volumes if volume is not None)
        return PRESETS["brain"], f"{named}, {sizes} litres: prepared as heads or brains (--preprocess)"
    view = View(crop="none", percentiles=PRESETS["brain"].percentiles)
    if kinds == ["CT", "CT"]:
        view = View(crop="none", window=PRESETS["body"].window)
    return view, f"{named}: prepared as a whole (--preprocess)"


def _bright_volume(image: sitk.Image) -> float | None:
    """Volume in ml of the largest bright region, or None where there is none."""
    try:
        region = body_mask(image)
    except UserError:
        return None
    return float(np.count_nonzero(region) * np.prod(Frame.of(image).spacing) / 1000)
