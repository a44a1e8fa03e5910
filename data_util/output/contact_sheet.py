"""Contact sheets: a look at many scans of a data set at once."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from data_util.output.figures import MOVING_COLOUR, PLANES, View, save_figure

COLUMNS, SLICE_INCHES = 3, 1.8  # scans a row, and a slice's width


def sheet_figure(
    path: str | Path, scan_ids: Sequence[str], read: Callable[[str], Any], faulty: Collection[str] = ()
) -> None:
    """Draw axial, coronal and sagittal slices of scans to an image file, every label outlined in its colour.

    Slices go through the centre of a scan's labels, or else its middle. Grey values are shown as they are, 0 black and
    255 white.

    Args:
        path: the image file.
        scan_ids: ids of the scans, at least one.
        read: function from an id to its `hdf5.Scan`.
        faulty: ids whose title is red.

    Raises:
        UserError: the file cannot be written.
    """
    columns = min(COLUMNS, len(scan_ids))
    rows = -(-len(scan_ids) // columns)
    figure = Figure(figsize=(SLICE_INCHES * 3 * columns, (SLICE_INCHES + 0.25) * rows), layout="constrained")
    axes = figure.subplots(rows, 3 * columns, squeeze=False).reshape(-1, 3)
    for axis in axes.flat:
        axis.set_axis_off()
    for scan_id, row in zip(scan_ids, axes, strict=False):
        scan = read(scan_id)
        labels = np.zeros(scan.volume.shape, np.int32) if scan.segmentation is None else scan.segmentation
        inside = np.argwhere(labels)
        centre = np.rint(inside.mean(axis=0)).astype(int) if len(inside) else np.array(labels.shape) // 2
        for axis, plane in zip(row, PLANES, strict=True):
            view = View(plane, centre[plane.normal], (1, 1, 1) if scan.spacing is None else scan.spacing)
            view.show(axis, scan.volume, cmap="gray", vmin=0, vmax=255)
            view.show(axis, _borders(labels, plane.normal), cmap="tab10", vmin=0, vmax=9)
        row[0].set_title(scan_id, fontsize=8, loc="left", color=MOVING_COLOUR if scan_id in faulty else "black")
    save_figure(figure, path)


def _borders(labels: np.ndarray, normal: int) -> np.ma.MaskedArray:
    """Number (1..9) of the label at voxels that have a neighbour of another one in their slice, the rest masked out."""
    border = np.zeros(labels.shape, bool)
    for axis in {0, 1, 2} - {normal}:
        step = np.diff(labels, axis=axis) != 0
        width = [(0, 0)] * 3
        for width[axis] in ((0, 1), (1, 0)):
            border |= np.pad(step, width)
    return np.ma.masked_array(1 + (labels - 1) % 9, ~border | (labels == 0))
