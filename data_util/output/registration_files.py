"""Files of two registered scans: what register.py and demo.py leave in their output folders.

On the voxels of the fixed scan's file, with its axes as they are there:

    warped.nii.gz        the moving scan, interpolated once
    transform.h5         ITK transform from places in the fixed scan to those in the moving one, on the network's grid
    inverse.h5           the inverse of it
    report.html          the volumes slice by slice, with maps of the quality, for a browser
    labels.nii.gz        the moving scan's labels, nearest voxel
    points.csv           the moving scan's landmarks in the fixed scan, x,y,z in mm (LPS), and the error of the inverse

demo.py alone:

    displacement.nii.gz  vectors in mm, from a place in the fixed scan to the one in the moving scan (ITK's convention)
    affine.tfm           the affine cascade alone, as an ITK transform of the same direction
    fixed, moving, warped_moving_k      on the grid that the network saw, as in the original: PNG of slices, and a DICOM
                         series in the scan's own unit, after each cascade k
    flow_k.png           the composed flow of the cascades up to k; 0 is the affine one
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

import files
from data_util.grey_values import from_unit, to_uint8
from data_util.output import registration_figures
from data_util.output.html_report import write_html
from data_util.output.registration_report import doubts_about_inverse
from data_util.scans import transform_chain
from data_util.scans.dicom import FRAME_UID, MODALITY
from data_util.scans.dicom_writing import source_tags, write_series
from data_util.scans.frame import Frame
from data_util.scans.images import orient, to_array, write_image
from data_util.scans.pair_transform import resample_labels
from data_util.scans.points import write_points
from data_util.scans.prepared import PreparedScan
from data_util.scans.transform_files import End, write_transform

MEASURED = 50_000  # places at which the transforms are measured


def write_output(
    folder: Path,
    result: Any,
    labels: sitk.Image | None = None,
    points: np.ndarray | None = None,
    series: bool | None = None,
) -> None:
    """Write a `registration.Registration` into a folder that is there, but for its report.

    The report is told how exact the transforms are.

    Args:
        folder: where to.
        result: the registration.
        labels: SimpleITK image of the moving scan's labels, or None.
        points: landmarks of the moving scan in mm (LPS), [n, 3], NaN where one is missing, or None.
        series: whether to write the warped scan as a DICOM series too, in the folder `warped`; None: if one is DICOM.

    Raises:
        UserError: a file cannot be written.
    """
    ends = End("fixed", result.fixed.file_frame), End("moving", result.moving.file_frame)
    files.remove_leftovers(folder)  # before several threads make folders in it
    with ThreadPoolExecutor() as pool:  # while the transforms are measured and the summary is drawn
        written = [
            pool.submit(write_image, result.warped, folder / "warped.nii.gz"),
            pool.submit(write_transform, result.composite, folder / "transform.h5", ends),
            pool.submit(write_transform, result.inverse, folder / "inverse.h5", ends[::-1]),
        ]
        measure_transforms(result)
        written.append(pool.submit(_write_page, folder, result))
        draw_summary(folder, result)
        for file in written:
            file.result()
    if labels is not None:
        write_image(resample_labels(labels, result.displacement), folder / "labels.nii.gz")
    if points is not None:
        rows = np.full((len(points), 4), np.nan)
        known = np.isfinite(points).all(axis=1)
        rows[known] = np.column_stack(result.transform.to_fixed(points[known]))
        write_points(folder / "points.csv", rows[:, :3], rows[:, 3])
    images = result.fixed.image, result.moving.image
    if any(image.HasMetaDataKey(MODALITY) for image in images) if series is None else series:
        fixed, moving = map(source_tags, images)
        write_series(orient(result.warped), folder / "warped", {**moving, FRAME_UID: fixed[FRAME_UID]}, "warped")


def _write_page(folder: Path, result: Any) -> None:
    """Write report.html."""
    fixed, moving = result.fixed, result.moving
    volumes = {"fixed": fixed.in_lps(fixed.volume), "moving": moving.in_lps(moving.volume)}
    volumes["warped"] = _warped_volume(fixed, result.stages[-1])
    write_html(folder / "report.html", volumes, result.quality, fixed.frame, result.report)


def write_original(
    folder: Path, result: Any, labels: sitk.Image | None = None, points: np.ndarray | None = None
) -> None:
    """Write what `write_output` does and, as the original's demo, pictures and DICOM series after each cascade.

    Args:
        folder: where to.
        result: the registration.
        labels, points: as in `write_output`.

    Raises:
        UserError: a file cannot be written.
    """
    write_output(folder, result, labels, points, series=False)
    write_image(result.displacement, folder / "displacement.nii.gz")
    _write_affine(result.transform.affine, folder / "affine.tfm")
    write_series_of(folder, result)
    draw_stages(folder, result)


def measure_transforms(result: Any) -> None:
    """Say in the report how exact transform.h5 and inverse.h5 are.

    Where the flow folds there is no inverse; a doubt says so where it is much.
    """
    scan, frame = Frame.of(result.fixed.image), result.fixed.frame
    places, inside = (transform_chain.sample(grid, MEASURED) for grid in (scan, frame))
    # All at once, since SimpleITK copies a field whenever it is asked for it.
    led = transform_chain.map_points(result.composite, np.concatenate([places, inside]))
    beside = np.linalg.norm(led[: len(places)] - result.transform.to_moving(places), axis=1)
    back = np.linalg.norm(transform_chain.map_points(result.inverse, led[len(places) :]) - inside, axis=1)
    result.report["transform"] = {
        "from_displacement_mm": _largest_and_mean(beside),
        "inverse_error_mm": _largest_and_mean(back),
        "inverse_error_above_1_mm": round(float(np.mean(back > 1)), 6),
    }
    result.report["doubts"] += doubts_about_inverse(back)


def _largest_and_mean(error: np.ndarray) -> dict[str, float]:
    return {"largest": round(float(error.max()), 4), "mean": round(float(error.mean()), 4)}


def _write_affine(transform: sitk.Transform, path: Path) -> None:
    with files.whole_file(path, RuntimeError) as new:
        sitk.WriteTransform(transform, str(new))
        text = new.read_text()
        if "\nFixedParameters:" not in text or not text.endswith("\n"):  # SimpleITK passes over a full disk
            raise RuntimeError(f"wrote only {len(text)} bytes of it")


def write_series_of(folder: Path, result: Any) -> None:
    """Write the DICOM series: both scans on their frames, and the moving one on the fixed frame after each cascade.

    They have the scans' own grey values, read once from the scan in full resolution.
    """
    tags = {role: source_tags(scan.image) for role, scan in (("fixed", result.fixed), ("moving", result.moving))}
    for role, scan in (("fixed", result.fixed), ("moving", result.moving)):
        volume = scan.frame.resample(sitk.Cast(scan.image, sitk.sitkFloat32))
        write_series(orient(volume), folder / role, tags[role], role)
    in_fixed = {**tags["moving"], FRAME_UID: tags["fixed"][FRAME_UID]}
    moving = sitk.Cast(result.moving.image, sitk.sitkFloat32)
    for k, stage in enumerate(result.stages):
        transform = replace(result.transform, flow=stage.composed_flow)
        warped, _ = transform.warp(moving, result.fixed.frame)
        write_series(orient(warped), folder / f"warped_moving_{k}", in_fixed, f"warped_moving_{k}")


def draw_stages(folder: Path, result: Any) -> None:
    """Draw slices of both volumes, and of the warped one with the flow after each cascade."""
    fixed = result.fixed
    for role, scan in (("fixed", fixed), ("moving", result.moving)):
        registration_figures.slices_figure(folder / f"{role}.png", scan.in_lps(scan.volume), scan.frame.spacing)
    for k, stage in enumerate(result.stages):
        registration_figures.flow_image(folder / f"flow_{k}.png", fixed.in_lps(stage.composed_flow))
        registration_figures.slices_figure(
            folder / f"warped_moving_{k}.png", _warped_volume(fixed, stage), fixed.frame.spacing
        )


def draw_summary(folder: Path, result: Any) -> None:
    """Draw summary.png: both scans, how alike they are before and after, the flow, and what may be wrong."""
    fixed, moving, last = result.fixed, result.moving, result.stages[-1]
    registration_figures.summary_figure(
        folder / "summary.png",
        [_shown(scan) for scan in (fixed, moving)],
        (fixed.in_lps(fixed.volume), moving.in_lps(moving.volume), _warped_volume(fixed, last)),
        fixed.in_lps(last.composed_flow),
        result.quality.residual,
        fixed.frame.spacing,
        headline(result.report),
        result.report["doubts"],
    )


def _warped_volume(fixed: PreparedScan, stage: Any) -> np.ndarray:
    """The warped volume of a stage, 0..255, its axes turned to LPS."""
    return to_uint8(from_unit(fixed.in_lps(stage.warped)))


def headline(report: Mapping[str, Any]) -> str:
    """Say in a line how similar the volumes are before and after, and how much of the flow folds."""
    similarity, folded = report["similarity"], 100 * report["folding"][-1]
    return f"Correlation {similarity[0]:.3f} -> {similarity[-1]:.3f}, folding {folded:.2f} %"


def _shown(scan: PreparedScan) -> tuple:
    """A scan as `summary_figure` takes it, in the window of what the network saw of it."""
    return to_array(scan.image), Frame.of(scan.image).spacing, scan.region, scan.box, scan.window
