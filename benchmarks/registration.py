"""Registration of two scans without a network, beside ANTs and SimpleITK: python -m benchmarks.registration.

    python -m benchmarks.registration --nilearn DATA --mricron TEMPLATES --ants PYTHON
    python -m benchmarks.registration --nilearn DATA --mricron TEMPLATES --only "MNI and Colin*/*45*/here"
    python -m benchmarks.registration --fixed a.nii.gz --moving b.nii.gz --fixed_labels a_seg.nii.gz --moving_labels b_seg.nii.gz
    python -m benchmarks.registration --report docs/registration.md

Every pair (`registration_pairs`) is registered from every start by every method (`registration_methods`), each in a
process of its own, which gets the two scans as files and nothing else. What it found comes back as a displacement
field, and is judged here, in the same way for all. A line of JSON is appended to --records as soon as one is done; what
is on record is not done again unless it failed. --report writes the table of all records.

DATA is the folder datasets/data of the package nilearn, TEMPLATES that of Debian's mricron-data. What is not given is
left out, and said.
"""  # noqa: E501

import argparse
import fnmatch
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

import cli
from benchmarks import registration_methods, registration_pairs
from benchmarks.registration_pairs import Pair
from benchmarks.registration_table import report
from data_util.scans.frame import Frame
from errors import UserError

ROOT = Path(__file__).parents[1]
GRID = 2.0  # mm, of the displacement field that is judged
ALL = ["*"]  # what is registered unless --only says otherwise: but for the methods for heads
POINTS = 20_000  # places where the error is taken
PAIR_SCANS = ("fixed", "moving", "fixed_labels", "moving_labels")


def main(arguments: list[str] | None = None) -> None:
    """Register what is asked for and not on record yet, and write the table."""
    flags = argparse.ArgumentParser(prog="python -m benchmarks.registration", description="Register without a network.")
    flags.add_argument("--nilearn", type=Path, metavar="FOLDER", help="datasets/data of the package nilearn")
    flags.add_argument("--mricron", type=Path, metavar="FOLDER", help="templates of Debian's mricron-data")
    flags.add_argument("--ants", metavar="PYTHON", help="interpreter with antspyx")
    for name in PAIR_SCANS:
        flags.add_argument(f"--{name}", help="of a pair of your own")
    flags.add_argument("--only", nargs="+", default=ALL, metavar="PAIR/START/METHOD", help="patterns such as '*/*/SyN'")
    flags.add_argument(
        "--spacing", type=float, metavar="MM", help="register the scans at about this spacing (their own)"
    )
    flags.add_argument("--records", type=Path, default=Path("registration.jsonl"), help="file of results (%(default)s)")
    flags.add_argument("--report", type=Path, help="write the table of all records to this file")
    flags.add_argument("--list", action="store_true", help="name what would be done, and end")
    args = flags.parse_args(arguments)
    sources = registration_pairs.Sources(args.nilearn, args.mricron, {name: getattr(args, name) for name in PAIR_SCANS})
    done = {(one["pair"], one["start"], one["method"]) for one in read_records(args.records) if "failed" not in one}
    asked = wanted(args.only, bool(args.ants))
    suffix = f", at {args.spacing:g} mm" if args.spacing else ""
    own = " ".join(Path(path).name for path in sources.given.values() if path)
    titles = {pair: (f"{pair} ({own})" if pair == "given" and own else pair) + suffix for pair, *_ in asked}
    todo = [(pair, *rest) for pair, *rest in asked if (titles[pair], *rest) not in done]
    if not asked:
        raise UserError(f"--only {' '.join(args.only)}: no PAIR/START/METHOD has such a name; --list names them")
    if args.list:
        print(*("/".join(one) for one in todo), sep="\n")
        return
    makers = registration_pairs.pairs(sources)
    for name in dict.fromkeys(pair for pair, *_ in todo):
        try:
            pair = makers[name]()
        except UserError as error:
            print(f"{name}: left out ({error})")
            continue
        register_all(titles[name], pair, [(start, method) for one, start, method in todo if one == name], args)
    if args.report:
        args.report.write_text(report(read_records(args.records)), encoding="utf-8")


def wanted(patterns: list[str], with_ants: bool) -> list[tuple[str, str, str]]:
    """(pair, start, method) of all that the patterns name and that makes sense."""
    found = []
    for pair in registration_pairs.pairs(registration_pairs.Sources(None, None, {})):
        two = pair in registration_pairs.TWO_MODALITIES
        senseless = registration_methods.ONE_MODALITY if two else registration_methods.TWO_MODALITIES
        if patterns == ALL or pair not in registration_pairs.HEADS:
            senseless = (*senseless, *registration_methods.OF_HEADS)
        for start in registration_pairs.starts():
            for method, (who, _) in registration_methods.METHODS.items():
                if method in senseless or (who == registration_methods.ANTS and not with_ants):
                    continue
                if any(fnmatch.fnmatchcase(f"{pair}/{start}/{method}", pattern) for pattern in patterns):
                    found.append((pair, start, method))
    return found


def read_records(path: Path) -> list[dict[str, Any]]:
    """The last record of each pair, start and method in a file, out of which a line that a stop cut short is taken."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    records = [json.loads(line) for line in whole.splitlines()]
    return list({(one["pair"], one["start"], one["method"]): one for one in records}.values())


def register_all(name: str, pair: Pair, asked: list[tuple[str, str]], args: argparse.Namespace) -> None:
    """Register a pair from these starts by these methods, and put each on record."""
    starts, points = registration_pairs.starts(), places(pair.fixed)
    for begin in dict.fromkeys(start for start, _ in asked):
        start = starts[begin](pair.moving)
        with tempfile.TemporaryDirectory() as folder:
            scans = {"fixed": pair.fixed, "moving": registration_pairs.moved(pair.moving, start)}
            for role, scan in scans.items():
                sitk.WriteImage(coarser(sitk.Cast(scan, sitk.sitkFloat32), args.spacing), f"{folder}/{role}.nii.gz")
            sitk.WriteImage(judged_grid(pair.fixed), f"{folder}/grid.nii.gz")
            before = judged(pair, start, sitk.Transform(), points)
            for method in (method for one, method in asked if one == begin):
                record = {"pair": name, "start": begin, "method": method, "before": before}
                record |= registered(Path(folder), method, pair, start, points, args)
                with args.records.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
                print(f"{name}, {begin}, {method}: {told(record)}", flush=True)


def told(record: dict[str, Any]) -> str:
    """A record in a few words."""
    if "failed" in record:
        return f"failed: {record['failed']}"
    after = ", ".join(f"{name} {value:.3f}" for name, value in record["after"].items() if value is not None)
    return f"{after}; {record['seconds']['cpu']:.0f} s of CPU time"


def registered(
    folder: Path, method: str, pair: Pair, start: sitk.Transform, points: np.ndarray, args: argparse.Namespace
) -> dict[str, Any]:
    """What a method finds in a process of its own: how good it is, what it took, and what it told."""
    job = {name: str(folder / f"{name}.nii.gz") for name in ("fixed", "moving", "grid")}
    job |= {"method": method, "folder": str(folder), "field": f"{folder}/field.mha", "told": f"{folder}/told.json"}
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    who = registration_methods.METHODS[method][0]
    interpreter = args.ants if who == registration_methods.ANTS else sys.executable
    threads = {"ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": str(os.cpu_count())}
    busy, before, begin = busy_seconds(), resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [interpreter, "-m", "benchmarks.registration_methods", str(folder / "job.json")],
        **{"cwd": ROOT, "env": {**os.environ, **threads}, "capture_output": True, "text": True, "check": False},
    )
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    process = {"wall": wall, "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}
    others = (busy_seconds() - busy - process["cpu"]) / wall
    if done.returncode:
        return {
            "failed": (done.stderr.strip() or "it says nothing").splitlines()[-1],
            "process": process,
            "others": others,
        }
    found = json.loads((folder / "told.json").read_text(encoding="utf-8"))
    field = sitk.ReadImage(job["field"], sitk.sitkVectorFloat64)
    folding = share_folded(field, pair.fixed)
    result = {"after": judged(pair, start, sitk.DisplacementFieldTransform(field), points), "folding": folding}
    result["seconds"] = {name: found.pop(name) for name in ("wall", "cpu")}
    return {**result, **found, "process": process, "others": others}


def busy_seconds() -> float:
    """Seconds that the cores of this machine have worked so far, on anything, all cores together."""
    user, nice, system, _, _, interrupts, soft, *_ = Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    return sum(map(int, (user, nice, system, interrupts, soft))) / os.sysconf("SC_CLK_TCK")


def grid_of(scan: sitk.Image, spacing: float) -> Frame:
    """A grid over a scan, of about `spacing` mm along the axes where its own is finer."""
    frame = Frame.of(scan)
    size = np.ceil((np.array(frame.size) - 1) * np.minimum(np.divide(frame.spacing, spacing), 1)).astype(int) + 1
    return frame.box((0, 0, 0), frame.size, np.maximum(size, 2))


def judged_grid(scan: sitk.Image) -> sitk.Image:
    """An empty image on a grid of about GRID mm over a scan."""
    grid = grid_of(scan, GRID)
    return grid.put(np.zeros(grid.size, np.uint8))


def coarser(scan: sitk.Image, spacing: float | None) -> sitk.Image:
    """A scan smoothed and resampled to about `spacing` mm, or as it is where that is None."""
    if spacing is None:
        return scan
    sigma = [np.sqrt(max(spacing**2 - mm**2, 1e-4)) / 2 for mm in scan.GetSpacing()]
    return grid_of(scan, spacing).resample(sitk.SmoothingRecursiveGaussian(scan, sigma))


def judged(pair: Pair, start: sitk.Transform, found: sitk.Transform, points: np.ndarray) -> dict[str, float | None]:
    """Mean Dice of each set of labels, and mean error in mm of the moving scan, under a transform that was found."""
    whole = sitk.CompositeTransform([start.GetInverse(), found])  # the last comes first
    values: dict[str, float | None] = {}
    for name, (fixed, moving) in pair.labels.items():
        values[name] = mean_dice(fixed, sitk.Resample(moving, fixed, whole, sitk.sitkNearestNeighbor, 0))
    values["mm"] = None
    if pair.truth is not None:
        led = [np.array([one.TransformPoint(point) for point in points.tolist()]) for one in (whole, pair.truth)]
        values["mm"] = float(np.linalg.norm(led[0] - led[1], axis=1).mean())
    return values


def shown(scan: sitk.Image) -> np.ndarray:
    """Where a scan shows something: bool [z, y, x], the largest bright region without its holes."""
    grey = sitk.GetArrayViewFromImage(scan).astype(np.float32)
    low, high = np.percentile(grey, (1, 99.5))
    regions, _ = ndimage.label(ndimage.gaussian_filter(grey, 1) > low + 0.15 * (high - low))
    sizes = np.bincount(regions.ravel())
    sizes[0] = 0
    return ndimage.binary_fill_holes(regions == sizes.argmax())


def places(scan: sitk.Image) -> np.ndarray:
    """Places of a scan where there is something to see: [n, 3] in mm."""
    found = np.argwhere(shown(scan))[:, ::-1]
    return Frame.of(scan).to_physical(found[:: max(len(found) // POINTS, 1)])


def share_folded(field: sitk.Image, scan: sitk.Image) -> float:
    """Share of voxels of a displacement field, where the scan shows something, at which the map turns space over."""
    inside = Frame.of(scan).put(np.swapaxes(shown(scan), 0, 2).astype(np.uint8))
    inside = sitk.Resample(inside, field, sitk.Transform(), sitk.sitkNearestNeighbor)
    determinant = sitk.GetArrayFromImage(sitk.DisplacementFieldJacobianDeterminant(field))
    return float((determinant[sitk.GetArrayViewFromImage(inside) > 0] <= 0).mean())


def mean_dice(one: sitk.Image, other: sitk.Image) -> float:
    """Mean over the labels of `one`, but for 0, of twice the common voxels over the voxels of both."""
    a, b = (sitk.GetArrayViewFromImage(image).astype(np.int64).ravel() for image in (one, other))
    count = int(max(a.max(), b.max())) + 1
    common, size = np.bincount(a[a == b], minlength=count), np.bincount(a, minlength=count)
    labels = np.flatnonzero(size)
    labels = labels[labels > 0]
    return float((2 * common[labels] / (size + np.bincount(b, minlength=count))[labels]).mean())


if __name__ == "__main__":
    sys.exit(cli.run(main))
