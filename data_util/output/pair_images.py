"""Images of an evaluated pair on disk: what eval.py writes for --save and --figures.

A pair's arrays are [x, y, z] in its files too: voxel (i, j, k) of a NIfTI file is array[i, j, k]. A flow is an image of
vectors, array[i, j, k] = (along x, along y, along z), in voxels: warped(p) = moving(p + flow(p)). Grey values are
0..255. Images on the fixed grid have the spacing of the fixed scan, those of the moving scan its own; 1 mm where it is
unknown. Origin 0, axes as SimpleITK's (LPS).
"""

import pathlib

import numpy as np

from data_util.output.figures import pair_figure
from data_util.scans.frame import Frame
from data_util.scans.images import write_image

# What --save offers: item -> the images that it stands for.
ITEMS = {
    "flow": ("flow",),
    "warped": ("warped",),
    "seg": ("fixed_seg", "moving_seg", "warped_seg"),
    "moving": ("moving",),
    "fixed": ("fixed",),
    "jacobian": ("jacobian",),
}
FIGURE_ITEMS = ("fixed", "moving", "warped", "flow", "seg")
_GREY = ("fixed", "moving", "warped")


def images_of(items):
    """Names of the images that some of `ITEMS` stand for, each once."""
    return tuple(dict.fromkeys(name for item in items for name in ITEMS[item]))


def pair_name(result):
    """Name of a pair's files: <index>_<fixed>_<moving>."""
    return f"{result.index}_{result.fixed_id}_{result.moving_id}"


def save_pair(folder, result, items, file_format="nii"):
    """Write images of a pair, to folder/<index>_<fixed>_<moving>/; label maps that it lacks are left out.

    Args:
        folder: made where it does not exist.
        result: `PairResult` with the images of `items`.
        items: names out of `ITEMS`.
        file_format: 'nii' for a file <name>.nii.gz an image, 'npz' for one images.npz that also has `fixed_spacing` and
            `moving_spacing` (mm, NaN where unknown).

    Raises:
        UserError: a file cannot be written.
    """
    folder = pathlib.Path(folder) / pair_name(result)
    folder.mkdir(parents=True, exist_ok=True)
    images = {name: image for name in images_of(items) if (image := _image(result, name)) is not None}
    if file_format == "npz":
        spacings = {"fixed_spacing": result.fixed_spacing, "moving_spacing": result.moving_spacing}
        np.savez_compressed(folder / "images.npz", **images, **spacings)
        return
    for name, array in images.items():
        spacing = result.moving_spacing if name.startswith("moving") else result.fixed_spacing
        frame = Frame(array.shape[:3], _known(spacing), (0.0, 0.0, 0.0), tuple(np.eye(3).ravel()))
        write_image(frame.put(array), folder / f"{name}.nii.gz")


def draw_pair(folder, result):
    """Draw a pair with the images of `FIGURE_ITEMS` by `pair_figure`, to folder/<index>_<fixed>_<moving>.png.

    Raises:
        UserError: the file cannot be written.
    """
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    images = {name: _image(result, name) for name in images_of(FIGURE_ITEMS)}
    title = f"fixed {result.fixed_id}, moving {result.moving_id}"
    path = pathlib.Path(folder) / f"{pair_name(result)}.png"
    pair_figure(path, **images, spacing=_known(result.fixed_spacing), title=title)


def _image(result, name):
    """An image of a pair as files have it; None for a label map of a scan without segmentation."""
    image = result.images[name]
    if name in _GREY:
        return image * np.float32(255)
    return None if name.endswith("_seg") and (image < 0).all() else image


def _known(spacing):
    return [float(mm) for mm in (np.ones(3) if np.isnan(spacing).any() else spacing)]
