"""Make a data set of your own scans: a folder or a CSV of them -> PREFIX.h5 and its config PREFIX.json.

    python -m data_util.build SCANS -o datasets/mine --crop liver

`making.sources` says where images, labels and landmarks are looked for, `making.recipe` what is made of a scan.
Its frame and the scan's own are kept with each volume, so that results can be put back: see datasets/README.md.

A finished scan is a file in PREFIX.parts/ until all are there and put together in PREFIX.h5. So a build that was
stopped goes on where it was, and where a scan fails the others are still made.
"""

import argparse
import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import numpy as np

from cli import run
from data_util.config import write_dataset_config
from data_util.hdf5 import DOUBTS, HDF5Reader
from data_util.making.flags import joined_window, parse_recipe, plan
from data_util.making.labels import label_table
from data_util.making.parts import is_finished, join_parts, make_parts, opened_parts, parts_folder, remove_parts
from data_util.making.recipe import Recipe
from data_util.making.sources import RULE, Source, find_sources
from data_util.making.splits import SUBSETS
from data_util.names import check_name
from data_util.scans.affine_search import KINDS
from data_util.scans.points import SPACES
from data_util.scans.view import CROPS
from errors import Stopped, UserError

MODALITIES = ("ct", "mr")
SCHEMES = dict(zip(SUBSETS, ("1", "2", "test"), strict=True))


def build(
    sources: list[Source],
    prefix: str | Path,
    recipe: Recipe,
    subsets: dict[str, list[str]],
    image_type: str,
    atlas: str | None = None,
    workers: int = 1,
    overwrite: bool = False,
) -> tuple[Path, Path]:
    """Make scans, PREFIX.h5, and the config of the data set, PREFIX.json.

    Goes on from the parts of a build that was stopped.

    Args:
        sources: the scans.
        prefix: both files' path without their ending.
        recipe: how a scan becomes a volume.
        subsets: ids of the scans of each subset.
        image_type: what the volumes show, for the config.
        atlas: id of the scan that is the fixed image of every pair, or None.
        workers: number of processes; what they make does not depend on it.
        overwrite: replace a data set that is there, and remove parts that were made by another recipe.

    Returns:
        The paths of both files.

    Raises:
        UserError: as `opened_parts` and `make_parts` say, or a file cannot be written.
        Stopped: Ctrl-C; what is finished is kept.
    """
    data, config = Path(f"{prefix}.h5"), Path(f"{prefix}.json")
    for source in sources:
        check_name(f"{data.stem}/{source.id}", "scan")
    made_by = asdict(recipe)
    if recipe.align is None:  # as before there was --align: a data set of then is known again
        del made_by["align"]
    command = [made_by, subsets, image_type, atlas]
    if not overwrite and is_finished(data, sources, command):
        print(f"{data} is there already, made by the same command of the same files", file=sys.stderr)
        return data, config
    try:
        with opened_parts(data, recipe, overwrite) as folder:
            join_parts(make_parts(sources, recipe, folder, workers), data, command)
            _write_config(config, data, subsets, recipe, image_type, atlas)
            remove_parts(folder)  # last: until then the same command goes on
    except KeyboardInterrupt:
        kept = parts_folder(data)
        what = f"finished scans are kept in {kept}: go on with the same command" if kept.exists() else "nothing is kept"
        raise Stopped(f"Stopped; {what}") from None
    return data, config


def _write_config(
    path: Path, data: Path, subsets: dict[str, list[str]], recipe: Recipe, image_type: str, atlas: str | None
) -> None:
    """Write the config of a built file."""
    others = recipe.view.to_dict()
    if atlas is not None:
        others["atlas"] = f"{data.stem}/{atlas}"
    if labels := label_table(_label_values(data), recipe.labels):
        others["segmentation_class_value"] = labels
    schemes = {SCHEMES[subset]: {subset: 1.0} for subset in subsets}
    write_dataset_config(path, data, recipe.size, image_type, subsets, schemes, **others)


def _label_values(data: Path) -> set[int]:
    """The values in the segmentations of a built file."""
    values: set[int] = set()
    with closing(HDF5Reader(data)) as reader:
        for members in map(reader.members, reader.keys()):
            if "segmentation" in members:
                values.update(np.unique(np.asarray(members["segmentation"])).tolist())
    return values


# ---------------------------------------------------------------------------------------------------- command


def build_parser() -> argparse.ArgumentParser:
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
    add("--points_space", choices=SPACES, default="lps", help="what the landmarks' numbers are (mm in %(default)s)")
    add("--align", metavar="TEMPLATE", help="scan that all are brought to before they are cropped (none)")
    add("--align_kind", choices=KINDS, help="map that brings them there (affine)")
    add("--split", default="0.8/0.1/0.1", help="shares of training/validation/test (%(default)s)")
    add("--seed", type=int, default=0, help="another seed, another split (%(default)s)")
    add("--pairs", default="all", help="all, paired (two scans of a group, or neighbours) or atlas=ID (%(default)s)")
    add("--workers", type=int, default=1, help="processes (%(default)s)")
    add("--overwrite", action="store_true", help="replace a set that is there, and parts made with other options")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command.

    Args:
        argv: flags; those of the process where None.
    """
    args = build_parser().parse_args(joined_window(sys.argv[1:] if argv is None else argv))
    recipe = parse_recipe(args)
    if args.workers < 1:
        raise UserError(f"--workers is {args.workers}; it must be a whole number from 1")
    sources, remarks = find_sources(args.scans)
    for remark in remarks:
        print(remark, file=sys.stderr)
    subsets, atlas = plan(sources, args.split, args.seed, args.pairs)
    image_type = args.crop if args.crop in ("liver", "brain") else args.modality
    data, config = build(sources, args.output, recipe, subsets, image_type, atlas, args.workers, args.overwrite)
    _print_summary(data, [source.id for source in sources])
    print(f"{config}: " + ", ".join(f"{len(ids)} scans in {name}" for name, ids in subsets.items()))
    paired = {"train": ' --data_args "paired=True"', "eval": " --paired"} if args.pairs == "paired" else {}
    print(f"next: python -m data_util.check {config}{paired.get('eval', '')}")
    if "train" in subsets:
        print(f"then: python train.py -d {config}{paired.get('train', '')}")


def _print_summary(data: Path, ids: list[str]) -> None:
    """Print what a built file holds, and which of its scans to look at."""
    with closing(HDF5Reader(data)) as reader:
        scans = {scan_id: reader.members(scan_id) for scan_id in ids}
        size = "x".join(map(str, scans[ids[0]]["volume"].shape))
        labelled = sum("segmentation" in members for members in scans.values())
        marked = sum(bool(np.isfinite(np.asarray(members.get("point", np.nan))).any()) for members in scans.values())
        print(f"{data}: {len(ids)} scans of {size} voxels, {labelled} with labels, {marked} with landmarks")
        for scan_id, members in scans.items():
            if doubts := members.get(DOUBTS):
                print(f"look at {scan_id}: {doubts}")


if __name__ == "__main__":
    sys.exit(run(main, if_out_of_memory="use fewer --workers or a smaller --size"))
