"""Evaluate a trained network: python eval.py -c weights/VTN-10-liver -g 0 -v lits"""

import argparse
import dataclasses
import pathlib
import re
import sys
import typing
from collections.abc import Collection, Mapping, Sequence

import cli
import devices
import progress
from errors import Stopped, UserError
from network.registry import IMAGES, METRICS, default_metrics, images_of

if typing.TYPE_CHECKING:
    import tensorflow as tf

    from data_util.dataset import Scheme
    from data_util.output.records import Records
    from data_util.output.settings import Settings
    from network import RecursiveCascadedNetwork
    from network.evaluation import EvaluationPlan, Evaluator

EVALUATE = pathlib.Path("evaluate")
LONGEST_NAME = 255 - len(".shard-9999-of-9999.records.new")  # file systems allow 255 bytes


def build_parser() -> argparse.ArgumentParser:
    """The flags of eval.py."""
    flags = cli.parser("Evaluate a trained network on the pairs of a data set.")
    add = flags.add_argument
    add("-c", "--checkpoint", required=True, help="run: FOLDER, FOLDER:STEP or its name in weights/")
    add("-r", "--rep", default="1", help="how often each cascade is applied; auto: as often as helps a pair (1)")
    add("--refine", type=int, default=0, help="steps that fit one more flow to each pair, after the network (0: none)")
    add("--affine", default="none", help="map to find first, by grey values: none, rigid, similarity or affine (none)")
    add("-d", "--dataset", default=None, help="data config (the one that the run was trained on)")
    add("-v", "--val_subset", default=None, help="schemes of the config, comma-separated (scheme 2)")
    add("--batch", type=int, default=4, help="image pairs at a time, over all devices")
    add("--paired", action="store_true", help="pairs of neighbouring scans only, both ways round")
    add("--data_args", default=None, help='data options, "key=value": paired (those of the run)')
    add("--name", default=None, help="added to the name of the report")
    optional = ", ".join(name for name in METRICS if name not in default_metrics())
    add("--metrics", default=None, help=f"what to measure, comma-separated: {', '.join(METRICS)} (all but {optional})")
    add("--per_cascade", action="store_true", help="measure before registration and after every cascade, too")
    add("--save", default=None, help=f"images to keep of every pair, comma-separated: {', '.join(image_items())}")
    add("--save_format", choices=("nii", "npz"), default="nii", help="files of --save: NIfTI or NumPy")
    add("--figures", type=int, default=0, help="draw so many pairs, spread evenly over the scheme")
    add(
        "--resume",
        action="store_true",
        help="go on with an evaluation that was stopped; what is finished is not done again",
    )
    add("--shard", default="1/1", help="evaluate part i of n, as i/n; join with python -m data_util.report merge")
    cli.add_shared_flags(flags)
    cli.add_trust_flag(flags)
    return flags


def image_items() -> list[str]:
    """The names that --save takes."""
    return list(dict.fromkeys(image.item for image in IMAGES.values()))


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate every scheme asked for and write its report."""
    args = cli.parse(build_parser(), arguments)
    cli.load_plugin(args.plugin)
    check_flags(args)
    shard, rep = parse_shard(args.shard), cli.parse_rep(args.rep)
    save = parse_names("--save", args.save, image_items(), ())
    metrics = parse_names("--metrics", args.metrics, METRICS, default_metrics())

    from data_util.config import load_dataset_config
    from network import runs

    prefix = runs.find_checkpoint(args.checkpoint)
    trained = runs.load_args(prefix.parent)
    data = load_dataset_config(args.dataset or trained.dataset or "datasets/liver.json", args.trust)
    data_args = trained.data_args if args.data_args is None else args.data_args
    paired = args.paired or cli.is_paired(data_args)
    reports = report_names(args, prefix)
    strategy = devices.devices(args.gpu, args.batch, most=1 if rep == "auto" or args.refine else None)

    from data_util.dataset import open_scheme
    from data_util.output.settings import Settings, Value
    from data_util.store import ScanStore
    from network import checkpoints
    from network.evaluation import EvaluationPlan

    store = ScanStore(data.files)
    schemes = {name: open_scheme(data, name, paired, store) for name in reports}
    images = images_to_keep(save, args.figures)
    plan = EvaluationPlan(tuple(metrics), args.per_cascade, images, rep == "auto", args.refine, args.affine != "none")
    evaluators = load_evaluators(args, prefix, schemes, plan, strategy)
    for name, scheme in schemes.items():
        settings = Settings(
            report=reports[name],
            checkpoint=checkpoint_name(prefix),
            dataset=str(data.path),
            scheme=name,
            paired=paired,
            pairs=len(scheme),
            batch=args.batch,
            network=evaluators[name].network.config.to_dict(),
            rep=rep,
            refine=args.refine,
            affine=args.affine,
            labels=scheme.labels,
            metrics=tuple(metrics),
            per_cascade=args.per_cascade,
            save=tuple(save),
            save_format=args.save_format,
            figures=args.figures,
            versions=versions(),
            weights=checkpoints.fingerprint(prefix),
            written=pathlib.Path(f"{prefix}.index").stat().st_mtime,
            values={name: Value(**dataclasses.asdict(value)) for name, value in plan.values().items()},
        )
        try:
            evaluate_scheme(evaluators.pop(name), scheme, settings, shard, args.resume)
        except KeyboardInterrupt:
            raise Stopped("Stopped; the finished pairs are kept: go on with the same flags and --resume") from None


def load_evaluators(
    args: argparse.Namespace,
    prefix: pathlib.Path,
    schemes: Mapping[str, "Scheme"],
    plan: "EvaluationPlan",
    strategy: "tf.distribute.Strategy",
) -> dict[str, "Evaluator"]:
    """For each scheme by name, what evaluates the network of a checkpoint on it, as the flags say.

    That of the first scheme is traced while the weights are read.
    """
    from network import checkpoints
    from network.evaluation import Evaluator

    (first, scheme), *_ = schemes.items()
    rep = cli.parse_rep(args.rep)
    evaluators = {}

    def make(network: "RecursiveCascadedNetwork") -> None:
        evaluators.update({k: Evaluator(network, one.label_values, plan, strategy) for k, one in schemes.items()})
        evaluators[first].prepare(pairs_of(scheme, [], args.batch, args.affine).element_spec)

    run = f"{prefix.parent}:{prefix.name.removeprefix('model-')}"
    repeats = 1 if rep == "auto" else int(rep)
    with strategy.scope():
        checkpoints.load_model(run, repeats, scheme.image_size, args.net_args, make, **cli.execution(args))
    return evaluators


def check_flags(args: argparse.Namespace) -> None:
    """Check the flags that need no other file.

    Raises:
        UserError: a value is outside its range, or flags do not go together.
    """
    cli.positive("batch", args.batch)
    for name in ("figures", "refine"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name} is {getattr(args, name)}; it must be a whole number from 0")
    cli.part_of_name("--name", args.name)
    rep = cli.parse_rep(args.rep)
    if rep == "auto" and args.per_cascade:
        raise UserError(
            "-r auto gives every pair a number of cascades of its own: leave out --per_cascade, or give -r N"
        )
    if args.affine != "none":
        from data_util.scans.affine_search import KINDS

        if args.affine not in KINDS:
            raise UserError(f"--affine {args.affine!r} is no kind of map; known are none, {', '.join(KINDS)}")
    if (rep == "auto" or args.refine) and devices.device_count(args.gpu) > 1:
        raise UserError(
            f"-r auto and --refine work on one device, not on -g {args.gpu}; give one, and --shard the pairs"
        )


def checkpoint_name(prefix: pathlib.Path) -> str:
    """Run and step of a checkpoint, as reports are called by it."""
    return f"{prefix.parent.resolve().name}-{prefix.name}"


def report_names(args: argparse.Namespace, prefix: pathlib.Path) -> dict[str, str]:
    """The schemes to evaluate, and the name of each one's report.

    Raises:
        UserError: a scheme's name cannot be part of a file's name, or that gets too long.
    """
    reports = {}
    for scheme in (name.strip() for name in (args.val_subset or "2").split(",")):
        cli.part_of_name("-v", scheme)
        repeats = "" if cli.parse_rep(args.rep) == 1 else f"rep{cli.parse_rep(args.rep)}"
        refined = f"refine{args.refine}" if args.refine else ""
        moved = f"affine{args.affine}" if args.affine != "none" else ""
        parts = [checkpoint_name(prefix), moved, repeats, refined, args.name, scheme if args.val_subset else ""]
        reports[scheme] = "-".join(part for part in parts if part)
        if (length := len(reports[scheme].encode())) > LONGEST_NAME:
            raise UserError(f"the report's name has {length} bytes, of {LONGEST_NAME} at most; give a shorter --name")
    return reports


def parse_shard(text: str) -> tuple[int, int]:
    """(i, n) of a text 'i/n' with 1 <= i <= n.

    Raises:
        UserError: it is not such a text.

    >>> parse_shard("2/8")
    (2, 8)
    """
    i, slash, n = text.partition("/")
    if not (slash and re.fullmatch("[0-9]{1,4}/[0-9]{1,4}", text) and 1 <= int(i) <= int(n)):
        raise UserError(f"--shard {text!r} is not i/n with i from 1 to n; write 2/8 for the second of eight parts")
    return int(i), int(n)


def parse_names(flag: str, text: str | None, known: Collection[str], default: Sequence[str]) -> list[str]:
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


def versions() -> dict[str, str]:
    """Versions of what the numbers may depend on."""
    import platform

    import keras
    import numpy as np
    import tensorflow as tf

    packages = {module.__name__: module.__version__ for module in (tf, keras, np)}
    return {"python": platform.python_version(), **packages}


def evaluate_scheme(
    evaluator: "Evaluator", scheme: "Scheme", settings: "Settings", shard: tuple[int, int], resume: bool
) -> None:
    """Evaluate one scheme, or one shard of it, and write its report or records into evaluate/."""
    from data_util.batches import user_errors
    from data_util.output import report_files, tables
    from data_util.output.records import Records, read_records

    part, parts = shard
    target = EVALUATE / settings.report
    if resume and report_files.is_finished(target, settings):
        print(f"Report: {target}.txt was finished before")
        return
    report_files.check_replaceable(target, settings)
    path = pathlib.Path(f"{target}{f'.shard-{part}-of-{parts}' if parts > 1 else ''}.records")
    with Records(path, settings, resume) as records, user_errors():
        evaluate_pairs(evaluator, scheme, settings, shard, records)
        if parts > 1:
            print(f"Records: {path}; join the {parts} parts with python -m data_util.report merge")
            return
        _, finished = read_records(path)
        report_files.write_report(target, settings, finished)
        records.remove()
    for line in tables.headlines(finished, settings):
        print(line)
    for line in tables.warnings(finished, settings):
        print(cli.in_red(line))
    print(f"Report: {target}.txt\nnext: look at {target}.csv (one row per pair), or draw pairs by --figures 3")


def images_to_keep(save: Sequence[str], figures: int) -> tuple[str, ...]:
    """Names of the images that are saved or drawn of a pair, each once."""
    images = images_of(save)
    if figures:
        from data_util.output.pair_images import FIGURE_IMAGES

        images += FIGURE_IMAGES
    return tuple(dict.fromkeys(images))


def pairs_of(scheme: "Scheme", indices: Sequence[int], batch: int, affine: str) -> "tf.data.Dataset":
    """Batches of the pairs `indices` of a scheme, each with an affine map of a kind ('none': without)."""
    return scheme.evaluation(batch, indices, None if affine == "none" else affine)


def evaluate_pairs(
    evaluator: "Evaluator", scheme: "Scheme", settings: "Settings", shard: tuple[int, int], records: "Records"
) -> None:
    """Evaluate the pairs of a scheme, or of one shard of it, that are not on record yet; save and draw their images."""
    from data_util.output.records import remaining

    if settings.save or settings.figures:  # matplotlib and SimpleITK are for these alone
        from data_util.output.pair_images import draw_pair, save_pair

    figures = min(settings.figures, len(scheme))
    drawn = {k * len(scheme) // figures for k in range(figures)}
    indices = remaining(len(scheme), settings.batch, shard, records.done)
    batches = pairs_of(scheme, indices, settings.batch, settings.affine)
    if settings.affine != "none" and not scheme.has_spacings:
        print("--affine: where the spacing of a scan is unknown, voxels of its pairs count as 1 mm", file=sys.stderr)
    if indices:
        print(f"{len(indices)} pairs; the first takes longest, since the network is compiled for it", file=sys.stderr)
    results = evaluator.evaluate(batches, None if settings.save else drawn)
    for result in progress.bar(results, total=len(indices), desc=settings.report, unit="pair"):
        if result.index in records.done:
            continue
        folder = EVALUATE / settings.report
        if settings.save:
            save_pair(folder, result, images_of(settings.save), settings.save_format, scheme.orientation)
        if result.index in drawn:
            draw_pair(folder, result)
        records.add(result)  # last: a pair on record has its images


if __name__ == "__main__":
    sys.exit(cli.run(main, if_out_of_memory="use a smaller --batch, more devices, or --precision mixed_bfloat16"))
