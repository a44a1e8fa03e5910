"""Register two raw scans: python demo.py -c weights/VTN-10-liver -f fixed_folder -m moving.nii.gz -o output"""

import argparse
import os
import pathlib
import sys
import time
from typing import Any

import cli
import devices
from data_util.output.output_folder import check_folder, new_folder
from errors import UserError


def build_parser() -> argparse.ArgumentParser:
    """The flags of demo.py."""
    flags = cli.parser("Register two raw scans: DICOM or NIfTI in, the warped scan and its displacement field out.")
    add = flags.add_argument
    add("-c", "--checkpoint", default=None, help="run: FOLDER, FOLDER:STEP or its name in weights/")
    add("-f", "--fixed", default=None, help="fixed scan: folder of a DICOM series, or NIfTI, NRRD, MHA")
    add("-m", "--moving", default=None, help="moving scan, likewise")
    add("-o", "--output", default="output", help="folder to make (output)")
    add("--affine", default=None, help="find this map first: none, rigid, similarity or affine (affine; none with -c)")
    add("-r", "--rep", default="1", help="times each cascade is applied, or auto: as often as it helps (1)")
    add("--refine", type=int, default=0, metavar="STEPS", help="optimise the result for this pair; needs no -c (0)")
    add("--preprocess", default=None, help="what is registered: liver, body, brain, or none for all (the run's, liver)")
    for role in ("fixed", "moving"):
        add(f"--{role}_mask", default=None, help=f"label image of the {role} scan's organ, not 0 there (found)")
        add(f"--{role}_series", default=None, help=f"id of the {role} series, where a folder has several (the largest)")
    add("--labels", default=None, help="label image of the moving scan to carry to the fixed one")
    add("--points", default=None, help="table of landmarks x,y,z of the moving scan, to carry likewise")
    add("--points_space", default="lps", help="what their numbers are: mm as lps or ras, or voxel of the file (lps)")
    add("--orientation", default=None, help="where the network's axes run to, such as RPI (the run's, LPS)")
    add("--overwrite", action="store_true", help="replace an output folder of this script")
    cli.add_shared_flags(flags)
    return flags


def main(arguments: list[str] | None = None) -> None:
    """Register the pair and write everything into a folder, which appears when it is complete.

    Args:
        arguments: flags; those of the process where None.
    """
    args = cli.parse(build_parser(), arguments)
    check(args)
    cli.load_plugin(args.plugin)
    output = pathlib.Path(args.output)

    import tqdm

    from data_util.making.labels import read_label_image
    from data_util.output.registration_files import headline, write_output
    from data_util.scans.geometry import doubts_about_labels, doubts_about_points
    from registration import Input, register

    print("Reading and registering ...", flush=True)
    labels = None if args.labels is None else read_label_image(args.labels)
    points = read_landmarks(args)
    devices.devices(args.gpu, batch=1)
    with tqdm.tqdm(total=args.refine, desc="refine", unit="step", disable=not args.refine) as bar:
        result = register(
            Input(args.fixed, args.fixed_mask, args.fixed_series),
            Input(args.moving, args.moving_mask, args.moving_series),
            args.checkpoint,
            asked_view(args),
            lambda *_: bar.update(),
            affine=args.affine,
            rep=cli.parse_rep(args.rep),
            refine=args.refine,
            net_args=args.net_args,
            **cli.execution(args),
        )
    if points is not None:
        result.report["doubts"] += doubts_about_points(points, result.moving.image)
    if labels is not None:
        result.report["doubts"] += doubts_about_labels(labels, result.moving.image)
    print("Writing ...", flush=True)
    with new_folder(output, result.report) as folder:
        start = time.perf_counter()
        write_output(folder, result, labels, points)
        result.report["seconds"]["write"] = round(time.perf_counter() - start, 3)
    if args.rep == "auto":
        print(f"Each cascade was applied {result.report['settings']['rep']} times")
    print(headline(result.report))
    for doubt in result.report["doubts"]:
        print(cli.in_red(f"Check {output / 'summary.png'}: {doubt}"))
    print(f"Output: {output}\nnext: look at {output / 'summary.png'}, then use {output / 'warped.nii.gz'}")
    print(f"python apply.py -t {output / 'transform.h5'} carries labels, points and meshes the same way")


def check(args: argparse.Namespace) -> None:
    """See that the flags can be meant, before anything slow is done.

    Raises:
        UserError: a flag is missing or outside its range, a file is not there, or the output must not be written.
    """
    for flag in ("fixed", "moving"):
        if getattr(args, flag) is None:
            raise UserError(f"--{flag} is missing; python demo.py -c RUN -f FIXED -m MOVING -o OUTPUT")
    if args.refine < 0:
        raise UserError(f"--refine is {args.refine}; it must be a whole number from 0")
    if args.checkpoint is None and not args.refine and args.affine in (None, "none"):
        raise UserError("no --checkpoint; name a run, or register without a network by --refine 200")
    cli.parse_rep(args.rep)
    if devices.device_count(args.gpu) > 1:
        raise UserError(f"-g {args.gpu}: a pair is registered on one device; name one, such as -g 0")
    inputs = [args.fixed, args.moving, args.fixed_mask, args.moving_mask, args.labels, args.points, args.checkpoint]
    check_folder(pathlib.Path(args.output), args.overwrite, inputs)
    for path in (args.labels, args.points):
        if path is not None and not os.path.exists(path):
            raise UserError(f"{path}: no such file; check --labels and --points")


def asked_view(args: argparse.Namespace) -> Any:
    """What --preprocess and --orientation ask for: a `View`."""
    from data_util.scans.view import PRESETS, View

    if args.preprocess not in (None, *PRESETS):
        raise UserError(f"unknown kind of scan {args.preprocess!r}; known are {', '.join(PRESETS)}")
    return View(orientation=args.orientation).completed(PRESETS.get(args.preprocess, View()))


def read_landmarks(args: argparse.Namespace) -> Any:
    """The landmarks of --points in mm (LPS), [n, 3], or None."""
    from data_util.scans.images import read_native
    from data_util.scans.points import frame_for_voxels, read_points

    if args.points is None:
        return None
    in_voxels = args.points_space == "voxel"
    native = read_native(args.moving, args.moving_series) if in_voxels else None
    frame = None if native is None else frame_for_voxels(native, args.points)
    return read_points(args.points, args.points_space, frame)


if __name__ == "__main__":
    sys.exit(cli.run(main, if_out_of_memory="use --precision mixed_bfloat16, or a machine with more memory"))
