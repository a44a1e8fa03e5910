"""Seeded anatomy-like scans: a body with an organ in it, organ label, landmarks and, for some, a known flow.

    python -m data_util.phantoms -o datasets/phantom --size 64 64 64 --train 12 --pairs 4 --seed 0

What is drawn is in `data_util.making.anatomy`, the flows in `data_util.making.known_flows`.
"""

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from cli import run
from data_util.hdf5 import Scan
from data_util.making.anatomy import check_size, make_phantom
from data_util.making.known_flows import individual_flow, known_pair
from data_util.making.new_set import write_scans
from errors import UserError


def write_dataset(
    prefix: str | Path,
    size: Sequence[int],
    n_train: int,
    n_pairs: int,
    seed: int,
    overwrite: bool = False,
    two_modalities: bool = False,
) -> tuple[Path, Path]:
    """Write a set of phantoms, PREFIX.h5 and PREFIX.json; return both paths.

    train  `n_train` individuals; all ordered pairs are meant (scheme "1").
    val    `n_pairs` adjacent pairs of two more individuals each (scheme "2").
    known  `n_pairs` adjacent pairs (s, d), scheme "known": d is s deformed by a known flow, a placement and a smooth
           one together, so that the pair fixed d, moving s has its true flow in the file; the reverse has none.

    No two individuals are alike, and the same arguments give the same set. With `two_modalities` every second scan is
    an MR of the same individual, and so is d.

    Args:
        prefix: path of both files without their endings.
        size: voxels along x, y, z, at least 16 each.
        n_train: number of training scans, at least 2.
        n_pairs: number of pairs of `val` and of `known`, at least 1.
        seed: another seed, other individuals; from 0.
        overwrite: replace files that are there.
        two_modalities: CT and MR by turns.

    Returns:
        Paths of the HDF5 file and the config.

    Raises:
        UserError: a number is too small, or a file is there already (unless `overwrite`) or cannot be written.
    """
    check_size(size)
    if n_train < 2 or n_pairs < 1:
        raise UserError(f"{n_train} training scans and {n_pairs} pairs: a set needs at least 2 scans and 1 pair")
    if seed < 0:
        raise UserError(f"seed {seed}: give a whole number from 0 on")
    name = Path(prefix).name
    first_known = n_train + 2 * n_pairs
    total = first_known + 2 * n_pairs

    def scans() -> Iterator[Scan]:
        for k in range(first_known):
            yield make_phantom(size, [seed, k], mr=two_modalities and k % 2 == 1)
        for k in range(first_known, total, 2):
            flow = individual_flow(size, np.random.default_rng([seed, k + 1]))
            yield (scan := make_phantom(size, [seed, k]))
            other = make_phantom(size, [seed, k], mr=True) if two_modalities else scan
            yield known_pair(other, flow, f"{name}/{k}")[1]

    subsets = {"train": range(n_train), "val": range(n_train, first_known), "known": range(first_known, total)}
    schemes = {"1": {"train": 1.0}, "2": {"val": 1.0}, "known": {"known": 1.0}}
    view = {"orientation": "LPS", "crop": "none"}
    return write_scans(prefix, scans(), size, "phantom", subsets, schemes, overwrite, **view)


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m data_util.phantoms", description="Write a set of seeded phantoms.")
    parser.add_argument("-o", "--output", default="datasets/phantom", help="prefix of the .h5 and .json (%(default)s)")
    parser.add_argument(
        "--size", type=int, nargs=3, default=(64, 64, 64), metavar=("X", "Y", "Z"), help="voxels (64 64 64)"
    )
    parser.add_argument("--train", type=int, default=12, help="number of training scans (%(default)s)")
    parser.add_argument("--pairs", type=int, default=4, help="number of validation and of known pairs (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other individuals (%(default)s)")
    parser.add_argument("--two_modalities", action="store_true", help="every second scan as an MR of the body")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    args = parser.parse_args(argv)
    numbers = args.size, args.train, args.pairs, args.seed
    data, config = write_dataset(args.output, *numbers, args.overwrite, args.two_modalities)
    size = "x".join(str(n) for n in args.size)
    print(
        f"{data}: {args.train} training scans, {args.pairs} validation pairs, {args.pairs} known pairs, {size} voxels"
    )
    print(f"{config}: the config, for -d")
    print(f"next: python train.py -d {shlex.quote(str(config))}")


if __name__ == "__main__":
    sys.exit(run(main))
