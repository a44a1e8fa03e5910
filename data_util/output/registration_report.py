"""What the report of a registration says of the two scans, and what may be wrong with the result."""

from collections.abc import Collection
from typing import Any

import numpy as np
import SimpleITK as sitk

from data_util.scans.dicom import MODALITY
from data_util.scans.prepared import PreparedScan

MUCH_FOLDING = 0.05  # share of the voxels
MUCH_INEXACT = 0.001  # share of the places at which the inverse is more than 1 mm off
LOST_CORRELATION = 0.01
LEAST_LOCAL_CORRELATION = 0.3
SAME_CONTRAST = ("ncc", "lncc")  # similarities that ask for the same structures to be bright in both scans
MUCH_TURNED, MUCH_SHIFTED = 10, 15  # degrees and mm that are left over after registration


def degrees(angle: float) -> str:
    """An angle in words.

    >>> degrees(0.8), degrees(20)
    ('1 degree', '20 degrees')
    """
    return f"{angle:.0f} degree{'' if f'{angle:.0f}' == '1' else 's'}"


def describe(scan: PreparedScan) -> dict[str, Any]:
    """A scan and its frame, as report.json tells them."""
    frame = scan.frame
    region = None if scan.region is None else round(float(scan.region.sum() * np.prod(scan.image.GetSpacing()) / 1000))
    return {
        "size": scan.image.GetSize(),
        "spacing": scan.image.GetSpacing(),
        "region_ml": region,
        "frame": {name: getattr(frame, name) for name in ("size", "spacing", "origin", "direction")},
    }


def doubts(
    fixed: PreparedScan,
    moving: PreparedScan,
    measured: dict[str, Any],
    left_over: tuple[float, float] | None,
    similarities: Collection[str],
) -> list[str]:
    """Say what may be wrong with a registration, about the regions, the modalities and the result.

    Args:
        fixed, moving: the scans.
        measured: `similarity` and `folding`, before registration and after each stage, and `quality`.
        left_over: degrees and mm that the result is turned and shifted by, or None where that was not looked at.
        similarities: what the scans were compared by: names of `SAME_CONTRAST`, or one for two contrasts among them.

    Returns:
        Sentences, none where nothing is unusual.
    """
    found = [f"{role}: {doubt}" for role, scan in (("fixed", fixed), ("moving", moving)) for doubt in scan.doubts]
    grey = [sitk.GetArrayViewFromImage(scan.image) for scan in (fixed, moving)]
    if np.array_equal(*grey):
        found.append("the two scans have the same grey values in every voxel; was one scan named twice?")
    modalities = [scan.image.GetMetaData(MODALITY) for scan in (fixed, moving) if scan.image.HasMetaDataKey(MODALITY)]
    same_contrast = set(similarities) <= set(SAME_CONTRAST)
    if len(set(modalities)) > 1 and same_contrast:
        found.append(
            f"fixed is {modalities[0]} and moving {modalities[1]}: networks compare scans of one modality, and "
            "refinement needs --net_args \"similarity='mi'\""
        )
    before, after = measured["similarity"][0], measured["similarity"][-1]
    if same_contrast and after < before - LOST_CORRELATION:
        found.append(f"the result is worse than the start: the correlation fell from {before:.3f} to {after:.3f}")
    local = measured["quality"]["local_correlation"]["after"]
    if same_contrast and local is not None and local < LEAST_LOCAL_CORRELATION:
        found.append(
            f"the scans are hardly alike after registration: the mean correlation around a voxel is {local:.2f}; do "
            "they show the same body part, in one modality?"
        )
    if measured["folding"][-1] > MUCH_FOLDING:
        found.append(f"the flow folds at {100 * measured['folding'][-1]:.1f} % of the voxels")
    if left_over is not None and (left_over[0] > MUCH_TURNED or left_over[1] > MUCH_SHIFTED):
        found.append(
            f"a turn of {degrees(left_over[0])} and a shift of {left_over[1]:.0f} mm are left over between the two "
            "scans; find them first with --affine rigid"
        )
    return found


def doubts_about_inverse(error: np.ndarray) -> list[str]:
    """Say where the inverse of a transform is not to be trusted.

    Args:
        error: how far places are from where they were after the transform and its inverse, [n] in mm.

    Returns:
        A sentence, or none where it is exact to 1 mm nearly everywhere.
    """
    share = np.mean(error > 1)
    if share <= MUCH_INEXACT:
        return []
    return [
        f"inverse.h5 is more than 1 mm off at {100 * share:.1f} % of the places, at most {error.max():.0f} mm: where "
        "the flow folds or nearly does, it has no inverse"
    ]
