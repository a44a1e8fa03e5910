"""Registration of two scans without a network, beside ANTs: python -m benchmarks.registration; docs/measured.md.

    python -m benchmarks.registration --fixed a.nii.gz --moving b.nii.gz --fixed_labels a_seg.nii.gz --moving_labels b_seg.nii.gz
    python -m benchmarks.registration --known a.nii.gz --known_labels a_seg.nii.gz --only rotated

The second makes its pairs from one scan: turned, shifted and scaled, deformed smoothly, and with other grey values and
noise. There the truth is known, and the error is told in mm. With `--ants PYTHON`, an interpreter that has antspyx, each
pair is also registered by ANTs' SyN, from the same two cropped volumes. A row tells the mean Dice over the labels, the
share of voxels that are folded, and the seconds of CPU time of all threads.
"""  # noqa: E501

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

import cli
from data_util.scans.frame import Frame
from data_util.scans.images import read_image
from data_util.scans.pair_transform import resample_labels
from errors import UserError

MARGIN = 30  # mm around a scan that is turned and shifted, so that nothing of it leaves the grid
POINTS = 4000  # places where the error is taken
AXES = {"x": (1, 0, 0), "y": (0, 1, 0), "z": (0, 0, 1)}

# What the interpreter with antspyx runs: it reads a JSON of paths and writes the warped labels and the carried points.
PEER = """
import json, resource, sys
import ants, numpy, pandas
job = json.load(open(sys.argv[1]))
fixed, moving = ants.image_read(job["fixed"]), ants.image_read(job["moving"])
found = ants.registration(fixed, moving, type_of_transform=job["kind"], random_seed=1)
used = resource.getrusage(resource.RUSAGE_SELF)
transforms = found["fwdtransforms"]
if job["labels"]:
    warped = ants.apply_transforms(
        ants.image_read(job["grid"]), ants.image_read(job["labels"]), transforms, interpolator="genericLabel")
    ants.image_write(warped, job["warped"])
points = pandas.DataFrame(numpy.load(job["points"]), columns=list("xyz"))
carried = ants.apply_transforms_to_points(3, points, transforms)[["x", "y", "z"]].to_numpy()
field = [name for name in transforms if name.endswith(".nii.gz")]
folding = (ants.create_jacobian_determinant_image(fixed, field[0]).numpy() <= 0).mean() if field else 0.0
numpy.savez(job["found"], carried=carried, seconds=used.ru_utime + used.ru_stime, folding=folding)
"""


class Pair(NamedTuple):
    """Two scans with their labels or None, and the true map of places of the fixed one to the moving one, or None."""

    name: str
    fixed: sitk.Image
    moving: sitk.Image
    fixed_labels: sitk.Image | None
    moving_labels: sitk.Image | None
    truth: sitk.Transform | None


class Result(NamedTuple):
    """What a registration gave: the moving labels on the fixed scan, carried points, share folded, CPU seconds."""

    labels: sitk.Image | None
    carried: np.ndarray
    folding: float
    seconds: float


def main(arguments: list[str] | None = None) -> None:
    """Print a Markdown table with one row for each pair and method."""
    flags = argparse.ArgumentParser(prog="python -m benchmarks.registration", description="Register without a network.")
    flags.add_argument("--fixed", help="fixed scan")
    flags.add_argument("--moving", help="moving scan")
    flags.add_argument("--fixed_labels", help="its label image")
    flags.add_argument("--moving_labels", help="its label image")
    flags.add_argument("--known", help="scan to make pairs of, whose truth is known")
    flags.add_argument("--known_labels", help="its label image")
    flags.add_argument("--only", default="", help="only the pairs with this in their name")
    flags.add_argument("--preprocess", default="brain", help="what the scans show (brain)")
    flags.add_argument("--net_args", default="", help="the loss, such as \"similarity='ncc'\"")
    flags.add_argument("--ants", metavar="PYTHON", help="interpreter with antspyx, to register by SyN too")
    flags.add_argument("--kind", default="SyN", help="kind of ANTs' registration (SyN)")
    args = flags.parse_args(arguments)
    pairs = [pair for pair in asked_pairs(args) if args.only in pair.name]
    if not pairs:
        raise UserError("no pair: give --fixed and --moving, or --known, and an --only that is in a pair's name")
    print("| pair | method | Dice before | Dice | error before, mm | error, mm | folded | CPU time, s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for pair in pairs:
        points = places(pair.fixed)
        result, crops = registered_here(pair, points, args)
        print(row(pair, "here", points, result), flush=True)
        if args.ants:
            print(row(pair, f"ANTs {args.kind}", points, registered_by_ants(pair, points, crops, args)), flush=True)


def asked_pairs(args: argparse.Namespace) -> Iterator[Pair]:
    """The pairs of the flags."""

    def labels(path: str | None) -> sitk.Image | None:
        return None if path is None else read_image(path, is_label=True)

    if args.fixed and args.moving:
        scans = read_image(args.fixed), read_image(args.moving)
        yield Pair("two scans", *scans, labels(args.fixed_labels), labels(args.moving_labels), None)
    if args.known:
        yield from known_pairs(read_image(args.known), labels(args.known_labels), args.only)


def known_pairs(scan: sitk.Image, labels: sitk.Image | None, only: str) -> Iterator[Pair]:
    """Pairs of a scan and itself, deformed, with other grey values and noise; each from a chance of its own."""
    changes: dict[str, dict] = {"deformed": {}}
    changes |= {f"rotated {a} about {x}": {"angle": a, "axis": AXES[x]} for a in (15, 30, 45) for x in AXES}
    changes |= {f"shifted {mm} mm": {"shift": (mm, -mm / 2, mm / 4)} for mm in (20, 50)}
    changes |= {f"scaled {factor}": {"scale": factor} for factor in (0.8, 1.25)}
    for seed, (name, change) in enumerate(changes.items()):
        if only in name:
            yield deformed(name, scan, labels, np.random.default_rng(seed), **change)


def deformed(
    name: str,
    scan: sitk.Image,
    labels: sitk.Image | None,
    rng: np.random.Generator,
    angle: float = 0.0,
    axis: tuple[int, int, int] = (0, 0, 1),
    shift: tuple[float, ...] = (0, 0, 0),
    scale: float = 1.0,
) -> Pair:
    """One such pair: `angle` in degrees, `shift` in mm."""
    frame = Frame.of(scan)
    wide = frame.widened(*([int(MARGIN / min(frame.spacing))] * 3 for _ in range(2)))
    grid = wide.box((0, 0, 0), wide.size, [int(n * mm / 2) for n, mm in zip(wide.size, wide.spacing, strict=True)])
    centre = frame.to_physical((np.array(frame.size) - 1) / 2)
    linear = sitk.Similarity3DTransform()
    linear.SetCenter(centre.tolist())
    linear.SetRotation(axis, float(np.deg2rad(angle)))
    linear.SetScale(scale)
    linear.SetTranslation([float(mm) for mm in shift])
    field = np.zeros((*grid.size, 3))
    for sigma, length in ((8, 6.0), (16, 8.0)):  # voxels of 2 mm, mm
        smooth = np.stack([ndimage.gaussian_filter(rng.normal(size=grid.size), sigma) for _ in range(3)], -1)
        field += length * smooth / np.abs(smooth).max()
    warp = sitk.DisplacementFieldTransform(sitk.Cast(grid.put(field), sitk.sitkVectorFloat64))
    truth = sitk.CompositeTransform([linear, warp])  # the last comes first
    reference = sitk.Image([int(n) for n in wide.size], sitk.sitkUInt8)
    reference.SetSpacing(wide.spacing)
    reference.SetOrigin(wide.origin)
    reference.SetDirection(wide.direction)
    fixed = sitk.Resample(sitk.Cast(scan, sitk.sitkFloat32), reference, truth, sitk.sitkLinear, 0.0)
    grey = sitk.GetArrayFromImage(fixed)
    most = np.percentile(grey[grey > 0], 99)
    bias = ndimage.zoom(rng.uniform(0.8, 1.2, (3, 3, 3)), np.array(grey.shape) / 3, order=2)
    grey = most * np.clip(grey / most, 0, None) ** 0.8 * bias[tuple(map(slice, grey.shape))]
    changed = sitk.GetImageFromArray((grey + 0.03 * most * np.abs(rng.normal(size=grey.shape))).astype(np.float32))
    changed.CopyInformation(fixed)
    carried = labels and sitk.Resample(labels, reference, truth, sitk.sitkNearestNeighbor, 0)
    return Pair(name, changed, scan, carried, labels, truth)


def places(scan: sitk.Image) -> np.ndarray:
    """Places of a scan where there is something to see: [n, 3] in mm."""
    grey = np.swapaxes(sitk.GetArrayViewFromImage(scan), 0, 2)
    found = np.argwhere(grey > 0.2 * np.percentile(grey, 99))
    return Frame.of(scan).to_physical(found[:: max(len(found) // POINTS, 1)])


def registered_here(pair: Pair, points: np.ndarray, args: argparse.Namespace) -> tuple[Result, list[sitk.Image]]:
    """The result of `register`, and the two volumes that it compared."""
    from registration import register

    before = cpu_seconds()
    found = register(pair.fixed, pair.moving, view=args.preprocess, net_args=args.net_args)
    seconds = cpu_seconds() - before
    labels = pair.moving_labels and resample_labels(pair.moving_labels, found.displacement)
    crops = [scan.frame.put(np.asarray(scan.volume, np.float32)) for scan in (found.fixed, found.moving)]
    return Result(labels, found.transform.to_moving(points), found.report["folding"][-1], seconds), crops


def registered_by_ants(pair: Pair, points: np.ndarray, crops: list[sitk.Image], args: argparse.Namespace) -> Result:
    """The result of ANTs, on two threads.

    Raises:
        UserError: it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: f"{folder}/{name}.nii.gz" for name in ("fixed", "moving", "grid", "labels", "warped")}
        images = {"fixed": crops[0], "moving": crops[1], "grid": pair.fixed, "labels": pair.moving_labels}
        for name, image in images.items():
            if image is not None:
                sitk.WriteImage(sitk.Cast(image, sitk.sitkFloat32), paths[name])
        job = {**paths, "kind": args.kind, "points": f"{folder}/points.npy", "found": f"{folder}/found.npz"}
        job["labels"] = paths["labels"] if pair.moving_labels is not None else ""
        np.save(job["points"], points)
        Path(folder, "job.json").write_text(json.dumps(job))
        threads = {**os.environ, "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": "2"}
        done = subprocess.run(
            [args.ants, "-c", PEER, f"{folder}/job.json"], env=threads, capture_output=True, text=True, check=False
        )
        if done.returncode:
            reason = (done.stderr.strip() or "it says nothing").splitlines()[-1]
            raise UserError(f"{args.ants} cannot register by ANTs ({reason}); is antspyx installed there?")
        found = np.load(job["found"])
        labels = sitk.Cast(sitk.ReadImage(paths["warped"]), sitk.sitkInt32) if pair.moving_labels is not None else None
        return Result(labels, found["carried"], float(found["folding"]), float(found["seconds"]))


def row(pair: Pair, method: str, points: np.ndarray, result: Result) -> str:
    """A row of the table."""
    dice = before = error = error_before = ""
    if pair.fixed_labels is not None and result.labels is not None:
        fixed = sitk.Resample(pair.fixed_labels, result.labels, sitk.Transform(), sitk.sitkNearestNeighbor, 0)
        still = sitk.Resample(pair.moving_labels, result.labels, sitk.Transform(), sitk.sitkNearestNeighbor, 0)
        before, dice = (f"{mean_dice(fixed, other):.3f}" for other in (still, result.labels))
    if pair.truth is not None:
        true = np.array([pair.truth.TransformPoint(point) for point in points.tolist()])
        error_before, error = (f"{np.linalg.norm(at - true, axis=1).mean():.2f}" for at in (points, result.carried))
    folded = f"{100 * result.folding:.3f} %"
    return (
        f"| {pair.name} | {method} | {before} | {dice} | {error_before} | {error} | {folded} | {result.seconds:.1f} |"
    )


def mean_dice(one: sitk.Image, other: sitk.Image) -> float:
    """Mean over the labels of `one`, but for 0, of twice the common voxels over the voxels of both."""
    a, b = (sitk.GetArrayViewFromImage(image).astype(np.int64).ravel() for image in (one, other))
    count = int(max(a.max(), b.max())) + 1
    common, size = np.bincount(a[a == b], minlength=count), np.bincount(a, minlength=count)
    labels = np.flatnonzero(size)
    labels = labels[labels > 0]
    return float((2 * common[labels] / (size + np.bincount(b, minlength=count))[labels]).mean())


def cpu_seconds() -> float:
    """CPU time of this process and all its threads so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    sys.exit(cli.run(main))
