"""A task of the Learn2Reg challenge as a data set: PREFIX.h5 and its config PREFIX.json.

The challenge's images of a task are on grids of one size already, so they are kept voxel by voxel, with the axes of
their files: what the network finds on them is what is handed in. Only grey values are mapped to 0..255.
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import tqdm

from data_util.challenge import SUBSETS, Case, Pair, Task
from data_util.config import DatasetConfig, write_dataset_config
from data_util.hdf5 import CROP, SOURCE, WINDOW, Scan, hdf5_errors
from data_util.hdf5_writer import new_file
from data_util.making.labels import read_native_labels
from data_util.making.new_set import new_paths
from data_util.scans.frame import SET_UPRIGHT, Frame
from data_util.scans.images import read_native, to_array
from data_util.scans.points import read_points
from data_util.scans.preprocessing import shown_window, window
from data_util.scans.view import ENDS, PRESETS, View
from errors import UserError, listed

SCHEMES = dict(zip(SUBSETS, ("1", "2", "test"), strict=True))
SAME_SPACING = 1e-4  # relative difference of spacings that are written down differently


def default_view(task: Task) -> View:
    """The grey values that are shown of a task where nobody says: 40/400 of CT, else the 1st to the 99th percentile."""
    is_ct = bool(task.modalities) and all("CT" in name.upper() for name in task.modalities)
    preset = PRESETS["body" if is_ct else "brain"]
    return View(crop="none", window=preset.window, percentiles=preset.percentiles)


def import_task(task: Task, prefix: str | Path, view: View, overwrite: bool = False) -> tuple[Path, Path]:
    """Write a task's images as a data set.

    Scheme 1 is for training, 2 for the validation pairs and `test` for those of the test; what there is no pair for is
    left out, and so are test pairs whose images were not given out.

    Args:
        task: the task.
        prefix: path of both files without their ending.
        view: the grey values to show; its other parts are found here.
        overwrite: replace a data set that is there.

    Returns:
        The paths of both files.

    Raises:
        UserError: an image is missing, of another size than the others or otherwise not to be used; no subset has a
            pair; the data set is there already, or cannot be written.
    """
    data, config = new_paths(prefix, overwrite)
    subsets, pairs = _subsets(task)
    ids = list(dict.fromkeys(scan for scans in subsets.values() for scan in scans))
    frames: dict[str, Frame] = {}
    values: set[int] = set()
    with new_file(data) as file, tqdm.tqdm(ids, desc=task.name, unit="scan") as progress:
        for scan_id in progress:
            case = task.cases[scan_id]
            scan, frame, shown = _read_case(case, view)
            first = next(iter(frames.values()), frame)
            if frame.size != first.size:
                sizes = ["x".join(map(str, size)) for size in (frame.size, first.size)]
                raise UserError(
                    f"{case.image}: has {sizes[0]} voxels, and {ids[0]} has {sizes[1]}; the images of a task must be "
                    "of one size: resample them, or build a set with python -m data_util.build"
                )
            frames[scan_id] = frame
            attributes = {SOURCE: case.image.name, CROP: "none", WINDOW: shown}
            frame.save(attributes)
            frame.save(attributes, "source_")
            file.write_scan(scan_id, scan, attributes)
            values |= set() if scan.segmentation is None else set(np.unique(scan.segmentation).tolist())
    others: dict[str, Any] = _geometry(frames.values(), view).to_dict()
    if labels := task.labels or {str(value): value for value in sorted(values - {0})}:
        others["segmentation_class_value"] = labels
    others["pairs"] = {
        subset: [[f"{data.stem}/{scan}" for scan in pair] for pair in listed_pairs]
        for subset, listed_pairs in pairs.items()
    }
    size = frames[ids[0]].size
    schemes = {SCHEMES[subset]: {subset: 1.0} for subset in subsets}
    write_dataset_config(config, data, size, task.name, subsets, schemes, **{k: v for k, v in others.items() if v})
    return data, config


def check_grids(config: DatasetConfig, task: Task, pairs: Sequence[Pair]) -> None:
    """Check that a data set has the images of pairs voxel by voxel as the task's files have them.

    Raises:
        UserError: an image is not in it, or lies there on another grid, so that flows are none of the task's.
    """
    for scan_id in dict.fromkeys(scan for pair in pairs for scan in pair):
        own = Frame.of(read_native(task.cases[scan_id].image))
        data = next(iter(config.files.values())).path
        with hdf5_errors(data), h5py.File(data, "r") as file:
            frame = Frame.load(file[scan_id].attrs) if scan_id in file and "direction" in file[scan_id].attrs else None
        if frame is None or frame.size != own.size or not np.allclose(frame.matrix, own.matrix, atol=SAME_SPACING):
            what = "is not in it" if frame is None else f"is not on the grid of {task.cases[scan_id].image} there"
            raise UserError(
                f"{config.path}: {scan_id} {what}; give the data set that python -m data_util.learn2reg import makes"
            )


def _subsets(task: Task) -> tuple[dict[str, list[str]], dict[str, list[Pair]]]:
    """The ids of each subset's images, and the pairs of the subsets that list them."""
    later = {scan for subset in ("val", "test") for pair in task.pairs[subset] for scan in pair}
    pairs = {subset: list(task.pairs[subset]) for subset in SUBSETS}
    pairs["train"] = [pair for pair in pairs["train"] if not later & set(pair)]
    lost = [scan for pair in pairs["test"] for scan in pair if not task.cases[scan].image.is_file()]
    if lost:
        print(f"{task.path}: no scheme 'test', as images of it are not there: {listed(lost)}", file=sys.stderr)
        pairs["test"] = []
    subsets = {name: list(dict.fromkeys(scan for pair in pairs[name] for scan in pair)) for name in SUBSETS}
    if not pairs["train"] and len(task.training) > 1:
        subsets["train"] = list(task.training)
    subsets = {name: ids for name, ids in subsets.items() if ids}
    if not subsets:
        raise UserError(f"{task.path}: has no pairs, and fewer than two images to train on; add images or pairs to it")
    return subsets, {name: pairs[name] for name in subsets if pairs[name]}


def _read_case(case: Case, view: View) -> tuple[Scan, Frame, tuple[float, float]]:
    """A case on its own grid, with its frame and the (level, width) shown."""
    image = read_native(case.image)
    if image.HasMetaDataKey(SET_UPRIGHT):
        raise UserError(f"{case.image}: its axes are not at right angles, so its grid cannot be kept; resample it")
    frame, grey = Frame.of(image), to_array(image)
    labels = None if case.label is None else read_native_labels(case.label)
    if labels is not None and labels.shape != grey.shape:
        sizes = ["x".join(map(str, array.shape)) for array in (labels, grey)]
        raise UserError(
            f"{case.label}: has {sizes[0]} voxels and its image {sizes[1]}; give labels on the image's grid"
        )
    if labels is not None and labels.max() < 256:
        labels = labels.astype(np.uint8)
    if grey.min() == grey.max():
        raise UserError(f"{case.image}: is {grey.min():g} everywhere, so nothing can be seen in it; check the file")
    try:
        shown = shown_window(grey, view)
    except UserError as error:
        raise UserError(f"{case.image}: {error}") from error
    points = None
    if len(case.landmarks) == 1:  # several kinds belong to several partners, and a scan has but one list
        (table,) = case.landmarks.values()
        points = frame.to_voxel(read_points(table, "voxel", frame)).astype(np.float32)
    scan = Scan(window(grey, *shown), labels, points, np.array(frame.spacing))
    return scan, frame, shown


def _geometry(frames: Iterable[Frame], view: View) -> View:
    """A view with the orientation and the spacing that all frames have; what differs is left open."""
    frames = list(frames)
    orientations = {_orientation(frame) for frame in frames}
    spacings = np.array([frame.spacing for frame in frames])
    alike = np.allclose(spacings, spacings[0], rtol=SAME_SPACING, atol=0)
    x, y, z = spacings[0].tolist()
    return replace(
        view,
        orientation=orientations.pop() if len(orientations) == 1 else None,
        spacing=(x, y, z) if alike else None,
    )


def _orientation(frame: Frame) -> str | None:
    """Where the axes of a frame run to, such as 'RAS'; None where they are not along x, y and z, in this order."""
    direction = np.reshape(frame.direction, (3, 3))
    if list(np.abs(direction).argmax(axis=0)) != [0, 1, 2]:
        return None
    return "".join(ends[0 if direction[axis, axis] > 0 else 1] for axis, ends in enumerate(ENDS))
