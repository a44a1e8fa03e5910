"""Train a recursive cascaded network: python train.py -b VTN -n 10 -d datasets/liver.json -g 0,1"""

import datetime
import itertools
import json
import math
import pathlib
import sys

import cli
import devices
from errors import UserError

WEIGHTS, LOGS = pathlib.Path("weights"), pathlib.Path("logs")
# Flags that, where not given, are those of the run that -c continues, or else these.
DEFAULTS = {
    "rep": 1,
    "dataset": "datasets/liver.json",
    "batch": 4,
    "round": 20000,
    "epochs": 5.0,
    "data_args": "",
    "lr": 1e-4,
    "precision": "float32",
    "seed": 0,
}


def build_parser():
    """The flags of train.py."""
    flags = cli.parser("Train a recursive cascaded network, without labels.")
    add = flags.add_argument

    def add_inherited(*names, help, **options):
        default = DEFAULTS[names[-1].lstrip("-")]
        add(*names, **options, help=f"{help} ({default!r}, or the checkpoint's)")

    add("-b", "--base_network", default=None, help="VTN or VoxelMorph ('VTN', or the checkpoint's)")
    add("-n", "--n_cascades", type=int, default=None, help="deformable cascades; 0: affine alone (1, or as -c)")
    add_inherited("-r", "--rep", type=int, help="times each cascade is applied in a row, with shared weights")
    add("-c", "--checkpoint", default=None, help="continue from this run: FOLDER, FOLDER:STEP or its name in weights/")
    add_inherited("-d", "--dataset", help="data config")
    add_inherited("--batch", type=int, help="image pairs a step, over all devices")
    add_inherited("--round", type=int, help="steps an epoch")
    add_inherited("--epochs", type=float, help="epochs")
    add("--debug", action="store_true", help="write nothing, validate after every step")
    add("--val_steps", type=int, default=100, help="steps between validations (100)")
    add("--val_pairs", type=int, default=20, help="pairs of scheme 2 that are validated (20)")
    add_inherited("--data_args", help='data options, "key=value": paired')
    add_inherited("--lr", type=float, help="initial learning rate")
    add("--clear_steps", action="store_true", help="with -c: start at step 0 with a fresh optimizer")
    add("--finetune", default=None, help="with -c: train on scheme finetune-train-NAME, in the run <run>_ftNAME")
    add("--name", default=None, help="added to the name of the run")
    add("--logs", default="", help="folder in logs/ for TensorBoard")
    add_inherited("--seed", type=int, help="seed of weights, pairs and augmentation")
    add("--jit", action="store_true", help="compile each step with XLA, on GPUs")
    add("--rematerialize", action="store_true", help="compute activations again in the backward pass: less memory")
    cli.add_shared_flags(flags)
    flags.set_defaults(precision=None)  # that of the run
    return flags


def main(arguments=None):
    """Assemble the run that the flags describe and fit it."""
    args = build_parser().parse_args(arguments)
    source = inherit(args)
    total = check(args)

    from data_util.config import load_dataset_config

    data = load_dataset_config(args.dataset)
    paired = cli.is_paired(args.data_args)
    config = model_config(args, source, data.image_size)
    args.base_network, args.n_cascades = config.base_network, config.n_cascades  # as the run's args.json tells them
    strategy = devices.devices(args.gpu, args.batch, machines=True)
    is_chief = devices.cluster()["index"] == 0  # it alone writes

    import keras

    from data_util.dataset import open_scheme, user_errors
    from data_util.hdf5 import ScanStore
    from network import callbacks, checkpoints, training
    from network.recursive_cascaded_networks import build_network

    schemes = scheme_names(args.finetune, data)
    store = ScanStore(data.files)
    scheme = open_scheme(data, schemes[0], paired, store)
    validation = open_scheme(data, schemes[1], paired, store) if schemes[1] else None

    keras.utils.set_random_seed(args.seed)
    step = 0
    with strategy.scope():
        network = build_network(config)
        optimizer = training.adam(network)
        if source:
            fresh = starts_anew(args, source)
            checkpoints.restore(network, source, None if fresh else optimizer)
            step = 0 if fresh else int(source.name.removeprefix("model-"))
        trainer = training.Trainer(network, step, args.jit)
        trainer.compile(optimizer=optimizer)
    if step >= total:
        raise UserError(f"{source} is at step {step} of {total} already; raise --epochs or use --clear_steps")
    with user_errors():
        shown = next(iter((validation or scheme).evaluation(1, [0])))

    run = make_run(args, config, source, trained_view(data, source)) if is_chief and not args.debug else None
    progress = callbacks.Progress("debug" if run is None else run.name, total, is_chief)
    if is_chief:
        needed = training.estimate_memory(network, args.batch // strategy.num_replicas_in_sync) / 2**30
        print(f"A step will need about {needed:.1f} GiB of memory on each device")
    steps = [
        callbacks.LearningRate(args.lr, args.round),
        progress,
        callbacks.StopAtNonFinite(lambda step: scheme.training_pair_ids(args.batch, args.seed, step)),
    ]
    writer = saver = None
    if run is not None:
        import tensorflow as tf

        from data_util.output.figures import training_pictures

        writer = tf.summary.create_file_writer(str(LOGS / args.logs / run.name))
        saver = callbacks.SaveCheckpoints(run, args.round, total)
        steps += [callbacks.Log(run, writer), saver, callbacks.Pictures(writer, shown, training_pictures)]
    if validation is not None and is_chief:
        sample = validation.sample(args.val_pairs, seed=0)
        every = 1 if args.debug else args.val_steps
        batches = lambda: validation.evaluation(args.batch, sample)  # noqa: E731
        steps.append(callbacks.Validate(every, batches, validation.label_values, run, writer))
    unsaved = "nothing was to be saved" if is_chief else "the first worker saves"
    steps.append(callbacks.StopAtSignal(saver, unsaved))  # last: what a step leads to is done before the run ends
    try:
        with user_errors():
            trainer.fit(
                strategy.distribute_datasets_from_function(
                    lambda context: scheme.training(
                        args.batch,
                        args.seed,
                        step,
                        total,
                        context.num_replicas_in_sync,
                        context.input_pipeline_id,
                        context.num_input_pipelines,
                    )
                ),
                callbacks=steps,
                steps_per_epoch=total - step,
                verbose=0,
                shuffle=False,
            )
    finally:
        progress.close()
    if devices.cluster()["workers"] > 1:
        strategy.reduce("SUM", 0.0, axis=None)  # nobody leaves before the chief has saved
    if not is_chief:
        return
    print(f"Finished: {total} steps" + ("" if run is None else f", checkpoint {run}/model-{total}"))


def inherit(args):
    """Fill the flags that were not given, from the run of -c or the defaults; its checkpoint's prefix, or None."""
    previous, source = {}, None
    if args.checkpoint is not None:
        from network import checkpoints

        source = checkpoints.find_checkpoint(args.checkpoint, WEIGHTS)
        previous = checkpoints.load_args(source.parent)
    for name, default in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, previous.get(name, default))
    return source


def check(args):
    """The number of the run's last step.

    Raises:
        UserError: a flag has a value outside its range.
    """
    for name in ("batch", "round", "val_steps", "val_pairs"):
        cli.positive(name, getattr(args, name))
    for name in ("epochs", "lr"):
        value = getattr(args, name)
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"--{name} is {value}; it must be greater than 0")
    if not 0 <= args.seed < 2**31:
        raise UserError(f"--seed is {args.seed}; it must be a whole number from 0 to {2**31 - 1}")
    if args.jit and not devices.gpu_ids(args.gpu):
        raise UserError(f"--jit with -g {args.gpu}: XLA's convolutions are very slow on a CPU; leave --jit out")
    for name in ("name", "finetune"):
        if "/" in (getattr(args, name) or ""):
            raise UserError(f"--{name} is {getattr(args, name)!r}; it becomes part of a folder's name: leave out the /")
    if args.finetune and not args.checkpoint:
        raise UserError("--finetune starts from a trained model; name it with -c")
    return max(math.ceil(round(args.epochs * args.round, 6)), 1)  # 1.1 * 100 is 110 and a rounding error


def starts_anew(args, source):
    """Whether the run takes only weights from the checkpoint: not where it continues a run, finetuning included."""
    finetunes = args.finetune and not source.parent.resolve().name.endswith(f"_ft{args.finetune}")
    return bool(args.clear_steps or finetunes)


def model_config(args, source, image_size):
    """The network's config by the flags and the checkpoint `source`, if any."""
    from network.config import CascadeConfig

    options = {"rep": args.rep, "image_size": image_size, "rematerialize": args.rematerialize, **cli.execution(args)}
    if source is None:
        base_network = "VTN" if args.base_network is None else args.base_network
        n_cascades = 1 if args.n_cascades is None else args.n_cascades
        return CascadeConfig(base_network, n_cascades, **options).with_net_args(args.net_args)
    from network import checkpoints

    config = checkpoints.load_cascade_config(source.parent)
    for flag, name in (("-b", "base_network"), ("-n", "n_cascades")):
        asked, there = getattr(args, name), getattr(config, name)
        if asked not in (None, there):
            raise UserError(f"{flag} {asked} is not what the checkpoint {source} is: {there}; leave {flag} out")
    return config.replace(**options).with_net_args(args.net_args)


def scheme_names(finetune, data):
    """Names of the training and validation schemes; the latter is None where the config has none."""
    train, validation = "1", "2"
    if finetune:
        train = f"finetune-train-{finetune}"
        if f"finetune-val-{finetune}" in data.schemes:
            validation = f"finetune-val-{finetune}"
    if validation not in data.schemes:
        print(f"{data.path} has no scheme {validation!r}: this run is not validated", file=sys.stderr)
        validation = None
    return train, validation


def trained_view(data, source):
    """How the volumes that the run trains on show scans: as its data set says, or else the run that it continues."""
    if source is None:
        return data.view
    from register import run_view

    before = run_view(source.parent)
    for difference in data.view.differences(before):
        print(f"{data.path}: {difference} as in the run that is continued", file=sys.stderr)
    return data.view.completed(before)


def make_run(args, config, source, view):
    """Make the run's folder in weights/ with args.json and config.json: <month><day>-<time>[_NAME] or <run>_ftNAME.

    Raises:
        UserError: its folder, or that of its TensorBoard curves, cannot be written.
    """
    if args.finetune:
        suffix = f"_ft{args.finetune}"
        stem = source.parent.resolve().name.removesuffix(suffix) + suffix
    else:
        stem = datetime.datetime.now().strftime("%b%d-%H%M")
    try:
        run = new_folder(stem, f"_{args.name}" if args.name else "")
        try:
            (LOGS / args.logs).mkdir(parents=True, exist_ok=True)
        except OSError:
            run.rmdir()
            raise
        (run / "args.json").write_text(json.dumps(vars(args), indent=2))
        (run / "config.json").write_text(json.dumps({**config.to_dict(), "data": view.to_dict()}, indent=2))
    except OSError as error:
        raise UserError(
            f"cannot write to {error.filename} ({error.strerror}); make the folder writable, or run where it is"
        ) from error
    return run


def new_folder(stem, suffix):
    """A folder in weights/ that was not there: the stem and suffix, with _1, _2, ... between where taken."""
    WEIGHTS.mkdir(exist_ok=True)
    for attempt in itertools.count():
        run = WEIGHTS / (stem + (f"_{attempt}" if attempt else "") + suffix)
        try:
            run.mkdir()
            return run
        except FileExistsError:
            continue


if __name__ == "__main__":
    remedy = "use a smaller --batch, more devices, --precision mixed_bfloat16 or --rematerialize"
    sys.exit(cli.run(main, if_out_of_memory=remedy))
