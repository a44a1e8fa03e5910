"""What happens around the steps of a run of train.py: its callbacks, and how it chooses its best checkpoint."""

from __future__ import annotations

import argparse
import pathlib
import sys
from typing import TYPE_CHECKING

import workers
from errors import UserError
from network import selection
from network.registry import METRICS

if TYPE_CHECKING:  # TensorFlow is imported within the functions, so that --help is quick
    import keras
    import numpy as np
    import tensorflow as tf

    from data_util.dataset import Scheme

LOGS = pathlib.Path("logs")


def open_selection(
    args: argparse.Namespace, source: pathlib.Path | None, validation: Scheme | None
) -> selection.Selection | None:
    """How a run chooses its best checkpoint, after the validations of the one that it continues; None without --best.

    Raises:
        UserError: there is nothing to validate on, nothing of it can be measured, or the run that is continued is over.
    """
    if not args.best:
        return None
    if validation is None:
        raise UserError(
            f"--best {args.best}: {args.dataset} has no scheme '2' to validate on; add it, or give --best ''"
        )
    needed = METRICS.find(selection.chosen_value(args.best)[0]).member
    if needed is not None and not validation.some_pair_has(needed):
        raise UserError(selection.not_measured(args.best))
    chosen = selection.Selection(args.best, args.patience)
    if source is not None:
        from network import checkpoints

        before = checkpoints.read_validations(source, args.best)
        if before is not None and not chosen.go_on(source, before):
            print(f"{source}: the best checkpoint of before is gone; the best is chosen anew", file=sys.stderr)
    if chosen.is_over:
        raise UserError(f"{source} is over: {chosen.why_over()}; raise --patience, or use --clear_steps")
    return chosen


def draw_pictures(*images: np.ndarray) -> dict[str, np.ndarray]:
    """`figures.training_pictures`; matplotlib is imported for the first of them."""
    from data_util.output.figures import training_pictures

    return training_pictures(*images)


def make_callbacks(
    args: argparse.Namespace,
    run: pathlib.Path | None,
    scheme: Scheme,
    validation: Scheme | None,
    chosen: selection.Selection | None,
    shown: dict[str, tf.Tensor],
    total: int,
    how: str,
) -> list[keras.callbacks.Callback]:
    """What happens around each step, in this order; the progress bar is the first, the stop at a signal the last.

    Args:
        args: the flags.
        run: the run's folder; None where nothing is written.
        scheme, validation: what is trained and validated on.
        chosen: how the best checkpoint is chosen, if it is.
        shown: a Batch whose first pair is drawn.
        total: the run's last step.
        how: how to go on after a signal.
    """
    from network import callbacks

    progress = callbacks.Progress("debug" if run is None else run.name, total, workers.is_chief())
    steps = [
        progress,
        callbacks.LearningRate(args.lr, args.round),
        callbacks.StopAtNonFinite(lambda step: scheme.training_pair_ids(args.batch, args.seed, step)),
    ]
    curves = saver = None
    written: list[keras.callbacks.Callback] = []
    if run is not None:
        from network.curves import Curves

        curves = Curves(LOGS / args.logs / run.name)
        saver = callbacks.SaveCheckpoints(run, args.round, total, chosen)
        steps.append(callbacks.Log(run, curves))
        written = [saver, callbacks.Pictures(curves, shown, draw_pictures)]
    if validation is not None and workers.is_chief():
        sample = validation.sample(args.val_pairs, seed=0)
        every = 1 if args.debug else args.val_steps
        batches = lambda: validation.evaluation(args.batch, sample)  # noqa: E731
        keeper = None if chosen is None else callbacks.KeepBest(chosen, saver)
        validate = callbacks.Validate(every, batches, validation.labels, run, curves, keeper)
        # A checkpoint knows of the validation after its step, where that chooses; else it is saved before all else.
        written.insert(0 if chosen is not None else len(written), validate)
    steps += written
    steps.append(callbacks.StopAtSignal(saver, how, total))  # what a step leads to is done before the run ends
    return steps
