"""FreeSurfer's volumes, .mgz and .mgh, which SimpleITK does not read: by nibabel, where it is installed."""

import zlib
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from data_util.scans.frame import Frame
from errors import UserError

ENDINGS = (".mgz", ".mgh")


def read_freesurfer(path: str | Path) -> sitk.Image:
    """Read a volume of FreeSurfer.

    Args:
        path: .mgz or .mgh file.

    Returns:
        Three-dimensional image on the file's own grid.

    Raises:
        UserError: nibabel is not installed, or the file is no single volume or is damaged.
    """
    try:
        import nibabel
    except ImportError:
        raise UserError(
            f"{path}: FreeSurfer's format needs nibabel; pip install nibabel, or convert it to NIfTI by mri_convert"
        ) from None
    try:
        volume = nibabel.load(path)
        array = np.asanyarray(volume.dataobj)
        to_ras = np.asarray(volume.affine, np.float64)
    except (nibabel.filebasedimages.ImageFileError, OSError, EOFError, ValueError, zlib.error) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: cannot be read as a volume of FreeSurfer ({reason}); copy it again") from error
    if array.ndim != 3:
        raise UserError(f"{path}: has {array.ndim} dimensions; give one three-dimensional volume of grey values")
    matrix = np.diag((-1, -1, 1)) @ to_ras[:3, :3]  # FreeSurfer's places are RAS
    spacing = np.linalg.norm(matrix, axis=0)
    frame = Frame(
        array.shape,
        tuple(spacing.tolist()),
        tuple((to_ras[:3, 3] * (-1, -1, 1)).tolist()),
        tuple((matrix / spacing).ravel().tolist()),
    )
    return frame.put(array.astype(array.dtype.newbyteorder("=")))
