"""Whether the geometry of landmarks and labels can be right: reasons to doubt it, as short sentences.

Numbers that are placed wrongly are still numbers: landmarks in voxels instead of millimetres, or labels that were saved
without the geometry of their scan, give results that mean nothing. Nothing here is an error by itself.
"""

from itertools import product

import numpy as np
import SimpleITK as sitk

from data_util.scans.frame import Frame
from data_util.scans.images import to_array

SAMPLE = 100_000  # voxels of a label that are looked at


def doubts_about_points(points: np.ndarray, image: sitk.Image) -> list[str]:
    """Reasons to doubt that landmarks belong to a scan.

    Args:
        points: places in mm (LPS), [L, 3]; rows of NaN are missing ones.
        image: the scan, in LPS.

    Returns:
        Sentences, none where at least half of the landmarks lie in the scan.
    """
    known = np.asarray(points, np.float64).reshape(-1, 3)
    known = known[np.isfinite(known).all(axis=1)]
    frame = Frame.of(image)
    is_outside = ~_inside(known, frame)
    outside = np.count_nonzero(is_outside)
    if 2 * outside <= len(known):
        return []
    spaces = {"ras": known * (-1, -1, 1), "voxel": frame.to_physical(known)}
    likely = [name for name, places in spaces.items() if 2 * np.count_nonzero(_inside(places, frame)) > len(known)]
    remedy = f"are they of --points_space {' or '.join(likely)}" if likely else "are they of this scan, in mm (LPS)"
    first = ", ".join(f"{mm:g}" for mm in known[is_outside][0])
    counted = f"all {outside}" if outside == len(known) else f"{outside} of {len(known)}"
    what = "the only landmark lies" if len(known) == 1 else f"{counted} landmarks lie"
    return [f"{what} outside the scan, the first at ({first}) mm; {remedy}?"]


def doubts_about_labels(labels: sitk.Image, image: sitk.Image) -> list[str]:
    """Reasons to doubt that a label image belongs to a scan.

    Args:
        labels: label image in LPS, on whatever grid; what is not 0 is labelled.
        image: the scan, in LPS.

    Returns:
        Sentences, none where the labels can be the scan's.
    """
    reasons = []
    own, frame = Frame.of(labels), Frame.of(image)
    marked = np.argwhere(to_array(labels))
    marked = marked[:: -(-len(marked) // SAMPLE) or 1]
    share = np.mean(~_inside(own.to_physical(marked), frame)) if len(marked) else 0
    if share > 0.5:
        reasons.append(f"{100 * share:.0f} % of the labelled voxels lie outside the scan")
    apart = np.linalg.norm(_corners(own) - _corners(frame), axis=1).max()
    if apart > min(frame.spacing) / 2 and sorted(own.size) == sorted(frame.size):
        size = "x".join(map(str, own.size))
        reasons.append(
            f"the label image has as many voxels as the scan, {size}, but lies up to {apart:.3g} mm elsewhere; was it "
            "saved without the scan's geometry?"
        )
    elif apart > min(frame.spacing) / 2 and _is_default(own) and not _is_default(frame):
        reasons.append("the label image has voxels of 1 mm from 0, 0, 0 on; was it saved without its geometry?")
    return reasons


def doubts_about_grey_values(image: sitk.Image, most: int = 8) -> list[str]:
    """Reasons to doubt that an image is a scan: it has so few whole grey values that it may be a label image.

    Args:
        image: the scan.
        most: number of values that a label image may have.
    """
    array = sitk.GetArrayViewFromImage(image)
    if len(np.unique(array[::4, ::4, ::4])) > most:
        return []
    values = np.unique(array)
    if len(values) > most or (values % 1).any() or values.min() < 0:
        return []
    return [f"the scan's only grey values are {', '.join(f'{value:g}' for value in values)}; is it a label image?"]


def _inside(places: np.ndarray, frame: Frame) -> np.ndarray:
    """Whether places in mm [n, 3] lie in a voxel of a frame: bool [n]."""
    voxels = frame.to_voxel(places)
    return np.asarray(((voxels > -0.5) & (voxels < np.array(frame.size) - 0.5)).all(axis=1))


def _corners(frame: Frame) -> np.ndarray:
    """Places in mm of a frame's eight corner voxels, [8, 3]."""
    return frame.to_physical(list(product(*((0, n - 1) for n in frame.size))))


def _is_default(frame: Frame) -> bool:
    """Whether a frame is what a file says that was written without one: voxels of 1 mm, counted from 0, 0, 0."""
    return np.allclose(frame.spacing, 1) and bool((np.abs(_corners(frame)) < 1e-6).all(axis=1).any())
