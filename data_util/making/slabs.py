"""CTs with a liver, cut to the slab that all of them show."""

from pathlib import Path

import numpy as np
import SimpleITK as sitk

from data_util.scans.images import match_labels, read_image, to_array
from errors import UserError

LIVER = 5  # the label's value in label images of totalsegmentator


def read_ct(image_path: Path, labels_path: Path) -> tuple[sitk.Image, np.ndarray]:
    """Read a CT and its liver on the CT's grid: (SimpleITK image in HU, bool [x, y, z]), in LPS.

    Raises:
        UserError: one cannot be read, or no voxel is liver.
    """
    image = read_image(image_path)
    liver = to_array(match_labels(read_image(labels_path), image)) == LIVER
    if not liver.any():
        raise UserError(f"{labels_path}: no voxel has the liver's value {LIVER} where {image_path} lies")
    return image, liver


def common_slab(cts: list[tuple[sitk.Image, np.ndarray]]) -> list[tuple[sitk.Image, np.ndarray]]:
    """Cut each CT along z to the length of liver that all of them show, taken from the liver's upper end downwards.

    List of (image, liver) as of `read_ct` -> the same list, cut.
    """
    rows = [np.flatnonzero(liver.any(axis=(0, 1))) for _, liver in cts]
    length = min((z[-1] - z[0] + 1) * image.GetSpacing()[2] for z, (image, _) in zip(rows, cts, strict=True))
    cut = []
    for z, (image, liver) in zip(rows, cts, strict=True):
        top = int(z[-1]) + 1
        first = top - max(2, round(length / image.GetSpacing()[2]))
        cut.append((image[:, :, first:top], liver[..., first:top]))
    return cut
