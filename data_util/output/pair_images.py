"""Images of an evaluated pair on disk: what eval.py writes for --save and --figures.

A pair's arrays are [x, y, z] in its files too: voxel (i, j, k) of a NIfTI file is array[i, j, k]. Grey values are
0..255. Images on the fixed grid have the spacing of the fixed scan, those of the moving scan its own; 1 mm where it is
unknown. The origin is 0, and the axes run as the orientation of the data set says (as LPS where it is unknown).

A flow says where to look in the moving image: warped(p) = moving(p + flow(p)). In NIfTI, where both spacings are known,
it is `flow.nii.gz`, a displacement field as ITK takes it: vectors in mm along the axes of LPS, from a place in the
fixed image to a place in `moving.nii.gz` beside it. Where one is unknown, it is `flow_voxels.nii.gz`: array[i, j, k] =
(along x, along y, along z) in voxels, whatever unit the header names. In NumPy it is `flow`, in voxels.
"""

import os
import pathlib
from collections.abc import Collection, Mapping
from typing import Any, Protocol

import numpy as np

import files
from data_util.grey_values import from_unit
from data_util.output.figures import pair_figure
from data_util.scans.frame import Frame
from data_util.scans.images import write_image

# The images that a figure is drawn from.
FIGURE_IMAGES = ("fixed", "moving", "warped", "flow", "fixed_seg", "moving_seg", "warped_seg")
# The direction in LPS of an axis that runs to L, R, P, A, S or I.
_DIRECTIONS = {"L": (1, 0, 0), "R": (-1, 0, 0), "P": (0, 1, 0), "A": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}


class PairImage(Protocol):
    """An image of a pair, as `network.evaluation.PairImage`."""

    array: np.ndarray
    kind: str
    side: str


class Pair(Protocol):
    """A pair with images: part of `network.evaluation.PairResult`."""

    index: int
    fixed_id: str
    moving_id: str
    images: Mapping[str, PairImage]
    fixed_spacing: np.ndarray
    moving_spacing: np.ndarray


def pair_name(result: Pair) -> str:
    """Name of a pair's files: <index>_<fixed>_<moving>."""
    return f"{result.index}_{result.fixed_id}_{result.moving_id}"


def save_pair(
    folder: str | os.PathLike,
    result: Pair,
    names: Collection[str],
    file_format: str = "nii",
    orientation: str | None = None,
) -> None:
    """Write images of a pair, to folder/<index>_<fixed>_<moving>/; label maps that it lacks are left out.

    A new folder appears when all of them are written, and an older one's files are replaced then.

    Args:
        folder: made where it does not exist.
        result: the pair.
        names: the images to write.
        file_format: 'nii' for one file <name>.nii.gz per image, 'npz' for one images.npz that also has `fixed_spacing`
            and `moving_spacing` (mm, NaN where unknown).
        orientation: where the axes of the scans run, such as 'LPS' or 'RPI'; None where it is unknown.

    Raises:
        UserError: a file cannot be written.
    """
    target = pathlib.Path(folder) / pair_name(result)
    with files.writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with files.partial_folder(target.parent) as partial:
            new = partial / target.name
            new.mkdir()
            _write_images(new, result, names, file_format, orientation)
            if not target.exists():
                files.publish(new, target)
            else:  # of an evaluation before: other images of it stay
                for file in sorted(new.iterdir()):
                    files.publish(file, target / file.name)


def _write_images(
    folder: pathlib.Path, result: Pair, names: Collection[str], file_format: str, orientation: str | None
) -> None:
    arrays = {name: array for name in names if (array := _in_file(result.images[name])) is not None}
    if file_format == "npz":
        spacings = {"fixed_spacing": result.fixed_spacing, "moving_spacing": result.moving_spacing}
        np.savez_compressed(folder / "images.npz", **{**arrays, **spacings})  # type: ignore[arg-type]
        return
    spacings = {"fixed": result.fixed_spacing, "moving": result.moving_spacing}
    spacing_known = not np.isnan([*result.fixed_spacing, *result.moving_spacing]).any()
    for name, array in arrays.items():
        image = result.images[name]
        frames = {side: _frame(array.shape[:3], spacing, orientation) for side, spacing in spacings.items()}
        if image.kind == "flow" and spacing_known:
            array = _displacement(array, frames["fixed"], frames["moving"])
        elif image.kind == "flow":
            name = f"{name}_voxels"
        write_image(frames[image.side].put(array), folder / f"{name}.nii.gz")


def draw_pair(folder: str | os.PathLike, result: Pair) -> None:
    """Draw a pair with `FIGURE_IMAGES` by `pair_figure`, to folder/<index>_<fixed>_<moving>.png.

    Raises:
        UserError: the file cannot be written.
    """
    with files.writing(folder):
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    images: dict[str, Any] = {name: _in_file(result.images[name]) for name in FIGURE_IMAGES}
    title = f"fixed {result.fixed_id}, moving {result.moving_id}"
    path = pathlib.Path(folder) / f"{pair_name(result)}.png"
    pair_figure(path, **images, spacing=_known(result.fixed_spacing), title=title)


def _in_file(image: PairImage) -> np.ndarray | None:
    """The array of an image as files have it; None for a label map of a scan without segmentation."""
    if image.kind == "grey":
        return from_unit(image.array)
    return None if image.kind == "labels" and (image.array < 0).all() else image.array


def _frame(size: tuple[int, ...], spacing: np.ndarray, orientation: str | None) -> Frame:
    """The grid of a scan."""
    direction = np.array([_DIRECTIONS[letter] for letter in orientation or "LPS"]).T
    return Frame(size, _known(spacing), (0.0, 0.0, 0.0), tuple(float(part) for part in direction.ravel()))


def _displacement(flow: np.ndarray, fixed: Frame, moving: Frame) -> np.ndarray:
    """A flow in voxels as a displacement field on the fixed grid: float32 [X, Y, Z, 3], in mm along the axes of LPS."""
    voxels = np.moveaxis(np.indices(flow.shape[:3]), 0, -1)
    return (moving.to_physical(voxels + flow) - fixed.to_physical(voxels)).astype(np.float32)


def _known(spacing: np.ndarray) -> tuple[float, ...]:
    """A spacing, or 1 mm along each axis where it is unknown."""
    return tuple(float(mm) for mm in (np.ones(3) if np.isnan(spacing).any() else spacing))
