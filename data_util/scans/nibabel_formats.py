"""NIfTI, Analyze and FreeSurfer's volumes (.mgz): files whose headers nibabel reads.

SimpleITK hides what is wrong with such a file: what is missing of a file that is cut short reads as 0, and so do NaN
and infinite values; a sheared sform is passed over for the qform. Here the voxels are those of the file, and their
places those of the header, of which NIfTI's standard prefers the sform.
"""

import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from nibabel.analyze import AnalyzeHeader
from nibabel.filebasedimages import ImageFileError
from nibabel.freesurfer.mghformat import MGHHeader
from nibabel.nifti1 import Nifti1Header, Nifti1PairHeader
from nibabel.nifti2 import Nifti2Header, Nifti2PairHeader
from nibabel.spatialimages import HeaderDataError
from nibabel.spm99analyze import Spm99AnalyzeHeader, Spm99AnalyzeImage
from scipy.io.matlab import MatReadError  # type: ignore[import-untyped]

from data_util.scans.frame import Frame
from errors import UserError

ENDINGS = (".nii", ".nii.gz", ".hdr", ".img", ".hdr.gz", ".img.gz", ".mgz", ".mgh", ".mgh.gz")
DAMAGE = (HeaderDataError, ImageFileError, MatReadError, ValueError, KeyError, TypeError, OverflowError, OSError)
GZIP = b"\x1f\x8b"
TO_LPS = np.diag((-1.0, -1.0, 1.0))  # the places of these formats are RAS
VECTORS = (1006, 1007)  # NIfTI's intents: displacements, vectors
MM_PER_UNIT = {1: 1000.0, 2: 1.0, 3: 0.001}  # NIfTI's codes of metre, millimetre and micrometre


def read_volume(path: Path) -> sitk.Image:
    """Read one volume.

    Args:
        path: file with one of `ENDINGS`; of a pair .hdr and .img either.

    Returns:
        Three-dimensional image on the file's own grid, whose axes need not be at right angles.

    Raises:
        UserError: the file is damaged, cut short, or no single volume of grey values at known places.
    """
    header_file, data_file = _pair(path)
    content = read_whole(header_file)
    try:
        header = _header_class(path, content).from_fileobj(io.BytesIO(content), check=False)
        shape, kind, offset = header.get_data_shape(), header.get_data_dtype(), header.get_data_offset()
        slope, intercept = (None, None) if isinstance(header, MGHHeader) else _scaling(header)
        matrix, origin = _geometry(header, data_file)
    except DAMAGE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: its header cannot be right ({reason}); convert the scan again") from error
    if isinstance(header, Nifti1Header) and header.is_single:
        offset = max(offset, header.single_vox_offset)  # 0 is a way to say that the voxels follow the header
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3 or kind.names is not None or kind.kind == "c":
        values = "colours" if kind.names is not None else "complex numbers" if kind.kind == "c" else "numbers"
        raise UserError(
            f"{path}: has {len(shape)} dimensions of {values}; give one three-dimensional volume of grey values"
        )
    voxels = _voxels(data_file, content if data_file == header_file else read_whole(data_file), shape, kind, offset)
    if slope is not None:
        wide = kind.itemsize > 4 or (kind.kind in "iu" and kind.itemsize == 4)
        voxels = np.multiply(voxels, slope, dtype=np.float64 if wide else np.float32)
        voxels += intercept
    elif kind.itemsize > 8:
        voxels = voxels.astype(np.float64)
    spacing = np.linalg.norm(matrix, axis=0)
    if not (np.isfinite(matrix).all() and np.isfinite(origin).all() and (spacing > 0).all()):
        raise UserError(f"{path}: has voxels of {_text(spacing)} mm at {_text(origin)}; convert the scan again")
    frame = Frame(shape, tuple(spacing.tolist()), tuple(origin.tolist()), tuple((matrix / spacing).ravel().tolist()))
    return frame.put(voxels.astype(voxels.dtype.newbyteorder("="), copy=False))


def check_vectors(path: Path, remedy: str) -> None:
    """See that a NIfTI file holds a whole field of vectors in mm, as ITK reads it.

    Args:
        path: file with one of `ENDINGS`.
        remedy: what to give instead, for the message.

    Raises:
        UserError: the file is damaged, cut short, has NaN, or does not say that it has three numbers per voxel.
    """
    content = read_whole(path)
    try:
        header = _header_class(path, content).from_fileobj(io.BytesIO(content), check=False)
        shape, intent, kind = header.get_data_shape(), int(header["intent_code"]), header.get_data_dtype()
        count, offset = int(np.prod(shape, dtype=object)), int(header.get_data_offset())
    except (*DAMAGE, IndexError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: its header cannot be right ({reason}); {remedy}") from error
    if len(shape) != 5 or shape[3:] != (1, 3) or intent not in VECTORS:
        size = "x".join(map(str, shape))
        raise UserError(f"{path}: has {size} numbers of intent {intent}, which is no displacement field; {remedy}")
    if len(content) < (promised := offset + count * kind.itemsize):
        raise UserError(f"{path}: is cut short: {len(content)} bytes of {promised}; {remedy}")
    wrong = 0 if kind.kind != "f" else np.count_nonzero(~np.isfinite(np.frombuffer(content, kind, count, offset)))
    if wrong:  # SimpleITK would read them as 0
        raise UserError(f"{path}: has {wrong} numbers that are NaN or infinite, of {count}; {remedy}")


def _text(numbers: np.ndarray) -> str:
    return ", ".join(f"{number:g}" for number in numbers)


def _pair(path: Path) -> tuple[Path, Path]:
    """The files of a volume's header and of its voxels: the same one unless it is a pair, .hdr and .img."""
    name = path.name.lower().removesuffix(".gz")
    if not name.endswith((".hdr", ".img")):
        return path, path
    stem = path.name[: len(name) - 4]
    beside = {file.name.lower(): file for file in path.parent.iterdir() if file.name.startswith(stem)}
    files = []
    for ending, what in ((".hdr", "header"), (".img", "voxels")):
        names = (f"{stem}{ending}".lower(), f"{stem}{ending}.gz".lower())
        found = path if name.endswith(ending) else next((beside[name] for name in names if name in beside), None)
        if found is None:
            raise UserError(f"{path}: the {what} are missing; put {stem}{ending} beside it")
        files.append(found)
    return files[0], files[1]


def read_whole(path: Path) -> bytes:
    """Read a file, decompressed where it is gzip, whatever its name.

    Args:
        path: the file.

    Returns:
        Its content. What follows the compressed data is left out.

    Raises:
        UserError: it cannot be read, or its compressed data are damaged or cut short.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the file") from error
    if not content.startswith(GZIP):
        return content
    pieces, rest = [], content
    while rest.startswith(GZIP):  # a gzip file may have several members
        inflater = zlib.decompressobj(zlib.MAX_WBITS | 16)
        try:
            pieces.append(inflater.decompress(rest))
        except zlib.error as error:
            raise UserError(f"{path}: its compressed data are damaged ({error}); copy it again") from error
        if not inflater.eof:
            raise UserError(f"{path}: is cut short, its compressed data do not end; copy it again")
        rest = inflater.unused_data
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _header_class(path: Path, content: bytes) -> Any:
    """The class of nibabel for a header."""
    if path.name.lower().removesuffix(".gz").endswith((".mgh", ".mgz")):
        if content[:4] == b"\0\0\0\1" and len(content) >= 284:
            return MGHHeader
    elif content[344:348] in (b"n+1\0", b"ni1\0"):
        return Nifti1Header if content[344:347] == b"n+1" else Nifti1PairHeader
    elif content[4:8] in (b"n+2\0", b"ni2\0") and len(content) >= 540:
        return Nifti2Header if content[4:7] == b"n+2" else Nifti2PairHeader
    elif content[:4] in (b"\x5c\1\0\0", b"\0\0\1\x5c") and len(content) >= 348 and _pair(path)[0] != _pair(path)[1]:
        return Spm99AnalyzeHeader
    raise UserError(
        f"{path}: cannot be read as an image of the format that its name says, its header is of another; copy it "
        "again, or name it as its format needs"
    )


def _scaling(header: AnalyzeHeader) -> tuple[float | None, float | None]:
    """Slope and intercept from stored numbers to grey values; None where these are the stored numbers."""
    slope, intercept = header.get_slope_inter()
    if slope is None or (slope, intercept or 0) == (1, 0):
        return None, None
    return slope, intercept or 0.0


def _geometry(header: AnalyzeHeader | MGHHeader, data_file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Columns of mm per voxel and the place of the first voxel, LPS: float64 [3, 3] and [3]."""
    if isinstance(header, Nifti1Header):
        scale = MM_PER_UNIT.get(int(header["xyzt_units"]) & 7, 1.0)
        if header["sform_code"] > 0:
            affine = header.get_sform()
        elif header["qform_code"] > 0:
            affine = header.get_qform()
        else:
            affine = np.diag((*np.abs(header["pixdim"][1:4]).astype(float), 1.0))
    elif isinstance(header, Spm99AnalyzeHeader) and data_file.with_suffix(".mat").is_file():
        scale, affine = 1.0, Spm99AnalyzeImage.from_filename(data_file).affine  # SPM keeps the places in a third file
    else:
        scale, affine = 1.0, header.get_best_affine()
    affine = np.asarray(affine, np.float64)
    return TO_LPS @ affine[:3, :3] * scale, TO_LPS @ affine[:3, 3] * scale


def _voxels(path: Path, content: bytes, shape: tuple[int, ...], kind: np.dtype, offset: int) -> np.ndarray:
    """The stored numbers [x, y, z]."""
    count = int(np.prod([int(n) for n in shape], dtype=object))
    promised = int(offset) + count * kind.itemsize
    if min(shape) < 1 or offset < 0:
        raise UserError(f"{path}: its header promises {'x'.join(map(str, shape))} voxels; convert the scan again")
    if len(content) < promised:
        raise UserError(
            f"{path}: cannot be read as an image, it is cut short: {len(content)} bytes of the {promised} that its "
            f"header "
            "promises; copy it again"
        )
    return np.frombuffer(content, kind, count, int(offset)).reshape(shape, order="F")
