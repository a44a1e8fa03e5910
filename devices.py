"""The devices that a command computes on: -g and the workers of TF_CONFIG, as a `tf.distribute` strategy."""

from __future__ import annotations

import contextlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

import start
import workers
from cli import AUTO
from errors import UserError

if TYPE_CHECKING:
    import tensorflow as tf


def devices(gpu: str, batch: int, wait: float | None = None, most: int | None = None) -> tf.distribute.Strategy:
    """The strategy for the devices of -g and, where the command can use several machines, the cluster of TF_CONFIG.

    Args:
        gpu: "auto"; GPU ids such as "0,1"; "-1" (CPU); or "cpu:N", the CPU as N devices. "auto" is the largest number
            of GPUs by which the batch divides, or the CPU where there is none, and is said.
        batch: pairs in a batch, over all devices.
        wait: seconds to wait for the other workers; None for a command that cannot use several machines.
        most: how many GPUs "auto" may be at most; None for all.

    Returns:
        The `tf.distribute.Strategy`.

    Raises:
        UserError: a GPU is not there, the batch does not divide evenly over the devices, or the cluster cannot be used
            or is not complete in time.
    """
    ids, n = gpu_ids(gpu), device_count(gpu)
    cluster = workers.cluster()
    if cluster.workers > 1 and wait is None:
        raise UserError("TF_CONFIG names several workers, but only train.py works on several machines; unset it")
    _check_divides(batch, n, cluster.workers)
    if cluster.workers > 1 and not ids and n > 1:
        raise UserError(f"-g {gpu}: with TF_CONFIG each worker has one CPU; use -g -1")
    tf = start.tensorflow()
    if gpu == AUTO:
        ids = _automatic(tf, batch // cluster.workers, most)
        n = max(len(ids), 1)
    if wait is not None and cluster.workers > 1:
        workers.meet(cluster, wait)
    with start.quietly(), workers.connecting() if cluster.workers > 1 else contextlib.nullcontext():
        strategy = _strategy(tf, gpu, ids, n, cluster.workers)
    start.compiler()
    return strategy


def computes_on_gpus() -> bool:
    """Whether `devices` has chosen GPUs."""
    return bool(start.tensorflow().config.get_visible_devices("GPU"))


def _check_divides(batch: int, n: int, processes: int) -> None:
    """Raise a UserError unless a batch divides evenly over all devices of all workers."""
    total = n * processes
    if batch % total:
        nearest = [b for b in (batch // total * total, (batch // total + 1) * total) if b]
        hint = " or ".join(str(b) for b in nearest)
        where = f"{total} devices" if processes == 1 else f"{total} devices on {processes} workers"
        raise UserError(f"--batch {batch} does not divide by {where}; use --batch {hint}")


def _automatic(tf: ModuleType, batch: int, most: int | None) -> list[int]:
    """The GPUs that "auto" means for a batch: [] for the CPU; says which."""
    found = len(tf.config.list_physical_devices("GPU"))
    allowed = found if most is None else min(found, most)
    ids = list(range(next(k for k in range(allowed, -1, -1) if k == 0 or batch % k == 0)))
    if ids:
        print(f"Computing on GPU {','.join(map(str, ids))}" + (f" of {found}" if len(ids) < found else ""))
    else:
        print("Computing on the CPU: TensorFlow finds no GPU")
    return ids


def _strategy(tf: ModuleType, gpu: str, ids: list[int], n: int, processes: int) -> tf.distribute.Strategy:
    """The strategy for GPUs, or for the CPU as `n` devices."""
    chosen = _visible_gpus(tf, gpu, ids)
    if processes > 1:
        return tf.distribute.MultiWorkerMirroredStrategy()  # before anything else is computed, as TensorFlow demands
    if not chosen and n > 1:
        _split_cpu(tf, n)
        return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(n)])
    return tf.distribute.get_strategy() if n == 1 else tf.distribute.MirroredStrategy()


def gpu_ids(gpu: str) -> list[int]:
    """GPU ids in a value of -g, [] for the CPU and for "auto", which depends on the machine.

    Raises:
        UserError: it is not a list of numbers, each once.

    >>> gpu_ids("0,2")
    [0, 2]
    """
    if gpu in (AUTO, "-1") or gpu.startswith("cpu:"):
        return []
    ids = [part.strip() for part in gpu.split(",")]
    if not (all(part.isdigit() for part in ids) and len(set(ids)) == len(ids)):
        raise UserError(
            f"-g {gpu!r} is not a list of GPU ids; write -g auto, -g 0, -g 0,1, -g -1 for the CPU, or -g cpu:2"
        )
    return [int(part) for part in ids]


def device_count(gpu: str) -> int:
    """How many devices a value of -g means, "auto" counting as one.

    Raises:
        UserError: it is not such a value.

    >>> device_count("cpu:4")
    4
    """
    ids = gpu_ids(gpu)
    if ids or gpu in (AUTO, "-1"):
        return max(len(ids), 1)
    number = gpu.removeprefix("cpu:")
    if not number.isdigit() or int(number) < 1:
        raise UserError(f"-g {gpu!r}: {number!r} is not a number of devices; write -g cpu:2")
    return int(number)


def _visible_gpus(tf: ModuleType, gpu: str, ids: list[int]) -> list[Any]:
    """Make only the chosen GPUs visible to TensorFlow, with memory taken as it is needed."""
    found = tf.config.list_physical_devices("GPU")
    for k in ids:
        if k >= len(found):
            there = f"GPUs 0..{len(found) - 1}" if found else "no GPU that TensorFlow can use"
            raise UserError(f"-g {gpu}: GPU {k} is not there, this machine has {there}; use -g -1 for the CPU")
    chosen = [found[k] for k in ids]
    try:
        tf.config.set_visible_devices(chosen, "GPU")
    except RuntimeError as error:
        raise UserError(
            f"-g {gpu}: TensorFlow has started already ({error}); a --plugin may not compute at import"
        ) from error
    for device in chosen:
        tf.config.experimental.set_memory_growth(device, True)
    return chosen


def _split_cpu(tf: ModuleType, n: int) -> None:
    cpu = tf.config.list_physical_devices("CPU")[0]
    try:
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * n)
    except RuntimeError:  # TensorFlow has started: fine where it started so
        if len(tf.config.list_logical_devices("CPU")) < n:
            raise
