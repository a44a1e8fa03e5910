"""Make a data set of your own scans: a folder or a CSV of them -> PREFIX.h5 and its config PREFIX.json.

    python -m data_util.build SCANS -o datasets/mine --crop liver

`making.sources` says where images, labels and landmarks are looked for, `making.recipe` what is made of a scan.
Its frame and the scan's own are kept with each volume, so that results can be put back: see datasets/README.md.

A finished scan is a file in PREFIX.parts/ until all are there and put together in PREFIX.h5. So a build that was
stopped goes on where it was, and where a scan fails the others are still made.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path

import h5py
import numpy as np
import SimpleITK as sitk
import tqdm

from cli import run
from data_util.making.recipe import ALL_LABELS, CROPS, Recipe, make_scan
from data_util.making.sources import RULE, SUBSETS, find_sources, split
from data_util.phantoms import write_scan
from data_util.scans.preprocessing import BRAIN_PERCENTILES, WINDOWS
from errors import UserError

MODALITIES = ("ct", "mr")
SCHEMES = dict(zip(SUBSETS, ("1", "2", "test"), strict=True))


def build(sources, prefix, recipe, subsets, image_type, atlas=None, workers=1, overwrite=False):
    """Make the scans of a list of Sources in PREFIX.h5, with the config PREFIX.json; return both paths.

    `subsets` (name -> ids), `image_type` and `atlas` (an id) go into the config.

    `workers` processes make one scan each at a time; what they make does not depend on their number. Goes on from the
    parts of a build that was stopped. Raises UserError where the file is there already or parts were made by another
    Recipe (unless `overwrite`, which begins anew), and, after all others are made, where a scan failed.
    """
    data, folder = Path(f"{prefix}.h5"), Path(f"{prefix}.parts")
    _open_parts(folder, recipe, data, overwrite)
    parts = {source.id: folder / f"{source.id}.h5" for source in sources}
    missing = [source for source in sources if not _is_made(parts[source.id], source)]
    failed, bar = {}, {"total": len(sources), "initial": len(sources) - len(missing), "unit": "scan", "desc": data.name}
    jobs = [(source, recipe, parts[source.id]) for source in missing]
    try:
        for scan_id, error in tqdm.tqdm(_outcomes(jobs, min(workers, len(jobs))), **bar):
            if error:
                failed[scan_id] = error
    except KeyboardInterrupt:
        raise UserError(f"stopped; finished scans are kept in {folder}: go on with the same command") from None
    except BrokenProcessPool as error:
        raise UserError(
            f"a worker was killed, most likely for want of memory; finished scans are kept in {folder}: go on with "
            "the same command and fewer --workers"
        ) from error
    if failed:
        for scan_id in (source.id for source in sources if source.id in failed):
            print(f"{scan_id}: {failed[scan_id]}", file=sys.stderr)
        raise UserError(
            f"{len(failed)} of {len(sources)} scans failed, as told above; the others are kept in {folder}: mend or "
            "remove these and give the same command"
        )
    _join(parts, data)
    config = _write_config(data, subsets, recipe, image_type, atlas)
    shutil.rmtree(folder)  # last: until then the same command goes on
    return data, config


def _open_parts(folder, recipe, data, overwrite):
    """Make the folder of parts, or see that those in it were made by the same recipe."""
    settings, wanted = folder / "settings.json", json.loads(json.dumps(asdict(recipe)))
    if settings.exists():
        there = json.loads(settings.read_text(encoding="utf-8"))
        name = next((name for name in wanted if there.get(name) != wanted[name]), None)
        if name is None:
            return
        if not overwrite:
            raise UserError(
                f"{folder} holds scans made with {name} {there.get(name)}, not {wanted[name]}; give the same options "
                "to go on, or begin anew with --overwrite"
            )
        shutil.rmtree(folder)
    for path in (data, data.with_suffix(".json")):
        if path.exists() and not overwrite:
            raise UserError(f"{path} is there already; choose another name with -o, or replace it with --overwrite")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"{folder} holds other things than parts of a build; move it, or choose another -o")
        new = folder / ".settings"
        new.write_text(json.dumps(wanted), encoding="utf-8")
        os.replace(new, settings)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; choose another place with -o") from error


def _outcomes(jobs, workers):
    """Make parts by so many processes and yield (scan's id, what failed or None) as they are finished."""
    if workers <= 1:
        for job in jobs:
            yield job[0].id, _make_part(*job)
        return
    context = multiprocessing.get_context("spawn")  # safe with the threads of SimpleITK
    with ProcessPoolExecutor(workers, context, _start_worker, (workers,)) as pool:
        futures = {pool.submit(_make_part, *job): job[0].id for job in jobs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker(workers):
    """Leave Ctrl-C to the parent, share the cores, and end with the parent, even where it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(max(1, (os.cpu_count() or 1) // workers))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def _make_part(source, recipe, part):
    """Make one scan and write its part, whole or not at all; return what failed, or None."""
    new = part.with_name(f".{part.name}.{os.getpid()}")
    try:
        stamp = _stamp(source)
        scan, frame, own, facts = make_scan(source, recipe)
        with h5py.File(new, "w") as file:
            file.attrs["stamp"] = stamp
            group = file.create_group("scan")
            write_scan(group, scan)
            frame.save(group.attrs)
            own.save(group.attrs, "source_")
            for name, value in {"source": source.image.name, "crop": recipe.crop, **facts}.items():
                group.attrs[name] = value
        os.replace(new, part)
    except (UserError, OSError, RuntimeError, MemoryError) as error:  # SimpleITK's are RuntimeErrors
        new.unlink(missing_ok=True)
        return f"{error}".strip().splitlines()[-1] if f"{error}".strip() else type(error).__name__
    return None


def _is_made(part, source):
    """Whether a part is there, made of the files as they are now."""
    try:
        with h5py.File(part, "r") as file:
            return file.attrs["stamp"] == _stamp(source)
    except (OSError, KeyError):
        return False


def _stamp(source):
    """What changes where one of a scan's files does: names, sizes and times."""
    digest = hashlib.blake2b(digest_size=16)
    for path in (source.image, source.label, source.points):
        files = [] if path is None else sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            about = file.stat()
            digest.update(f"{file.absolute()} {about.st_size} {about.st_mtime_ns}\n".encode())
        digest.update(b"\n")
    return digest.hexdigest()


def _join(parts, data):
    """Put the parts, id -> path, together in one file."""
    new = Path(f"{data}.{os.getpid()}.tmp")
    try:
        with h5py.File(new, "w") as file:
            for scan_id, path in parts.items():
                with h5py.File(path, "r") as part:
                    part.copy("scan", file, name=scan_id)
        os.replace(new, data)
    except OSError as error:
        raise UserError(f"cannot write {data}: {error.strerror or error}; the parts are kept") from error
    finally:
        new.unlink(missing_ok=True)


def _write_config(data, subsets, recipe, image_type, atlas):
    """Write the config of a built file beside it: subsets is {name of SUBSETS: list of ids}. Return its path."""
    name, path = data.stem, data.with_suffix(".json")
    content = {
        "files": {name: {"type": "HDF5", "path": data.as_posix()}},
        "image_size": list(recipe.size),
        "image_type": image_type,
        "subsets": {subset: [f"{name}/{scan_id}" for scan_id in ids] for subset, ids in subsets.items()},
        "schemes": {SCHEMES[subset]: {subset: 1.0} for subset in subsets},
    }
    if atlas is not None:
        content["atlas"] = f"{name}/{atlas}"
    if labels := _label_table(data, recipe.labels):
        content["segmentation_class_value"] = labels
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def _label_table(data, wanted):
    """Names and values of the labels in a built file; nothing where it has one mask."""
    if wanted == ALL_LABELS:
        with h5py.File(data, "r") as file:
            found = [np.unique(group["segmentation"]) for group in file.values() if "segmentation" in group]
        return {str(value): int(value) for value in np.unique(np.concatenate([[0], *found])) if value > 0}
    if wanted is None or len(wanted) == 1:
        return {}
    return {name: values[0] for name, values in wanted.items()}


# ---------------------------------------------------------------------------------------------------- command


def build_parser():
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m data_util.build", description="Make a data set of your own scans.", epilog=f"Input: {RULE}."
    )
    add = parser.add_argument
    add("scans", metavar="SCANS", help="folder with images/ and, where known, labels/ and points/; or a CSV")
    add("-o", "--output", required=True, help="prefix of the .h5 and .json, such as datasets/mine")
    add("--size", type=int, nargs=3, default=(128, 128, 128), metavar=("X", "Y", "Z"), help="voxels (128 128 128)")
    add("--spacing", type=float, nargs=3, metavar=("X", "Y", "Z"), help="mm a voxel (the size spans the crop)")
    add("--crop", choices=CROPS, default="none", help="what the volumes show; mask: what is labelled (%(default)s)")
    add("--modality", choices=MODALITIES, default="ct", help="ct is in Hounsfield units (%(default)s)")
    add("--window", help="LEVEL,WIDTH or percentiles LOW%%,HIGH%% (liver 120,290, other CT 40,400, MR 1%%,99%%)")
    add("--labels", help="values to keep: NAME=VALUE,NAME=VALUE+VALUE or 'all' (the one value that there is)")
    add("--split", default="0.8/0.1/0.1", help="shares of training/validation/test (%(default)s)")
    add("--seed", type=int, default=0, help="another seed, another split (%(default)s)")
    add("--pairs", default="all", help="all, paired (two scans of a group, or neighbours) or atlas=ID (%(default)s)")
    add("--workers", type=int, default=1, help="processes (%(default)s)")
    add("--overwrite", action="store_true", help="replace a set that is there, and parts made with other options")
    return parser


def main(argv=None):
    """Run the command."""
    args = build_parser().parse_args(argv)
    recipe = parse_recipe(args)
    if args.workers < 1:
        raise UserError(f"--workers is {args.workers}; it must be a whole number from 1")
    sources = find_sources(args.scans)
    subsets, atlas = plan(sources, args.split, args.seed, args.pairs)
    image_type = args.crop if args.crop in ("liver", "brain") else args.modality
    data, config = build(sources, args.output, recipe, subsets, image_type, atlas, args.workers, args.overwrite)
    labelled, marked = (sum(getattr(s, name) is not None for s in sources) for name in ("label", "points"))
    size = "x".join(str(n) for n in recipe.size)
    print(f"{data}: {len(sources)} scans of {size} voxels, {labelled} with labels, {marked} with landmarks")
    print(f"{config}: " + ", ".join(f"{len(ids)} scans in {name}" for name, ids in subsets.items()))
    with h5py.File(data, "r") as file:
        for scan_id in (source.id for source in sources):
            if doubts := file[scan_id].attrs.get("doubts"):
                print(f"look at {scan_id}: {doubts}")
    paired = {"train": ' --data_args "paired=True"', "eval": " --paired"} if args.pairs == "paired" else {}
    print(f"next: python -m data_util.check {config}{paired.get('eval', '')}")
    if "train" in subsets:
        print(f"then: python train.py -d {config}{paired.get('train', '')}")


def parse_recipe(args):
    """The Recipe that the flags describe.

    Raises:
        UserError: a value is outside its range, or the flags do not go together.
    """
    if min(args.size) < 2:
        raise UserError(f"--size {' '.join(map(str, args.size))}: a volume needs at least 2 voxels along each axis")
    if args.spacing is not None and not (np.isfinite(args.spacing).all() and min(args.spacing) > 0):
        raise UserError(f"--spacing {' '.join(map(str, args.spacing))}: give three numbers of mm above 0")
    if args.crop == "liver" and args.modality != "ct":
        raise UserError("--crop liver looks for Hounsfield units and --modality is mr; take --crop body, mask or none")
    shown, percentiles = parse_window(args.window) if args.window else (None, None)
    if not args.window and args.modality == "ct":
        shown = tuple(map(float, WINDOWS["liver" if args.crop == "liver" else "body"]))
    elif not args.window:
        percentiles = tuple(map(float, BRAIN_PERCENTILES))
    spacing = None if args.spacing is None else tuple(args.spacing)
    return Recipe(tuple(args.size), spacing, args.crop, shown, percentiles, parse_labels(args.labels))


def parse_window(text):
    """'40,400' -> ((40, 400), None), '1%,99%' -> (None, (1, 99)).

    Raises:
        UserError: it is neither.
    """
    first, _, second = text.replace(" ", "").partition(",")
    is_share = first.endswith("%") and second.endswith("%")
    try:
        values = float(first.rstrip("%")), float(second.rstrip("%"))
    except ValueError:
        values = (np.nan, np.nan)
    good = 0 <= values[0] < values[1] <= 100 if is_share else np.isfinite(values).all() and values[1] > 0
    if not good or ("%" in text and not is_share):
        raise UserError(f"--window {text}: give LEVEL,WIDTH as 40,400, or percentiles LOW%,HIGH% as 1%,99%")
    return (None, values) if is_share else (values, None)


def parse_labels(text):
    """'liver=5+6,spleen=1' -> {'liver': [5, 6], 'spleen': [1]}; 'all' and None as they are.

    Raises:
        UserError: it is none of these, or a name or a value is there twice.
    """
    if text in (None, ALL_LABELS):
        return text
    labels, seen = {}, set()
    for entry in text.split(","):
        name, _, values = (part.strip() for part in entry.partition("="))
        parts = [value.strip() for value in values.split("+")]
        if not name or not all(part.isdecimal() and 0 < int(part) < 65536 for part in parts):
            raise UserError(f"--labels {text}: write NAME=VALUE,NAME=VALUE+VALUE with values from 1 to 65535, or 'all'")
        merged = [int(part) for part in parts]
        if name in labels or seen & set(merged) or len(set(merged)) < len(merged):
            raise UserError(f"--labels {text}: '{entry.strip()}' repeats a name or a value; each may be there once")
        labels[name] = merged
        seen |= set(merged)
    return labels


def plan(sources, shares, seed, pairs):
    """The subsets that the flags describe, and the atlas' id or None.

    Raises:
        UserError: a flag is malformed, the atlas is not there, or as `sources.split` does.
    """
    try:
        numbers = [float(share) for share in shares.split("/")]
    except ValueError:
        numbers = []
    if len(numbers) != len(SUBSETS) or not all(np.isfinite(n) and n >= 0 for n in numbers):
        raise UserError(f"--split {shares}: give the shares of training/validation/test, as 0.8/0.1/0.1")
    pairing, is_atlas, atlas = pairs.partition("=")
    if not (pairs in ("all", "paired") or (pairing == "atlas" and atlas)):
        raise UserError(f"--pairs {pairs}: give all, paired or atlas=ID")
    if is_atlas and atlas not in [source.id for source in sources]:
        raise UserError(f"--pairs {pairs}: there is no scan '{atlas}'; the first is '{sources[0].id}'")
    return split(sources, numbers, seed, pairing, atlas or None), atlas or None


if __name__ == "__main__":
    sys.exit(run(main, if_out_of_memory="use fewer --workers or a smaller --size"))
