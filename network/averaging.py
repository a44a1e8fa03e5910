"""Averages of the weights over the steps (EMA), as Keras's optimizers keep them with `use_ema`."""

import contextlib
from collections.abc import Iterator

import keras

from .recursive_cascaded_networks import RecursiveCascadedNetwork

_AVERAGES = "_model_variables_moving_average"  # where Keras's optimizer keeps them, in the order of its weights


def averages(
    network: RecursiveCascadedNetwork, optimizer: keras.optimizers.Optimizer
) -> list[tuple[keras.Variable, keras.Variable]]:
    """Each weight that is trained, and its average; none where the optimizer keeps no averages."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    if not inner.use_ema:
        return []
    kept = getattr(inner, _AVERAGES, None)
    if kept is None:
        raise RuntimeError(f"Keras {keras.__version__} keeps averages elsewhere than in Optimizer.{_AVERAGES}")
    return list(zip(network.trainable_variables, kept, strict=True))


@contextlib.contextmanager
def averaged_weights(network: RecursiveCascadedNetwork, optimizer: keras.optimizers.Optimizer) -> Iterator[None]:
    """Within the block, the network has the averages in the place of its weights, where the optimizer keeps them.

    Keras's `SwapEMAWeights` swaps them by sums and differences, after which the weights differ in their last digits.
    """
    pairs = averages(network, optimizer)
    last = [keras.ops.convert_to_numpy(weight.value) for weight, _ in pairs]
    for weight, average in pairs:
        weight.assign(average.value)
    try:
        yield
    finally:
        for (weight, _), value in zip(pairs, last, strict=True):
            weight.assign(value)
