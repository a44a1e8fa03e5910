"""Train a recursive cascaded network: python train.py -b VTN -n 10 -d datasets/liver.json -g 0,1"""

import datetime
import itertools
import json
import math
import pathlib
import sys

import cli
from errors import UserError, run

WEIGHTS, LOGS = pathlib.Path("weights"), pathlib.Path("logs")
DATA_ARGS = ("paired", "task")


def build_parser():
    """The flags of train.py."""
    flags = cli.parser("Train a recursive cascaded network, without labels.")
    add = flags.add_argument
    add("-b", "--base_network", default=None, help="VTN or VoxelMorph (VTN, or the checkpoint's)")
    add("-n", "--n_cascades", type=int, default=None, help="deformable cascades, 0 for affine alone (1, or as -c)")
    add("-r", "--rep", type=int, default=1, help="times each cascade is applied in a row, with shared weights")
    add("-c", "--checkpoint", default=None, help="continue from this run: FOLDER, FOLDER:STEP or its name in weights/")
    add("-d", "--dataset", default="datasets/liver.json", help="data config")
    add("--batch", type=int, default=4, help="image pairs a step, over all devices")
    add("--round", type=int, default=20000, help="steps an epoch")
    add("--epochs", type=float, default=5, help="epochs")
    add("--debug", action="store_true", help="write nothing, validate after every step")
    add("--val_steps", type=int, default=100, help="steps between validations")
    add("--val_pairs", type=int, default=20, help="pairs of scheme 2 that are validated")
    add("--data_args", default="", help='data options, "key=value": paired, task')
    add("--lr", type=float, default=1e-4, help="initial learning rate")
    add("--clear_steps", action="store_true", help="with -c: start at step 0 with a fresh optimizer")
    add("--finetune", default=None, help="with -c: train on scheme finetune-train-NAME, in the run <run>_ftNAME")
    add("--name", default=None, help="added to the name of the run")
    add("--logs", default="", help="folder in logs/ for TensorBoard")
    add("--seed", type=int, default=0, help="seed of weights, pairs and augmentation")
    cli.add_shared_flags(flags)
    return flags


def main(arguments=None):
    """Assemble the run that the flags describe and fit it."""
    args = build_parser().parse_args(arguments)
    for name in ("batch", "round", "val_steps", "val_pairs"):
        cli.positive(name, getattr(args, name))
    total = math.ceil(args.epochs * args.round)
    if total < 1 or not args.lr > 0:
        raise UserError(f"--epochs {args.epochs} and --lr {args.lr} must be greater than 0")
    if args.finetune and not args.checkpoint:
        raise UserError("--finetune starts from a trained model; name it with -c")

    from data_util.config import load_config as load_data_config
    from network.config import parse_assignments

    data = load_data_config(args.dataset)
    data_args = parse_assignments(args.data_args, DATA_ARGS, "--data_args")
    config, source = model_config(args, data.image_size)
    strategy = cli.devices(args.gpu, args.batch)

    import keras

    from data_util.dataset import open_scheme, user_errors
    from network import callbacks, checkpoints, training
    from network.recursive_cascaded_networks import build_network

    paired = data_args.get("paired", False)
    schemes = scheme_names(args.finetune, data)
    scheme = open_scheme(data, schemes[0], paired=paired)
    validation = open_scheme(data, schemes[1], paired=paired) if schemes[1] else None

    keras.utils.set_random_seed(args.seed)
    with strategy.scope():
        network = build_network(config)
        optimizer = training.adam(network)
        step = 0
        if source:
            fresh = args.clear_steps or args.finetune
            checkpoints.restore(network, source, None if fresh else optimizer)
            step = 0 if fresh else int(source.name.removeprefix("model-"))
        trainer = training.Trainer(network, step)
        trainer.compile(optimizer=optimizer)
    if step >= total:
        raise UserError(f"{source} is at step {step} of {total} already; raise --epochs or use --clear_steps")

    run = None if args.debug else make_run(args, config)
    name = "debug" if run is None else run.name
    progress = callbacks.Progress(name, total)
    steps = [
        callbacks.LearningRate(args.lr, args.round),
        progress,
        callbacks.StopAtNonFinite(lambda step: scheme.training_pair_ids(args.batch, args.seed, step)),
    ]
    writer = saver = None
    if run is not None:
        import tensorflow as tf

        from data_util.figures import training_pictures

        writer = tf.summary.create_file_writer(str(LOGS / args.logs / name))
        shown = next(iter((validation or scheme).evaluation(1, [0])))
        saver = callbacks.SaveCheckpoints(run, args.round, total)
        steps += [callbacks.Log(run, writer), saver, callbacks.Pictures(writer, shown, training_pictures)]
    if validation is not None:
        sample = validation.sample(args.val_pairs, seed=0)
        every = 1 if args.debug else args.val_steps
        batches = lambda: validation.evaluation(args.batch, sample)  # noqa: E731
        steps.append(callbacks.Validate(every, batches, validation.labels, run, writer))
    batches = scheme.training(args.batch, args.seed, step, total)
    try:
        with user_errors():
            trainer.fit(batches, callbacks=steps, verbose=0, shuffle=False)
    except KeyboardInterrupt:
        if saver is not None:
            saver.save()
            raise UserError(f"stopped at step {trainer.step} of {total}, which is saved: go on with -c {run}") from None
        raise
    finally:
        progress.close()
    print(f"Finished: {total} steps" + ("" if run is None else f", checkpoint {run}/model-{total}"))


def model_config(args, image_size):
    """The network's config by the flags and the checkpoint that -c names, and that checkpoint's prefix (or None)."""
    from network.config import CascadeConfig

    options = {"rep": args.rep, "image_size": image_size, "fast_reconstruction": args.fast_reconstruction}
    if args.checkpoint is None:
        base_network = "VTN" if args.base_network is None else args.base_network
        n_cascades = 1 if args.n_cascades is None else args.n_cascades
        return CascadeConfig(base_network, n_cascades, **options).with_net_args(args.net_args), None
    from network import checkpoints

    prefix = checkpoints.find_checkpoint(args.checkpoint, WEIGHTS)
    config = checkpoints.load_config(prefix.parent)
    for flag, name in (("-b", "base_network"), ("-n", "n_cascades")):
        asked, there = getattr(args, name), getattr(config, name)
        if asked not in (None, there):
            raise UserError(f"{flag} {asked} is not what the checkpoint {prefix} is: {there}; leave {flag} out")
    return config.replace(**options).with_net_args(args.net_args), prefix


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


def make_run(args, config):
    """Make the run's folder in weights/ with args.json and config.json: <month><day>-<time>[_NAME] or <run>_ftNAME.

    Raises:
        UserError: the folder cannot be written.
    """
    if args.finetune:
        from network.checkpoints import find_run

        stem = find_run(args.checkpoint, WEIGHTS)[0].resolve().name.removesuffix(f"_ft{args.finetune}")
        stem += f"_ft{args.finetune}"
    else:
        stem = datetime.datetime.now().strftime("%b%d-%H%M")
    try:
        run = new_folder(stem, f"_{args.name}" if args.name else "")
        (run / "args.json").write_text(json.dumps(vars(args), indent=2))
        (run / "config.json").write_text(json.dumps(config.to_dict(), indent=2))
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
    sys.exit(run(main))
