"""Displacement fields as the Learn2Reg challenge takes them: `disp_FIXED_MOVING.nii.gz`.

A field is a four-dimensional NIfTI image of float32, disp[i, j, k, c] of the shape [H, W, D, 3], where [H, W, D] is the
fixed image's. i, j and k are the axes of the arrays as the files store them; headers turn and scale nothing. disp is in
voxels, and its channel c = 0, 1, 2 moves along i, j, k: what lies at p in the fixed image is at p + disp(p) in the
moving one. So the challenge's evaluation warps by

    identity = np.indices((H, W, D))
    warped = scipy.ndimage.map_coordinates(moving, identity + disp.transpose(3, 0, 1, 2), order=0)

This is a flow of this toolkit, warped(p) = moving(p + flow(p)), on the native grids of the task's files. Its name is
made of the images' numbers, `disp_0438_0439.nii.gz` (see `challenge.Task.field_names`).
"""

from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk

from data_util.challenge import ENDING, Grid
from data_util.scans.frame import Frame
from data_util.scans.images import read_native, to_array
from data_util.scans.nibabel_formats import DAMAGE
from errors import UserError
from files import whole_file

PAIR_FILES = ("images.npz", "flow_voxels.nii.gz", "flow.nii.gz")  # of eval.py --save flow
NPZ_KEY = "arr_0"  # what NumPy calls an array without a name


def write_field(flow: np.ndarray, grid: Grid, path: Path) -> None:
    """Write a flow as a displacement field.

    Args:
        flow: [H, W, D, 3], in voxels, on the fixed image's own grid.
        grid: that of the fixed image; its affine goes into the header, for viewers.
        path: where to.

    Raises:
        UserError: the flow is not on that grid, or the file cannot be written.
    """
    if flow.shape != (*grid.shape, 3):
        raise UserError(f"{path}: its flow is {_size(flow.shape)}, and the fixed image {_size(grid.shape)} voxels")
    with whole_file(path) as new:
        nibabel.save(nibabel.Nifti1Image(np.asarray(flow, np.float32), grid.affine), new)


def read_field(folder: Path, names: Sequence[str], grid: Grid) -> np.ndarray:
    """Read the displacement field of a pair.

    Args:
        folder: where the fields are.
        names: how its file may be called, without its ending, .nii.gz or .npz.
        grid: that of the fixed image.

    Returns:
        float64 [H, W, D, 3], or float32 of an .npz.

    Raises:
        UserError: it is not there, of another shape than the fixed image, not finite, or damaged.
    """
    paths = [folder / f"{name}{ending}" for name in names for ending in (ENDING, ".npz")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        others = " or ".join(file.name for file in paths[1:])
        raise UserError(f"{paths[0]}: no such displacement field (nor {others}); write it by export")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                field = np.asarray(arrays[NPZ_KEY], np.float32)
        else:
            field = np.asarray(nibabel.load(path).dataobj, np.float64)  # type: ignore[attr-defined]
    except (*DAMAGE, EOFError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: cannot be read as a displacement field ({reason}); write it again") from error
    if field.shape != (*grid.shape, 3):
        wanted = _size((*grid.shape, 3))
        raise UserError(f"{path}: has the shape {_size(field.shape)}, and the fixed image asks for {wanted}")
    if not np.isfinite(field).all():
        raise UserError(f"{path}: has displacements that are no numbers (NaN or infinite); write it again")
    return field


def saved_flow(folder: Path, fixed: str, moving: str) -> np.ndarray:
    """Read the flow that `eval.py --save flow` kept of a pair.

    Args:
        folder: that of the evaluation, evaluate/REPORT.
        fixed: id of the fixed scan in reports, such as "oasis_OASIS_0438_0000".
        moving: id of the moving scan.

    Returns:
        float32 [X, Y, Z, 3], in voxels.

    Raises:
        UserError: it is not there, or damaged.
    """
    places = [place for place in folder.glob(f"*_{fixed}_{moving}") if place.name.split("_")[0].isdigit()]
    found = [place / name for place in places for name in PAIR_FILES if (place / name).is_file()]
    if not found:
        raise UserError(
            f"{folder}: has no flow of the pair fixed {fixed}, moving {moving}; evaluate it by eval.py --save flow"
        )
    path = found[0]
    try:
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                return np.asarray(arrays["flow"], np.float32)
        flow = sitk.ReadImage(str(path))
    except (*DAMAGE, EOFError, RuntimeError) as error:
        raise UserError(f"{path}: has no flow that can be read; evaluate the pair by eval.py --save flow") from error
    vectors = np.ascontiguousarray(sitk.GetArrayFromImage(flow).swapaxes(0, 2))
    if path.name == "flow_voxels.nii.gz":
        return vectors
    voxels = np.moveaxis(np.indices(vectors.shape[:3]), 0, -1)
    places_in_moving = Frame.of(flow).to_physical(voxels.reshape(-1, 3)) + vectors.reshape(-1, 3)
    there = Frame.of(read_native(path.with_name("moving.nii.gz"))).to_voxel(places_in_moving)
    return (there.reshape(voxels.shape) - voxels).astype(np.float32)


def read_label_map(path: Path, grid: Grid, what: str) -> np.ndarray:
    """Read labels or a mask on the grid of their image, the axes as they are in the file.

    Args:
        path: the label image.
        grid: that of its image.
        what: what it is, for messages.

    Raises:
        UserError: it cannot be read, or is of another size.
    """
    array = to_array(read_native(path, is_label=True))
    if array.shape != tuple(grid.shape):
        raise UserError(f"{path}: has {_size(array.shape)} voxels and the image of this {what} {_size(grid.shape)}")
    return array


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
