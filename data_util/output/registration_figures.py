"""Pictures of two registered scans: slices of a volume, a flow as the original draws it, and a summary of everything.

Conventions are those of `figures`: volumes [x, y, z] in LPS, shown as radiologists look at them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
NEAR = 6  # slices on either side that smoothing looks at
TILES = 6  # tiles of the checkerboard along the longest side
MM_COLOURS = "inferno"  # of a map in mm
LEAST_MM = 1.0  # what its brightest colour stands for at least
HEADS = (
    "fixed scan",
    "moving scan",
    "fixed | moving",
    "fixed | warped",
    "moving\n(edges: fixed)",
    "warped\n(edges: fixed)",
    "flow",
    "warped grid",
    "last step",
)
PICTURE_INCHES = COLUMN_INCHES - 0.1
LABEL_INCHES, TITLE_INCHES, LINE_INCHES, GAP_INCHES, KEY_INCHES = 0.65, 0.8, 0.2, 0.2, 0.85


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


@dataclass(frozen=True)
class _Picture:
    """A place for one slice on a sheet: an axis in inches, down from the top, on which all pictures are drawn.

    Attributes:
        view: what is cut.
        left, top, width, height: where it lies.
    """

    axis: Axes
    view: View
    left: float
    top: float
    width: float
    height: float

    @classmethod
    def within(cls, axis: Axes, view: View, shape: Sequence[int], box: tuple[float, float, float]) -> "_Picture":
        """In right proportions, in the middle of a box (left, top, height) of one column's width."""
        left, top, room = box
        along, across = (shape[k] * view.spacing[k] for k in (view.plane.along, view.plane.across))
        width = min(PICTURE_INCHES, room * across / along)
        height = width * along / across
        return cls(axis, view, left + (COLUMN_INCHES - width) / 2, top + (room - height) / 2, width, height)

    def cut(self, volume: np.ndarray) -> np.ndarray:
        """The slice of a volume."""
        return self.view.plane.cut(volume, self.view.index)

    def show(self, cut: np.ndarray, **options: Any) -> None:
        """Draw a slice; `options` are those of `Axes.imshow`."""
        extent = (self.left, self.left + self.width, self.top + self.height, self.top)
        self.axis.imshow(cut, aspect="auto", extent=extent, interpolation="nearest", **options)

    def show_grey(self, volume: np.ndarray, low: float = 0, high: float = 255) -> None:
        """Draw the slice of a volume of grey values."""
        self.show(self.cut(volume), cmap="gray", vmin=low, vmax=high)

    def lines(self, cut: np.ndarray, levels: Sequence[float] | np.ndarray, colour: str, width: float) -> None:
        """Draw where the values of a slice are at some levels."""
        if any(cut.min() < level < cut.max() for level in levels):
            y, x = ((np.arange(n) + 0.5) / n for n in cut.shape)
            self.axis.contour(
                self.left + self.width * x, self.top + self.height * y, cut, levels, colors=[colour], linewidths=width
            )

    def box(self, low: np.ndarray, high: np.ndarray, shape: Sequence[int]) -> None:
        """Draw a box between two corners in voxels of a volume of a shape."""
        plane = self.view.plane
        first = shape[plane.along] - 1 - high[plane.along] if plane.upwards else low[plane.along]
        x, y = self.width / shape[plane.across], self.height / shape[plane.along]
        corner = (self.left + x * low[plane.across], self.top + y * first)
        size = x * (high - low + 1)[plane.across], y * (high - low + 1)[plane.along]
        self.axis.add_patch(Rectangle(corner, *size, fill=False, color=BOX_COLOUR))


def summary_figure(
    path: str | Path,
    scans: Sequence[tuple],
    volumes: Sequence[np.ndarray],
    flow: np.ndarray,
    residual: np.ndarray,
    spacing: Sequence[float],
    title: str,
    doubts: Sequence[str] = (),
) -> None:
    """Draw what was registered and how well to an image file: rows are the three planes.

    Columns: both scans with the region (green, red) and the box (blue); the checkerboard of fixed and moving, and of
    fixed and warped; the edges of the fixed volume on the moving and on the warped one; the flow; the deformed grid
    over the warped volume; how far the last step still moved each voxel.

    Args:
        path: the image file.
        scans: two (image, spacing, region, box, window): fixed and moving scan [x, y, z], mm per voxel, bool region or
            None, corners (low, high) in voxels of what was registered, and the (level, width) to show it in.
        volumes: fixed, moving and warped volume [X, Y, Z], 0..255.
        flow: composed flow [X, Y, Z, 3] in voxels.
        residual: mm by which the last step moved each voxel [X, Y, Z].
        spacing: mm per voxel of the fixed volume.
        title: what stands above.
        doubts: sentences on what may be wrong, drawn in red.

    Raises:
        UserError: the file cannot be written.
    """
    fixed, moving, warped = volumes
    boards = [_checkerboard(fixed, other, spacing) for other in (moving, warped)]
    shapes = [(fixed.shape, spacing), *((image.shape, mm) for image, mm, *_ in scans)]
    heights = [max(_height(plane, *shape) for shape in shapes) * PICTURE_INCHES for plane in PLANES]
    head = TITLE_INCHES + LINE_INCHES * len(doubts)
    inches = (LABEL_INCHES + COLUMN_INCHES * len(HEADS), head + sum(heights) + GAP_INCHES * len(heights) + KEY_INCHES)
    figure = Figure(figsize=inches)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    for k, text in enumerate(HEADS):
        axis.text(_column(k) + COLUMN_INCHES / 2, head - 0.06, text, ha="center", va="bottom", fontsize=10)
    top, most = head, (float(np.abs(flow).max()), max(float(residual.max()), LEAST_MM))
    for plane, height in zip(PLANES, heights, strict=True):
        axis.text(LABEL_INCHES - 0.08, top + height / 2, plane.name, ha="right", va="center", fontsize=9)
        for k, scan in enumerate(scans):
            _show_scan(axis, plane, (_column(k), top, height), *scan, (FIXED_COLOUR, MOVING_COLOUR)[k])  # type: ignore[call-arg]
        view = View(plane, fixed.shape[plane.normal] // 2, spacing)
        pictures = [_Picture.within(axis, view, fixed.shape, (_column(k), top, height)) for k in range(2, len(HEADS))]
        _show_pair(pictures[:4], volumes, boards)
        pictures[4].show(flow_colours(pictures[4].cut(flow), most[0]))
        _show_grid(pictures[5], warped, flow)
        pictures[6].show(pictures[6].cut(residual), cmap=MM_COLOURS, vmin=0, vmax=most[1])
        top += height + GAP_INCHES
    axis.set(xlim=(0, inches[0]), ylim=(inches[1], 0))
    _draw_keys(figure, axis, top, inches, most)
    axis.text(inches[0] / 2, 0.1, "\n".join([title, *doubts]), color="#c00000" if doubts else "black",
              fontsize=11, ha="center", va="top")  # fmt: skip
    save_figure(figure, path)


def _column(k: int) -> float:
    """Left edge of a column in inches."""
    return LABEL_INCHES + COLUMN_INCHES * k


def _height(plane: Plane, shape: Sequence[int], spacing: Sequence[float]) -> float:
    """Height of a volume's picture by its width, within `ROW_HEIGHTS`."""
    along, across = (shape[k] * spacing[k] for k in (plane.along, plane.across))
    return float(np.clip(along / across, *ROW_HEIGHTS))


def _show_pair(pictures: Sequence[_Picture], volumes: Sequence[np.ndarray], boards: Sequence[np.ndarray]) -> None:
    """Show the checkerboards, and the edges of the fixed volume on the moving and on the warped one."""
    fixed, moving, warped = volumes
    plane, index = pictures[0].view.plane, pictures[0].view.index
    near = [slice(None)] * 3
    near[plane.normal] = slice(max(0, index - NEAR), index + NEAR + 1)
    smooth = ndimage.gaussian_filter(fixed[tuple(near)].astype(np.float32), EDGE_SIGMA)
    for picture, board in zip(pictures[:2], boards, strict=True):
        picture.show_grey(board)
    for picture, volume in zip(pictures[2:], (moving, warped), strict=True):
        picture.show_grey(volume)
        picture.lines(plane.cut(smooth, min(index, NEAR)), EDGE_LEVELS, FIXED_COLOUR, 0.6)


def _show_grid(picture: _Picture, warped: np.ndarray, flow: np.ndarray) -> None:
    """Show the warped volume with lines of the moving one, as the flow moves them, over it."""
    view = picture.view
    picture.show_grey(warped)
    side = np.max(np.multiply(warped.shape, view.spacing)) / 16
    for place, along in zip(places(flow, view.plane, view.index), (view.plane.across, view.plane.along), strict=True):
        step = max(2, round(side / view.spacing[along]))
        picture.lines(place, np.arange(step / 2, place.max(), step), GRID_COLOUR, 0.7)


def _draw_keys(figure: Figure, axis: Axes, top: float, inches: tuple[float, float], most: tuple[float, float]) -> None:
    """Say below the pictures what the colours mean."""
    said = [
        (0, "green outline: the fixed scan's region", FIXED_COLOUR),
        (1, "red outline: the moving scan's region", MOVING_COLOUR),
    ]
    for k, text, colour in said:
        axis.text(_column(k), top, text, color=colour, va="top", fontsize=8)
    axis.text(_column(0), top + 0.22, "box: what was registered of each", color=BOX_COLOUR, va="top", fontsize=8)
    width, height = PICTURE_INCHES / inches[0], 0.3 / inches[1]
    bottom = 1 - (top + 0.35) / inches[1]
    flow_key(figure.add_axes((_column(6) / inches[0], bottom, width, height)), most[0])
    key = figure.add_axes((_column(8) / inches[0], bottom, width, height))
    key.imshow(np.linspace(0, 1, 256)[None], aspect="auto", extent=(0, most[1], 0, 1), cmap=MM_COLOURS)
    key.set(yticks=[])
    key.set_xlabel("mm that the last step still moved", fontsize=8)
    key.tick_params(axis="x", labelsize=8)


def _show_scan(
    axis: Axes,
    plane: Plane,
    place: tuple[float, float, float],
    image: np.ndarray,
    spacing: Sequence[float],
    region: np.ndarray | None,
    box: np.ndarray,
    shown: tuple[float, float],
    colour: str,
) -> None:
    """Show a scan through the middle of the box that was registered, with the box and the region."""
    low, high = box
    level, width = shown
    view = View(plane, round((low[plane.normal] + high[plane.normal]) / 2), spacing)
    picture = _Picture.within(axis, view, image.shape, place)
    picture.show_grey(image, level - width / 2, level + width / 2)
    if region is not None:
        picture.lines(plane.cut(region, view.index).astype(np.uint8), [0.5], colour, 1)
    picture.box(low, high, image.shape)


def _checkerboard(first: np.ndarray, second: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Tiles of two volumes in turn, cubes in mm."""
    side = np.max(np.multiply(first.shape, spacing)) / TILES
    tiles = [(np.arange(n) * mm // side).astype(int) for n, mm in zip(first.shape, spacing, strict=True)]
    odd = sum(np.meshgrid(*tiles, indexing="ij", sparse=True)) % 2
    return np.where(odd == 1, second, first)
