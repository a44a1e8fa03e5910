"""Evaluate a trained network: python eval.py -c weights/VTN-10-liver -g 0 -v lits"""

import pathlib
import sys

import cli
import devices
from errors import UserError

EVALUATE = pathlib.Path("evaluate")
METRICS_HELP = "overlap, landmarks, jacobian, folding, sdlogj, similarity, flow_error, surface"


def build_parser():
    """The flags of eval.py."""
    flags = cli.parser("Evaluate a trained network on the pairs of a data set.")
    add = flags.add_argument
    add("-c", "--checkpoint", required=True, help="run: FOLDER, FOLDER:STEP or its name in weights/")
    add("-r", "--rep", default="1", help="times each cascade is applied in a row; auto: as often as helps a pair (1)")
    add("--refine", type=int, default=0, help="steps that fit one more flow to each pair, after the network (0: none)")
    add("-d", "--dataset", default=None, help="data config (the one that the run was trained on)")
    add("-v", "--val_subset", default=None, help="schemes of the config, comma-separated (scheme 2)")
    add("--batch", type=int, default=4, help="image pairs at a time, over all devices")
    add("--paired", action="store_true", help="pairs of neighbouring scans only, both ways round")
    add("--data_args", default=None, help='data options, "key=value": paired (those of the run)')
    add("--name", default=None, help="added to the name of the report")
    add("--metrics", default=None, help=f"what to measure, comma-separated: {METRICS_HELP} (all but surface)")
    add("--per_cascade", action="store_true", help="measure before registration and after every cascade, too")
    add(
        "--save",
        default=None,
        help="images to keep of every pair, comma-separated: flow, warped, seg, moving, fixed, jacobian",
    )
    add("--save_format", choices=("nii", "npz"), default="nii", help="files of --save: NIfTI or NumPy")
    add("--figures", type=int, default=0, help="draw so many pairs, spread evenly over the scheme")
    add(
        "--resume",
        action="store_true",
        help="go on with an evaluation that was stopped; what is finished is not redone",
    )
    add("--shard", default="1/1", help="evaluate part i of n, as i/n; join with python -m data_util.report merge")
    cli.add_shared_flags(flags)
    return flags


def main(arguments=None):
    """Evaluate every scheme asked for and write its report."""
    args = build_parser().parse_args(arguments)
    cli.load_plugin(args.plugin)
    cli.positive("batch", args.batch)
    shard = parse_shard(args.shard)
    for name in ("figures", "refine"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name} is {getattr(args, name)}; it must be a whole number from 0")
    rep = cli.parse_rep(args.rep)
    if rep == "auto" and args.per_cascade:
        raise UserError(
            "-r auto gives every pair a number of cascades of its own: leave out --per_cascade, or give -r N"
        )
    if (rep == "auto" or args.refine) and devices.device_count(args.gpu) > 1:
        raise UserError(
            f"-r auto and --refine work on one device, not on -g {args.gpu}; give one, and --shard the pairs"
        )

    from data_util.config import load_dataset_config
    from data_util.output import pair_images
    from network import checkpoints, evaluation

    save = parse_names("--save", args.save, pair_images.ITEMS, ())
    metrics = parse_names("--metrics", args.metrics, evaluation.METRICS, evaluation.DEFAULT_METRICS)
    prefix = checkpoints.find_checkpoint(args.checkpoint)
    trained = checkpoints.load_args(prefix.parent)
    data = load_dataset_config(args.dataset or trained.get("dataset") or "datasets/liver.json")
    data_args = trained.get("data_args", "") if args.data_args is None else args.data_args
    paired = args.paired or cli.is_paired(data_args)
    strategy = devices.devices(args.gpu, args.batch)

    from data_util.dataset import open_scheme
    from data_util.store import ScanStore

    names = [name.strip() for name in (args.val_subset or "2").split(",")]
    store = ScanStore(data.files)
    schemes = {name: open_scheme(data, name, paired, store) for name in names}
    path = f"{prefix.parent}:{prefix.name.removeprefix('model-')}"
    with strategy.scope():
        network = checkpoints.load_model(
            path, 1 if rep == "auto" else rep, data.image_size, args.net_args, **cli.execution(args)
        )
    checkpoint = f"{prefix.parent.resolve().name}-{prefix.name}"
    for name, scheme in schemes.items():
        repeats = "" if rep == 1 else f"rep{rep}"
        refined = f"refine{args.refine}" if args.refine else ""
        parts = [checkpoint, repeats, refined, args.name, name if args.val_subset else ""]
        report = "-".join(part for part in parts if part)
        settings = {
            "report": report,
            "checkpoint": checkpoint,
            # Another model of the same name is another evaluation.
            "written": pathlib.Path(f"{prefix}.index").stat().st_mtime,
            "dataset": str(data.path),
            "scheme": name,
            "paired": paired,
            "pairs": len(scheme),
            "batch": args.batch,
            "network": network.config.to_dict(),
            "rep": rep,
            "refine": args.refine,
            "labels": scheme.labels,
            "metrics": metrics,
            "per_cascade": args.per_cascade,
            "save": save,
            "save_format": args.save_format,
            "figures": args.figures,
            "versions": versions(),
        }
        try:
            evaluate_scheme(network, scheme, settings, shard, args.resume, strategy)
        except KeyboardInterrupt:
            raise UserError("stopped; the finished pairs are kept: go on with the same flags and --resume") from None


def parse_shard(text):
    """(i, n) of a text 'i/n' with 1 <= i <= n.

    Raises:
        UserError: it is not such a text.
    """
    i, slash, n = text.partition("/")
    if not (slash and i.isdigit() and n.isdigit() and 1 <= int(i) <= int(n)):
        raise UserError(f"--shard {text!r} is not i/n with i from 1 to n; write 2/8 for the second of eight parts")
    return int(i), int(n)


def parse_names(flag, text, known, default):
    """The names of a comma-separated text, each once and in the order of `known`; `default` where there is no text.

    Raises:
        UserError: a name is not among `known`.
    """
    if text is None:
        return list(default)
    given = [name.strip() for name in text.split(",")]
    for name in given:
        if name not in known:
            raise UserError(f"{flag}: unknown name {name!r}; known are {', '.join(known)}")
    return [name for name in known if name in given]


def versions():
    """Versions of what the numbers may depend on."""
    import platform

    import keras
    import numpy as np
    import tensorflow as tf

    found = {module.__name__: module.__version__ for module in (tf, keras, np)}
    return {"python": platform.python_version(), **found}


def evaluate_scheme(network, scheme, settings, shard, resume, strategy):
    """Evaluate one scheme, or one shard of it, and write its report or records into evaluate/."""
    import tqdm

    from data_util import report
    from data_util.dataset import user_errors
    from data_util.output import pair_images
    from data_util.output.records import Records, read_records, remaining
    from network.evaluation import evaluate

    batch, (part, parts) = settings["batch"], shard
    target = EVALUATE / settings["report"]
    if resume and report.is_finished(target, settings):
        print(f"Report: {target}.txt was finished before")
        return
    report.check_replaceable(target, settings)
    path = pathlib.Path(f"{target}{f'.shard-{part}-of-{parts}' if parts > 1 else ''}.records")
    figures = min(settings["figures"], len(scheme))
    drawn = {k * len(scheme) // figures for k in range(figures)}
    items = [*settings["save"], *(pair_images.FIGURE_ITEMS if drawn else ())]
    with Records(path, settings, resume) as records, user_errors():
        indices = remaining(len(scheme), batch, shard, records.done)
        found = evaluate(
            network,
            scheme.evaluation(batch, indices),
            scheme.label_values,
            settings["metrics"],
            strategy,
            settings["per_cascade"],
            images=pair_images.images_of(items),
            images_of=None if settings["save"] else drawn,
            adaptive=settings["rep"] == "auto",
            refine_steps=settings["refine"],
        )
        for result in tqdm.tqdm(found, total=len(indices), desc=settings["report"], unit="pair"):
            if result.index in records.done:
                continue
            if settings["save"]:
                pair_images.save_pair(target, result, settings["save"], settings["save_format"])
            if result.index in drawn:
                pair_images.draw_pair(target, result)
            records.add(result)  # last: a pair on record has its images
    if parts > 1:
        print(f"Records: {path}; join the {parts} parts with python -m data_util.report merge")
        return
    settings, finished = read_records(path)
    report.write_report(target, settings, finished)
    path.unlink()
    print(report.headline(finished))
    print(f"Report: {target}.txt")


if __name__ == "__main__":
    sys.exit(cli.run(main, if_out_of_memory="use a smaller --batch, more devices, or --precision mixed_bfloat16"))
