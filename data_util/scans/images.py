"""Every scan comes through here: a file, a folder of DICOM slices or a SimpleITK image, checked, as a SimpleITK image.

What is no single volume of finite grey values at known places is refused. `read_native` keeps the axes of the file;
`read_image` turns them to LPS, the orientation of DICOM: the axes run to the patient's left, back and head (posterior,
superior), and the direction matrix is the identity wherever the scan was not taken askew. Arrays are [x, y, z].
"""

import gzip
import os
import sys
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

import files
from data_util.scans import nibabel_formats, text_headers
from data_util.scans.dicom import SOURCE_TAGS, find_series, read_series, series_of_file
from data_util.scans.dicom_slices import is_dicom
from data_util.scans.frame import Frame, upright
from errors import UserError

# How the names of image files end; .nhdr, .mhd and .hdr are headers, whose voxels are in a file beside them.
ENDINGS = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".hdr", ".mgz", ".mgh")
FORMATS = "DICOM, NIfTI, Analyze, NRRD, MHA or MGZ"
# SimpleITK's names of the formats that it reads without passing over damage.
CHECKED_BY_SIMPLEITK = ("MetaImageIO", "NrrdImageIO")
GREY_TYPES = (
    *(sitk.sitkInt8, sitk.sitkUInt8, sitk.sitkInt16, sitk.sitkUInt16, sitk.sitkInt32, sitk.sitkUInt32),
    *(sitk.sitkInt64, sitk.sitkUInt64, sitk.sitkFloat32, sitk.sitkFloat64),
)
NIFTI_HEADER = 352  # bytes before the voxels
_silence = threading.Lock()
Source = Any  # a path (str, Path) or a SimpleITK image


def read_image(source: Source, series: str | None = None, is_label: bool = False) -> sitk.Image:
    """Read a scan as `read_native` does, with its axes turned to LPS.

    Args:
        source: image file, folder of DICOM slices, or SimpleITK image.
        series: id of the series to read of a folder.
        is_label: whether the values are labels, which are not interpolated.

    Returns:
        Three-dimensional image, as of `orient`.

    Raises:
        UserError: as `read_native`.

    Example:
        >>> image = sitk.GetImageFromArray(np.zeros((4, 5, 6), np.int16))  # [z, y, x]
        >>> image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
        >>> turned = read_image(image)
        >>> turned.GetDirection()[0], turned.GetOrigin()
        (1.0, (-5.0, -4.0, 0.0))
    """
    return orient(read_native(source, series, is_label))


def read_native(source: Source, series: str | None = None, is_label: bool = False) -> sitk.Image:
    """Read a scan on its own grid, its axes as they are in its file.

    A scan whose axes are not at right angles, such as one of a tilted gantry, is resampled on an upright grid.

    Args:
        source: image file, folder of DICOM slices, or SimpleITK image.
        series: id of the series to read of a folder; None for the one with most slices.
        is_label: whether the values are labels, which are not interpolated.

    Returns:
        Three-dimensional image of finite grey values in their unit (CT: HU). That of a DICOM series carries the patient
        and study of its source, as `dicom.SOURCE_TAGS` lists them.

    Raises:
        UserError: there is nothing, no image, or not a single volume of finite grey values at known places.

    Example:
        >>> read_native(sitk.GetImageFromArray(np.zeros((4, 5, 6), np.int16))).GetSize()
        (6, 5, 4)
    """
    if isinstance(source, sitk.Image):
        image, where = source, "the image"
    elif isinstance(source, str | os.PathLike):
        image, where = _read_path(Path(source), series), str(source)
    else:
        raise UserError(
            f"a scan of type {type(source).__name__} has no place in the patient; give a file, a folder of DICOM "
            f"slices or "
            "a SimpleITK image with spacing, origin and direction"
        )
    if image.GetDimension() == 4 and image.GetSize()[3] == 1:
        image = image[..., 0]
    _check(image, where)
    return _with_tags(upright(image, is_label), image)


def _read_path(path: Path, series: str | None) -> sitk.Image:
    if not path.exists():
        kind = "a link to a file that is not there" if path.is_symlink() else "no such file or folder"
        raise UserError(f"{path}: {kind}; give an image file or a folder of DICOM slices")
    if path.is_dir():
        return read_series(find_series(path, series))
    if series is not None:
        raise UserError(f"{path} is a file, which has no series {series!r}; name a series of a DICOM folder only")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: is empty, a file of 0 bytes; copy or write it again")
    if path.name.lower().endswith(nibabel_formats.ENDINGS):
        return nibabel_formats.read_volume(path)
    if is_dicom(path):
        return read_series(series_of_file(path))
    return _read_by_simpleitk(path)


def _read_by_simpleitk(path: Path) -> sitk.Image:
    """Read a MetaImage or NRRD file: of others SimpleITK does not tell whether they are cut short."""
    reader = sitk.ImageFileReader()
    try:
        reader.SetImageIO(reader.GetImageIOFromFileName(str(path)))
        reader.SetFileName(str(path))
        if reader.GetImageIO() not in CHECKED_BY_SIMPLEITK:
            raise UserError(f"{path}: cannot be read as an image; give {FORMATS}, or convert it to one of them")
        text_headers.check_header(path)
        return reader.Execute()
    except RuntimeError as error:
        raise UserError(f"{path}: cannot be read as an image; give {FORMATS} ({reason_of(error)})") from error


def reason_of(error: Exception) -> str:
    """The line of a SimpleITK error that says most."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line.split("): ")[-1] for line in lines if "ERROR: " in line and "): " in line]
    return (said or lines[-1:] or ["of unknown cause"])[0]


def _check(image: sitk.Image, where: str) -> None:
    """Raise UserError where an image is no single volume of finite grey values at known places."""
    remedy = "give one three-dimensional volume of grey values"
    if image.GetPixelID() not in GREY_TYPES or image.GetDimension() != 3:
        components = image.GetNumberOfComponentsPerPixel()
        values = f"{components} value{'s' * (components > 1)} per voxel of type {image.GetPixelIDTypeAsString()}"
        raise UserError(f"{where}: has {image.GetDimension()} dimensions and {values}; {remedy}")
    size = "x".join(map(str, image.GetSize()))
    if min(image.GetSize()) < 2:
        what = "no voxels" if min(image.GetSize()) < 1 else "a single slice, not a volume"
        raise UserError(f"{where}: has {size} voxels, {what}; {remedy}")
    frame = Frame.of(image)
    numbers = np.concatenate([frame.spacing, frame.origin, frame.direction])
    if not np.isfinite(numbers).all() or min(frame.spacing) <= 0 or np.linalg.matrix_rank(frame.matrix) < 3:
        raise UserError(
            f"{where}: has voxels of {frame.spacing} mm at {frame.origin} along {frame.direction}, which no scan has; "
            "convert it again from its source"
        )
    if image.GetPixelID() in (sitk.sitkFloat32, sitk.sitkFloat64):
        wrong = int(np.count_nonzero(~np.isfinite(sitk.GetArrayViewFromImage(image))))
        if wrong:
            raise UserError(
                f"{where}: has grey values that are no numbers (NaN or infinite), in {wrong} of its voxels; replace "
                "them, by air for one"
            )


def _with_tags(image: sitk.Image, source: sitk.Image) -> sitk.Image:
    for tag in filter(source.HasMetaDataKey, SOURCE_TAGS):
        image.SetMetaData(tag, source.GetMetaData(tag))
    return image


def orient(image: sitk.Image) -> sitk.Image:
    """Turn an image to LPS.

    Args:
        image: three-dimensional image.

    Returns:
        The image with its axes flipped and swapped; every voxel keeps its place in the patient.
    """
    return _with_tags(sitk.DICOMOrient(image, "LPS"), image)


def to_array(image: sitk.Image) -> np.ndarray:
    """Return the voxels as an array [x, y, z] of the image's own type."""
    return np.ascontiguousarray(sitk.GetArrayViewFromImage(image).transpose(2, 1, 0))


def match_labels(labels: sitk.Image, image: sitk.Image) -> sitk.Image:
    """Return a label image on the grid of another image, by place in the patient: nearest voxel, 0 outside."""
    return sitk.Resample(labels, image, sitk.Transform(), sitk.sitkNearestNeighbor, 0)


def write_image(image: sitk.Image, path: str | os.PathLike) -> None:
    """Write an image, compressed, whole or not at all.

    Args:
        image: SimpleITK image.
        path: where to; the format follows the name (.nii.gz, .nrrd, .mha).

    Raises:
        UserError: it cannot be written.
    """
    with files.whole_file(path, RuntimeError) as new:
        new.touch()  # a disk without room for a name is told by the system, but not by every format's library
        try:
            with _silent_library():
                sitk.WriteImage(image, str(new), useCompression=True)
        except RuntimeError as error:
            if files.is_full(error):
                raise
            raise UserError(f"cannot write {path} as an image ({reason_of(error)}); check the file's ending") from error
        _check_whole(new.parent, image)


def _check_whole(folder: Path, image: sitk.Image) -> None:
    """Raise RuntimeError unless new NIfTI or Analyze files hold all voxels: their library passes over a full disk."""
    voxels = image.GetNumberOfPixels() * image.GetNumberOfComponentsPerPixel() * image.GetSizeOfPixelComponent()
    for file in folder.iterdir():
        name = file.name.lower().removesuffix(".gz")
        header = NIFTI_HEADER if name.endswith(".nii") else 0
        if name.endswith((".nii", ".img")) and not _has_bytes(file, header + voxels):
            raise RuntimeError(f"wrote only {file.stat().st_size} bytes of it")


def _has_bytes(path: Path, wanted: int) -> bool:
    """Whether a file has so many bytes; a packed one is unpacked, and must end as it should."""
    if path.suffix.lower() != ".gz":
        return path.stat().st_size >= wanted
    length = 0
    try:
        with gzip.open(path) as file:
            while block := file.read(2**22):
                length += len(block)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        return False
    return length >= wanted


@contextmanager
def _silent_library() -> Iterator[None]:
    """Keep the NIfTI library's own words off standard error: what they tell is raised, in a line.

    The library writes to the file descriptor, past Python. What others write there meanwhile is handed on.
    """
    with _silence, os.fdopen(os.memfd_create("stderr"), "w+b") as said:
        sys.stderr.flush()
        before = os.dup(2)
        os.dup2(said.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(before, 2)
            os.close(before)
            said.seek(0)
            for line in said:
                if not line.startswith(b"** ERROR"):
                    os.write(2, line)
