"""Medical images as SimpleITK images: DICOM folders and NIfTI, NRRD or MHA files, read into one orientation, and back.

The one orientation is LPS, that of DICOM: the axes run to the patient's left, back and head (posterior, superior), and
the direction matrix is the identity wherever the scan was not taken askew. Arrays are [x, y, z] along these axes.
"""

from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from data_util.scans import nibabel_formats, text_headers
from data_util.scans.dicom import SOURCE_TAGS, find_series, read_series, series_of_file
from data_util.scans.dicom_slices import is_dicom
from data_util.scans.frame import upright
from errors import UserError

# How the names of image files end; .nhdr, .mhd and .hdr are headers, whose voxels are in a file beside them.
ENDINGS = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".hdr", ".mgz", ".mgh")


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
        return _checked(read_series(find_series(path, series)), str(path))
    if series is not None:
        raise UserError(f"{path} is a file, which has no series {series!r}; name a series of a DICOM folder only")
    if path.name.lower().endswith(nibabel_formats.ENDINGS):
        return _checked(nibabel_formats.read_volume(path), str(path))
    if is_dicom(path):
        return _checked(read_series(series_of_file(path)), str(path))
    if path.name.lower().endswith(text_headers.ENDINGS):
        text_headers.check_header(path)
    return _checked(_read_file(path), str(path))


def _read_file(path: Path) -> sitk.Image:
    """Read a file by SimpleITK."""
    try:
        return sitk.ReadImage(str(path))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"{path}: cannot be read as an image; give DICOM, NIfTI, NRRD or MHA ({reason})") from error


def _checked(image: sitk.Image, where: str) -> sitk.Image:
    """The image, if it is one volume of finite grey values whose voxels lie in space, its axes at right angles."""
    size = image.GetSize()
    if image.GetDimension() == 4 and size[3] == 1:
        image, size = image[..., 0], size[:3]
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        kind = f"{image.GetDimension()} dimensions and {image.GetNumberOfComponentsPerPixel()} values per voxel"
        raise UserError(f"{where}: has {kind}; give one three-dimensional volume of grey values")
    if "complex" in image.GetPixelIDTypeAsString():
        raise UserError(f"{where}: has complex numbers; give one volume of grey values, such as their magnitude")
    if min(size) < 2:
        shown = " x ".join(map(str, size))
        raise UserError(f"{where}: has {shown} voxels, a single slice or less; give the whole volume")
    if not (np.isfinite(image.GetSpacing()).all() and min(image.GetSpacing()) > 0):
        raise UserError(f"{where}: has voxels of {image.GetSpacing()} mm; mend its spacing")
    if not (np.isfinite(image.GetOrigin()).all() and np.isfinite(image.GetDirection()).all()):
        raise UserError(f"{where}: has an origin or direction that is no number; mend its header")
    if not np.isfinite(sitk.GetArrayViewFromImage(image)).all():
        raise UserError(f"{where}: has grey values that are no numbers (NaN or infinite); replace them, by air for one")
    return upright(image)


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
