"""Files of transforms: the one reader of what ITK, ANTs, Slicer and FreeSurfer write, and the writer of our own.

All come out as ITK has them: from a place in the fixed scan to the one in the moving scan, in mm (LPS).

    .h5 .tfm .txt .mat       transforms of ITK and ANTs, composites too
    .lta                     a linear map of FreeSurfer: its source is the moving scan, its target the fixed one
    .nii .nii.gz .nrrd .mha  displacement fields: a vector in mm (LPS) per voxel; of eval.py also those in voxels
"""

import io
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import SimpleITK as sitk

from data_util.scans import lta, nibabel_formats, text_headers
from data_util.scans.frame import Frame
from data_util.scans.images import reason_of
from data_util.scans.transform_chain import field_transform, is_field, linear_map, parts
from errors import UserError
from files import whole_file

HDF5 = (".h5", ".hdf5")
ITK_ENDINGS = (*HDF5, ".tfm", ".txt", ".mat")
FIELD_ENDINGS = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd")
ENDINGS = (*ITK_ENDINGS, ".lta", *FIELD_ENDINGS)
IN_VOXELS = "_voxels"  # how the name of a field of eval.py ends whose scans have no known spacing
LEAST_DETERMINANT = 1e-6
ENDS = "registered"  # attribute of our own files: the two scans, as JSON
CHUNK = 2**16  # numbers that share a checksum


def read_transform(path: str | os.PathLike) -> sitk.Transform:
    """Read a transform.

    Args:
        path: file with one of `ENDINGS`.

    Returns:
        SimpleITK transform of three dimensions from fixed to moving places, all its numbers finite.

    Raises:
        UserError: there is no such file, or it holds no such transform, is damaged or cut short.

    Example:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp(), "shift.tfm")
        >>> sitk.WriteTransform(sitk.TranslationTransform(3, (1, 2, 3)), str(file))
        >>> read_transform(file).TransformPoint((10, 10, 10))
        (11.0, 12.0, 13.0)
    """
    path = Path(path)
    name = path.name.lower()
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a transform ({', '.join(ENDINGS)})")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: is empty, a file of 0 bytes; copy or write it again")
    if name.endswith(".lta"):
        transform = lta.read(path)
    elif name.endswith(ITK_ENDINGS):
        transform = _read_itk(path)
    elif name.endswith(FIELD_ENDINGS):
        transform = _read_field(path)
    else:
        raise UserError(f"{path}: is no transform by its name; known are {', '.join(ENDINGS)}")
    for part in parts(transform):
        _check(path, part)
    return transform


def read_linear(source: str | os.PathLike | sitk.Transform) -> tuple[np.ndarray, np.ndarray]:
    """Read a transform that is linear: matrix [3, 3] and offset [3] in mm (LPS), from fixed to moving places.

    Args:
        source: file with one of `ENDINGS`, or a SimpleITK transform.

    Raises:
        UserError: as `read_transform`, or it is not linear.
    """
    is_read = isinstance(source, sitk.Transform)
    transform = source if is_read else read_transform(source)
    try:
        return linear_map(transform)
    except UserError as error:
        raise UserError(f"{'the transform' if is_read else source}: {error}") from error


class End(NamedTuple):
    """One of the two scans that a transform is of.

    Attributes:
        role: 'fixed' or 'moving' in the registration that found it.
        frame: the grid of the scan's file.
    """

    role: str
    frame: Frame


def write_transform(transform: sitk.Transform, path: str | os.PathLike, ends: tuple[End, End] | None = None) -> None:
    """Write a transform of linear parts and displacement fields to an .h5 file as ITK does, smaller and with checksums.

    The vectors are stored as float32, half of what ITK itself takes; compressed, they would take two thirds of that,
    and ten times as long.

    Args:
        transform: SimpleITK transform.
        path: where to.
        ends: the scan that it leads from and the one that it leads to, which `read_ends` tells; None: not known.

    Raises:
        UserError: it cannot be written.
    """
    layers = parts(transform)[::-1]
    content = io.BytesIO()  # HDF5 cannot close a file that does not fit on the disk
    with h5py.File(content, "w") as file:
        group = file.create_group("TransformGroup")
        if ends is not None:
            group.attrs[ENDS] = json.dumps([[end.role, vars(end.frame)] for end in ends])
        _write_type(group.create_group("0"), "CompositeTransform")
        for k, part in enumerate(layers, 1):
            place = group.create_group(str(k))
            _write_type(place, part.GetName())
            _write_numbers(place, "TransformFixedParameters", np.array(part.GetFixedParameters(), np.float64))
            if is_field(part):
                image = sitk.DisplacementFieldTransform(part).GetDisplacementField()
                vectors = sitk.GetArrayViewFromImage(image).ravel().astype(np.float32)
                _write_numbers(place, "TransformParameters", vectors)
            else:
                _write_numbers(place, "TransformParameters", np.array(part.GetParameters(), np.float64))
    with whole_file(path) as new:
        new.write_bytes(content.getbuffer())


def read_ends(path: str | os.PathLike) -> tuple[End, End] | None:
    """The scans that a transform leads from and to, where its file tells: one that `write_transform` wrote."""
    if not Path(path).name.lower().endswith(HDF5):
        return None
    try:
        with h5py.File(path) as file:
            first, last = json.loads(file["TransformGroup"].attrs[ENDS])
        return _end(*first), _end(*last)
    except (OSError, KeyError, ValueError, TypeError):
        return None


def _end(role: str, frame: dict[str, Any]) -> End:
    return End(role, Frame(**{name: tuple(numbers) for name, numbers in frame.items()}))


def _write_numbers(group: h5py.Group, name: str, numbers: np.ndarray) -> None:
    """Write an array with checksums, so that damage is an error when it is read, by ITK as well."""
    options = {"chunks": (min(CHUNK, numbers.size),), "fletcher32": True} if numbers.size else {}
    group.create_dataset(name, data=numbers, **options)


def _write_type(group: h5py.Group, name: str) -> None:
    group.create_dataset("TransformType", data=[f"{name}_double_3_3"], dtype=h5py.string_dtype("ascii"))


def _read_itk(path: Path) -> sitk.Transform:
    """Read a file that ITK wrote."""
    if path.name.lower().endswith(HDF5):
        _check_hdf5(path)
    try:
        return sitk.ReadTransform(str(path))
    except RuntimeError as error:
        what = "FSL and SPM write other files of this name; convert them to ITK's" if path.suffix == ".mat" else ""
        raise UserError(
            f"{path}: cannot be read as a transform of ITK ({reason_of(error)}); {what or 'write or copy it again'}"
        ) from error


def _check_hdf5(path: Path) -> None:
    """Read all of an HDF5 file: of one that is damaged ITK says nothing that helps, or reads on."""
    try:
        with h5py.File(path) as file:
            if "TransformGroup" not in file:
                raise UserError(f"{path}: is HDF5 without a transform; give one that demo.py, ITK or ANTs wrote")
            for place in file["TransformGroup"].values():
                for dataset in place.values():
                    dataset[()]
    except (OSError, RuntimeError, AttributeError, KeyError, TypeError, ValueError) as error:  # as HDF5 meets damage
        raise UserError(f"{path}: is damaged or cut short ({error}); copy or write it again") from error


def _read_field(path: Path) -> sitk.Transform:
    """Read a displacement field."""
    remedy = "give a field with a vector of three numbers per voxel, as ITK and ANTs write it"
    if path.name.lower().endswith(nibabel_formats.ENDINGS):
        nibabel_formats.check_vectors(path, remedy)
    else:
        text_headers.check_header(path)
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise UserError(f"{path}: cannot be read as a displacement field ({reason_of(error)}); {remedy}") from error
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 3:
        raise UserError(
            f"{path}: has {image.GetDimension()} dimensions and {image.GetNumberOfComponentsPerPixel()} values per "
            f"voxel; {remedy}"
        )
    stem = path.name.removesuffix(".gz").removesuffix(".nii")
    if stem.endswith(IN_VOXELS):
        return _from_voxels(path, image)
    return sitk.DisplacementFieldTransform(sitk.Cast(image, sitk.sitkVectorFloat64))


def _from_voxels(path: Path, image: sitk.Image) -> sitk.Transform:
    """A field in voxels of eval.py: from the grid of the field to that of moving.nii.gz beside it, if it is there."""
    fixed = Frame.of(image)
    beside = path.with_name("moving.nii.gz")
    moving = Frame.of(nibabel_formats.read_volume(beside)) if beside.is_file() else fixed
    flow = np.swapaxes(sitk.GetArrayFromImage(image), 0, 2)
    voxels = np.moveaxis(np.indices(fixed.size), 0, -1)
    return field_transform(fixed, moving.to_physical(voxels + flow) - fixed.to_physical(voxels))


def _check(path: Path, part: sitk.Transform) -> None:
    """Raise UserError where a part of a transform is not three-dimensional and finite, or leads to a plane."""
    if part.GetDimension() != 3:
        raise UserError(f"{path}: is a transform of {part.GetDimension()} dimensions; give one of three")
    if is_field(part):
        image = sitk.DisplacementFieldTransform(part).GetDisplacementField()
        numbers = sitk.GetArrayViewFromImage(image)
        if not min(image.GetSize()):
            raise UserError(f"{path}: its displacement field is empty; write it again")
    else:
        numbers = np.array([*part.GetParameters(), *part.GetFixedParameters()])
    wrong = np.count_nonzero(~np.isfinite(numbers))
    if wrong:
        raise UserError(f"{path}: has {wrong} numbers that are NaN or infinite, of {numbers.size}; write it again")
    if not is_field(part) and part.IsLinear() and abs(np.linalg.det(linear_map(part)[0])) < LEAST_DETERMINANT:
        raise UserError(f"{path}: its matrix leads all places to a plane, so it is no registration; write it again")
