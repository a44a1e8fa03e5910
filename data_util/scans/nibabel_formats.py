"""NIfTI, Analyze and FreeSurfer's volumes, read by nibabel: it tells what SimpleITK hides.

SimpleITK fills the end of a file that was cut short with zeros, makes zeros of NaN, and places a scan by its qform
where the NIfTI standard gives the sform precedence.
"""

import gzip
import re
import warnings
import zlib
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk

from data_util.scans.frame import Frame, upright
from errors import UserError

ENDINGS = (".nii", ".nii.gz", ".hdr", ".hdr.gz", ".img", ".img.gz", ".mgz", ".mgh")
MILLIMETRES = {"meter": 1000.0, "micron": 0.001}  # per unit of a header, where it is not mm
GZIP = b"\x1f\x8b"
PLAIN = tuple(size.to_bytes(4, order) for size in (348, 540) for order in ("little", "big"))  # a header's first number
_DAMAGE = (
    nibabel.filebasedimages.ImageFileError,
    nibabel.spatialimages.HeaderDataError,
    nibabel.wrapstruct.WrapStructError,
    OSError,
    EOFError,
    ValueError,
    OverflowError,
    zlib.error,
)


def read_volume(path: str | Path) -> sitk.Image:
    """Read a volume of these formats.

    Args:
        path: file whose name ends in one of `ENDINGS`; of a pair .hdr and .img either.

    Returns:
        Three-dimensional image on the file's own grid, set upright where its axes are not at right angles.

    Raises:
        UserError: the file is damaged, cut short or misnamed, no single volume of plain grey values, or lies nowhere.
    """
    path = Path(path)
    _check_compression(path)
    nibabel.imageglobals.logger.setLevel("CRITICAL")  # what matters of its remarks is an error here
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            volume = nibabel.load(path)
            _check_whole(path)
            array = np.asanyarray(volume.dataobj)
    except _DAMAGE as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{path}: cannot be read as an image, perhaps cut short or damaged; get the file again ({reason})"
        ) from error
    return upright(_frame_of(path, volume, array).put(_plain(path, array)))


def _check_compression(path: Path) -> None:
    """Raise where the name does not say whether the file is compressed."""
    try:
        with path.open("rb") as file:
            begin = file.read(4)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    compressed, named = begin.startswith(GZIP), path.suffix.lower() in (".gz", ".mgz")
    if compressed and not named:
        raise UserError(f"{path}: is compressed, which its name does not say; rename it to {path.name}.gz")
    if begin in PLAIN and named:
        raise UserError(f"{path}: is not compressed, though its name says so; rename it to {path.stem}")


def _check_whole(path: Path) -> None:
    """Read a compressed file to its end, where its checksum is."""
    if path.suffix.lower() in (".gz", ".mgz"):
        with gzip.open(path) as file:
            while file.read(2**22):
                pass


def _plain(path: Path, array: np.ndarray) -> np.ndarray:
    """The voxels [x, y, z], if they are finite numbers of one volume, in a type of this machine."""
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 3:
        raise UserError(f"{path}: has {array.ndim} dimensions {array.shape}; give one three-dimensional volume")
    if array.dtype.kind not in "iufb":
        kind = "complex numbers" if array.dtype.kind == "c" else "several values per voxel, such as colours"
        raise UserError(f"{path}: has {kind}; give one volume of grey values")
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype in (np.float16, np.longdouble) or array.dtype.kind == "b":
        array = array.astype(np.float32 if array.dtype.kind == "f" else np.uint8)
    return array


def _frame_of(path: Path, volume: nibabel.spatialimages.SpatialImage, array: np.ndarray) -> Frame:
    """Where the voxels lie, in LPS: by the sform, else the qform; without both as SimpleITK places them."""
    is_nifti = isinstance(volume, nibabel.nifti1.Nifti1Pair)
    codes = [int(volume.header[name]) for name in ("sform_code", "qform_code")] if is_nifti else [0, 0]
    if isinstance(volume, nibabel.analyze.AnalyzeImage) and codes[0] <= 0:
        _check_spacing(path)
    if isinstance(volume, nibabel.analyze.AnalyzeImage) and max(codes) <= 0:
        try:
            frame = Frame.of(sitk.ReadImage(str(path)))
        except RuntimeError as error:
            raise UserError(f"{path}: does not say where its voxels lie; convert it to NIfTI or NRRD") from error
        return Frame(*(tuple(part[:3]) for part in (frame.size, frame.spacing, frame.origin)), _cut(frame.direction))
    unit = volume.header.get_xyzt_units()[0] if is_nifti else "mm"
    to_lps = np.diag((-1.0, -1, 1)) @ np.asarray(volume.affine, np.float64)[:3] * MILLIMETRES.get(unit, 1.0)
    matrix, origin = to_lps[:, :3], to_lps[:, 3]
    spacing = np.linalg.norm(matrix, axis=0)
    if not np.isfinite(to_lps).all() or not abs(np.linalg.det(matrix)) > 1e-9:
        shown = ", ".join(f"{mm:g}" for mm in spacing)
        raise UserError(f"{path}: its voxels are {shown} mm along their axes and span no volume; mend its header")
    return Frame(
        array.shape[:3], tuple(spacing.tolist()), tuple(origin.tolist()), tuple((matrix / spacing).ravel().tolist())
    )


def _check_spacing(path: Path) -> None:
    """Raise where the header's own voxel sizes are not above 0; nibabel makes them so."""
    header = path.with_name(re.sub(r"\.img(\.gz)?$", r".hdr\1", path.name, flags=re.IGNORECASE))
    with (gzip.open if header.suffix.lower() == ".gz" else open)(header, "rb") as file:
        begin = file.read(540)
    order = "<" if begin[:4] in (PLAIN[0], PLAIN[2]) else ">"
    is_second = int.from_bytes(begin[:4], "little" if order == "<" else "big") == 540
    sizes = np.frombuffer(begin, f"{order}f8" if is_second else f"{order}f4", 4, 104 if is_second else 76)[1:]
    if not (np.isfinite(sizes).all() and (np.abs(sizes) > 0).all()):
        shown = ", ".join(f"{mm:g}" for mm in sizes)
        raise UserError(f"{path}: its voxels are {shown} mm; they must be above 0: mend its header (pixdim)")


def _cut(direction: tuple) -> tuple:
    """The three-dimensional part of a matrix of directions."""
    n = round(len(direction) ** 0.5)
    return tuple(np.reshape(direction, (n, n))[:3, :3].ravel().tolist())
