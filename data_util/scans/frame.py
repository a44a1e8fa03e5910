"""Frames: where the voxels of an array lie in the patient.

A volume for the network is a scan resampled on a frame: a box of the scan with as many voxels as the network sees. What
the network finds there goes back to the scan, or to millimetres, through the same frame. Points are [n, 3].
"""

import itertools
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Frame:
    """A grid of voxels in space, with ITK's conventions: place = origin + direction (spacing * voxel), in mm.

    Attributes:
        size: voxels along x, y, z.
        spacing: mm from a voxel's centre to the next.
        origin: place of the centre of voxel (0, 0, 0).
        direction: the axes as the columns of a matrix, its nine numbers row by row.

    Example:
        >>> frame = Frame((4, 5, 6), (2.0, 2.0, 3.0), (-10.0, 0.0, 5.0), (1, 0, 0, 0, 1, 0, 0, 0, 1))
        >>> frame.to_physical([1, 0, 2]).tolist()
        [-8.0, 0.0, 11.0]
    """

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]

    @classmethod
    def of(cls, image: sitk.Image) -> "Frame":
        """The frame that a SimpleITK image lies on."""
        return cls(image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection())

    @classmethod
    def load(cls, attributes: Mapping[str, Any], prefix: str = "") -> "Frame":
        """The frame that `save` wrote into the attributes of an HDF5 group."""
        return cls(*(tuple(attributes[f"{prefix}{field.name}"].tolist()) for field in fields(cls)))

    def save(self, attributes: MutableMapping[str, Any], prefix: str = "") -> None:
        """Write the frame into the attributes of an HDF5 group, as PREFIXsize, -spacing, -origin and -direction."""
        for name, values in vars(self).items():
            attributes[f"{prefix}{name}"] = values

    @property
    def matrix(self) -> np.ndarray:
        """Millimetres per voxel: float64 [3, 3], place = origin + matrix @ voxel."""
        return np.reshape(self.direction, (3, 3)) * np.asarray(self.spacing)

    def to_physical(self, points: ArrayLike) -> np.ndarray:
        """Places in mm of points in voxels."""
        return np.asarray(points, np.float64) @ self.matrix.T + self.origin

    def to_voxel(self, points: ArrayLike) -> np.ndarray:
        """Points in voxels of places in mm; the inverse of `to_physical`."""
        return np.linalg.solve(self.matrix, (np.asarray(points, np.float64) - self.origin).T).T

    def box(self, low: ArrayLike, high: ArrayLike, size: Sequence[int] | np.ndarray) -> "Frame":
        """Frame of `size` voxels over the voxels low <= i < high of this one.

        The first and the last voxels' centres of both lie at the same places.
        """
        step = (np.asarray(high) - low - 1) / (np.asarray(size) - 1)
        return Frame(
            tuple(int(n) for n in size),
            tuple(float(mm) for mm in self.spacing * step),
            tuple(float(mm) for mm in self.to_physical(low)),
            self.direction,
        )

    def flipped(self, axes: Iterable[int]) -> "Frame":
        """Frame of the same voxels' places whose axes of these numbers run the other way."""
        first = np.zeros(3)
        signs = np.ones(3)
        for axis in axes:
            first[axis], signs[axis] = self.size[axis] - 1, -1
        return Frame(
            self.size,
            self.spacing,
            tuple(float(mm) for mm in self.to_physical(first)),
            tuple(float(part) for part in (np.reshape(self.direction, (3, 3)) * signs).ravel()),
        )

    def widened(self, before: Sequence[int] | np.ndarray, after: Sequence[int] | np.ndarray) -> "Frame":
        """Frame of the same voxels and of so many more before the first and after the last one of each axis."""
        return Frame(
            tuple(int(n) for n in np.add(self.size, before) + after),
            self.spacing,
            tuple(float(mm) for mm in self.to_physical(np.negative(before))),
            self.direction,
        )

    def permuted(self, order: Sequence[int]) -> "Frame":
        """Frame of the same voxels whose axis k is axis order[k] of this one."""
        order = list(order)
        return Frame(
            tuple(self.size[axis] for axis in order),
            tuple(self.spacing[axis] for axis in order),
            self.origin,
            tuple(float(part) for part in np.reshape(self.direction, (3, 3))[:, order].ravel()),
        )

    def mapped(self, matrix: np.ndarray, offset: np.ndarray) -> "Frame":
        """Frame whose voxels lie where an affine map, place -> matrix @ place + offset, leads those of this one.

        Its axes need not be at right angles.
        """
        columns = np.asarray(matrix) @ self.matrix
        spacing = np.linalg.norm(columns, axis=0)
        return Frame(
            self.size,
            tuple(float(mm) for mm in spacing),
            tuple(float(mm) for mm in np.asarray(matrix) @ self.origin + offset),
            tuple(float(part) for part in (columns / spacing).ravel()),
        )

    def put(self, array: np.ndarray) -> sitk.Image:
        """SimpleITK image of an array [x, y, z], or of vectors [x, y, z, 3], that lies on this frame."""
        array = np.ascontiguousarray(np.swapaxes(array, 0, 2))
        image = sitk.GetImageFromArray(array, isVector=array.ndim == 4)
        image.SetSpacing(self.spacing)
        image.SetOrigin(self.origin)
        image.SetDirection(self.direction)
        return image

    def resample(
        self, image: sitk.Image, nearest: bool = False, outside: float = 0, transform: sitk.Transform | None = None
    ) -> sitk.Image:
        """An image read on this frame, linearly or by nearest voxel: SimpleITK image of its pixel type.

        Args:
            image: SimpleITK image.
            nearest: for labels.
            outside: the value where the image has none.
            transform: SimpleITK transform from places on this frame to places in the image; the identity where None.
        """
        return sitk.Resample(
            image,
            self.size,
            transform or sitk.Transform(),
            sitk.sitkNearestNeighbor if nearest else sitk.sitkLinear,
            self.origin,
            self.spacing,
            self.direction,
            outside,
        )


def cast_rounded(image: sitk.Image, pixel_type: int) -> sitk.Image:
    """An image of floating point as one of another pixel type: where that is whole, rounded and kept in its range."""
    if pixel_type in (sitk.sitkFloat32, sitk.sitkFloat64):
        return sitk.Cast(image, pixel_type)
    # SimpleITK's Round is wrong beyond 32 bits, and its Cast wraps around.
    kind = sitk.GetArrayViewFromImage(sitk.Image([1, 1, 1], pixel_type)).dtype
    low, high = (float(np.clip(bound, -EXACT, EXACT)) for bound in (np.iinfo(kind).min, np.iinfo(kind).max))
    array = np.clip(np.floor(sitk.GetArrayViewFromImage(image) + 0.5), low, high).astype(kind)
    whole = sitk.GetImageFromArray(array)
    whole.CopyInformation(image)
    return whole


EXACT = 2**53  # up to here float64 knows every whole number
SET_UPRIGHT = "set_upright"  # metadata of an image that is not on the grid of its file any more
RIGHT_ANGLES = 5e-4  # largest difference of a matrix of directions from a rotation


def upright(image: sitk.Image, is_label: bool = False) -> sitk.Image:
    """An image whose axes are at right angles: as it is, or resampled on a grid that holds all of it.

    The first axis stays, the others are turned the least. What lies outside gets the lowest grey value, or label 0.

    Args:
        image: image whose directions may be sheared, as of a tilted gantry; it is left as it is.
        is_label: whether the values are labels, which are not interpolated.

    Returns:
        Image of the same pixel type, its directions exactly at right angles.
    """
    frame = Frame.of(image)
    direction = np.reshape(frame.direction, (3, 3))
    turned, triangle = np.linalg.qr(direction)
    turned = turned * np.sign(np.diag(triangle))
    if np.abs(direction - turned).max() <= RIGHT_ANGLES:
        if np.abs(direction - turned).max() == 0:
            return image
        straight = sitk.Image(image)
        straight.SetDirection(turned.ravel().tolist())
        return straight
    corners = frame.to_physical(list(itertools.product(*((0, n - 1) for n in frame.size)))) - frame.origin
    spacing = np.abs(np.diag(turned.T @ frame.matrix))
    voxels = corners @ turned / spacing
    low, high = np.floor(voxels.min(axis=0) + 1e-6), np.ceil(voxels.max(axis=0) - 1e-6)
    grid = Frame(
        tuple(int(n) for n in high - low + 1),
        tuple(float(mm) for mm in spacing),
        tuple(float(mm) for mm in frame.origin + turned @ (low * spacing)),
        tuple(float(part) for part in turned.ravel()),
    )
    if is_label:
        resampled = grid.resample(image, nearest=True)
    else:
        lowest = float(sitk.GetArrayViewFromImage(image).min())
        resampled = grid.resample(sitk.Cast(image, sitk.sitkFloat64), outside=lowest)
        resampled = cast_rounded(resampled, image.GetPixelID())
    resampled.SetMetaData(SET_UPRIGHT, "yes")
    return resampled
