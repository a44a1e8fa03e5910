"""Checkpoints: load and save every variable of a network and its optimizer, published and own.

Both kinds use the original's variable names (`RecursiveCascadedNetwork.named_weights`) with the Adam slots
`<name>/Adam` and `<name>/Adam_1`, so that one reader serves both, and the original can read ours. What a run's folder
holds beside them is in `runs.py`, whose functions are offered here too.
"""

import hashlib
import math
import pathlib
import shlex
import sys
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import files
from errors import UserError

from .affine import resampled_kernel
from .averaging import averages
from .checkpoint_reader import CheckpointReader, damaged
from .config import CascadeConfig
from .recursive_cascaded_networks import RecursiveCascadedNetwork, build_network
from .runs import (
    ARGS_FILE,
    BEST_PREFIX,
    CONFIG_FILE,
    checkpoint_prefix,
    find_checkpoint,
    find_run,
    find_step,
    list_steps,
    load_args,
    load_best,
    load_cascade_config,
    load_data,
    remove_leftovers,
)

__all__ = [
    "ARGS_FILE",
    "CONFIG_FILE",
    "checkpoint_prefix",
    "find_checkpoint",
    "find_run",
    "find_step",
    "fingerprint",
    "list_steps",
    "load_args",
    "load_cascade_config",
    "load_data",
    "load_model",
    "open_model",
    "restore",
    "save",
    "save_weights",
]

# Where Keras's Adam keeps the moments of its weights, in their order, and the published name of each.
_SLOTS = {"_momentums": "Adam", "_velocities": "Adam_1"}
# The state of Keras's `LossScaleOptimizer`.
_LOSS_SCALE = ("dynamic_scale", "step_counter")
# What a weight was after the last step, where what is saved under its name is the average over the steps.
_LAST = "last"
_BETAS = {"beta1_power": 0.9, "beta2_power": 0.999}
# Adam's step count where a published file's power of beta2 has become 0: its bias corrections have long become 1.
_MANY_STEPS = 1_000_000
_KEEP_NEWEST = 5
_KEEP_EVERY_SECONDS = 5 * 3600


def load_model(
    path: str | pathlib.Path,
    rep: int = 1,
    image_size: tuple[int, int, int] | None = None,
    net_args: str | None = "",
    meanwhile: Callable[[RecursiveCascadedNetwork], None] | None = None,
    **execution: Any,
) -> RecursiveCascadedNetwork:
    """A trained network from a run folder.

    Args:
        path: 'FOLDER', 'FOLDER:STEP' or the name of a run in weights/; published or own.
        rep: how often each deformable cascade is applied in a row.
        image_size: (X, Y, Z) to work at; None is the size that the run was trained at.
        net_args: options that override the run's, as on the command line.
        meanwhile: as in `open_model`.
        execution: how to compute, as in `CascadeConfig.executed`.

    Returns:
        `RecursiveCascadedNetwork` with its weights; `.config` tells what it is.

    Raises:
        UserError: no such run or checkpoint, or weights that do not fit the architecture or size.
    """
    prefix = find_checkpoint(path)
    config = load_cascade_config(prefix.parent).with_net_args(net_args)
    config = config.executed(**execution).replace(rep=rep, image_size=image_size or config.image_size)
    return open_model(prefix, config, meanwhile)


def open_model(
    prefix: pathlib.Path,
    config: CascadeConfig,
    meanwhile: Callable[[RecursiveCascadedNetwork], None] | None = None,
) -> RecursiveCascadedNetwork:
    """The network of a `CascadeConfig`, with the weights of a checkpoint.

    Args:
        prefix: FOLDER/model-<step>, as `find_checkpoint` gives it.
        config: its options, as `load_cascade_config` gives them, with any changes.
        meanwhile: called with the network while its weights are read: they have no values yet. To trace it, say.

    Returns:
        `RecursiveCascadedNetwork`.

    Raises:
        UserError: the file is damaged, or does not fit the architecture or size.
    """
    with CheckpointReader(prefix) as reader:
        reader.begin(_weight_names(reader))
        network = build_network(config, drawn=False)
        restore(network, reader, meanwhile=meanwhile)
    network.checkpoint = prefix
    return network


def fingerprint(prefix: str | pathlib.Path) -> str:
    """Text that tells a checkpoint's content: the same for a copy, another for other weights.

    It is a hash of the index, in which TensorFlow keeps a checksum of every variable (and checks it when the variable
    is read), and of the size of the data: quick for any size.

    Raises:
        UserError: the checkpoint cannot be read.
    """
    prefix = pathlib.Path(prefix)
    content = hashlib.sha256()
    try:
        content.update(pathlib.Path(f"{prefix}.index").read_bytes())
        for file in sorted(prefix.parent.glob(f"{prefix.name}.data-*")):
            content.update(f"{file.name.removeprefix(prefix.name)} {file.stat().st_size}".encode())
    except OSError as error:
        raise UserError(damaged(prefix, error)) from error
    return content.hexdigest()[:16]


def restore(
    network: RecursiveCascadedNetwork,
    checkpoint: str | pathlib.Path | CheckpointReader,
    optimizer: keras.optimizers.Optimizer | None = None,
    any_size: bool = False,
    meanwhile: Callable[[RecursiveCascadedNetwork], None] | None = None,
) -> None:
    """Fill the network's weights, and the optimizer's state if one is given, from a checkpoint: its prefix or reader.

    Strict: every weight must be there in its shape, and every variable in the file must be a weight or known
    bookkeeping. With an optimizer that keeps averages, these become what is saved as the weights, and the weights what
    they were after the last step.

    With `any_size`, the checkpoint may be one of another image size. All weights but the last kernels of the affine
    cascade fit any size, and these are resampled. Flows and shifts then are of as many voxels as before, which are of
    another size in mm: near enough to train on from there.

    `meanwhile` is called once the checkpoint is known to fit: as in `open_model`.

    Raises:
        UserError: the file is damaged, or does not fit the network.
    """
    reader = checkpoint if isinstance(checkpoint, CheckpointReader) else CheckpointReader(checkpoint)
    prefix, shapes, weights = reader.prefix, reader.shapes, network.named_weights()
    wanted = {name: tuple(weight.shape) for name, weight in weights.items()}
    _check_fit(prefix, network.config, wanted, shapes, any_size)
    if any(tuple(shapes[name]) != shape for name, shape in wanted.items()):
        print(
            f"checkpoint {prefix} is of another image size: the last kernels of its affine cascade are resampled",
            file=sys.stderr,
        )
    if optimizer is not None and "beta1_power" not in shapes:
        raise UserError(f"checkpoint {prefix} holds no optimizer state to continue with; use --clear_steps")
    if meanwhile is not None:
        meanwhile(network)
    for name, value in reader.read_all(weights):
        fits = tuple(value.shape) == wanted[name]
        weights[name].assign(value if fits else resampled_kernel(value.numpy(), wanted[name][:3]))
    if optimizer is not None:
        for name, (weight, average) in _averages(network, optimizer).items():
            average.assign(weight.value)
            if f"{name}/{_LAST}" in shapes:  # not in a checkpoint of a run without averages
                weight.assign(reader.read(f"{name}/{_LAST}"))
        slots = _slot_variables(network, optimizer)
        for name, value in reader.read_all(slots):
            slots[name].assign(value)
        for name, variable in _scale_variables(optimizer).items():
            if name in shapes:  # not in a checkpoint of another precision
                variable.assign(reader.read(name))
        optimizer.iterations.assign(_adam_steps(float(reader.read("beta2_power"))))


def _weight_names(reader: CheckpointReader) -> list[str]:
    """Names of the weights that a checkpoint has, without the state of its training."""
    known = (*(f"/{slot}" for slot in (*_SLOTS.values(), _LAST)), *_BETAS, *_LOSS_SCALE, "is_training")
    return [name for name in sorted(reader.shapes) if not (name.startswith(BEST_PREFIX) or name.endswith(known))]


def read_validations(prefix: str | pathlib.Path, metric: str) -> np.ndarray | None:
    """What a checkpoint keeps of the validations before it (`Selection.state`); None where none was chosen by `metric`.

    Raises:
        UserError: the file is damaged.
    """
    reader, name = CheckpointReader(prefix), f"{BEST_PREFIX}{metric}"
    return reader.read(name) if reader.shapes.get(name) == [3] else None


def save(
    folder: str | pathlib.Path,
    network: RecursiveCascadedNetwork,
    optimizer: keras.optimizers.Optimizer,
    step: int,
    validations: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write a checkpoint of every variable of the network and of the optimizer's state: FOLDER/model-<step>.

    Where the optimizer keeps averages of the weights, these are what is saved under the weights' names, and the
    weights themselves beside them. `validations` are numbers to keep besides (`Selection.state`).

    The files appear under their names only when they are complete and on the disk, the index last, so that a kill or a
    power failure at any moment leaves the older checkpoints and no broken one. Of those written before, the newest five
    stay, one every five hours, and the best that `best.json` names.

    Raises:
        UserError: it cannot be written.
    """
    folder = pathlib.Path(folder)
    remove_leftovers(folder)
    variables = network.named_weights() | _slot_variables(network, optimizer) | _scale_variables(optimizer)
    tensors = {name: variable.value for name, variable in variables.items()}
    for name, (weight, average) in _averages(network, optimizer).items():
        tensors |= {name: average.value, f"{name}/{_LAST}": weight.value}
    tensors.update({name: tf.constant(value) for name, value in (validations or {}).items()})
    done = int(keras.ops.convert_to_numpy(optimizer.iterations))
    tensors.update({name: tf.constant(beta ** (done + 1), tf.float32) for name, beta in _BETAS.items()})
    tensors["is_training"] = tf.constant(False)
    prefix = checkpoint_prefix(folder, step)
    names = sorted(tensors)
    with files.writing(prefix, tf.errors.OpError), files.partial_folder(folder) as partial:
        tf.raw_ops.SaveV2(
            prefix=str(partial / prefix.name),
            tensor_names=names,
            shape_and_slices=[""] * len(names),
            tensors=[tensors[name] for name in names],
        )
        files.sync(partial)  # both: after a kill between the two names, the index is published later
        for file in sorted(partial.iterdir()):  # .data-... before .index
            files.publish(file, folder / file.name)
        _prune(folder)


def save_weights(source: str | pathlib.Path, folder: str | pathlib.Path) -> None:
    """Write the weights of a checkpoint alone into a folder, as float16, under the checkpoint's name.

    `restore` reads them as any others. The folder is one that nobody else sees yet.

    Raises:
        UserError: the checkpoint cannot be read, or a weight is too large for float16, or the files not be written.
    """
    source = pathlib.Path(source)
    reader = CheckpointReader(source)
    tensors = {}
    for name, value in reader.read_all(_weight_names(reader)):
        weight = value.numpy().astype(np.float32)
        if np.abs(weight).max(initial=0) > np.finfo(np.float16).max:
            raise UserError(f"checkpoint {source}: {name} is too large for float16; keep the run as it is")
        tensors[name] = tf.constant(weight.astype(np.float16))
    with files.writing(folder, tf.errors.OpError):
        tf.raw_ops.SaveV2(
            prefix=str(pathlib.Path(folder) / source.name),
            tensor_names=list(tensors),
            shape_and_slices=[""] * len(tensors),
            tensors=list(tensors.values()),
        )


def _prune(folder: pathlib.Path) -> None:
    """Remove older checkpoints by way of a partial folder: after a kill in between, the index finds its data again."""
    kept_at, best = -math.inf, load_best(folder)
    for step in list_steps(folder)[:-_KEEP_NEWEST]:
        if best is not None and step == best.step:
            continue
        prefix = checkpoint_prefix(folder, step)
        written_at = pathlib.Path(f"{prefix}.index").stat().st_mtime
        if written_at - kept_at >= _KEEP_EVERY_SECONDS:
            kept_at = written_at
            continue
        with files.partial_folder(folder) as removed:
            for file in sorted(folder.glob(f"{prefix.name}.*"), reverse=True):  # the index first
                file.rename(removed / file.name)


def _slot_variables(
    network: RecursiveCascadedNetwork, optimizer: keras.optimizers.Optimizer
) -> dict[str, keras.Variable]:
    """Adam's moments by published name: '<name>/Adam' and '<name>/Adam_1' of every weight that is trained."""
    adam = getattr(optimizer, "inner_optimizer", optimizer)
    names = {id(weight): name for name, weight in network.named_weights().items()}
    trained = network.trainable_variables
    slots: dict[str, keras.Variable] = {}
    for attribute, slot in _SLOTS.items():
        moments = getattr(adam, attribute, None)
        if moments is None or [m.shape for m in moments] != [weight.shape for weight in trained]:
            raise RuntimeError(f"Keras {keras.__version__} keeps Adam's moments elsewhere than in Adam.{attribute}")
        slots |= {f"{names[id(weight)]}/{slot}": m for weight, m in zip(trained, moments, strict=True)}
    return slots


def _averages(
    network: RecursiveCascadedNetwork, optimizer: keras.optimizers.Optimizer
) -> dict[str, tuple[keras.Variable, keras.Variable]]:
    """Weight and average by published name; {} for an optimizer that keeps no averages."""
    names = {id(weight): name for name, weight in network.named_weights().items()}
    return {names[id(weight)]: (weight, average) for weight, average in averages(network, optimizer)}


def _scale_variables(optimizer: keras.optimizers.Optimizer) -> dict[str, keras.Variable]:
    """Variables of a dynamic loss scale by name in a checkpoint, {} for an optimizer without one."""
    return {name: getattr(optimizer, name) for name in _LOSS_SCALE if hasattr(optimizer, name)}


def _adam_steps(beta2_power: float) -> int:
    """Adam's step count from the power of beta2 that a checkpoint keeps, beta2^(steps + 1)."""
    if beta2_power <= 1e-30:
        return _MANY_STEPS
    return max(round(math.log(beta2_power) / math.log(_BETAS["beta2_power"])) - 1, 0)


def _check_fit(
    prefix: str | pathlib.Path,
    config: CascadeConfig,
    wanted: dict[str, tuple[int, ...]],
    found: dict[str, list[int]],
    any_size: bool,
) -> None:
    """Raise a UserError unless the file's variables are just the wanted weights and known bookkeeping."""
    options = ", ".join(f"{name} {value}" for name, value in config.base_network_options.items())
    names = " or ".join(reversed(config.base_network_options)) or "the image size"
    what = f"{config.base_network} with {config.n_cascades} cascades ({options})"
    heads = [name for name in wanted if "/conv7_" in name]
    for name in sorted(wanted, key=lambda n: n in heads):  # a wrong size is told apart from a wrong architecture
        if name not in found:
            raise UserError(f"checkpoint {prefix} is not one of {what}: it lacks the variable {name}; check -b and -n")
        if tuple(found[name]) != wanted[name]:
            other_size = name in heads and tuple(found[name][3:]) == wanted[name][3:]
            if other_size and any_size:
                continue
            if other_size:
                raise UserError(_other_size(prefix, config, found[name]))
            raise UserError(
                f"checkpoint {prefix} is not one of {what}: {name} has shape {tuple(found[name])}, "
                f"not {wanted[name]}; check -b, -n and {names} in --net_args"
            )
    slots = {f"{name}/{slot}" for name in wanted for slot in (*_SLOTS.values(), _LAST)}
    unused = sorted(set(found) - set(wanted) - slots - {*_BETAS, *_LOSS_SCALE, "is_training"})
    unused = [name for name in unused if not name.startswith(BEST_PREFIX)]
    foreign = [name for name in unused if name.startswith("gaffdfrm/")]
    if foreign:
        raise UserError(
            f"checkpoint {prefix} is not one of {what}: its variable {foreign[0]} has no place there "
            f"({len(foreign)} such in all); check -b and -n"
        )
    if unused:
        print(f"checkpoint {prefix}: unused variables {', '.join(unused)}", file=sys.stderr)


def _other_size(prefix: str | pathlib.Path, config: CascadeConfig, shape: list[int]) -> str:
    size = " x ".join(str(n) for n in config.image_size)
    grid = " x ".join(str(n) for n in shape[:3])
    limits = " x ".join(f"{64 * (n - 1) + 1}..{64 * n}" for n in shape[:3])
    return (
        f"checkpoint {prefix} was trained at another image size than {size}: the last kernels of its affine cascade "
        f"cover {grid} voxels, which are sizes of {limits}; resample the data to the size it was trained at, or train "
        f"on from its weights at this one: train.py -c {shlex.quote(str(prefix))} --clear_steps -d DATASET.json"
    )
