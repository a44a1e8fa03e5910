"""Train a recursive cascaded network: python train.py -b VTN -n 10 -d datasets/liver.json -g 0,1"""

from __future__ import annotations

import argparse
import datetime
import math
import pathlib
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import cli
import devices
import workers
from checked import MOST
from errors import Stopped, UserError
from network import runs, selection
from training_callbacks import LOGS, make_callbacks, open_selection

if TYPE_CHECKING:  # TensorFlow is imported within the functions, so that --help is quick
    import tensorflow as tf

    from data_util.config import DatasetConfig
    from data_util.dataset import Scheme
    from data_util.scans.view import View
    from network import training
    from network.config import CascadeConfig

WEIGHTS = pathlib.Path("weights")
# Flags that, where not given, are those of the run that -c continues, or else these.
INHERITED = (
    *("rep", "dataset", "batch", "round", "epochs", "data_args", "lr", "precision", "seed", "finetune"),
    *("best", "patience", "ema", "clip"),
)
DEFAULTS = {name: getattr(runs.RunArgs(), name) for name in INHERITED} | {"dataset": "datasets/liver.json"}

# The options of the model that ask for more of the scans than their volumes, and for what.
SUPERVISION = {"dice_factor": "seg", "landmark_factor": "points"}

MOST_CLIP = 1e18  # the square of a greater norm is infinite

SLOW_JIT = "XLA's convolutions are very slow on a CPU; leave --jit out"


def build_parser() -> argparse.ArgumentParser:
    """The flags of train.py."""
    flags = cli.parser(
        "Train a recursive cascaded network, by grey values alone or with labels and landmarks (docs/commands.md)."
    )
    add = flags.add_argument

    def add_inherited(*names: str, help: str, **options: Any) -> None:
        default = DEFAULTS[names[-1].lstrip("-")]
        add(*names, **options, help=f"{help} ({default!r}, or the checkpoint's)")

    add("-b", "--base_network", default=None, help="VTN or VoxelMorph ('VTN', or the checkpoint's)")
    add("-n", "--n_cascades", type=int, default=None, help="deformable cascades; 0: affine alone (1, or as -c)")
    add_inherited("-r", "--rep", type=int, help="times that each cascade is applied, with the same weights")
    add(
        "-c",
        "--checkpoint",
        default=None,
        help="continue from this run: FOLDER, FOLDER:STEP, FOLDER:best or its name in weights/",
    )
    add_inherited("-d", "--dataset", help="data config")
    add_inherited("--batch", type=int, help="image pairs per step, over all devices")
    add_inherited("--round", type=int, help="steps per epoch")
    add_inherited("--epochs", type=float, help="epochs")
    add("--debug", action="store_true", help="write nothing, validate after every step")
    add("--val_steps", type=int, default=100, help="steps between validations (100)")
    add("--val_pairs", type=int, default=20, help="pairs of scheme 2 that are validated (20)")
    add_inherited(
        "--best",
        metavar="METRIC",
        help="keep the checkpoint of the best validation, FOLDER:best, by dice, landmark_distance, ...; '' for none",
    )
    add_inherited("--patience", type=int, help="with --best: end after so many validations without a better; 0: never")
    add_inherited("--ema", type=float, help="decay of the average of the weights that is validated and saved; 0: none")
    add_inherited("--clip", type=float, metavar="NORM", help="scale a gradient of a greater norm down to it; 0: none")
    add_inherited("--data_args", help='data options, "key=value": paired')
    add_inherited("--lr", type=float, help="initial learning rate")
    add("--clear_steps", action="store_true", help="with -c: start at step 0 with a fresh optimizer")
    add(
        "--finetune",
        default=None,
        metavar="NAME",
        help="with -c: train on scheme finetune-train-NAME, in the run <run>_ftNAME; '' for the whole data set again "
        "(none, or the checkpoint's)",
    )
    add("--name", default=None, help="added to the name of the run")
    add("--logs", default="", help="folder in logs/ for TensorBoard")
    add_inherited("--seed", type=int, help="seed of weights, pairs and augmentation")
    add("--jit", action="store_true", help="compile each step with XLA, on GPUs")
    add("--rematerialize", action="store_true", help="compute activations again in the backward pass: less memory")
    add("--wait", type=int, default=600, metavar="SECONDS", help="how long to wait for the workers of TF_CONFIG (600)")
    cli.add_shared_flags(flags)
    cli.add_trust_flag(flags)
    flags.set_defaults(precision=None)  # that of the run
    return flags


def main(arguments: list[str] | None = None) -> None:
    """Assemble the run that the flags describe and fit it."""
    args = cli.parse(build_parser(), arguments)
    cli.load_plugin(args.plugin)
    source = inherit(args)
    total = check(args)

    from data_util.config import load_dataset_config

    data = load_dataset_config(args.dataset, args.trust)
    config = model_config(args, source, data.image_size)
    # As the run's args.json tells them, in which the original reads net_args as text.
    args.base_network, args.n_cascades, args.net_args = config.base_network, config.n_cascades, config.net_args
    strategy = devices.devices(args.gpu, args.batch, args.wait)
    if args.jit and not devices.computes_on_gpus():
        raise UserError(f"--jit: {SLOW_JIT}")
    watch = workers.Watch() if workers.cluster().workers > 1 else None
    view = trained_view(data, source)
    scheme, validation = open_schemes(args, data)
    scheme.check_members(*supervision(config))
    from network import training

    with training.no_lost_worker(strategy):
        trainer = build_trainer(args, config, source, strategy, scheme.label_values)
    if trainer.step >= total:
        raise UserError(f"{source} is at step {trainer.step} of {total} already; raise --epochs or use --clear_steps")
    if watch is not None:
        watch.spared = 1  # from now on, a first signal ends the run after a step
    continued = None if source is None or starts_anew(args, source) else source
    chosen = open_selection(args, continued, validation)
    run = fit(args, trainer, scheme, validation, chosen, total, lambda: make_run(args, config, source, view))
    if workers.is_chief():
        print(f"Finished: {trainer.step} steps" + ("" if run is None else f", checkpoint {run}/model-{trainer.step}"))
        if run is not None:
            best = "" if runs.load_best(run) is None else f":{runs.BEST}"
            print(f"Next: python eval.py -c {run}{best}" + ("" if args.gpu == cli.AUTO else f" -g {args.gpu}"))


def inherit(args: argparse.Namespace) -> pathlib.Path | None:
    """Fill the flags that were not given, from the run of -c or the defaults.

    Returns:
        The prefix of the checkpoint of -c, or None.
    """
    previous = runs.RunArgs()
    source = None
    if args.checkpoint is not None:
        source = runs.find_checkpoint(args.checkpoint, WEIGHTS)
        previous = runs.load_args(source.parent)
    if args.best == "" and args.patience is None:
        args.patience = 0  # the patience of before was for its --best
    for name, default in DEFAULTS.items():
        if getattr(args, name) is None:
            kept = getattr(previous, name)
            setattr(args, name, default if kept is None else kept)
    return source


def check(args: argparse.Namespace) -> int:
    """The number of the run's last step.

    Raises:
        UserError: a flag has a value outside its range.
    """
    for name in ("batch", "round", "val_steps", "val_pairs", "wait"):
        cli.positive(name, getattr(args, name))
    for name in ("epochs", "lr"):
        value = getattr(args, name)
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"--{name} is {value}; it must be greater than 0")
    if not 0 <= args.seed < 2**31:
        raise UserError(f"--seed is {args.seed}; it must be a whole number from 0 to {2**31 - 1}")
    if args.jit and args.gpu != cli.AUTO and not devices.gpu_ids(args.gpu):
        raise UserError(f"--jit with -g {args.gpu}: {SLOW_JIT}")
    if args.best:
        selection.chosen_value(args.best)
    if args.patience < 0 or (args.patience and not args.best):
        raise UserError(f"--patience is {args.patience}; it must be a whole number from 0, and goes with --best alone")
    if not 0 <= args.ema < 1:
        raise UserError(f"--ema is {args.ema}; it must be a number from 0 to below 1, such as 0.999")
    if not 0 <= args.clip <= MOST_CLIP:
        raise UserError(f"--clip is {args.clip}; it must be a number from 0 to {MOST_CLIP:g}, such as 1")
    for name in ("name", "finetune"):
        cli.part_of_name(f"--{name}", getattr(args, name))
    logs = pathlib.PurePath(args.logs)
    if logs.is_absolute() or ".." in logs.parts:
        raise UserError(f"--logs is {args.logs!r}; it must be a folder in {LOGS}/, without / before it and ..")
    if args.finetune and not args.checkpoint:
        raise UserError("--finetune starts from a trained model; name it with -c")
    total = round(args.epochs * args.round, 6)  # 1.1 * 100 is 110 and a rounding error
    if total > MOST:
        raise UserError(f"--epochs {args.epochs} of --round {args.round} steps are {total:.3g} steps; at most {MOST}")
    return max(math.ceil(total), 1)


def starts_anew(args: argparse.Namespace, source: pathlib.Path | None) -> bool:
    """Whether the run takes only the weights of the checkpoint: with --clear_steps, or where it begins a finetuning."""
    return args.clear_steps or (args.finetune or None) != finetuned_on(source)


def finetuned_on(source: pathlib.Path | None) -> str | None:
    """The NAME of --finetune that a checkpoint's run was trained with, or None."""
    if source is None:
        return None
    return runs.load_args(source.parent).finetune or None


def model_config(
    args: argparse.Namespace, source: pathlib.Path | None, image_size: tuple[int, int, int]
) -> CascadeConfig:
    """The network's config by the flags and the checkpoint `source`, if any."""
    from network.config import CascadeConfig

    options = {"rep": args.rep, "image_size": image_size, "rematerialize": args.rematerialize, **cli.execution(args)}
    if source is None:
        base_network = "VTN" if args.base_network is None else args.base_network
        n_cascades = 1 if args.n_cascades is None else args.n_cascades
        return CascadeConfig(base_network, n_cascades, **options).with_net_args(args.net_args)
    config = runs.load_cascade_config(source.parent)
    for flag, name in (("-b", "base_network"), ("-n", "n_cascades")):
        asked, there = getattr(args, name), getattr(config, name)
        if asked not in (None, there):
            raise UserError(f"{flag} {asked} is not what the checkpoint {source} is: {there}; leave {flag} out")
    return config.replace(**options).with_net_args(args.net_args)


def scheme_names(finetune: str | None, data: DatasetConfig) -> tuple[str, str | None]:
    """Names of the training and validation schemes; the latter is None where the config has none."""
    train, validation = "1", "2"
    if finetune:
        train = f"finetune-train-{finetune}"
        if f"finetune-val-{finetune}" in data.schemes:
            validation = f"finetune-val-{finetune}"
    if validation not in data.schemes:
        print(f"{data.path} has no scheme {validation!r}: this run is not validated", file=sys.stderr)
        return train, None
    return train, validation


def open_schemes(args: argparse.Namespace, data: DatasetConfig) -> tuple[Scheme, Scheme | None]:
    """The schemes to train on and to validate on, of which the latter may be None."""
    from data_util.dataset import open_scheme
    from data_util.store import ScanStore

    train, validation = scheme_names(args.finetune, data)
    paired, store = cli.is_paired(args.data_args), ScanStore(data.files)
    return (
        open_scheme(data, train, paired, store),
        None if validation is None else open_scheme(data, validation, paired, store),
    )


def supervision(config: CascadeConfig) -> tuple[list[str], list[str]]:
    """What a config asks for of the scans beside their volumes, and the option that asks for each."""
    asked = {option: member for option, member in SUPERVISION.items() if getattr(config, option)}
    if config.similarity_mask in ("scan", "both"):
        asked["similarity_mask"] = "mask"
    return list(asked.values()), list(asked)


def build_trainer(
    args: argparse.Namespace,
    config: CascadeConfig,
    source: pathlib.Path | None,
    strategy: tf.distribute.Strategy,
    labels: Sequence[int] | None,
) -> training.Trainer:
    """The network in its trainer, with the weights and, where it goes on, the state of the checkpoint `source`."""
    import keras

    from network import checkpoints, training
    from network.recursive_cascaded_networks import build_network

    keras.utils.set_random_seed(args.seed)
    step = 0
    with strategy.scope():
        network = build_network(config, drawn=source is None)
        optimizer = training.adam(network, args.ema, args.clip)
        if source is not None:
            fresh = starts_anew(args, source)
            checkpoints.restore(network, source, None if fresh else optimizer, any_size=fresh)
            step = 0 if fresh else int(source.name.removeprefix("model-"))
        trainer = training.Trainer(network, step, args.jit, labels)
        trainer.compile(optimizer=optimizer)
    return trainer


def fit(
    args: argparse.Namespace,
    trainer: training.Trainer,
    scheme: Scheme,
    validation: Scheme | None,
    chosen: selection.Selection | None,
    total: int,
    new_run: Callable[[], pathlib.Path],
) -> pathlib.Path | None:
    """Train up to step `total`; the run's folder, which `new_run` makes, or None where nothing is written."""
    from data_util.batches import user_errors
    from network import training

    strategy, first = trainer.distribute_strategy, trainer.step
    members, _ = supervision(trainer.network.config)
    with user_errors():
        shown = next(iter((validation or scheme).evaluation(1, [0])))
    run = new_run() if workers.is_chief() and not args.debug else None
    if workers.is_chief():
        needed = training.estimate_memory(trainer.network, args.batch // strategy.num_replicas_in_sync) / 2**30
        print(f"A step will need about {needed:.1f} GiB of memory on each device")
    how = "nothing was to be saved" if workers.is_chief() or args.debug else "the first worker has saved it"
    how = how if run is None else f"go on with -c {run}: {command_to_go_on(args, run)}"
    callbacks = make_callbacks(args, run, scheme, validation, chosen, shown, total, how)

    def batches(context: tf.distribute.InputContext) -> tf.data.Dataset:
        share = context.num_replicas_in_sync, context.input_pipeline_id, context.num_input_pipelines
        return scheme.training(args.batch, args.seed, first, total, *share, members=members)

    stopped = None
    try:
        with user_errors():
            trainer.fit(
                strategy.distribute_datasets_from_function(batches),
                callbacks=callbacks,
                steps_per_epoch=total - first,
                verbose=0,
                shuffle=False,
            )
    except Stopped as why:
        stopped = why
    finally:
        callbacks[0].close()
    if not trainer.leaves_together() and not workers.is_chief():  # who has saved, and needs nobody any more
        raise UserError(
            f"all workers end after step {trainer.step}, but the first was lost before it said that this is saved; "
            "see what it said, and go on with -c and the run's newest checkpoint"
        )
    callbacks[-1].end()
    if stopped is not None:
        raise stopped
    return run


def command_to_go_on(args: argparse.Namespace, run: pathlib.Path) -> str:
    """The command that continues a run: -c, and the flags that a continued run does not take from its checkpoint."""
    command = ["python", "train.py", "-c", str(run)]
    defaults = build_parser().parse_args([])
    for name in ("gpu", "val_steps", "val_pairs", "wait", "logs", "plugin"):
        if getattr(args, name) != getattr(defaults, name):
            command += ["-g" if name == "gpu" else f"--{name}", str(getattr(args, name))]
    command += [f"--{name}" for name in ("jit", "rematerialize") if getattr(args, name)]
    return shlex.join(command + ([] if args.fast_reconstruction else ["--no-fast_reconstruction"]))


def trained_view(data: DatasetConfig, source: pathlib.Path | None) -> View:
    """How the volumes that the run trains on show scans: as its data set says, or else the run that it continues."""
    if source is None:
        return data.view
    from views import run_view

    before = run_view(source.parent)
    for difference in data.view.differences(before):
        print(f"{data.path}: {difference} as in the run that is continued", file=sys.stderr)
    return data.view.completed(before)


def make_run(args: argparse.Namespace, config: CascadeConfig, source: pathlib.Path | None, view: View) -> pathlib.Path:
    """Make the run's folder in weights/ with args.json and config.json: <month><day>-<time>[_NAME] or <run>_ftNAME.

    Raises:
        UserError: its folder, or that of its TensorBoard curves, cannot be written.
    """
    if args.finetune and source is not None:
        suffix = f"_ft{args.finetune}"
        stem = source.parent.resolve().name
        if args.finetune == finetuned_on(source) and suffix in stem:  # a finetuning that goes on
            stem = stem[: stem.rindex(suffix)]
        stem += suffix
    else:
        stem = datetime.datetime.now().strftime("%b%d-%H%M")
    plugin = {} if args.plugin is None else {"plugin": pathlib.Path(args.plugin).name}
    content = {"args.json": vars(args), "config.json": {**config.to_dict(), "data": view.to_dict(), **plugin}}
    return runs.new_run(WEIGHTS, stem, f"_{args.name}" if args.name else "", content, LOGS / args.logs)


if __name__ == "__main__":
    remedy = "use a smaller --batch, more devices, --precision mixed_bfloat16 or --rematerialize"
    sys.exit(cli.run(main, if_out_of_memory=remedy))
