"""Register two raw scans: python demo.py -c weights/VTN-10-liver -f fixed_folder -m moving.nii.gz -o output"""

import json
import os
import pathlib
import shutil
import sys
import tempfile
import time

import cli
import devices
from errors import UserError

REPORT = "report.json"


def build_parser():
    """The flags of demo.py."""
    flags = cli.parser("Register two raw scans: DICOM or NIfTI in, the warped scan and its displacement field out.")
    add = flags.add_argument
    add("-c", "--checkpoint", default=None, help="run: FOLDER, FOLDER:STEP or its name in weights/")
    add("-f", "--fixed", default=None, help="fixed scan: folder of a DICOM series, or NIfTI, NRRD, MHA")
    add("-m", "--moving", default=None, help="moving scan, likewise")
    add("-o", "--output", default="output", help="folder to make (output)")
    add("-r", "--rep", default="1", help="times each cascade is applied in a row, or auto: as often as it helps (1)")
    add("--refine", type=int, default=0, metavar="STEPS", help="optimise the result for this pair; needs no -c (0)")
    add("--preprocess", default="liver", help="what the network is to see: liver, body, brain, or none for all (liver)")
    for role in ("fixed", "moving"):
        add(f"--{role}_mask", default=None, help=f"label image of the {role} scan's organ, not 0 there (found)")
        add(f"--{role}_series", default=None, help=f"id of the {role} series, where a folder has several (the largest)")
    add("--labels", default=None, help="label image of the moving scan to carry to the fixed one")
    add("--points", default=None, help="table of landmarks x,y,z of the moving scan, to carry likewise")
    add("--points_space", default="lps", help="what their numbers are: mm as lps or ras, or voxel of the file (lps)")
    add("--orientation", default=None, help="where the network's axes run (LPS; of a published model RPI)")
    add("--overwrite", action="store_true", help="replace an output folder of this script")
    cli.add_shared_flags(flags)
    return flags


def main(arguments=None):
    """Register the pair and write everything into a folder, which appears when it is complete."""
    args = build_parser().parse_args(arguments)
    cli.load_plugin(args.plugin)
    for flag in ("fixed", "moving"):
        if getattr(args, flag) is None:
            raise UserError(f"--{flag} is missing; python demo.py -c RUN -f FIXED -m MOVING -o OUTPUT")
    if args.refine < 0:
        raise UserError(f"--refine is {args.refine}; it must be a whole number from 0")
    if args.checkpoint is None and not args.refine:
        raise UserError("no --checkpoint; name a run, or register without a network by --refine 200")
    rep = cli.parse_rep(args.rep)
    output = pathlib.Path(args.output)
    check_output(output, args.overwrite)
    for path in (args.labels, args.points):
        if path is not None and not os.path.exists(path):
            raise UserError(f"{path}: no such file; check --labels and --points")

    from data_util.output.registration_files import headline, write_output
    from data_util.scans.frame import Frame
    from data_util.scans.geometry import doubts_about_labels, doubts_about_points
    from data_util.scans.images import read_image, read_native
    from data_util.scans.points import read_points

    labels = None if args.labels is None else read_image(args.labels)
    points = None
    if args.points is not None:
        in_voxels = args.points_space == "voxel"
        frame = Frame.of(read_native(args.moving, args.moving_series)) if in_voxels else None
        points = read_points(args.points, args.points_space, frame)
    if devices.device_count(args.gpu) > 1:
        raise UserError(f"-g {args.gpu}: a pair is registered on one device; name one, such as -g 0")
    devices.devices(args.gpu, batch=1)

    import tqdm

    from register import register

    with tqdm.tqdm(total=args.refine, desc="refine", unit="step", disable=not args.refine) as bar:
        result = register(
            args.fixed,
            args.moving,
            args.checkpoint,
            rep,
            args.preprocess,
            args.fixed_mask,
            args.moving_mask,
            args.fixed_series,
            args.moving_series,
            refine=args.refine,
            orientation=args.orientation,
            net_args=args.net_args,
            **cli.execution(args),
            on_step=lambda *_: bar.update(),
        )
    if points is not None:
        result.report["doubts"] += doubts_about_points(points, result.moving.image)
    if labels is not None:
        result.report["doubts"] += doubts_about_labels(labels, result.moving.image)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as partial:
        folder = pathlib.Path(partial) / output.name
        folder.mkdir()
        start = time.perf_counter()
        write_output(folder, result, labels, points)
        result.report["seconds"]["write"] = round(time.perf_counter() - start, 3)
        (folder / REPORT).write_text(json.dumps(result.report, indent=2) + "\n", encoding="utf-8")
        if output.exists():
            shutil.move(output, pathlib.Path(partial) / "replaced")
        os.replace(folder, output)
    if rep == "auto":
        print(f"Each cascade was applied {result.report['settings']['rep']} times")
    print(headline(result.report))
    for doubt in result.report["doubts"]:
        print(f"Check {output / 'summary.png'}: {doubt}")
    print(f"Output: {output}")


def check_output(output, overwrite):
    """Raise UserError where the output folder must not be written: it has other files, or files and no --overwrite."""
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"-o {output} is a file; name a folder")
    if not any(output.iterdir()):
        return
    if not (output / REPORT).is_file():
        raise UserError(f"-o {output} has files that are not of this script; name another folder")
    if not overwrite:
        raise UserError(f"-o {output} is not empty; name another folder, or replace it with --overwrite")


if __name__ == "__main__":
    sys.exit(cli.run(main, if_out_of_memory="use --precision mixed_bfloat16, or a machine with more memory"))
