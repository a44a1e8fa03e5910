"""Evaluate a trained network: python eval.py -c weights/VTN-10-liver -g 0 -v lits"""

import pathlib
import sys

import cli
from errors import UserError

EVALUATE = pathlib.Path("evaluate")
DATA_ARGS = ("paired", "task")


def build_parser():
    """The flags of eval.py."""
    flags = cli.parser("Evaluate a trained network on the pairs of a data set.")
    add = flags.add_argument
    add("-c", "--checkpoint", required=True, help="run: FOLDER, FOLDER:STEP or its name in weights/")
    add("-r", "--rep", type=int, default=1, help="times each cascade is applied in a row, with shared weights")
    add("-d", "--dataset", default=None, help="data config (the one that the run was trained on)")
    add("-v", "--val_subset", default=None, help="schemes of the config, comma-separated (scheme 2)")
    add("--batch", type=int, default=4, help="image pairs at a time, over all devices")
    add("--paired", action="store_true", help="pairs of neighbouring scans only, both ways round")
    add("--data_args", default=None, help='data options, "key=value": paired, task (those of the run)')
    add("--name", default=None, help="added to the name of the report")
    add("--resume", action="store_true", help="go on with an evaluation that was stopped")
    add("--shard", default="1/1", help="evaluate part i of n, as i/n; join with python -m data_util.report merge")
    cli.add_shared_flags(flags)
    return flags


def main(arguments=None):
    """Evaluate every scheme asked for and write its report."""
    args = build_parser().parse_args(arguments)
    cli.positive("batch", args.batch)
    shard = parse_shard(args.shard)

    from data_util.config import load_config as load_data_config
    from network import checkpoints
    from network.config import parse_assignments

    folder, step = checkpoints.find_run(args.checkpoint)
    step = checkpoints.find_step(folder, step)
    trained = checkpoints.load_args(folder)
    data = load_data_config(args.dataset or trained.get("dataset") or "datasets/liver.json")
    data_args = trained.get("data_args", "") if args.data_args is None else args.data_args
    paired = args.paired or parse_assignments(data_args, DATA_ARGS, "--data_args").get("paired", False)
    strategy = cli.devices(args.gpu, args.batch)

    from data_util.dataset import open_scheme

    schemes = {name: open_scheme(data, name, paired=paired) for name in (args.val_subset or "2").split(",")}
    with strategy.scope():
        network = checkpoints.load_model(
            f"{folder}:{step}", args.rep, data.image_size, args.net_args, args.fast_reconstruction
        )
    run = f"{folder.resolve().name}-model-{step}"
    for name, scheme in schemes.items():
        parts = [run, f"rep{args.rep}" if args.rep > 1 else "", args.name, name if args.val_subset else ""]
        report = "-".join(part for part in parts if part)
        settings = {
            "report": report,
            "checkpoint": run,
            "dataset": str(data.path),
            "scheme": name,
            "paired": paired,
            "pairs": len(scheme),
            "batch": args.batch,
            "network": network.config.to_dict(),
            "labels": scheme.labels,
        }
        evaluate_scheme(network, scheme, settings, shard, args.resume, strategy)


def parse_shard(text):
    """(i, n) of a text 'i/n' with 1 <= i <= n.

    Raises:
        UserError: it is not such a text.
    """
    i, slash, n = text.partition("/")
    if not (slash and i.isdigit() and n.isdigit() and 1 <= int(i) <= int(n)):
        raise UserError(f"--shard {text!r} is not i/n with i from 1 to n; write 2/8 for the second of eight parts")
    return int(i), int(n)


def evaluate_scheme(network, scheme, settings, shard, resume, strategy):
    """Evaluate one scheme, or one shard of it, and write its report or records into evaluate/."""
    import tqdm

    from data_util.dataset import user_errors
    from data_util.report import Records, read_records, write_report
    from network.evaluation import evaluate

    batch, (part, parts) = settings["batch"], shard
    target = EVALUATE / settings["report"]
    records = Records(f"{target}{f'.shard-{part}-of-{parts}' if parts > 1 else ''}.records", settings, resume)
    # Whole batches, the same whatever the shards and wherever a run was stopped: a pair's numbers may depend, in the
    # last digit, on the pairs beside it.
    batches = [range(k, min(k + batch, len(scheme))) for k in range(0, len(scheme), batch)][part - 1 :: parts]
    indices = [i for group in batches if not records.done.issuperset(group) for i in group]
    labels = None if scheme.labels is None else tuple(scheme.labels.values())
    with user_errors(), tqdm.tqdm(total=len(indices), desc=settings["report"], unit="pair") as bar:
        for result in evaluate(network, scheme.evaluation(batch, indices), labels, strategy=strategy):
            if result.index not in records.done:
                records.add(as_record(result))
            bar.update()
    records.close()
    if parts > 1:
        print(f"Records: {records.path}; join the {parts} parts with python -m data_util.report merge")
        return
    write_report(target, *read_records(records.path))
    records.path.unlink()
    print(f"Report: {target}.txt")


def as_record(result):
    """A `PairResult` as a record of `data_util.report`: NaN becomes None."""

    def plain(value):
        return [plain(v) for v in value] if value.ndim else None if value != value else float(value)

    values = {name: plain(value) for name, value in result.values.items()}
    return {
        "index": result.index,
        "fixed": result.fixed_id,
        "moving": result.moving_id,
        "seconds": round(result.seconds, 4),
        "stages": [values],
    }


if __name__ == "__main__":
    sys.exit(cli.run(main))
