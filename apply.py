"""Carry scans, labels, points and meshes by transforms: python apply.py -t transform.h5 -i IN -r FIXED -o OUT.nii.gz"""

import argparse
import pathlib
import sys
from typing import Any

import cli
import files
from data_util.scans.carrying import INTERPOLATIONS
from data_util.scans.frame import Frame
from data_util.scans.points import SPACES
from errors import UserError

POINTS = (".csv", ".tsv", ".txt")
IMAGES = (".nii", ".nii.gz", ".nrrd", ".mha")  # one file each
AUTO = "auto"
CHAIN = """\
Carry an image, labels, points or a mesh to another scan by transforms, as demo.py, ITK, ANTs or FreeSurfer wrote them.

-i is something of the moving scan, and -o the same in the fixed scan; with --inverse it is the other way round. An
image is read at the places where the transform leads the voxels of -r (pulled); points are led by its inverse
(pushed). So the same -t carries a scan, its labels, its landmarks and its surfaces to the same place.

The first -t is the one that a place in the fixed scan goes through first, as in antsApplyTransforms. With a follow-up
registered to a first scan, and this one to an atlas,
  -t first_to_atlas/transform.h5 -t followup_to_first/transform.h5 -i followup.nii.gz -r atlas.nii.gz
carries the follow-up to the atlas."""


def build_parser() -> argparse.ArgumentParser:
    """The flags of apply.py."""
    flags = cli.parser(CHAIN)
    flags.formatter_class = argparse.RawDescriptionHelpFormatter
    add = flags.add_argument
    what = "transform: .h5 .tfm .txt .mat .lta, or displacement field .nii.gz .nrrd .mha; may be given several times"
    add("-t", "--transform", action="append", default=[], metavar="FILE", help=what)
    add("-i", "--input", help="image file or DICOM folder, table of points (.csv .tsv .txt) or mesh (.vtk .ply .stl)")
    add("-r", "--reference", help="for images: the scan whose voxels -o gets, the fixed one (moving with --inverse)")
    add("-o", "--output", help="file to write: .nii.gz .nii .nrrd .mha, .csv for points, for a mesh the ending of -i")
    add("--inverse", action="store_true", help="carry what is of the fixed scan to the moving one")
    how = "how an image is read; labels: a linear vote of each label (auto: nearest for labels, else linear)"
    add("--interpolation", default=AUTO, choices=(AUTO, *INTERPOLATIONS), help=how)
    add("--labels", action="store_true", help="-i is a label image (it is seen by its values)")
    add("--outside", type=float, metavar="VALUE", help="value outside of -i (its lowest; 0 for labels)")
    space = "what the numbers of points and meshes are, in -i and -o (what the mesh file says, else lps)"
    add("--points_space", choices=SPACES, help=space)
    voxels = "for --points_space voxel: the scan whose voxels -i has; -o has those of -r"
    add("--points_scan", metavar="SCAN", help=voxels)
    add("--overwrite", action="store_true", help="replace the output file")
    return flags


def main(arguments: list[str] | None = None) -> None:
    """Carry the input and write it.

    Args:
        arguments: flags; those of the process where None.
    """
    args = build_parser().parse_args(arguments)
    kind = check(args)

    from data_util.scans.transform_chain import chain
    from data_util.scans.transform_files import read_ends, read_transform
    from files import whole_file

    transform = chain([read_transform(path) for path in args.transform])
    with whole_file(args.output, RuntimeError) as new:
        carry = {"image": carry_image, "points": carry_points, "mesh": carry_mesh}[kind]
        said, frames = carry(args, transform, new)
    ends = [read_ends(path) for path in (args.transform[0], args.transform[-1])]
    roles = _roles(args, ends)
    print(f"{roles[0]} scan -> {roles[1]} scan: {said}\nOutput: {args.output}")
    for doubt in _doubts(args, ends, frames):
        print(cli.in_red(f"Check {args.output}: {doubt}"))


def _roles(args: argparse.Namespace, ends: list[Any]) -> tuple[str, str]:
    """Of which scan -i is, and of which -o is: 'moving' and 'fixed', unless the first and last transform tell else."""
    first, last = ends
    roles = last[1].role if last else "moving", first[0].role if first else "fixed"
    return roles[::-1] if args.inverse else roles


def _doubts(args: argparse.Namespace, ends: list[Any], frames: list[Frame]) -> list[str]:
    """Where the first and last transform tell what scans they are of: doubts about scans that lie elsewhere.

    `frames` are the grids of -r and -i, none where these are not images.
    """
    from data_util.scans.carrying import doubts_about_place

    paths = args.transform[0], args.transform[-1]
    scans = list(zip((args.reference, args.input), frames, strict=False))
    found = []
    for k, (name, frame) in enumerate(scans[::-1] if args.inverse else scans):
        if ends[k] is not None:
            found += doubts_about_place(name, frame, f"the {ends[k][k].role} scan of {paths[k]}", ends[k][k].frame)
    return found


def check(args: argparse.Namespace) -> str:
    """See that the flags can be meant: returns what -i is, 'image', 'points' or 'mesh'.

    Raises:
        UserError: a flag is missing or does not go with the others, or the output must not be written.
    """
    from data_util.scans.meshes import ENDINGS

    for flag in ("transform", "input", "output"):
        if not getattr(args, flag):
            raise UserError(f"--{flag} is missing; python apply.py -t transform.h5 -i INPUT -r REFERENCE -o OUTPUT")
    kinds = {"points": POINTS, "mesh": ENDINGS}
    source, output = pathlib.Path(args.input), pathlib.Path(args.output)
    kind = next((kind for kind, endings in kinds.items() if source.name.lower().endswith(endings)), "image")
    endings = {"image": IMAGES, "points": (".csv",), "mesh": (source.suffix,)}[kind]
    if not output.name.lower().endswith(tuple(ending.lower() for ending in endings)):
        raise UserError(f"-o {output}: -i is read as {kind}, so the name must end in {' or '.join(endings)}")
    if kind == "image" and args.reference is None:
        scan = "moving" if args.inverse else "fixed"
        raise UserError(f"--reference is missing; name the {scan} scan, whose voxels the output gets")
    if kind == "image" and args.labels and args.interpolation in ("linear", "bspline"):
        raise UserError(f"--labels with --interpolation {args.interpolation} would mix labels; use nearest or labels")
    if kind != "image" and args.points_space == "voxel" and None in (args.points_scan, args.reference):
        raise UserError("--points_space voxel needs --points_scan, the scan whose voxels -i has, and -r, the one of -o")
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise UserError(f"-o {output}: is a folder, or lies in none; name a file in a folder that is there")
    read = [path for path in (args.input, args.reference, args.points_scan, *args.transform) if path is not None]
    if output.exists() and any(pathlib.Path(path).resolve() == output.resolve() for path in read):
        raise UserError(f"-o {output}: is read too, and would be replaced; name another file")
    if output.exists() and not args.overwrite:
        raise UserError(f"-o {output} is there already; name another file, or replace it with --overwrite")
    return kind


def carry_image(args: argparse.Namespace, transform: Any, path: pathlib.Path) -> tuple[str, list[Frame]]:
    """Read an image on the voxels of the reference and write it.

    Returns:
        What was done, in a line; the grids of the reference and of the image.
    """
    from data_util.scans import carrying, transform_chain
    from data_util.scans.images import read_native, write_image

    image = read_native(args.input, is_label=args.labels)
    frame = Frame.of(read_native(args.reference))
    is_label = args.labels or carrying.is_label_image(image)
    interpolation = args.interpolation
    if interpolation == AUTO:
        interpolation = "nearest" if is_label else "linear"
    places, error = transform_chain.sample(frame, 100_000), ""
    if args.inverse:
        forward, transform = transform, transform_chain.inverse(transform)
        error = f"; {_error(transform_chain.inverse_error(transform, forward, places))}"
    carrying.check_reach(transform, places, image)
    write_image(carrying.carry_image(image, frame, transform, interpolation, args.outside), path)
    kind = "labels" if is_label else "grey values"
    said = f"{kind} read by interpolation {interpolation} on {'x'.join(map(str, frame.size))} voxels{error}"
    return said, [frame, Frame.of(image)]


def carry_points(args: argparse.Namespace, transform: Any, path: pathlib.Path) -> tuple[str, list[Frame]]:
    """Lead a table of points to the other scan and write it: x, y, z, and the error of the inverse in mm."""
    import numpy as np

    from data_util.scans.points import from_lps, read_points, write_points

    space = args.points_space or "lps"
    before, after = _grids(args, space)
    places = read_points(args.input, space, before)
    known = np.isfinite(places).all(axis=1)
    if not known.any():
        raise UserError(f"{args.input}: all its {len(places)} points are missing; give some")
    led, error = np.full_like(places, np.nan), np.full(len(places), np.nan)
    led[known], error[known] = _led(args, transform, places[known])
    write_points(path, from_lps(led, space, after), None if args.inverse else error)
    return f"{known.sum()} points {_how(args, error[known])}", []


def carry_mesh(args: argparse.Namespace, transform: Any, path: pathlib.Path) -> tuple[str, list[Frame]]:
    """Lead the vertices of a mesh to the other scan and write it; all else stays."""
    from data_util.scans.meshes import read_mesh
    from data_util.scans.points import from_lps, to_lps

    mesh = read_mesh(args.input)
    space = args.points_space or mesh.space or "lps"
    before, after = _grids(args, space)
    led, error = _led(args, transform, to_lps(mesh.points, space, before))
    with files.whole_file(path) as new:
        new.write_bytes(mesh.content(from_lps(led, space, after)))
    normals = "; the normals it keeps are the old ones: compute them again" if mesh.has_normals else ""
    return f"{len(led)} vertices, read as {space}, {_how(args, error)}{normals}", []


def _grids(args: argparse.Namespace, space: str) -> tuple[Any, Any]:
    """The frames whose voxels points have before and after, where they are in voxels."""
    from data_util.scans.images import read_native
    from data_util.scans.points import frame_for_voxels

    if space != "voxel":
        return None, None
    before, after = (frame_for_voxels(read_native(scan), args.input) for scan in (args.points_scan, args.reference))
    return before, after


def _led(args: argparse.Namespace, transform: Any, places: Any) -> tuple[Any, Any]:
    """Places led to the other scan, and how far off each is: [n, 3] and [n] in mm."""
    from data_util.scans import transform_chain
    from data_util.scans.carrying import check_reach

    if args.inverse:
        led, error = transform_chain.map_points(transform, places), 0 * places[:, 0]
        fixed = places
    else:
        led, error = transform_chain.inverse_points(transform, places)
        fixed = led
    try:
        check_reach(transform, fixed)
    except UserError as doubt:
        print(cli.in_red(f"Check {args.output}: {doubt}"))
    return led, error


def _how(args: argparse.Namespace, error: Any) -> str:
    return "led by the transform itself" if args.inverse else f"led by the transform's inverse; {_error(error)}"


def _error(error: Any) -> str:
    return f"the inverse is {error.max():.2g} mm off at most, {error.mean():.2g} mm on average"


if __name__ == "__main__":
    sys.exit(cli.run(main))
