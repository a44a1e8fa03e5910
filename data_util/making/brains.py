"""The brain in a T1-weighted MR of a head, and its grey and white matter: by an affine map and grey values alone.

Good enough to train on and to compare methods by; not a segmentation for anything else.
"""

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from data_util.scans.affine_search import find_affine
from data_util.scans.frame import Frame
from data_util.scans.images import to_array

GREY_MATTER, WHITE_MATTER = 1, 2  # values of labels
_REACH = 3.0  # mm that the brain may lie outside where the template's is, and that part it from the skull
_BRIGHTEST = 1.15  # of the 99.5th percentile of what is in the template's brain: above is fat


def brain_mask(head: sitk.Image, template: sitk.Image, brain: sitk.Image) -> np.ndarray:
    """Find the brain in a head.

    The template's brain is brought to the head by an affine map. In it and 3 mm around, what is darker than tissue or
    as bright as fat is left out, then what hangs on the rest by less than 6 mm, and holes are filled.

    Args:
        head: T1-weighted MR with skull, in LPS.
        template: another one.
        brain: label image of the template's brain, in the template's space.

    Returns:
        bool [x, y, z] on the head's grid.

    Raises:
        UserError: no map is found.
    """
    frame = Frame.of(head)
    back = find_affine(template, head).GetInverse()
    inside = to_array(frame.resample(brain, nearest=True, transform=back)) > 0
    grey = to_array(head)
    darkest, _ = tissue_thresholds(grey[inside])
    brightest = np.percentile(grey[inside], 99.5) * _BRIGHTEST
    ball = _ball(_REACH, frame.spacing)
    tissue = ndimage.binary_dilation(inside, ball) & (grey > darkest) & (grey < brightest)
    regions, _ = ndimage.label(ndimage.binary_opening(tissue, ball))
    sizes = np.bincount(regions.ravel())
    largest = regions == 1 + np.argmax(sizes[1:])
    mask = ndimage.binary_dilation(largest, ball) & tissue
    around = max(ball.shape)
    closed = ndimage.binary_closing(np.pad(mask, around), ball)[(slice(around, -around),) * 3]
    return ndimage.binary_fill_holes(closed)


def tissue_labels(image: sitk.Image, brain: np.ndarray) -> np.ndarray:
    """Label grey and white matter in a brain's mask: uint8 [x, y, z], 0 elsewhere and in the darkest class, fluid."""
    grey = to_array(image)
    darkest, brightest = tissue_thresholds(grey[brain])
    labels = np.where(grey > brightest, WHITE_MATTER, GREY_MATTER)
    return np.where(brain & (grey > darkest), labels, 0).astype(np.uint8)


def tissue_thresholds(grey: np.ndarray) -> tuple[float, float]:
    """The two thresholds (Otsu's) that part grey values best into fluid, grey and white matter."""
    search = sitk.OtsuMultipleThresholdsImageFilter()
    search.SetNumberOfThresholds(2)
    search.Execute(sitk.GetImageFromArray(np.asarray(grey, np.float32).reshape(1, 1, -1)))
    low, high = search.GetThresholds()
    return low, high


def _ball(radius: float, spacing: tuple[float, ...]) -> np.ndarray:
    """Voxels within a radius in mm: bool [x, y, z], of odd sizes."""
    reach = [int(np.ceil(radius / mm)) for mm in spacing]
    grids = np.ogrid[tuple(slice(-n, n + 1) for n in reach)]
    return np.asarray(sum((grid * mm / radius) ** 2 for grid, mm in zip(grids, spacing, strict=True)) <= 1)
