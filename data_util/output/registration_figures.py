"""Pictures of two registered scans: slices of a volume, a flow as the original draws it, and a summary of everything.

Conventions are those of `figures`: volumes [x, y, z] in LPS, shown as radiologists look at them.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.image
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from scipy import ndimage

import files
from data_util.output.figures import (
    COLUMN_INCHES,
    FIXED_COLOUR,
    GRID_COLOUR,
    MOVING_COLOUR,
    PLANES,
    ROW_HEIGHTS,
    Plane,
    View,
    flow_colours,
    flow_key,
    places,
    save_figure,
)

FADING = 15  # voxels of displacement by which a channel of the flow picture falls from white to 1/e
BOX_COLOUR = "#0a84ff"
EDGE_LEVELS = (40, 160)  # grey values along which edges are drawn: between fat and organs, and around bone
EDGE_SIGMA = 1.5  # voxels; the edges are those of the smoothed volume
TILES = 6  # tiles of the checkerboard along the longest side


def slices_figure(path: str | Path, volume: np.ndarray, spacing: Sequence[float] = (1, 1, 1)) -> None:
    """Draw 16 axial slices of a volume 0..255, evenly from the feet to the head, to an image file."""
    figure = Figure(figsize=(12, 12 * volume.shape[1] * spacing[1] / (volume.shape[0] * spacing[0])))
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.98, wspace=0.03, hspace=0.1)
    axes = figure.subplots(4, 4).ravel()
    for axis, index in zip(
        axes, np.linspace(0, volume.shape[2] - 1, len(axes)).round().astype(int).tolist(), strict=True
    ):
        View(PLANES[0], index, spacing).show(axis, volume, cmap="gray", vmin=0, vmax=255)
        axis.set_title(f"z = {index}", fontsize=8, pad=2)
    save_figure(figure, path)


def flow_image(path: str | Path, flow: np.ndarray) -> None:
    """Write the middle axial slice of a flow [X, Y, Z, 3] in voxels as a picture, one pixel per voxel.

    Red, green and blue tell the size of the displacement along x, y and z, whatever its sign: white is none, and
    every 15 voxels it falls to 1/e.

    Raises:
        UserError: it cannot be written.
    """
    picture = np.exp(-np.abs(PLANES[0].cut(flow, flow.shape[2] // 2)) / FADING)
    with files.whole_file(path) as new:
        matplotlib.image.imsave(new, (255 * picture).round().astype(np.uint8))


def summary_figure(
    path: str | Path,
    scans: Sequence[tuple],
    volumes: Sequence[np.ndarray],
    flow: np.ndarray,
    spacing: Sequence[float],
    title: str,
    doubts: Sequence[str] = (),
) -> None:
    """Draw what was registered and how well to an image file: rows are the three planes.

    Columns: both scans with the region (green, red) and the box (blue); the checkerboard of fixed and moving, and of
    fixed and warped; the edges of the fixed volume on the moving and on the warped one; the flow; the deformed grid
    over the warped volume.

    Args:
        path: the image file.
        scans: two (image, spacing, region, box, window): fixed and moving scan [x, y, z], mm per voxel, bool region or
            None, corners (low, high) in voxels of what the network saw, and the (level, width) to show it in.
        volumes: fixed, moving and warped volume [X, Y, Z], 0..255.
        flow: composed flow [X, Y, Z, 3] in voxels.
        spacing: mm per voxel of the fixed volume.
        title: what stands above.
        doubts: sentences on what may be wrong, drawn in red.

    Raises:
        UserError: the file cannot be written.
    """
    fixed, moving, warped = volumes
    heads = (
        "fixed scan",
        "moving scan",
        "fixed | moving",
        "fixed | warped",
        "moving\n(edges: fixed)",
        "warped\n(edges: fixed)",
        "flow",
        "warped grid",
    )
    lengths = np.multiply(fixed.shape, spacing)
    extents = [lengths, *(np.multiply(image.shape, mm) for image, mm, *_ in scans)]
    heights = [max(np.clip(mm[plane.along] / mm[plane.across], *ROW_HEIGHTS) for mm in extents) for plane in PLANES]
    inches = (COLUMN_INCHES * len(heads), COLUMN_INCHES * sum(heights) + 1.6 + 0.2 * len(doubts))
    figure = Figure(figsize=inches, layout="constrained")
    *rows, keys = figure.subplots(4, len(heads), height_ratios=[*heights, 0.16])
    for axis, head in zip(rows[0], heads, strict=True):
        axis.set_title(head, fontsize=10)
    boards = [_checkerboard(fixed, other, spacing) for other in (moving, warped)]
    edges = ndimage.gaussian_filter(fixed.astype(np.float32), EDGE_SIGMA)
    limit = float(np.abs(flow).max())
    steps = [max(2, round(lengths.max() / 16 / mm)) for mm in spacing]
    for row, plane in zip(rows, PLANES, strict=True):
        for axis, scan, colour in zip(row, scans, (FIXED_COLOUR, MOVING_COLOUR), strict=False):
            _show_scan(axis, plane, *scan, colour)  # type: ignore[call-arg]
        view = View(plane, fixed.shape[plane.normal] // 2, spacing)
        for axis, volume in zip(row[2:6], (*boards, moving, warped), strict=True):
            view.show(axis, volume, cmap="gray", vmin=0, vmax=255)
        for axis in row[4:6]:
            axis.contour(plane.cut(edges, view.index), levels=EDGE_LEVELS, colors=[FIXED_COLOUR], linewidths=0.6)
        view.show(row[6], flow_colours(flow, limit))
        view.show(row[7], warped, cmap="gray", vmin=0, vmax=255)
        for place, along in zip(places(flow, plane, view.index), (plane.across, plane.along), strict=True):
            lines = np.arange(steps[along] / 2, place.max(), steps[along])
            row[7].contour(place, levels=lines, colors=[GRID_COLOUR], linewidths=0.7)
        row[0].set_ylabel(plane.name, rotation=0, ha="right", va="center", fontsize=9)
    for axis in keys:
        axis.set_axis_off()
    keys[0].text(0, 0.5, "outline: region found or given", color=FIXED_COLOUR, va="center", fontsize=8)
    keys[1].text(0, 0.5, "box: what the network saw", color=BOX_COLOUR, va="center", fontsize=8)
    flow_key(keys[6], limit)
    figure.suptitle("\n".join([title, *doubts]), color="#c00000" if doubts else "black", fontsize=11)
    save_figure(figure, path)


def _show_scan(
    axis: Axes,
    plane: Plane,
    image: np.ndarray,
    spacing: Sequence[float],
    region: np.ndarray | None,
    box: np.ndarray,
    shown: tuple[float, float],
    colour: str,
) -> None:
    """Show a scan through the middle of the box that the network saw, with the box and the region."""
    low, high = box
    level, width = shown
    view = View(plane, round((low[plane.normal] + high[plane.normal]) / 2), spacing)
    view.show(axis, image, cmap="gray", vmin=level - width / 2, vmax=level + width / 2)
    view.outline(axis, region, colour)
    top = image.shape[plane.along] - 1 - high[plane.along] if plane.upwards else low[plane.along]
    size = high - low
    corner = (low[plane.across] - 0.5, top - 0.5)
    axis.add_patch(Rectangle(corner, size[plane.across] + 1, size[plane.along] + 1, fill=False, color=BOX_COLOUR))


def _checkerboard(first: np.ndarray, second: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Tiles of two volumes in turn, cubes in mm."""
    side = np.max(np.multiply(first.shape, spacing)) / TILES
    tiles = [(np.arange(n) * mm // side).astype(int) for n, mm in zip(first.shape, spacing, strict=True)]
    odd = sum(np.meshgrid(*tiles, indexing="ij", sparse=True)) % 2
    return np.where(odd == 1, second, first)
