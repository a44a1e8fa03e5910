"""Find what a scan is cropped to: the liver or the body of a CT, the head of a brain scan. By grey values alone.

Scans are three-dimensional SimpleITK images in LPS, masks are bool [x, y, z] on their grid. A region found in this way
can be wrong: `doubts` says what about it is unusual.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import SimpleITK as sitk
from scipy import ndimage, signal

from data_util.scans.dicom import MODALITY
from data_util.scans.frame import Frame
from data_util.scans.images import to_array
from errors import UserError

# Where a liver's grey values (HU) may lie, most likely first: with contrast medium, without, fatty, and very bright.
LIVER_RANGES = (
    (80, 140),
    (110, 160),
    (70, 90),
    (60, 80),
    (50, 70),
    (40, 60),
    (30, 50),
    (20, 40),
    (10, 30),
    (140, 180),
    (160, 200),
)
LIVER_RADIUS = 26  # mm
LIVER_SIGMA = 2  # voxels
LEAST_LIVER = 50  # ml
DARKEST = -200  # HU; every CT of a person has something darker, air
COARSE = 3  # mm, about the grid that majorities are counted on
BODY_HU = -300
BODY_GRID = 4  # mm
BODY_OPENING = 8  # mm; parts the body from the table
LEAST_BODY = 200  # ml
HEAD_LENGTH = 200  # mm; below it is neck
# Volumes (ml) that are no reason for doubt: an adult's, and a slab of a few cm of it; a body may be a brain alone.
USUAL_VOLUMES = {"liver": (300, 4000), "body": (500, 150000), "brain": (1000, 8000)}


def liver_mask(image: sitk.Image) -> np.ndarray:
    """Find the liver of a CT (HU): the largest region that a grey range of LIVER_RANGES fills.

    The scan is smoothed (Gaussian, 2 voxels); a range marks voxels; in every axial slice a voxel stays where most of
    the disk around it is marked, the edge repeated beyond the slice; the largest connected region is kept, and the
    largest over all ranges, in their order, is the liver. A range that marks fewer voxels than the best so far is
    skipped. Majorities are counted on blocks of about 3 mm, and their share is interpolated back to voxels.

    Args:
        image: the scan, in LPS.

    Returns:
        bool [x, y, z] on its grid.

    Raises:
        UserError: the image is no CT in HU, or no region reaches 50 ml.
    """
    check_hounsfield(image)
    grey = ndimage.gaussian_filter(to_array(image).astype(np.float32), LIVER_SIGMA, mode="nearest")
    spacing = np.array(image.GetSpacing()[:2])
    block = np.maximum(np.rint(COARSE / spacing), 1).astype(int)
    disk = _disk(LIVER_RADIUS / (spacing * block))
    best, largest = None, LEAST_LIVER * 1000 / np.prod(image.GetSpacing())
    for low, high in LIVER_RANGES:
        marked = (grey >= low) & (grey <= high)
        if np.count_nonzero(marked) <= largest:
            continue
        share = _share_in_disk(_block_means(marked, block), disk)
        region = _largest_region(share > 0.5)
        voxels = np.count_nonzero(region) * np.prod(block)
        if voxels > largest:
            best, largest = (share, region), voxels
    if best is None:
        raise UserError(
            f"no liver found: no connected soft tissue of {LEAST_LIVER} ml between {LIVER_RANGES[8][0]} and "
            f"{LIVER_RANGES[-1][1]} HU; give a mask of it, or preprocess by body or none"
        )
    return _refined(*best, block, grey.shape)


def check_hounsfield(image: sitk.Image) -> None:
    """Refuse a scan that is no CT in Hounsfield units.

    Raises:
        UserError: its DICOM modality is another, or it shows no air.
    """
    modality = image.GetMetaData(MODALITY) if image.HasMetaDataKey(MODALITY) else ""
    if modality not in ("", "CT"):
        raise UserError(f"the scan is {modality}, and liver and body are for CT; preprocess by brain or none")
    lowest = sitk.GetArrayViewFromImage(image).min()
    if lowest > DARKEST:
        raise UserError(
            f"the scan's lowest grey value is {lowest:g}, and a CT in Hounsfield units has air below {DARKEST}; "
            "of another modality, preprocess by brain or none"
        )


def _disk(radii: np.ndarray) -> np.ndarray:
    """Share of every pixel that a disk of `radii` pixels [2] covers, [2m+1, 2n+1], to sum 1."""
    fine = 9  # samples a pixel and axis
    reach = np.ceil(radii - 0.5).astype(int)
    squares = []
    for radius, pixels in zip(radii, reach, strict=True):
        places = (np.arange((2 * pixels + 1) * fine) + 0.5) / fine - pixels - 0.5
        squares.append((places / radius) ** 2)
    inside = squares[0][:, None] + squares[1] <= 1
    covered = inside.reshape(2 * reach[0] + 1, fine, 2 * reach[1] + 1, fine).mean(axis=(1, 3))
    return covered / covered.sum()


def _block_means(mask: np.ndarray, block: np.ndarray) -> np.ndarray:
    """Share of marked voxels in each in-plane block of `block` voxels; the edge is repeated to whole blocks."""
    width = [(0, -n % b) for n, b in zip(mask.shape, block, strict=False)]
    mask = np.pad(mask, [*width, (0, 0)], mode="edge")
    x, y = mask.shape[0] // block[0], mask.shape[1] // block[1]
    return mask.reshape(x, block[0], y, block[1], -1).mean(axis=(1, 3), dtype=np.float32)


def _share_in_disk(mask: np.ndarray, disk: np.ndarray) -> np.ndarray:
    """Mean of every axial slice over the disk around each pixel, the edge repeated."""
    reach = [(n // 2, n // 2) for n in disk.shape]
    padded = np.pad(mask, [*reach, (0, 0)], mode="edge")
    return signal.fftconvolve(padded, disk[..., None].astype(np.float32), mode="valid", axes=(0, 1))


def _largest_region(mask: np.ndarray) -> np.ndarray:
    """Return the largest region whose voxels are joined by their faces; empty where the mask is."""
    labels, count = ndimage.label(mask)
    if count == 0:
        return mask
    return labels == np.argmax(np.bincount(labels.ravel())[1:]) + 1


def _refined(share: np.ndarray, region: np.ndarray, block: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Interpolate shares of blocks to voxels, around a region, and return the largest region above one half."""
    mask = np.zeros(shape, bool)
    low, high = [], []
    for axis in range(3):
        there = np.flatnonzero(region.any(axis=tuple({0, 1, 2} - {axis})))
        low.append(max(there[0] - 1, 0))
        high.append(there[-1] + 2)
    near = tuple(map(slice, low, high))
    voxels = ndimage.zoom(share[near], (*block, 1), order=1, mode="nearest", grid_mode=True) > 0.5
    start = np.array(low) * (*block, 1)
    inside = tuple(slice(a, min(a + n, end)) for a, n, end in zip(start, voxels.shape, shape, strict=True))
    mask[inside] = _largest_region(voxels)[tuple(slice(part.stop - part.start) for part in inside)]
    return mask


def body_mask(image: sitk.Image) -> np.ndarray:
    """Find the body in a CT or MR: the largest bright region, parted from the table, with everything that it encloses.

    Bright is above -300 HU in a CT, else above Otsu's threshold.

    Args:
        image: the scan, in LPS.

    Returns:
        bool [x, y, z] on its grid.

    Raises:
        UserError: no region reaches 200 ml.
    """
    frame = Frame.of(image)
    size = np.ceil(np.array(frame.size) * frame.spacing / BODY_GRID).astype(int)
    coarse = frame.box((0, 0, 0), frame.size, np.clip(size, 2, np.maximum(frame.size, 2)))
    grey = to_array(coarse.resample(sitk.Cast(image, sitk.sitkFloat32)))
    bright = grey > (BODY_HU if grey.min() < DARKEST else otsu(grey))
    reach = np.maximum(BODY_OPENING / np.array(coarse.spacing), 1)
    around = [(int(r), int(r)) for r in reach]
    opened = ndimage.binary_opening(np.pad(bright, around, mode="edge"), _ball(reach))
    region = _largest_region(opened[tuple(slice(r, n - r) for (r, _), n in zip(around, opened.shape, strict=True))])
    if np.count_nonzero(region) * np.prod(coarse.spacing) < LEAST_BODY * 1000:
        raise UserError(
            f"no body found: no connected bright region of {LEAST_BODY} ml; give a mask, or preprocess by none"
        )
    for z in range(region.shape[2]):
        region[..., z] = ndimage.binary_fill_holes(region[..., z])
    return to_array(frame.resample(coarse.put(region.astype(np.float32)))) > 0.5


def brain_mask(image: sitk.Image) -> np.ndarray:
    """Find the head in a scan of it, or the brain in one without skull: `body_mask`, and of it the uppermost 200 mm."""
    mask = body_mask(image)
    top = np.flatnonzero(mask.any(axis=(0, 1)))[-1] + 1
    mask[..., : max(0, top - round(HEAD_LENGTH / image.GetSpacing()[2]))] = False
    return mask


def otsu(grey: np.ndarray) -> float:
    """Threshold between the 1st and 99th percentile that parts values best: with most variance between two means."""
    ends = np.percentile(grey, (1, 99))
    if ends[0] == ends[1]:
        return ends[1]
    counts, edges = np.histogram(grey, bins=128, range=ends)
    sums = counts * (edges[:-1] + edges[1:]) / 2
    below, above = np.cumsum(counts)[:-1], np.cumsum(counts[::-1])[-2::-1]
    low, high = np.cumsum(sums)[:-1], np.cumsum(sums[::-1])[-2::-1]
    between = below * above * (low / np.maximum(below, 1) - high / np.maximum(above, 1)) ** 2
    return edges[1 + np.argmax(between)]


def _ball(radii: np.ndarray) -> np.ndarray:
    grids = np.meshgrid(*[np.arange(-int(r), int(r) + 1) / r for r in radii], indexing="ij")
    return sum(grid**2 for grid in grids) <= 1


REGIONS = {"liver": liver_mask, "body": body_mask, "brain": brain_mask}


def doubts(image: sitk.Image, mask: Any, kind: Any) -> list[str]:
    """Say what is unusual about a region, in volume and place: a list of short sentences, empty where nothing is.

    Args:
        image: the scan, in LPS.
        mask: bool [x, y, z] on its grid.
        kind: one of REGIONS.
    """
    found = []
    volume = np.count_nonzero(mask) * np.prod(image.GetSpacing()) / 1000
    least, most = USUAL_VOLUMES[kind]
    if not least <= volume <= most:
        found.append(f"the {kind} found has {volume:.0f} ml, where {least} to {most} are usual")
    if kind == "liver":
        body = body_mask(image)
        centre, middle = (np.mean(np.nonzero(part)[0]) for part in (mask, body))
        if centre >= middle:
            found.append("the liver found lies on the patient's left; an organ beside it, or a mirrored scan?")
    return found
