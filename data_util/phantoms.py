"""Seeded anatomy-like scans: a body with an organ in it, organ label, landmarks and, for some, a known flow.

There is one template, a body of the population, written as formulas over the unit box -1..1 (so it has no resolution).
An individual is the template seen through a flow of its own, like everything here:

    individual(p) = template(p + flow(p))        p in voxels

and adds lesions, intensities, texture and noise of its own. Arrays are [x, y, z], oriented as LPS: x runs to the
patient's left, y to the back, z to the head. Flows are [x, y, z, 3] in voxels, points [n, 3] in voxels.

    python -m data_util.phantoms -o datasets/phantom --size 64 64 64 --train 12 --pairs 4 --seed 0
"""

import argparse
import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
from scipy import ndimage

from cli import run
from errors import UserError

SMALLEST_SIZE = 16
MAX_SLOPE = 0.6  # of a smooth flow; with the placement's 0.28 the sum stays below 1, so that it can be inverted


@dataclass(frozen=True)
class NewScan:
    """One scan to be written, as the files hold it.

    volume        uint8 [X, Y, Z], 0..255
    segmentation  uint8 [X, Y, Z], 0 or 255, or label values; or None
    points        float32 [n, 3] landmarks in voxels, or None
    spacing       three floats, mm a voxel, or None
    flow          [X, Y, Z, 3] in voxels where the scan is a known deformation: this(p) = source(p + flow(p)); or None
    source        full id of the scan that was deformed ("phantom/3"), or None
    """

    volume: np.ndarray
    segmentation: np.ndarray | None
    points: np.ndarray | None = None
    spacing: tuple | None = None
    flow: np.ndarray | None = None
    source: str | None = None


# ---------------------------------------------------------------------------------------------------------- flows


def slope(flow):
    """Return how much a flow changes from one place to another at the most, in voxel per voxel.

    Read linearly between voxels, the flow's derivative along an axis is, within a cell of eight voxels, a mean of the
    differences along the cell's four edges, so the largest of these bounds it: the result is a true bound, not an
    estimate. Below 1, p + flow(p) folds nowhere and can be inverted.
    """
    squares = 0
    for axis in range(3):
        steepest = np.linalg.norm(np.diff(flow, axis=axis), axis=-1)
        for other in {0, 1, 2} - {axis}:
            n = steepest.shape[other]
            steepest = np.maximum(steepest.take(range(n - 1), other), steepest.take(range(1, n), other))
        squares = squares + steepest**2
    return float(np.sqrt(squares.max()))


def smooth_flow(size, seed, amplitude):
    """Draw a smooth flow [X, Y, Z, 3], float32, in voxels, that folds nowhere and is zero on the border.

    The three lowest sine waves of each axis are mixed at random; being zero on the border, the flow maps the volume
    onto itself and nothing has to be invented outside. The longest displacement is `amplitude` voxels, or shorter
    where that would need a slope above MAX_SLOPE. `seed` is anything that numpy.random.default_rng takes.
    """
    rng = np.random.default_rng(seed)
    frequency = np.arange(1, 4)
    waves = [np.sin(np.pi * np.outer(frequency, np.linspace(0, 1, n))) for n in size]
    energy = sum(np.meshgrid(frequency**2, frequency**2, frequency**2, indexing="ij"))
    weights = rng.standard_normal((3, 3, 3, 3)) / energy
    flow = np.einsum("kabc,ax,by,cz->xyzk", weights, *waves, optimize=True)
    flow *= amplitude / np.linalg.norm(flow, axis=-1).max()
    return (flow * min(1, MAX_SLOPE / max(slope(flow), MAX_SLOPE))).astype(np.float32)


def placement_flow(size, seed, shift=0.08, scale=0.1, degrees=10):
    """Draw a mild affine flow [X, Y, Z, 3], float32, in voxels, about the volume's centre.

    Along each axis a shift of at most `shift` of the size and a factor within 1 +- `scale`; a turn of at most
    `degrees` about a random axis.
    """
    rng = np.random.default_rng(seed)
    size = np.asarray(size)
    axis = rng.standard_normal(3)
    turn = np.cross(np.eye(3), axis / np.linalg.norm(axis)) * np.sin(np.deg2rad(rng.uniform(-degrees, degrees)))
    rotation = np.eye(3) + turn + turn @ turn / (1 + np.sqrt(1 - (turn**2).sum() / 2))
    matrix = rotation * rng.uniform(1 - scale, 1 + scale, 3)
    offset = rng.uniform(-shift, shift, 3) * size
    from_centre = np.moveaxis(np.indices(size), 0, -1) - (size - 1) / 2
    return (from_centre @ (matrix - np.eye(3)).T + offset).astype(np.float32)


def individual_flow(size, rng):
    """Draw what makes one body of another: a placement and a smooth flow, [X, Y, Z, 3], float32, in voxels."""
    return placement_flow(size, rng) + smooth_flow(size, rng, amplitude=0.09 * min(size))


def warp(volume, flow):
    """Return volume(p + flow(p)), float32 [X, Y, Z]: linear between voxels, the edge repeated outside."""
    places = np.indices(volume.shape, dtype=np.float32) + np.moveaxis(flow, -1, 0)
    return ndimage.map_coordinates(volume, places, order=1, mode="nearest", output=np.float32)


def carry_points(points, flow):
    """Return where the points of a source lie in the scan deformed by `flow`: q with q + flow(q) = point.

    [n, 3] float32, exact to 0.001 voxel for the flow read linearly between voxels. Raises ValueError where the
    flow cannot be inverted at a point.
    """
    points = np.asarray(points, dtype=np.float64)

    def flow_at(places):
        channels = [
            ndimage.map_coordinates(flow[..., k], places.T, np.float64, order=1, mode="nearest") for k in range(3)
        ]
        return np.stack(channels, axis=-1)

    carried = points
    for _ in range(200):  # each round shrinks the error by the flow's slope
        carried = points - flow_at(carried)
    error = np.abs(carried + flow_at(carried) - points).max(initial=0)
    if error > 1e-3:
        raise ValueError(
            f"flow cannot be inverted at the points: {error:.3g} voxel left, its slope is {slope(flow):.3g}"
        )
    return carried.astype(np.float32)


def deform(scan, flow):
    """Return the NewScan that `scan` becomes under a flow: this(p) = scan(p + flow(p)), landmarks carried along.

    A mask is warped linearly and kept where it is above 128, as the Dice score does, so that the very same flow
    finds a perfect score.
    """
    return replace(
        scan,
        volume=np.rint(warp(scan.volume, flow)).astype(np.uint8),
        segmentation=np.where(warp(scan.segmentation, flow) > 128, 255, 0).astype(np.uint8),
        points=None if scan.points is None else carry_points(scan.points, flow),
        flow=None,
        source=None,
    )


# -------------------------------------------------------------------------------------------------------- anatomy

ORGAN_CENTRE, ORGAN_RADII = np.array([-0.22, -0.12, 0.0]), np.array([0.56, 0.48, 0.66])
# The vessel tree: places of its nodes, and its branches as (from, to, radius). Nodes 1, 2 and 3 are branch points.
VESSEL_NODES = ORGAN_CENTRE + ORGAN_RADII * np.array(
    [
        [0.95, 0.35, -0.30],
        [0.38, 0.15, -0.10],
        [-0.12, 0.28, 0.28],
        [-0.05, -0.30, -0.20],
        [-0.60, 0.40, 0.22],
        [-0.20, 0.05, 0.72],
        [-0.58, -0.18, -0.42],
        [0.18, -0.68, 0.05],
    ]
)
VESSELS = [(0, 1, 0.075), (1, 2, 0.055), (1, 3, 0.055), (2, 4, 0.04), (2, 5, 0.04), (3, 6, 0.04), (3, 7, 0.04)]
CYSTS = ORGAN_CENTRE + ORGAN_RADII * np.array([[-0.62, -0.30, 0.25], [0.30, -0.40, 0.50], [-0.25, 0.55, -0.45]])
CYST_RADIUS = 0.075
LANDMARKS = np.concatenate([VESSEL_NODES[1:4], CYSTS])


def _distance_to_branch(place, start, end):
    along = end - start
    share = sum((place[k] - start[k]) * along[k] for k in range(3)) / (along @ along)
    share = np.clip(share, 0, 1)
    return np.sqrt(sum((place[k] - start[k] - share * along[k]) ** 2 for k in range(3)))


def _ellipsoid(place, centre, radii):
    """Return about how far outside an ellipsoid a place is: negative inside, zero on it."""
    radius = np.sqrt(sum(((place[k] - centre[k]) / radii[k]) ** 2 for k in range(3)))
    return (radius - 1) * np.float32(np.mean(radii))


def _draw_body(place, rng, edge):
    """Paint an individual at template places (three arrays [X, Y, Z], -1..1): the image, 0..255, and the organ mask.

    Edges are `edge` wide. What is drawn at random differs from one individual to the next; the rest is the template.
    """
    x, y, z = place
    image = np.full(x.shape, 6, dtype=np.float32)

    def paint(outside, value, spread=4, within=1):
        inside = within / (1 + np.exp(np.clip(outside / edge, -30, 30)))
        image[...] += inside * (value + rng.uniform(-spread, spread) - image)
        return inside

    outline = (np.sqrt((x / 0.88) ** 2 + (y / 0.74) ** 2) - 1) * 0.8 + 0.015 * np.cos(3 * z) * np.cos(4 * x)
    paint(outline, 55)  # fat
    inside_rim = paint(outline + 0.07, 105)  # muscle and bowel
    spleen = _ellipsoid(place, (0.55, 0.12, 0.15), (0.22, 0.26, 0.40))
    paint(spleen, 140)
    stomach = _ellipsoid(place, (0.42, -0.32, 0.25), (0.20, 0.20, 0.42))
    paint(stomach, 70)
    aorta = np.hypot(x - 0.12, y - 0.26) - 0.07
    paint(aorta, 185)
    spine = np.hypot((x - 0.03) / 1.1, y - 0.50) - 0.15
    paint(spine, 225)
    paint(spine + 0.06, 180)  # marrow

    lumps = 0.05 * np.sin(5 * x + 1) * np.cos(4 * y - 0.5) + 0.05 * np.sin(5 * z + 2 * x) + 0.04 * np.cos(6 * y + 3 * z)
    notch = _ellipsoid(place, (0.16, 0.30, -0.25), (0.22, 0.30, 0.45))
    organ = np.maximum(_ellipsoid(place, ORGAN_CENTRE, ORGAN_RADII) + lumps, -notch)
    within = paint(organ, 150)
    vessels = np.minimum.reduce(
        [_distance_to_branch(place, VESSEL_NODES[a], VESSEL_NODES[b]) - r for a, b, r in VESSELS]
    )
    paint(vessels, 205, within=within)
    for centre in CYSTS:
        paint(_ellipsoid(place, centre, np.full(3, CYST_RADIUS)), 85, within=within)
    for _ in range(rng.integers(1, 4)):  # lesions
        centre = ORGAN_CENTRE + ORGAN_RADII * rng.uniform(-0.6, 0.6, 3)
        paint(_ellipsoid(place, centre, rng.uniform(0.03, 0.09, 3)), rng.choice([120, 175]), spread=8, within=within)

    texture = ndimage.gaussian_filter(rng.standard_normal(x.shape, dtype=np.float32), 1.5)
    image += inside_rim * texture * (3 / texture.std())
    image += 2 * rng.standard_normal(x.shape, dtype=np.float32)
    return image, organ < 0


def make_phantom(size, seed):
    """Make the individual of a seed: a NewScan [X, Y, Z] with mask and six landmarks float32 [6, 3].

    The landmarks are the three branch points of the organ's vessel tree and the centres of its three cysts; their
    order is the same in everyone. `seed` is anything that numpy.random.default_rng takes. Raises UserError for a
    size below 16 voxels along an axis.
    """
    _check_size(size)
    rng = np.random.default_rng(seed)
    flow = individual_flow(size, rng)
    last = np.array(size, dtype=np.float32) - 1
    place = [(np.indices(size, dtype=np.float32)[k] + flow[..., k]) * (2 / last[k]) - 1 for k in range(3)]
    image, organ = _draw_body(place, rng, edge=1.2 / min(size))
    return NewScan(
        volume=np.clip(np.rint(image), 0, 255).astype(np.uint8),
        segmentation=np.where(organ, 255, 0).astype(np.uint8),
        points=carry_points((LANDMARKS + 1) / 2 * last, flow),
    )


def known_pair(scan, flow, source):
    """Return `scan` and what it becomes under a flow, which is kept in the second, with `source`, the first's full id.

    The flow is kept in half precision, as it is written, and it is exactly this one that deforms: what a file holds is
    the truth, to the rounding of the grey values.
    """
    flow = flow.astype(np.float16)
    return scan, replace(deform(scan, flow.astype(np.float32)), flow=flow, source=source)


# ---------------------------------------------------------------------------------------------------------- files


def write_scans(prefix, scans, size, image_type, subsets, schemes, overwrite=False):
    """Write scans to PREFIX.h5 and their config to PREFIX.json; return both paths.

    scans    iterable of NewScan, made one at a time while they are written; the k-th gets the id "NAME/k", where NAME
             is the last part of the prefix.
    subsets  name -> range or list of the scans' numbers.
    schemes  name -> {subset: fraction}.

    Both files are written beside their final names and then renamed, so that no broken set is ever left behind.
    Raises UserError where one of them is there already (unless `overwrite`) or cannot be written.
    """
    prefix = Path(prefix)
    data, config = Path(f"{prefix}.h5"), Path(f"{prefix}.json")
    for path in (data, config):
        if path.exists() and not overwrite:
            raise UserError(f"{path} is there already; choose another name with -o, or replace it with --overwrite")
    content = {
        "files": {prefix.name: {"type": "HDF5", "path": data.as_posix()}},
        "image_size": [int(n) for n in size],
        "image_type": image_type,
        "subsets": {name: [f"{prefix.name}/{k}" for k in numbers] for name, numbers in subsets.items()},
        "schemes": schemes,
    }
    new_data, new_config = (Path(f"{path}.{os.getpid()}.tmp") for path in (data, config))
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {prefix.parent}: {error.strerror}; choose another with -o") from error
    try:
        with h5py.File(new_data, "w") as file:
            for k, scan in enumerate(scans):
                write_scan(file.create_group(str(k)), scan)
        new_config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(new_data, data)
        os.replace(new_config, config)
    except OSError as error:
        raise UserError(f"cannot write {data}: {error.strerror or error}; choose another place with -o") from error
    finally:
        new_data.unlink(missing_ok=True)
        new_config.unlink(missing_ok=True)
    return data, config


def write_scan(group, scan):
    """Write a NewScan into an empty HDF5 group."""

    def add(name, array):
        chunk = (min(8, array.shape[0]), *array.shape[1:])
        return group.create_dataset(name, data=array, chunks=chunk, compression="gzip", compression_opts=4)

    add("volume", scan.volume)
    if scan.segmentation is not None:
        add("segmentation", scan.segmentation)
    if scan.points is not None:
        group["point"] = np.asarray(scan.points, dtype=np.float32)
    if scan.spacing is not None:
        group.attrs["spacing"] = np.asarray(scan.spacing, dtype=np.float64)
    if scan.flow is not None:
        add("flow", scan.flow).attrs["source"] = scan.source


def write_dataset(prefix, size, n_train, n_pairs, seed, overwrite=False):
    """Write a set of phantoms, PREFIX.h5 and PREFIX.json; return both paths.

    train  `n_train` individuals; all ordered pairs are meant (scheme "1").
    val    `n_pairs` adjacent pairs of two more individuals each (scheme "2").
    known  `n_pairs` adjacent pairs (s, d), scheme "known": d is s deformed by a known flow, a placement and a smooth
           one together, so that the pair fixed d, moving s has its true flow in the file; the reverse has none.

    No two individuals are alike, and the same arguments give the same set. Raises UserError for a size below 16,
    fewer than two training scans, no pair, a negative seed, and as `write_scans` does.
    """
    _check_size(size)
    if n_train < 2 or n_pairs < 1:
        raise UserError(f"{n_train} training scans and {n_pairs} pairs: a set needs at least 2 scans and 1 pair")
    if seed < 0:
        raise UserError(f"seed {seed}: give a whole number from 0 on")
    name = Path(prefix).name
    first_known = n_train + 2 * n_pairs
    total = first_known + 2 * n_pairs

    def scans():
        for k in range(first_known):
            yield make_phantom(size, [seed, k])
        for k in range(first_known, total, 2):
            flow = individual_flow(size, np.random.default_rng([seed, k + 1]))
            yield from known_pair(make_phantom(size, [seed, k]), flow, f"{name}/{k}")

    subsets = {"train": range(n_train), "val": range(n_train, first_known), "known": range(first_known, total)}
    schemes = {"1": {"train": 1.0}, "2": {"val": 1.0}, "known": {"known": 1.0}}
    return write_scans(prefix, scans(), size, "phantom", subsets, schemes, overwrite)


def _check_size(size):
    if len(size) != 3 or min(size) < SMALLEST_SIZE:
        raise UserError(f"phantom size {tuple(size)}: give three numbers of at least {SMALLEST_SIZE} voxels")


def main(argv=None):
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m data_util.phantoms", description="Write a set of seeded phantoms.")
    parser.add_argument("-o", "--output", default="datasets/phantom", help="prefix of the .h5 and .json (%(default)s)")
    parser.add_argument(
        "--size", type=int, nargs=3, default=(64, 64, 64), metavar=("X", "Y", "Z"), help="voxels (64 64 64)"
    )
    parser.add_argument("--train", type=int, default=12, help="number of training scans (%(default)s)")
    parser.add_argument("--pairs", type=int, default=4, help="number of validation and of known pairs (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other individuals (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    args = parser.parse_args(argv)
    data, config = write_dataset(args.output, args.size, args.train, args.pairs, args.seed, args.overwrite)
    size = "x".join(str(n) for n in args.size)
    print(
        f"{data}: {args.train} training scans, {args.pairs} validation pairs, {args.pairs} known pairs, {size} voxels"
    )
    print(f"{config}: the config, for -d")


if __name__ == "__main__":
    sys.exit(run(main))
