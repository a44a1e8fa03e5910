"""What lies in a scan carried to another scan by a transform: grey values, labels and points.

An image is pulled: each voxel of the grid it is carried to is led to the image by the transform, and the value there is
read. Points are pushed: they are led the other way, by the transform's inverse. So both end at the same anatomy.
"""

import itertools

import numpy as np
import SimpleITK as sitk

from data_util.scans.frame import Frame, cast_rounded
from data_util.scans.images import to_array
from data_util.scans.transform_chain import field_frame, is_field, is_inside, map_points, parts
from errors import UserError

LINEAR, NEAREST, LABELS, BSPLINE = "linear", "nearest", "labels", "bspline"
INTERPOLATIONS = (LINEAR, NEAREST, LABELS, BSPLINE)
MOST_LABELS = 512  # values that a label image may have
LEAST_EQUAL = 0.7  # share of the neighbours, both labelled, that have the same label
MOST_APART = 2  # voxels by which the edges of one scan on two grids may differ
WIDE = (sitk.sitkInt32, sitk.sitkUInt32, sitk.sitkInt64, sitk.sitkUInt64, sitk.sitkFloat64)  # float32 would round them


def is_label_image(image: sitk.Image) -> bool:
    """Whether an image looks like labels: whole numbers from 0, few of them, and most neighbours have the same one."""
    if image.GetPixelID() in (sitk.sitkFloat32, sitk.sitkFloat64):
        return False
    array = to_array(image)
    if array.min() < 0 or len(np.unique(array[::3, ::3, ::3])) > MOST_LABELS:
        return False
    both = [(array[1:], array[:-1]), (array[:, 1:], array[:, :-1])]
    labelled, equal = 0, 0
    for one, other in both:
        marked = (one != 0) & (other != 0)
        labelled += int(np.count_nonzero(marked))
        equal += int(np.count_nonzero(one[marked] == other[marked]))
    return equal >= LEAST_EQUAL * labelled and len(np.unique(array)) <= MOST_LABELS


def carry_image(
    image: sitk.Image, frame: Frame, transform: sitk.Transform, interpolation: str, outside: float | None = None
) -> sitk.Image:
    """Read an image on a grid through a transform, once.

    Args:
        image: grey values or labels.
        frame: the grid.
        transform: from places on the grid to places in the image, mm (LPS).
        interpolation: one of `INTERPOLATIONS`. 'labels': each label is read linearly, and the one with most wins.
        outside: value where the image has none; None is its lowest grey value, and label 0.

    Returns:
        Image of the same pixel type on the grid; grey values between whole numbers are rounded.

    Raises:
        UserError: each label is to be read, and the image has too many values to be one of labels.
    """
    if outside is None:
        outside = 0 if interpolation in (NEAREST, LABELS) else float(sitk.GetArrayViewFromImage(image).min())
    if interpolation == LABELS:
        return _voted(image, frame, transform, outside)
    if interpolation == NEAREST:
        return _read(image, frame, transform, sitk.sitkNearestNeighbor, outside)
    wide = sitk.Cast(image, sitk.sitkFloat64 if image.GetPixelID() in WIDE else sitk.sitkFloat32)
    how = sitk.sitkBSpline if interpolation == BSPLINE else sitk.sitkLinear
    return cast_rounded(_read(wide, frame, transform, how, outside), image.GetPixelID())


def _read(image: sitk.Image, frame: Frame, transform: sitk.Transform, how: int, outside: float) -> sitk.Image:
    return sitk.Resample(image, frame.size, transform, how, frame.origin, frame.spacing, frame.direction, outside)


def _voted(image: sitk.Image, frame: Frame, transform: sitk.Transform, outside: float) -> sitk.Image:
    """The label of which most is there, read linearly; the smaller one of two with as much."""
    values = np.unique(sitk.GetArrayViewFromImage(image))
    if len(values) > MOST_LABELS:
        raise UserError(
            f"the image has {len(values)} values, and labels are at most {MOST_LABELS}; choose another interpolation "
            "than labels, such as nearest"
        )
    most = np.zeros(frame.size[::-1], np.float32)
    voted = np.full(most.shape, outside, values.dtype)
    for value in values.tolist():
        there = sitk.Cast(image == value, sitk.sitkFloat32)
        share = sitk.GetArrayFromImage(_read(there, frame, transform, sitk.sitkLinear, 0))
        is_more = share > most
        voted[is_more], most[is_more] = value, share[is_more]
    return frame.put(np.swapaxes(voted, 0, 2))


def check_reach(transform: sitk.Transform, places: np.ndarray, image: sitk.Image | None = None) -> None:
    """See that places, a transform of them and an image can belong together.

    Args:
        transform: from these places to others.
        places: [n, 3] in mm (LPS), such as those of a grid.
        image: what is to be read there, or None.

    Raises:
        UserError: all places lie beside a displacement field of the transform, or are led beside the image.
    """
    for part in parts(transform):
        if is_field(part) and not is_inside(places, field_frame(part)).any():
            raise UserError(
                f"a displacement field lies about {_middle(field_frame(part))}, and what it is applied to about "
                f"{_text(places.mean(axis=0))} mm: the transform is of other scans, or the order of -t is wrong"
            )
        places = map_points(part, places)
    if image is not None and not is_inside(places, Frame.of(image)).any():
        raise UserError(
            f"nothing of the image lies where the transform leads: the image lies about {_middle(Frame.of(image))}, "
            f"and the reference is led to about {_text(places.mean(axis=0))} mm; are they of these scans, or is it "
            "--inverse that is meant?"
        )


def doubts_about_place(name: str, frame: Frame, expected: str, known: Frame) -> list[str]:
    """A sentence where a scan, or labels of it on whatever grid, cannot be the one that a transform was found for.

    Args:
        name: of the scan, for the sentence.
        frame: its grid.
        expected: what scan it should be, for the sentence.
        known: the grid of that one.
    """
    boxes = [_box(one) for one in (frame, known)]
    apart = float(np.abs(boxes[0] - boxes[1]).max())
    if apart <= MOST_APART * max(*frame.spacing, *known.spacing):
        return []
    size = "x".join(map(str, known.size))
    return [
        f"{name} is not {expected}, of {size} voxels about {_middle(known)}: it covers up to {apart:.0f} mm more or "
        "less; right only if it is the same scan on another grid"
    ]


def _box(frame: Frame) -> np.ndarray:
    """The least and the largest place of a grid's voxels along each axis, outer edges: [2, 3] in mm."""
    corners = frame.to_physical(list(itertools.product(*((-0.5, n - 0.5) for n in frame.size))))
    return np.stack([corners.min(axis=0), corners.max(axis=0)])


def _middle(frame: Frame) -> str:
    return _text(frame.to_physical(np.subtract(frame.size, 1) / 2))


def _text(place: np.ndarray) -> str:
    return f"({', '.join(f'{mm:.0f}' for mm in place)})"
