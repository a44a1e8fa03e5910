"""How one scan becomes a volume of a data set: cropped, resampled on a frame, its grey values mapped to 0..255."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import SimpleITK as sitk

from data_util.hdf5 import AFFINE, DOUBTS, WINDOW, Scan
from data_util.making.alignment import Alignment
from data_util.making.labels import read_labels
from data_util.making.sources import Source
from data_util.scans.frame import Frame
from data_util.scans.geometry import doubts_about_grey_values, doubts_about_labels, doubts_about_points
from data_util.scans.images import match_labels, orient, read_native, to_array
from data_util.scans.points import frame_for_voxels, read_points
from data_util.scans.preprocessing import find_frame, find_region, prepare
from data_util.scans.regions import doubts
from data_util.scans.view import View
from errors import UserError


@dataclass(frozen=True)
class Recipe:
    """How a scan becomes a volume.

    Attributes:
        size: voxels of the volume along x, y, z.
        spacing: mm per voxel along x, y, z: the volume lies around the crop's middle; None: it spans the crop.
        crop: one of `view.CROPS`: what the volume shows. 'mask' is what the labels mark.
        window: (level, width) of the grey values, or None.
        percentiles: (low, high) of the scan's grey values in the volume, which become 0 and 255, or None; one of the
            two is given.
        labels: name -> values that become one label, the first of them; 'all': values as they are; None: any value
            above 0 is the mask, and there must be but one. One label alone is a mask, 0 and 255.
        points_space: what the numbers of landmarks are, one of `points.SPACES`.
        align: the template that scans are brought to before they are cropped, or None.
    """

    size: tuple[int, int, int]
    spacing: tuple[float, float, float] | None
    crop: str
    window: tuple[float, float] | None
    percentiles: tuple[float, float] | None
    labels: dict[str, list[int]] | str | None
    points_space: str = "lps"
    align: Alignment | None = None

    @property
    def view(self) -> View:
        """How the volumes show the scans; their axes run as in LPS."""
        return View("LPS", self.crop, self.window, self.percentiles, self.spacing)


def make_scan(source: Source, recipe: Recipe) -> tuple[Scan, Frame, Frame, dict[str, Any]]:
    """Make a scan's volume.

    Args:
        source: the scan's files.
        recipe: what to make of it.

    Returns:
        The scan as the data set has it, the frame of its volume, the frame of the scan, and facts to keep as
        attributes: `window` (level, width), `affine`, the map [4, 4] from places in the template to places in the scan
        where there is a template, and, where something may be wrong, `doubts`, a text.

    Raises:
        UserError: a file cannot be read or used.
    """
    native = read_native(source.image)
    image = orient(native)
    labels = None if source.label is None else read_labels(source.label, recipe.labels)
    reasons = doubts_about_grey_values(image)
    if labels is not None:
        reasons += doubts_about_labels(labels, image)
    facts: dict[str, Any] = {}
    if recipe.align is None:
        seen, seen_labels = image, None if labels is None else match_labels(labels, image)
    else:
        aligned = recipe.align.find(image)
        seen, seen_labels = aligned.on_template(image), None if labels is None else aligned.on_template(labels, True)
        facts[AFFINE] = aligned.matrix
    mask, doubtful = _cropped_to(source, recipe.crop, seen, seen_labels)
    reasons += doubtful
    frame = find_frame(seen, recipe.view, recipe.size, mask)
    if recipe.align is not None:
        frame = aligned.in_scan(frame)
    volume, shown = prepare(image, frame, recipe.view)
    segmentation = None
    if labels is not None:
        segmentation = to_array(frame.resample(labels, nearest=True))
        if not segmentation.any():
            raise UserError(f"{source.label}: marks no voxel of the crop of {source.image}; check the geometry of both")
    points = None
    if source.points is not None:
        voxels = frame_for_voxels(native, source.points) if recipe.points_space == "voxel" else None
        places = read_points(source.points, recipe.points_space, voxels)
        points = _points_in(frame, places)
        lost = np.isnan(points).all()
        reasons += doubts_about_points(places, image) or ["no landmark lies in the crop"] * bool(lost)
    scan = Scan(volume=volume, segmentation=segmentation, points=points, spacing=np.array(frame.spacing))
    facts |= {WINDOW: shown, **({DOUBTS: "; ".join(reasons)} if reasons else {})}
    return scan, frame, Frame.of(image), facts


def _cropped_to(
    source: Source, crop: str, image: sitk.Image, labels: sitk.Image | None
) -> tuple[np.ndarray | None, list[str]]:
    """What an image is cropped to, bool [x, y, z] on its grid or None for all of it, and what is unusual about it.

    The labels lie on the image's grid.
    """
    if crop == "none":
        return None, []
    if crop != "mask":
        mask = find_region(image, crop)
        return mask, doubts(image, mask, crop)
    if labels is None:
        raise UserError(f"{source.image}: has no labels to crop to; add them, or take another --crop")
    mask = to_array(labels) > 0
    if not mask.any():
        raise UserError(f"{source.label}: marks no voxel where {source.image} lies; check the geometry of both")
    return mask, []


def _points_in(frame: Frame, places: np.ndarray) -> np.ndarray:
    """Landmarks in voxels, float32 [L, 3]; those outside the frame are NaN: nothing can be measured there."""
    points = frame.to_voxel(places)
    inside = np.asarray(((points >= 0) & (points <= np.array(frame.size) - 1)).all(axis=1))
    return np.where(inside[:, None], points, np.nan).astype(np.float32)
