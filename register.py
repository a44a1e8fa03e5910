"""Register two raw scans: python register.py FIXED MOVING -o OUT

From Python: `from register import Input, register`; `registration` has the functions.
"""

import argparse
import contextlib
import functools
import importlib
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import cli
import devices
import progress
from data_util.output.output_folder import check_folder, new_folder
from errors import UserError

_OFFERED = ("Input", "Options", "Registration", "register")

EXAMPLES = """\
  python register.py fixed.nii.gz moving.nii.gz -o out            two scans of one modality, without a model
  python register.py ct_dicom/ mr.nii.gz -o out                   CT and MR: by mutual information
  python register.py a.nii.gz b.nii.gz -o out --refine 0 --affine rigid     a rigid map alone
  python register.py a/ b/ -c weights/VTN-10-liver -o out         with a trained model
  python register.py a.nii.gz b.nii.gz -o out --labels b_labels.nii.gz      carries labels of b to a"""
IF_OUT_OF_MEMORY = "use --precision mixed_bfloat16, or a machine with more memory"


def build_parser() -> argparse.ArgumentParser:
    """The flags of register.py."""
    flags = cli.parser("Register two raw scans: DICOM or NIfTI in, the warped scan and its transform out.", EXAMPLES)
    flags.add_argument("fixed", help="fixed scan: folder of a DICOM series, or NIfTI, NRRD, MHA, MGZ")
    flags.add_argument("moving", help="moving scan, likewise")
    flags.add_argument("--dicom", action="store_true", help="write the warped scan as a DICOM series too (if one is)")
    add_flags(flags)
    return flags


def add_flags(flags: argparse.ArgumentParser) -> None:
    """The flags that register.py and demo.py share."""
    add = flags.add_argument
    add("-c", "--checkpoint", default=None, help="run: FOLDER, FOLDER:STEP or its name in weights/ (none)")
    add("-o", "--output", default="output", help="folder to make (output)")
    add("--affine", default=None, help="find this map first: none, rigid, similarity or affine (affine; none with -c)")
    add("--initial_transform", metavar="FILE", help="linear transform to start from, in place of one that is found")
    add("-r", "--rep", default="1", help="times each cascade is applied, or auto: as often as it helps (1)")
    add("--refine", default=None, metavar="STEPS", help="optimise the result for this pair; auto: until it no longer "
        "improves (auto; 0 with -c)")  # fmt: skip
    add(
        "--smoothness",
        type=float,
        default=None,
        help="of the optimised flow: 10 is smoother, 1 follows closer (3, or the model's)",
    )
    add("--exclude_mask", default=None, help="label image of what not to compare in the fixed scan, a lesion (none)")
    add("--both_ways", action="store_true", help="optimise the other way too: how far are the two from inverse?")
    add("--preprocess", default=None, help="what is registered: liver, body, brain, none for all (the run's; chosen)")
    for role in ("fixed", "moving"):
        add(f"--{role}_mask", default=None, help=f"label image of the {role} scan's organ, not 0 there (found)")
        add(f"--{role}_series", default=None, help=f"id of the {role} series, where a folder has several (the largest)")
    add(
        "--size",
        type=int,
        nargs=3,
        metavar="N",
        help="voxels of the volumes to register (the run's; else what fits)",
    )
    add("--labels", default=None, help="label image of the moving scan to carry to the fixed one")
    add("--points", default=None, help="table of landmarks x,y,z of the moving scan, to carry likewise")
    add("--points_space", default="lps", help="what their numbers are: mm as lps or ras, or voxel of the file (lps)")
    add("--orientation", default=None, help="where the network's axes run to, such as RPI (the run's, LPS)")
    add("--overwrite", action="store_true", help="replace an output folder of this command")
    cli.add_shared_flags(flags)


def __getattr__(name: str) -> Any:
    if name not in _OFFERED:
        raise AttributeError(f"module 'register' has no attribute {name!r}; it offers {', '.join(_OFFERED)}")
    return getattr(importlib.import_module("registration"), name)  # at first use, so that --help is quick


def main(arguments: list[str] | None = None) -> None:
    """Register the pair and write the result into a folder, which appears when it is complete.

    Args:
        arguments: flags; those of the process where None.
    """
    from data_util.output import registration_files

    args = cli.parse(build_parser(), arguments)
    run(args, functools.partial(registration_files.write_output, series=args.dicom or None))


def run(args: argparse.Namespace, write: Callable[..., None]) -> None:
    """Register a pair as flags say, and tell the result.

    Args:
        args: the flags of `add_flags`, with `fixed` and `moving`.
        write: function of (folder, `Registration`, labels, points) that writes the files.
    """
    refine = check(args)
    initial = read_initial(args)
    cli.load_plugin(args.plugin)
    output = pathlib.Path(args.output)

    from data_util.output.registration_files import headline
    from data_util.scans.carrying import is_label_image
    from data_util.scans.geometry import doubts_about_labels, doubts_about_points
    from registration import Input, register

    print("Reading and registering ...", flush=True)
    labels = read_labels(args)
    points = read_landmarks(args)
    devices.devices(args.gpu, batch=1)
    with contextlib.ExitStack() as stack:
        result = register(
            Input(args.fixed, args.fixed_mask, args.fixed_series),
            Input(args.moving, args.moving_mask, args.moving_series),
            args.checkpoint,
            asked_view(args),
            _shown_steps(refine, stack),
            affine=args.affine,
            initial_transform=initial,
            rep=cli.parse_rep(args.rep),
            refine=refine,
            smoothness=args.smoothness,
            exclude_mask=args.exclude_mask,
            both_ways=args.both_ways,
            image_size=None if args.size is None else tuple(args.size),
            net_args=args.net_args,
            **cli.execution(args),
        )
    result.report["settings"]["initial_transform"] = args.initial_transform
    if points is not None:
        result.report["doubts"] += doubts_about_points(points, result.moving.image)
    if labels is not None:
        result.report["doubts"] += doubts_about_labels(labels, result.moving.image)
        if not is_label_image(labels):
            result.report["doubts"].append(
                f"{args.labels} looks like grey values, whose neighbours differ, and was read at the nearest voxel; "
                "grey values are carried by apply.py"
            )
    print("Writing ...", flush=True)
    clock = progress.Clock()
    result.inverse  # noqa: B018  It is made here, so that its time is known.
    clock.stop("inverse")
    result.report["seconds"] |= clock.seconds
    with new_folder(output, result.report) as folder:
        write(folder, result, labels, points)
        clock.stop("write")
        result.report["seconds"] |= clock.seconds
    for line in result.report["chosen"]:
        print(line)
    print(headline(result.report))
    for doubt in result.report["doubts"]:
        print(cli.in_red(f"Check {output / 'summary.png'}: {doubt}"))
    print(
        f"Output: {output}\n"
        f"next: look at {output / 'report.html'}, or carry more with apply.py -t {output / 'transform.h5'}"
    )


def _shown_steps(refine: int | str, stack: contextlib.ExitStack) -> Callable[..., None]:
    """What to call after each step of refinement: it moves a bar, which comes with the first step."""
    total = refine if isinstance(refine, int) else None

    @functools.cache
    def bar() -> Any:
        return stack.enter_context(progress.bar(total=total, desc="refine", unit="step"))

    return lambda *_: bar().update()


def check(args: argparse.Namespace) -> int | str:
    """See that the flags can be meant, before anything slow is done.

    Returns:
        The steps of refinement, or "auto".

    Raises:
        UserError: a flag is outside its range, a file is not there, or the output must not be written.
    """
    refine = parse_refine(args.refine, args.checkpoint)
    cli.parse_rep(args.rep)
    if devices.device_count(args.gpu) > 1:
        raise UserError(f"-g {args.gpu}: a pair is registered on one device; name one, such as -g 0")
    inputs = [args.fixed, args.moving, args.fixed_mask, args.moving_mask, args.labels, args.points, args.checkpoint]
    inputs.append(args.exclude_mask)
    check_folder(pathlib.Path(args.output), args.overwrite, inputs)
    for path in (args.fixed, args.moving):
        if not os.path.exists(path):
            raise UserError(f"{path}: no such file or folder; name the fixed and the moving scan")
    for path in (args.labels, args.points, args.exclude_mask, args.fixed_mask, args.moving_mask):
        if path is not None and not os.path.exists(path):
            raise UserError(f"{path}: no such file; check --labels, --points and the masks")
    asked_view(args)
    return refine


def parse_refine(text: str | None, checkpoint: str | None) -> int | str:
    """The value of --refine: a whole number from 0, or "auto"; where it is not given, 0 with a model, else "auto".

    Raises:
        UserError: it is neither.
    """
    if text is None:
        return cli.AUTO if checkpoint is None else 0
    if text == cli.AUTO:
        return text
    if not text.isdecimal():
        raise UserError(f"--refine {text!r} is neither a whole number from 0 nor auto")
    return int(text)


def asked_view(args: argparse.Namespace) -> Any:
    """What --preprocess and --orientation ask for: a `View`."""
    from data_util.scans.view import PRESETS, View

    if args.preprocess not in (None, *PRESETS):
        raise UserError(f"unknown kind of scan {args.preprocess!r}; known are {', '.join(PRESETS)}")
    return View(orientation=args.orientation).completed(PRESETS.get(args.preprocess, View()))


def read_initial(args: argparse.Namespace) -> Any:
    """The linear transform of --initial_transform, as SimpleITK has it, or None."""
    from data_util.scans.transform_chain import linear
    from data_util.scans.transform_files import read_linear

    return None if args.initial_transform is None else linear(*read_linear(args.initial_transform))


def read_labels(args: argparse.Namespace) -> Any:
    """The label image of --labels, or None."""
    from data_util.making.labels import read_label_image

    return None if args.labels is None else read_label_image(args.labels)


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
    sys.exit(cli.run(main, if_out_of_memory=IF_OUT_OF_MEMORY))
