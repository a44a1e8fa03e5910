"""A scan and what the network sees of it."""

from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk

from data_util.scans.frame import Frame
from data_util.scans.images import match_labels, to_array
from data_util.scans.preprocessing import find_frame, find_region, fitting_size, prepare
from data_util.scans.regions import doubts
from data_util.scans.view import View
from errors import UserError


@dataclass(frozen=True, eq=False)
class PreparedScan:
    """A scan and the volume that the network sees of it.

    Attributes:
        image: the scan, in LPS.
        file_frame: `Frame` of the scan's file, its axes as they are there.
        region: bool [x, y, z] on the image's grid, the organ found or given; None where the whole scan is taken.
        frame: `Frame` of the volume, its axes as the network's.
        volume: uint8 [X, Y, Z].
        window: (level, width) of the grey values that the volume shows.
        doubts: sentences on what is unusual about the region found.
    """

    image: sitk.Image
    file_frame: Frame
    region: np.ndarray | None
    frame: Frame
    volume: np.ndarray
    window: tuple[float, float]
    doubts: list[str]

    @property
    def box(self) -> np.ndarray:
        """Corners of the frame in voxels of the image, float64 (low [3], high [3])."""
        corners = self.frame.to_physical(np.array([(0, 0, 0), np.subtract(self.frame.size, 1)]))
        return np.sort(Frame.of(self.image).to_voxel(corners), axis=0)

    def in_lps(self, array: np.ndarray) -> np.ndarray:
        """An array [X, Y, Z] on the frame, or a flow [X, Y, Z, 3], with its axes turned to LPS."""
        signs = np.sign(np.diag(np.linalg.solve(Frame.of(self.image).matrix, self.frame.matrix)))
        turned = np.flip(array, tuple(np.flatnonzero(signs < 0).tolist()))
        return turned * signs.astype(np.float32) if array.ndim == 4 else turned


def prepare_scan(
    role: str,
    image: sitk.Image,
    file_frame: Frame,
    mask: sitk.Image | None,
    view: View,
    size: tuple[int, ...] | None,
) -> PreparedScan:
    """Prepare a scan for the network.

    Args:
        role: 'fixed' or 'moving', for messages.
        image: the scan, in LPS.
        file_frame: frame of its file.
        mask: label image of what to crop to, on whatever grid; None to find it.
        view: how the network sees scans.
        size: (X, Y, Z) of the volume; None for one that fits the scan, by `fitting_size`.

    Returns:
        The `PreparedScan`.

    Raises:
        UserError: what `find_region`, `find_frame` and `prepare` raise, with the role in front.
    """
    unusual: list[str] = []
    try:
        if mask is not None:
            region = to_array(match_labels(mask, image)) != 0
            if not region.any() and sitk.GetArrayViewFromImage(mask).any():
                raise UserError("the mask marks no voxel where the scan lies; does it have the scan's geometry?")
        else:
            region = find_region(image, view.crop)
            if region is not None:
                unusual = doubts(image, region, view.crop)
        frame = find_frame(image, view, size or fitting_size(image, view, region), region)
        volume, shown = prepare(image, frame, view)
    except UserError as error:
        raise UserError(f"{role} scan: {error}") from error
    return PreparedScan(image, file_frame, region, frame, volume, shown, unusual)
