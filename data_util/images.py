"""Medical images as SimpleITK images: DICOM folders and NIfTI, NRRD or MHA files, read into one orientation, and back.

The one orientation is LPS, that of DICOM: the axes run to the patient's left, back and head (posterior, superior), and
the direction matrix is the identity wherever the scan was not taken askew. Arrays are [x, y, z] along these axes.
"""

from pathlib import Path

import numpy as np
import SimpleITK as sitk

from errors import UserError


def read_image(path):
    """Read a scan, a DICOM folder or an image file: str or Path -> three-dimensional SimpleITK image in LPS.

    Of a folder the series with most slices is read, ordered by position; grey values come in their unit (CT: HU).
    Raises UserError where there is nothing, no image, or one that is not a single volume of plain grey values.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; give an image file or a folder of DICOM slices")
    source = _largest_series(path) if path.is_dir() else str(path)
    try:
        image = sitk.ReadImage(source)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"{path}: cannot be read as an image; give DICOM, NIfTI, NRRD or MHA ({reason})") from error
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        kind = f"{image.GetDimension()} dimensions and {image.GetNumberOfComponentsPerPixel()} values a voxel"
        raise UserError(f"{path}: has {kind}; give one three-dimensional volume of grey values")
    return orient(image)


def _largest_series(folder):
    """List the files of the folder's largest DICOM series, ordered by position. A series' id may be empty.

    An empty id asks GDCM for its first series, and sorts first: so it is that very series where there is one.
    """
    reader = sitk.ImageSeriesReader
    warns = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # of finding none, which the error below says better
    ids = reader.GetGDCMSeriesIDs(str(folder))
    sitk.ProcessObject.SetGlobalWarningDisplay(warns)
    if not ids:
        raise UserError(f"{folder}: no DICOM slices in this folder; give the folder that holds them, or an image file")
    return max((reader.GetGDCMSeriesFileNames(str(folder), i) for i in ids), key=len)


def orient(image):
    """Return the image with its axes flipped and swapped to LPS; every voxel keeps its place in the patient."""
    return sitk.DICOMOrient(image, "LPS")


def to_array(image):
    """Return the voxels as a NumPy array [x, y, z] of the image's own type."""
    return np.ascontiguousarray(sitk.GetArrayViewFromImage(image).transpose(2, 1, 0))


def from_array(array, like):
    """Return an array [x, y, z] as a SimpleITK image with the geometry (spacing, origin, direction) of another."""
    image = sitk.GetImageFromArray(np.asarray(array).transpose(2, 1, 0))
    image.CopyInformation(like)
    return image


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
