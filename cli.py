"""What the scripts share: flags and devices."""

import argparse

from errors import UserError


def parser(description):
    """Argument parser; each flag says its default itself."""
    return argparse.ArgumentParser(description=description)


def add_shared_flags(flags):
    """The flags that mean the same in every script."""
    flags.add_argument("-g", "--gpu", default="0", help="GPU ids, such as 0 or 0,1; -1 for the CPU (0)")
    flags.add_argument(
        "--fast_reconstruction",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="warp by compiled kernels that save memory; otherwise by the plain formulation (on)",
    )
    flags.add_argument("--net_args", default=None, help='network options, "key=value, key=value"')


def positive(name, value):
    """Value of a flag that must be a whole number from 1.

    Raises:
        UserError: it is less.
    """
    if value < 1:
        raise UserError(f"--{name} is {value}; it must be a whole number from 1")
    return value


def is_paired(data_args):
    """Whether a `--data_args` string asks for pairs of neighbouring scans.

    Raises:
        UserError: malformed text, an unknown key, or a value that is not True or False.
    """
    from network.config import parse_assignments

    paired = parse_assignments(data_args, ("paired",), "--data_args").get("paired", False)
    if not isinstance(paired, bool):
        raise UserError(f"--data_args: paired is {paired!r}; it must be True or False")
    return paired


def devices(gpu, batch):
    """`tf.distribute` strategy for the value of -g.

    Args:
        gpu: "-1" (CPU), or GPU ids such as "0,1".
        batch: pairs in a (global) batch.

    Raises:
        UserError: a GPU is not there, or the batch does not divide evenly over the devices.
    """
    ids = [part.strip() for part in gpu.split(",")]
    if ids != ["-1"] and not (all(part.isdigit() for part in ids) and len(set(ids)) == len(ids)):
        raise UserError(f"-g {gpu!r} is not a list of GPU ids; write -g 0, -g 0,1 or -g -1 for the CPU")
    if batch % len(ids):
        nearest = [n for n in (batch // len(ids) * len(ids), (batch // len(ids) + 1) * len(ids)) if n]
        hint = " or ".join(str(n) for n in nearest)
        raise UserError(f"--batch {batch} does not divide by {len(ids)} GPUs; use --batch {hint}")
    import tensorflow as tf

    if ids == ["-1"]:
        tf.config.set_visible_devices([], "GPU")
        return tf.distribute.get_strategy()
    found = tf.config.list_physical_devices("GPU")
    for part in ids:
        if int(part) >= len(found):
            there = f"GPUs 0..{len(found) - 1}" if found else "no GPU that TensorFlow can use"
            raise UserError(f"-g {gpu}: GPU {part} is not there, this machine has {there}; use -g -1 for the CPU")
    chosen = [found[int(part)] for part in ids]
    tf.config.set_visible_devices(chosen, "GPU")
    for device in chosen:
        tf.config.experimental.set_memory_growth(device, True)
    return tf.distribute.get_strategy() if len(ids) == 1 else tf.distribute.MirroredStrategy()
