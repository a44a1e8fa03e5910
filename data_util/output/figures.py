"""Pictures of a registration: slices with outlines, the flow as colour, the deformed grid, loss curves.

Volumes are [x, y, z], 0..255, in LPS (x to the patient's left, y to the back, z to the head); flows are [x, y, z, 3] in
voxels: warped(p) = moving(p + flow(p)). Slices are shown as radiologists look at them: the patient's right on the left
of an axial and a coronal picture, the front on top of an axial and on the left of a sagittal one, the head on top of
the other two. A picture is an array [row, column], row 0 on top.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import files
from errors import UserError

FIXED_COLOUR, MOVING_COLOUR, GRID_COLOUR = "#30d158", "#ff453a", "#ffd60a"
COLUMN_INCHES = 2.3
MOST_DIFFERENCE = 128  # grey values; beyond it the difference's colour is saturated
FAST_PNG: dict[str, Any] = {"pil_kwargs": {"compress_level": 1}}
ROW_HEIGHTS = (0.22, 1.5)  # the least and the most, in picture widths; what is longer is drawn narrower


@dataclass(frozen=True)
class Plane:
    """A way to slice a volume: across axis `normal`, axis `across` to the right, axis `along` down or, if so, up."""

    name: str
    normal: int
    across: int
    along: int
    upwards: bool

    def cut(self, volume: np.ndarray, index: int) -> np.ndarray:
        """Return the picture [row, column (, channel)] at an index along the normal."""
        picture = np.take(volume, index, axis=self.normal).swapaxes(0, 1)
        return picture[::-1] if self.upwards else picture


PLANES = (Plane("axial", 2, 0, 1, False), Plane("coronal", 1, 0, 2, True), Plane("sagittal", 0, 1, 2, True))


def mid_slices(volume: np.ndarray, centre: Sequence[int] | None = None) -> list[np.ndarray]:
    """Return the axial, coronal and sagittal picture through the middle, or through `centre` (three indices)."""
    centre = [n // 2 for n in volume.shape[:3]] if centre is None else centre
    return [plane.cut(volume, centre[plane.normal]) for plane in PLANES]


def flow_colours(flow: np.ndarray, limit: float | None = None) -> np.ndarray:
    """Return a flow's colours, uint8 [..., 3]: red, green, blue for its parts along x, y, z.

    A part of -limit voxels gives 0, none 128, +limit 255, and more is clipped; so no displacement is mid grey. Without
    a `limit`, it is the largest part of any displacement.
    """
    limit = float(np.abs(flow).max()) if limit is None else limit
    return np.floor(128 + 127.999 * np.clip(flow / (limit or 1), -1, 1)).astype(np.uint8)


def warped_grid_image(flow: np.ndarray, step: float = 8, plane: Plane = PLANES[0]) -> np.ndarray:
    """Return what the warp makes of grid lines painted on the moving image: a picture, uint8, white on black.

    The lines are `step` voxels apart and about two voxels wide; the picture lies in the plane through the middle of
    the flow [X, Y, Z, 3], on the fixed grid like the warped image.
    """
    middle = flow.shape[plane.normal] // 2
    distances = []
    for place in places(flow, plane, middle):
        offset = np.mod(place - step / 2, step)
        distances.append(np.minimum(offset, step - offset))
    return (255 * np.clip(1.5 - np.minimum(*distances), 0, 1)).astype(np.uint8)


def training_pictures(
    fixed: np.ndarray, moving: np.ndarray, warped: np.ndarray, flow: np.ndarray
) -> dict[str, np.ndarray]:
    """Axial mid-slices of volumes 0..1 and the warped grid, as TensorBoard shows them: name -> uint8 [H, W, 1]."""
    volumes = {"fixed": fixed, "moving": moving, "warped": warped}
    pictures = {name: (255 * mid_slices(volume)[0]).astype(np.uint8) for name, volume in volumes.items()}
    pictures["warped_grid"] = warped_grid_image(flow)
    return {name: picture[..., None] for name, picture in pictures.items()}


def places(flow: np.ndarray, plane: Plane, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Return two pictures: where each voxel of a plane reads the moving image, along the plane's two axes in voxels."""
    picture = plane.cut(flow, index)
    columns, rows = np.arange(flow.shape[plane.across]), np.arange(flow.shape[plane.along])[:, None]
    return columns + picture[..., plane.across], (rows[::-1] if plane.upwards else rows) + picture[..., plane.along]


def pair_figure(
    path: str | Path,
    fixed: np.ndarray,
    moving: np.ndarray,
    warped: np.ndarray,
    flow: np.ndarray,
    fixed_seg: np.ndarray | None = None,
    moving_seg: np.ndarray | None = None,
    warped_seg: np.ndarray | None = None,
    spacing: Sequence[float] = (1, 1, 1),
    title: str | None = None,
) -> None:
    """Draw a registered pair to an image file: rows are the three planes, columns the images and what lies between.

    The planes go through the centre of the fixed label where there is one, else through the middle. The grid is that
    of the moving image as the warp moves it, drawn over the warped image.

    Args:
        path: the image file.
        fixed, moving, warped: [X, Y, Z], 0..255; `warped` is the moving image as warped by `flow`.
        flow: [X, Y, Z, 3] in voxels.
        fixed_seg, moving_seg, warped_seg: label masks [X, Y, Z], non-zero inside; outlined, the fixed one green, the
            others red.
        spacing: mm per voxel, for the right proportions.
        title: what stands above.

    Raises:
        UserError: the file cannot be written.
    """
    before, after = np.subtract(fixed, moving, dtype=np.float32), np.subtract(fixed, warped, dtype=np.float32)
    limit = float(np.abs(flow).max())
    lengths = np.multiply(fixed.shape, spacing)
    steps = [max(2, round(lengths.max() / 16 / mm)) for mm in spacing]
    heads = (
        "fixed",
        "moving",
        "warped",
        f"fixed - moving\n(mean size {np.abs(before).mean():.1f})",
        f"fixed - warped\n(mean size {np.abs(after).mean():.1f})",
        "flow",
        f"warped grid\n(every {' x '.join(map(str, steps))} voxels)",
    )
    heights = [np.clip(lengths[plane.along] / lengths[plane.across], *ROW_HEIGHTS) for plane in PLANES]
    inches = (COLUMN_INCHES * len(heads), COLUMN_INCHES * sum(heights) + 1.6)
    figure = Figure(figsize=inches, layout="constrained")
    *rows, keys = figure.subplots(4, len(heads), height_ratios=[*heights, 0.16])
    for axis, head in zip(rows[0], heads, strict=True):
        axis.set_title(head, fontsize=10)

    for row, plane, index in zip(rows, PLANES, _centre(fixed, fixed_seg), strict=True):
        view = View(plane, index, spacing)
        for axis, volume in zip(row[:3], (fixed, moving, warped), strict=True):
            view.show(axis, volume, cmap="gray", vmin=0, vmax=255)
        view.outline(row[0], fixed_seg, FIXED_COLOUR)
        view.outline(row[1], moving_seg, MOVING_COLOUR)
        view.outline(row[2], fixed_seg, FIXED_COLOUR, width=2)
        view.outline(row[2], warped_seg, MOVING_COLOUR, width=0.8)
        for axis, volume in zip(row[3:5], (before, after), strict=True):
            difference = view.show(axis, volume, cmap="RdBu_r", vmin=-MOST_DIFFERENCE, vmax=MOST_DIFFERENCE)
        view.show(row[5], flow_colours(flow, limit))
        view.show(row[6], warped, cmap="gray", vmin=0, vmax=255)
        for place, axis in zip(places(flow, plane, index), (plane.across, plane.along), strict=True):
            lines = np.arange(steps[axis] / 2, place.max(), steps[axis])
            row[6].contour(place, levels=lines, colors=[GRID_COLOUR], linewidths=0.7)
        label = f"{plane.name}\n{'xyz'[plane.normal]} = {index}"
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)

    for axis in keys:
        axis.set_axis_off()
    if fixed_seg is not None:
        keys[0].text(0, 0.5, "outline: fixed", color=FIXED_COLOUR, va="center", weight="bold")
        keys[1].text(0, 0.5, "outline: moving, warped", color=MOVING_COLOUR, va="center", weight="bold")
    bar = figure.colorbar(
        difference, cax=keys[3], orientation="horizontal", ticks=[-MOST_DIFFERENCE, 0, MOST_DIFFERENCE]
    )
    keys[3].set_axis_on()
    bar.set_label("grey values", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    flow_key(keys[5], limit)
    if title:
        figure.suptitle(title)
    save_figure(figure, path)


def _centre(fixed: np.ndarray, fixed_seg: np.ndarray | None) -> list[int]:
    """Return the index of each of PLANES along its normal."""
    if fixed_seg is None or not np.any(fixed_seg):
        centre = [n // 2 for n in fixed.shape]
    else:
        centre = [round(float(np.mean(indices))) for indices in np.nonzero(fixed_seg)]
    return [centre[plane.normal] for plane in PLANES]


@dataclass(frozen=True)
class View:
    """One row of a figure: what is drawn on an axis is cut along the plane at the index, in right proportions."""

    plane: Plane
    index: int
    spacing: Sequence[float]

    def show(self, axis: Axes, volume: np.ndarray, **options: Any) -> Any:
        """Draw the slice of a volume; `options` are those of `Axes.imshow`, whose image is returned."""
        aspect = self.spacing[self.plane.along] / self.spacing[self.plane.across]
        axis.set(xticks=[], yticks=[])
        return axis.imshow(self.plane.cut(volume, self.index), aspect=aspect, interpolation="nearest", **options)

    def outline(self, axis: Axes, labels: np.ndarray | None, colour: str, width: float = 1) -> None:
        """Draw the outline of all labels together; nothing where there are none."""
        if labels is not None and np.any(picture := self.plane.cut(labels, self.index)):
            axis.contour(picture != 0, levels=[0.5], colors=[colour], linewidths=width)


def flow_key(axis: Axes, limit: float) -> None:
    """Draw the flow's colours from -limit to limit voxels, a strip for each of x, y, z."""
    along = np.zeros((3, 101, 3))
    for k in range(3):
        along[k, :, k] = np.linspace(-limit, limit, 101)
    axis.set_axis_on()
    axis.imshow(flow_colours(along, limit), aspect="auto", extent=(-limit or -1, limit or 1, 2.5, -0.5))
    axis.set_yticks(range(3), "xyz", fontsize=7)
    axis.set_xlabel("voxels", fontsize=8)
    axis.tick_params(axis="x", labelsize=8)


def cascade_figure(path: str | Path, table: Mapping[str, np.ndarray]) -> None:
    """Draw what was measured after every cascade to an image file: the mean over pairs, and a band of one deviation.

    Args:
        path: the image file.
        table: name of a value -> array [cascade, pair], NaN where not measured; cascade 0 is before registration, 1
            affine. Each has a panel, of the pairs for which every cascade was measured; there must be one.

    Raises:
        UserError: the file cannot be written.
    """
    figure = Figure(figsize=(5 * len(table), 3.6), layout="constrained")
    for axis, (name, values) in zip(figure.subplots(1, len(table), squeeze=False)[0], table.items(), strict=True):
        pairs = values[:, np.isfinite(values).all(axis=0)]
        mean, deviation, cascades = pairs.mean(axis=1), pairs.std(axis=1), np.arange(len(pairs))
        axis.fill_between(cascades, mean - deviation, mean + deviation, alpha=0.2, linewidth=0)
        axis.plot(cascades, mean, marker="o")
        axis.set_title(f"{name}: mean of {pairs.shape[1]} pairs, band of one standard deviation", fontsize=9)
        axis.set_xlabel("cascade (0: before registration, 1: affine)")
        axis.set_xticks(cascades)
        axis.grid(alpha=0.3)
    save_figure(figure, path)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure to an image file, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    FigureCanvasAgg(figure)
    with files.whole_file(path) as new:
        try:
            figure.savefig(new, dpi=110, **FAST_PNG if new.suffix.lower() == ".png" else {})
        except ValueError as error:
            raise UserError(f"cannot write the figure {path}: {error}; check its ending (.png, .pdf)") from error
