"""Medical images as SimpleITK images: DICOM folders and NIfTI, NRRD or MHA files, read into one orientation, and back.

The one orientation is LPS, that of DICOM: the axes run to the patient's left, back and head (posterior, superior), and
the direction matrix is the identity wherever the scan was not taken askew. Arrays are [x, y, z] along these axes.
"""

from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from data_util.scans.dicom import SOURCE_TAGS, find_series, read_file, read_series
from data_util.scans.freesurfer import ENDINGS as FREESURFER_ENDINGS
from data_util.scans.freesurfer import read_freesurfer
from errors import UserError

# How the names of image files end; .nhdr, .mhd and .hdr are headers, whose voxels are in a file beside them.
ENDINGS = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".hdr", *FREESURFER_ENDINGS)


def read_image(source: Any, series: str | None = None) -> sitk.Image:
    """Read a scan as `read_native` does, with its axes turned to LPS."""
    return orient(read_native(source, series))


def read_native(source: Any, series: str | None = None) -> sitk.Image:
    """Read a scan on its own grid, its axes as they are in its file.

    Of a DICOM folder the series with this id is read, or else the one with most slices; grey values come in their unit
    (CT: HU). An image of a DICOM series carries the patient and study of its source, as `dicom.source_tags` reads them.

    Args:
        source: image file or DICOM folder (str or Path), or a SimpleITK image.
        series: id of a series of the folder.

    Returns:
        Three-dimensional SimpleITK image of finite grey values.

    Raises:
        UserError: there is nothing, no image, or not a single volume of plain grey values, and as `dicom.read_series`.
    """
    if isinstance(source, sitk.Image):
        return _checked(source, "the image")
    if not isinstance(source, str | Path):
        raise UserError(f"a scan is a path or a SimpleITK image, not {type(source).__name__}; convert it first")
    path = Path(source)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; give an image file or a folder of DICOM slices")
    if path.is_dir():
        return read_series(find_series(path, series))
    if series is not None:
        raise UserError(f"{path} is a file, which has no series {series!r}; name a series of a DICOM folder only")
    image = read_freesurfer(path) if path.suffix.lower() in FREESURFER_ENDINGS else read_file(path)
    return _checked(image, str(path))


def _checked(image: sitk.Image, where: str) -> sitk.Image:
    """The image, if it is one volume of finite grey values."""
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        kind = f"{image.GetDimension()} dimensions and {image.GetNumberOfComponentsPerPixel()} values a voxel"
        raise UserError(f"{where}: has {kind}; give one three-dimensional volume of grey values")
    if not np.isfinite(sitk.GetArrayViewFromImage(image)).all():
        raise UserError(f"{where}: has grey values that are no numbers (NaN or infinite); replace them, by air for one")
    return image


def orient(image):
    """Return the image with its axes flipped and swapped to LPS; every voxel keeps its place in the patient."""
    turned = sitk.DICOMOrient(image, "LPS")
    for tag in filter(image.HasMetaDataKey, SOURCE_TAGS):
        turned.SetMetaData(tag, image.GetMetaData(tag))
    return turned


def to_array(image):
    """Return the voxels as a NumPy array [x, y, z] of the image's own type."""
    return np.ascontiguousarray(sitk.GetArrayViewFromImage(image).transpose(2, 1, 0))


def match_labels(labels, image):
    """Return a label image on the grid of another image, by place in the patient: nearest voxel, 0 outside."""
    return sitk.Resample(labels, image, sitk.Transform(), sitk.sitkNearestNeighbor, 0)


def write_image(image, path):
    """Write a SimpleITK image; the format follows the name (.nii.gz, .nrrd, .mha). Raises UserError where it cannot."""
    try:
        sitk.WriteImage(image, str(path), useCompression=True)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"{path}: cannot be written as an image; check folder and file ending ({reason})") from error
