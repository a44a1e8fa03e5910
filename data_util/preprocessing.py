"""From a CT in Hounsfield units to the volume the network sees: crop to a mask, resize, window. NumPy and SciPy alone.

Arrays are [x, y, z]; points are [n, 3] in voxels of their own array.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from errors import UserError


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


def resize(volume, size, order=1):
    """Resample a volume [X, Y, Z] to `size` voxels; its dtype stays. `order` 1 is linear, 0 nearest (for labels).

    The first and the last voxel's centres stay in the corners, as in scipy.ndimage.zoom: voxel i of n new ones shows
    the place i (N - 1) / (n - 1) of N old ones. Nothing is smoothed before a reduction.
    """
    return ndimage.zoom(volume, np.divide(size, volume.shape), order=order, mode="nearest", grid_mode=False)


@dataclass(frozen=True, eq=False)
class Crop:
    """A scan cropped to a mask and resized.

    volume  uint8 [X, Y, Z], windowed.
    mask    uint8 [X, Y, Z], 0 or 255.
    low     int [3], the first voxel of the scan that is in the crop.
    high    int [3], the first one beyond it.
    """

    volume: np.ndarray
    mask: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @property
    def step(self):
        """Scan voxels from one voxel of the crop to the next, float [3]; times the scan's spacing, the crop's in mm."""
        return (self.high - self.low - 1) / (np.array(self.volume.shape) - 1)

    def to_crop(self, points):
        """Where points of the scan lie in the crop: [n, 3] -> [n, 3], in voxels. Exact inverse of `to_scan`."""
        return (np.asarray(points) - self.low) / self.step

    def to_scan(self, points):
        """Where points of the crop lie in the scan: [n, 3] -> [n, 3], in voxels."""
        return np.asarray(points) * self.step + self.low


def crop_to_mask(volume, mask, size, level=120, width=290, margin=0.1, minimum=5):
    """Crop a CT (HU) and its mask to the mask's surroundings, resize both to `size`, and window the CT: -> Crop.

    In this order, so that the grey values are interpolated before they are clipped; the image linearly, the mask by
    nearest voxel. Raises UserError for an empty mask, a mask of another shape than the volume, and where the crop
    or `size` is a single voxel along an axis.
    """
    if volume.shape != mask.shape:
        raise UserError(f"the mask is {mask.shape} and the volume {volume.shape}: they must be on the same grid")
    low, high = crop_box(mask, margin, minimum)
    if min(high - low) < 2 or min(size) < 2:
        raise UserError(f"a crop of {tuple(high - low)} voxels to {tuple(size)}: it needs at least 2 along each axis")
    box = tuple(map(slice, low, high))
    grey = resize(np.asarray(volume[box], dtype=np.float32), size, order=1)
    inside = resize(np.asarray(mask[box] != 0, dtype=np.uint8), size, order=0)
    return Crop(volume=window(grey, level, width), mask=inside * np.uint8(255), low=low, high=high)
