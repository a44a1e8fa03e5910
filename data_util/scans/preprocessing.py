"""From a scan to the volume the network sees: the scan resampled on a frame around an organ, its grey values windowed.

Scans are three-dimensional SimpleITK images in LPS, masks bool [x, y, z] on a scan's grid, volumes uint8 [X, Y, Z].
"""

import numpy as np
import SimpleITK as sitk

from data_util.scans.frame import Frame
from data_util.scans.images import to_array
from data_util.scans.regions import REGIONS, check_hounsfield
from errors import UserError

# What a scan can be prepared as: an organ of `organs.REGIONS`, or the whole of it.
KINDS = (*REGIONS, "none")
WINDOWS = {"liver": (120, 290), "body": (40, 400)}  # level and width in HU
BRAIN_PERCENTILES = (1, 99)


def window(volume, level=120, width=290):
    """Map grey values linearly from level - width/2 .. level + width/2 to 0..255: any numbers -> uint8.

    What lies outside is clipped; fractions are cut off, not rounded. The defaults show a liver in a CT (HU).
    """
    if not width > 0:
        raise UserError(f"window width {width}: it must be above 0")
    lowest = level - width / 2
    return np.clip((np.asarray(volume, dtype=np.float32) - lowest) * (255 / width), 0, 255).astype(np.uint8)


def crop_box(mask, margin=0.1, minimum=5):
    """Return the box (low, high) around a mask's voxels, two int arrays [3], half-open: array[low:high].

    Each side of the bounding box is moved out by `margin` times the box's own length along that axis, by at least
    `minimum` voxels, and no further than the volume. Raises UserError where the mask is empty.
    """
    mask = np.asarray(mask)
    if not mask.any():
        raise UserError(
            "the mask is empty, so there is nothing to crop to; check that it marks the organ with non-zero voxels"
        )
    low, high = np.empty(3, dtype=int), np.empty(3, dtype=int)
    for axis in range(3):
        inside = np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis})))
        first, last = inside[0], inside[-1] + 1
        extra = max(minimum, round(margin * (last - first)))
        low[axis], high[axis] = max(first - extra, 0), min(last + extra, mask.shape[axis])
    return low, high


def crop_frame(image, mask, size, margin=0.1, minimum=5):
    """Frame of `size` voxels over the surroundings of a mask, as `crop_box` gives them.

    Raises UserError for an empty mask, a mask on another grid than the image, and where the box or `size` is a single
    voxel along an axis.
    """
    frame = Frame.of(image)
    if mask.shape != frame.size:
        raise UserError(f"the mask is {mask.shape} and the volume {frame.size}: they must be on the same grid")
    low, high = crop_box(mask, margin, minimum)
    if min(high - low) < 2 or min(size) < 2:
        box = tuple(int(n) for n in high - low)
        raise UserError(f"a crop of {box} voxels to {tuple(size)}: it needs at least 2 along each axis")
    return frame.box(low, high, size)


def find_region(image, kind):
    """Find the organ of a kind of scan: bool [x, y, z] on the scan's grid, or None for 'none', the whole scan.

    Raises UserError for an unknown kind, a liver or body in a scan that is no CT in HU, and where nothing is found.
    """
    _check_kind(kind)
    if kind in WINDOWS:
        check_hounsfield(image)
    return None if kind == "none" else REGIONS[kind](image)


def find_frame(image, kind, size, mask=None):
    """Frame of `size` voxels over what the network is to see of a scan.

    Args:
        image: the scan, in LPS.
        kind: one of KINDS.
        size: (X, Y, Z), voxels of the frame.
        mask: bool [x, y, z] on the scan's grid, the organ; of `find_region` where None.

    Raises UserError as `find_region` and `crop_frame` do.
    """
    region = find_region(image, kind) if mask is None else mask
    return crop_frame(image, np.ones(image.GetSize(), bool) if region is None else region, size)


def prepare(image, frame, kind):
    """Resample a scan on a frame and map its grey values to 0..255: uint8 [X, Y, Z].

    Grey values are interpolated linearly as they are in the scan, and mapped and clipped after. `kind` is one of KINDS
    or a window (level, width). A liver and a body are windowed, a brain between its 1st and 99th percentile in the
    frame; 'none' keeps values that lie in 0..255 and maps the range of others to it.

    Raises UserError for an unknown kind, and where the grey values of a brain or of 'none' are all the same.
    """
    grey = to_array(frame.resample(sitk.Cast(image, sitk.sitkFloat32)))
    if not isinstance(kind, str):
        return window(grey, *kind)
    _check_kind(kind)
    if kind in WINDOWS:
        return window(grey, *WINDOWS[kind])
    low, high = np.percentile(grey, BRAIN_PERCENTILES) if kind == "brain" else (grey.min(), grey.max())
    if kind == "none" and low >= 0 and 1 < high <= 255:
        low, high = 0, 255
    if low == high:
        raise UserError(f"the scan is {low:g} everywhere, so nothing can be seen in it; check the file")
    return window(grey, (low + high) / 2, high - low)


def _check_kind(kind):
    if kind not in KINDS:
        raise UserError(f"unknown kind of scan {kind!r}; known are {', '.join(KINDS)}")
