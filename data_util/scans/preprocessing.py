"""From a scan to the volume that a network sees: cropped, resampled on a frame, its grey values mapped to 0..255.

Scans are three-dimensional SimpleITK images in LPS, masks bool [x, y, z] on a scan's grid, volumes uint8 [X, Y, Z]. The
same functions make the volumes of a data set and those of the demo: a network sees there what it was trained on.
"""

import itertools
import math
from dataclasses import replace

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from data_util.scans.frame import Frame
from data_util.scans.images import to_array
from data_util.scans.regions import REGIONS, check_hounsfield
from data_util.scans.view import View, flipped_axes
from errors import UserError

# Voxels of a volume whose size nothing says: at least and at most, as far as LEAST_SIDE voxels along each axis allow.
FITTING = 128**3, 3_000_000
LEAST_SIDE = 32
IN_HOUNSFIELD = ("liver", "body")  # crops that are found by Hounsfield units
# FWHM of a Gaussian is 2.355 standard deviations.
FWHM = 2 * math.sqrt(2 * math.log(2))


def window(volume: np.ndarray, level: float = 120, width: float = 290) -> np.ndarray:
    """Map grey values linearly from level - width/2 .. level + width/2 to 0..255.

    What lies outside is clipped; fractions are cut off, not rounded. The defaults show a liver in a CT (HU).

    Args:
        volume: any numbers.
        level, width: middle and width of the range that is shown.

    Returns:
        uint8 array of the volume's shape.

    Raises:
        UserError: the width is not above 0.

    Example:
        >>> window(np.array([-1000, 0, 120, 400]))
        array([  0,  21, 127, 255], dtype=uint8)
    """
    if not width > 0:
        raise UserError(f"window width {width}: it must be above 0")
    lowest = level - width / 2
    return np.clip((np.asarray(volume, dtype=np.float32) - lowest) * (255 / width), 0, 255).astype(np.uint8)


def crop_box(mask: np.ndarray, margin: float = 0.1, minimum: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Find the box around a mask's voxels, with a margin.

    Each side of the bounding box is moved out by `margin` times the box's own length along that axis (its whole voxels,
    as in the original), by at least `minimum` voxels, and no further than the volume.

    Args:
        mask: bool [x, y, z].
        margin: share of the box's length.
        minimum: voxels.

    Returns:
        (low, high), two int arrays [3], half-open: array[low:high].

    Raises:
        UserError: the mask is empty.
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
        extra = max(minimum, int(margin * (last - first)))
        low[axis], high[axis] = max(first - extra, 0), min(last + extra, mask.shape[axis])
    return low, high


def crop_frame(
    image: sitk.Image, mask: np.ndarray, size: tuple[int, ...], margin: float = 0.1, minimum: int = 5
) -> Frame:
    """Frame over the surroundings of a mask, as `crop_box` finds them.

    Args:
        image: the scan.
        mask: bool [x, y, z] on its grid.
        size: voxels of the frame.
        margin, minimum: as in `crop_box`.

    Returns:
        `Frame` of `size` voxels.

    Raises:
        UserError: the mask is empty or on another grid, or the box or `size` is a single voxel along an axis.
    """
    frame = Frame.of(image)
    if mask.shape != frame.size:
        raise UserError(f"the mask is {mask.shape} and the volume {frame.size}: they must be on the same grid")
    low, high = crop_box(mask, margin, minimum)
    if min(high - low) < 2 or min(size) < 2:
        box = tuple(int(n) for n in high - low)
        raise UserError(f"a crop of {box} voxels to {tuple(size)}: it needs at least 2 along each axis")
    return frame.box(low, high, size)


def fitting_size(image: sitk.Image, view: View, region: np.ndarray | None = None) -> tuple[int, int, int]:
    """Size of a volume that shows all that a scan has, on voxels as long as wide and high.

    It has as many voxels as the scan has in the crop, within `FITTING`; where the view has a spacing, that of the view.

    Args:
        image, view, region: as in `find_frame`.

    Returns:
        (X, Y, Z), each from `LEAST_SIDE`.

    Raises:
        UserError: as `crop_frame`.
    """
    own = np.ones(image.GetSize(), bool) if region is None else region
    box = crop_frame(image, own, (2, 2, 2))
    extent = np.array(box.spacing)
    inside = np.prod(extent / image.GetSpacing() + 1)
    spacing = view.spacing or (np.prod(extent) / np.clip(inside, *FITTING)) ** (1 / 3)
    x, y, z = np.maximum(np.rint(extent / spacing).astype(int) + 1, LEAST_SIDE).tolist()
    return x, y, z


def find_region(image: sitk.Image, crop: str | None) -> np.ndarray | None:
    """Find what a scan is cropped to.

    Args:
        image: the scan.
        crop: one of `view.CROPS` but 'mask', or None.

    Returns:
        bool [x, y, z] on the scan's grid, or None for the whole scan.

    Raises:
        UserError: a liver or body in a scan that is no CT in HU, nothing is found, or a mask is needed.
    """
    if crop == "mask":
        raise UserError("the volumes are cropped to what a mask marks; give the mask of this scan")
    if crop in IN_HOUNSFIELD:
        check_hounsfield(image)
    return None if crop in (None, "none") else REGIONS[crop](image)


def find_frame(image: sitk.Image, view: View, size: tuple[int, ...], region: np.ndarray | None = None) -> Frame:
    """Frame of the volume that shows a scan as a view says, its axes in the view's orientation.

    Args:
        image: the scan.
        view: orientation, crop and spacing; where the orientation is unknown it is LPS.
        size: (X, Y, Z), voxels of the frame.
        region: bool [x, y, z] on the scan's grid, what to crop to, as `find_region` finds it; None: the whole scan.

    Returns:
        `Frame` of `size` voxels.

    Raises:
        UserError: as `crop_frame`.
    """
    whole = np.ones(image.GetSize(), bool)
    frame = crop_frame(image, whole if region is None else region, size)
    if view.spacing is not None:
        middle = (np.array(size) - 1) / 2
        spaced = replace(frame, spacing=view.spacing)
        origin = frame.to_physical(middle) - spaced.to_physical(middle) + spaced.origin
        frame = replace(spaced, origin=tuple(float(mm) for mm in origin))
    return frame.flipped(flipped_axes(view.orientation or "LPS"))


def prepare(image: sitk.Image, frame: Frame, view: View) -> tuple[np.ndarray, tuple[float, float]]:
    """Resample a scan on a frame and map its grey values to 0..255.

    Where the frame's voxels are larger than the scan's, the scan is smoothed first, so that fine detail and noise do
    not come out as something else; not for a crop to the liver, which is as the original makes it. Outside the scan
    the volume is as the scan's darkest voxel. Grey values are mapped by the view's window, or by its percentiles of
    the scan's own voxels in the frame. Without either, values within 0..255 are kept, others mapped by their range.

    Args:
        image: the scan.
        frame: where the volume lies.
        view: crop, and window or percentiles.

    Returns:
        uint8 [X, Y, Z], and the (level, width) shown.

    Raises:
        UserError: the grey values are all the same, or at both percentiles.
    """
    image = sitk.Cast(image, sitk.sitkFloat32)
    darkest = float(sitk.GetArrayViewFromImage(image).min())
    smooth = image if view.crop == "liver" else smoothed_for(image, frame)
    grey = to_array(frame.resample(smooth, outside=darkest))
    if grey.min() == grey.max():
        raise UserError(
            f"the scan is {grey.min():g} everywhere in its crop, so nothing can be seen in it; check the file, and the "
            "mask if one was given"
        )
    shown = view.window
    if shown is None:
        inside = grey[_lies_in(frame, image)]
        shown = shown_window(grey if not inside.size else inside, view)
    return window(grey, *shown), shown


def shown_window(grey: np.ndarray, view: View) -> tuple[float, float]:
    """The (level, width) of the grey values that a view shows: its window, or that of its percentiles.

    Args:
        grey: the grey values that percentiles are taken of.
        view: window or percentiles; without either, values within 0..255 are shown as they are, others by their range.

    Raises:
        UserError: both percentiles are the same value.
    """
    if view.window is not None:
        return view.window
    low, high = _shown_range(grey, view.percentiles)
    return (low + high) / 2, high - low


def smoothed_for(image: sitk.Image, frame: Frame) -> sitk.Image:
    """Smooth a scan for being resampled on a frame of larger voxels.

    By a Gaussian that makes a voxel of the scan as wide as one of the frame (full width at half maximum; Cardoso et
    al., Scale Factor Point Spread Function Matching, MICCAI 2015). Along an axis on which the frame is as fine as
    the scan nothing changes.

    Args:
        image: the scan, float32.
        frame: where it is to be resampled.

    Returns:
        Image of the scan around the frame.
    """
    own = Frame.of(image)
    factor = np.abs(np.linalg.solve(own.matrix, frame.matrix)).max(axis=1)  # voxels of the scan per voxel of the frame
    sigma = np.sqrt(np.maximum(factor**2 - 1, 0)) / FWHM  # in voxels of the scan
    if sigma.max() < 0.1:
        return image
    corners = own.to_voxel(frame.to_physical(list(itertools.product(*((0, n - 1) for n in frame.size)))))
    reach = np.ceil(3 * sigma) + 1
    low = np.clip(np.floor(corners.min(axis=0)) - reach, 0, np.subtract(own.size, 1)).astype(int)
    high = np.clip(np.ceil(corners.max(axis=0)) + reach + 1, low + 1, own.size).astype(int)
    near = to_array(image)[tuple(map(slice, low, high))]
    smooth = ndimage.gaussian_filter(near, sigma, mode="nearest", truncate=3)
    return replace(own, size=smooth.shape, origin=tuple(own.to_physical(low).tolist())).put(smooth)


def _lies_in(frame: Frame, image: sitk.Image) -> np.ndarray:
    """Whether each voxel of a frame lies in an image: bool [X, Y, Z]."""
    ones = sitk.Image(image.GetSize(), sitk.sitkUInt8) + 1
    ones.CopyInformation(image)
    return to_array(frame.resample(ones, nearest=True)) > 0


def _shown_range(grey: np.ndarray, percentiles: tuple[float, float] | None) -> tuple[float, float]:
    """The grey values that become 0 and 255: those at the percentiles, or 0 and 255, or the least and the most."""
    low, high = (float(value) for value in np.percentile(grey, percentiles or (0, 100)))
    if percentiles is None and low >= 0 and 1 < high <= 255:
        return 0.0, 255.0
    if low == high:
        raise UserError(f"{low:g} is the scan's grey value at both percentiles; take wider ones, or a window")
    return low, high
