"""What happens around the steps of a training run: Keras callbacks, all counting the run's own steps (from 1).

A run may start at any step, so none of them relies on Keras's batch or epoch numbers.
"""

from __future__ import annotations

import csv
import math
import pathlib
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TextIO

import keras
import numpy as np
import tensorflow as tf
import tqdm

import files
import progress
from errors import Stopped, UserError

from . import checkpoints
from .averaging import averaged_weights
from .curves import Curves
from .evaluation import EvaluationPlan, Evaluator
from .kernels import forward_alone, whole_step
from .selection import Selection, chosen_value
from .training import GRADIENT, learning_rate

Logs = Any  # Keras's: a dict of the step's values, or None where there are none.
EVERY_STEP_UNTIL = 500
LOG_EVERY = 10
PICTURES_EVERY = 1000
SAVE_EVERY_SECONDS = 3600


def is_logged(step: int) -> bool:
    """Whether a step gets a row: every step up to 500, then every tenth."""
    return step <= EVERY_STEP_UNTIL or step % LOG_EVERY == 0


class LearningRate(keras.callbacks.Callback):
    """Sets the rate of each step by its epoch of `steps_per_epoch` steps (see `learning_rate`)."""

    def __init__(self, initial: float, steps_per_epoch: int) -> None:
        super().__init__()
        self.initial, self.steps_per_epoch = initial, steps_per_epoch

    def on_train_batch_begin(self, batch: int, logs: Logs = None) -> None:
        rate = learning_rate(self.model.step, self.steps_per_epoch, self.initial)
        if rate != self.model.rate:
            self.model.rate = self.model.optimizer.learning_rate = rate


class StopAtNonFinite(keras.callbacks.Callback):
    """Stops the run by a UserError when the loss or its gradient is not finite; nothing is saved after it.

    Args:
        pair_ids: function of a step (from 0) giving its pairs' (fixed id, moving id).
    """

    def __init__(self, pair_ids: Callable[[int], list[tuple[str, str]]]) -> None:
        super().__init__()
        self.pair_ids = pair_ids

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        if math.isfinite(logs["loss"]) and math.isfinite(logs[GRADIENT]):
            return
        step = self.model.step
        names = ["loss", *(name for name in logs if name not in ("loss", GRADIENT))]
        terms = ", ".join(f"{name} {logs[name]:.6g}" for name in names)
        pairs = "; ".join(f"{fixed} <- {moving}" for fixed, moving in self.pair_ids(step - 1))
        what = "the gradient of the loss" if math.isfinite(logs["loss"]) else "the loss"
        raise UserError(
            f"step {step}: {what} is not finite ({terms}) on the pairs (fixed <- moving) {pairs}; "
            "the last checkpoint is kept: look at these scans, or continue from it with a lower --lr"
        )


class Log(keras.callbacks.Callback):
    """Writes the logged steps to `log.csv` (step, loss, lr and the loss terms) and as TensorBoard scalars."""

    def __init__(self, folder: pathlib.Path, curves: Curves) -> None:
        super().__init__()
        self.path, self.curves = pathlib.Path(folder) / "log.csv", curves
        self.file: TextIO | None = None

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        step = self.model.step
        if not is_logged(step):
            return
        terms = {name: value for name, value in logs.items() if name != GRADIENT}
        row = {"step": step, "loss": terms.pop("loss"), "lr": self.model.rate, **terms}
        with files.writing(self.path):
            if self.file is None:
                self.file = self.path.open("w", newline="")
                self.rows = csv.DictWriter(self.file, list(row))
                self.rows.writeheader()
            self.rows.writerow(row)
            self.file.flush()
        self.curves.scalars(step, {name: value for name, value in row.items() if name != "step"})

    def on_train_end(self, logs: Logs = None) -> None:
        if self.file is not None:
            with files.writing(self.path):
                self.file.close()


class Pictures(keras.callbacks.Callback):
    """Every 1000 steps, mid-slice pictures of one fixed pair for TensorBoard.

    Args:
        curves: the run's, for TensorBoard.
        batch: a Batch whose first pair is shown.
        draw: function (fixed, moving, warped [X, Y, Z], flow [X, Y, Z, 3]) -> dict name -> image [H, W, 1 or 3] uint8.
    """

    def __init__(
        self,
        curves: Curves,
        batch: dict[str, tf.Tensor],
        draw: Callable[..., dict[str, np.ndarray]],
    ) -> None:
        super().__init__()
        self.curves, self.draw = curves, draw
        self.pair = batch["fixed"][:1], batch["moving"][:1]

    def on_train_begin(self, logs: Logs = None) -> None:
        self.network = whole_step(forward_alone(self.model.network))

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        step = self.model.step
        if step % PICTURES_EVERY:
            return
        fixed, moving = self.pair
        with averaged_weights(self.model.network, self.model.optimizer):
            output = self.network((fixed, moving))
        images = [volume.numpy()[0, ..., 0] for volume in (fixed, moving, output.warped)]
        self.curves.pictures(step, self.draw(*images, output.flow.numpy()[0]))


class Validate(keras.callbacks.Callback):
    """Every `steps` steps, evaluates a fixed sample of pairs: TensorBoard `val_*`, a line, and `validation.csv`.

    Values that were not measured (no segmentation, no landmarks) are left out of the means; a mean of nothing is
    empty. An error in validation stops the run, since a mistake in the data would otherwise go unnoticed. Where the
    optimizer keeps averages of the weights, it is these that are validated.

    Args:
        steps: steps between validations.
        batches: function without arguments giving the Batches of the sample.
        labels: values of the labels by name, or None for a mask. Each has columns of its own.
        folder, curves: the run's folder and its curves for TensorBoard, or None to write nothing.
        keeper: what keeps the best checkpoint by a value of these, or None.
    """

    NAMES = {"dice": "dice_score", "jaccard": "jacc_score", "landmark_distance": "landmark_dist"}

    def __init__(
        self,
        steps: int,
        batches: Callable[[], Iterable[dict[str, tf.Tensor]]],
        labels: Mapping[str, int] | None,
        folder: pathlib.Path | None = None,
        curves: Curves | None = None,
        keeper: KeepBest | None = None,
    ) -> None:
        super().__init__()
        self.steps, self.batches, self.labels, self.keeper = steps, batches, labels, keeper
        self.path = None if folder is None else pathlib.Path(folder) / "validation.csv"
        self.curves = curves
        self.names, self.metrics = dict(self.NAMES), ["overlap", "landmarks"]
        if keeper is not None:
            chosen = keeper.selection.metric
            self.names.setdefault(chosen, chosen)
            self.metrics.append(chosen_value(chosen)[0])

    def on_train_begin(self, logs: Logs = None) -> None:
        plan = EvaluationPlan(tuple(dict.fromkeys(self.metrics)))
        labels = None if self.labels is None else self.labels.values()
        self.evaluator = Evaluator(self.model.network, labels, plan, self.model.distribute_strategy)

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        step = self.model.step
        if step % self.steps:
            return
        with averaged_weights(self.model.network, self.model.optimizer):
            results = list(self.evaluator.evaluate(self.batches()))
        means = {title: _mean([r.values[name] for r in results]) for name, title in self.names.items()}
        of_labels = {
            f"{self.NAMES[name]}_{label}": _mean([r.values[name][k : k + 1] for r in results])
            for name in ("dice", "jaccard")
            for k, label in enumerate(self.labels or ())
        }
        self.report(step, len(results), means, of_labels)
        if self.keeper is not None:
            selection = self.keeper.selection
            self.keeper.consider(step, means[self.names[selection.metric]])
            if selection.is_over:
                tqdm.tqdm.write(f"The run ends: {selection.why_over()}")
                self.model.found_over = True

    def report(self, step: int, pairs: int, means: dict[str, float | None], of_labels: dict[str, float | None]) -> None:
        """Write one validation's means."""
        text = ", ".join(f"{name} {'not measured' if v is None else format(v, '.4f')}" for name, v in means.items())
        tqdm.tqdm.write(f"step {step}: validation of {pairs} pairs: {text}")
        means = means | of_labels
        if self.curves is not None:
            self.curves.scalars(step, {f"val_{name}": value for name, value in means.items()})
        if self.path is not None:
            new = not self.path.exists()
            with files.writing(self.path), self.path.open("a", newline="") as file:
                rows = csv.writer(file)
                if new:
                    rows.writerow(["step", "pairs", *means])
                rows.writerow([step, pairs, *("" if v is None else v for v in means.values())])


def _mean(values: list[np.ndarray]) -> float | None:
    """Mean of what was measured, None where nothing was."""
    measured = np.concatenate([np.atleast_1d(value) for value in values])
    measured = measured[~np.isnan(measured)]
    return float(measured.mean()) if measured.size else None


class KeepBest:
    """Keeps the best checkpoint of a run by its validations.

    Args:
        selection: the best so far.
        saver: the run's `SaveCheckpoints`, or None where nothing is written.
    """

    def __init__(self, selection: Selection, saver: SaveCheckpoints | None) -> None:
        self.selection, self.saver = selection, saver
        if saver is not None:
            selection.write(saver.folder)

    def consider(self, step: int, value: float | None) -> None:
        """Take note of a validation: save a checkpoint where it is the best so far, and then name it in `best.json`."""
        if self.selection.consider(step, value) and self.saver is not None:
            self.saver.save()
            self.selection.write(self.saver.folder)


class SaveCheckpoints(keras.callbacks.Callback):
    """Saves the run at each epoch's end, at least hourly, and at its very end; with what its `selection` needs."""

    def __init__(
        self, folder: pathlib.Path, steps_per_epoch: int, last_step: int, selection: Selection | None = None
    ) -> None:
        super().__init__()
        self.folder, self.steps_per_epoch, self.last_step = folder, steps_per_epoch, last_step
        self.selection = selection
        self.saved_at, self.saved_step = time.monotonic(), None

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        step = self.model.step
        hourly = time.monotonic() - self.saved_at > SAVE_EVERY_SECONDS
        if hourly or step % self.steps_per_epoch == 0 or step == self.last_step:
            self.save()

    def save(self) -> None:
        """Save now, unless this step is saved already."""
        if self.saved_step == self.model.step:
            return
        tqdm.tqdm.write(f"Saving {checkpoints.checkpoint_prefix(self.folder, self.model.step)}")
        state = None if self.selection is None else self.selection.state()
        checkpoints.save(self.folder, self.model.network, self.model.optimizer, self.model.step, state)
        self.saved_at, self.saved_step = time.monotonic(), self.model.step


class StopAtSignal(keras.callbacks.Callback):
    """At Ctrl-C, SIGTERM or SIGHUP ends the run, saved, after a step; at a second signal, at once.

    A run that is over before its last step (`Trainer.is_over`) ends likewise, but as one that is finished.

    It is the step that is under way; with several workers, the first that begins after any of them was told, for all.
    Signals are heard from the run's start until `end`; one that was ignored, as under nohup, stays so.

    Args:
        saver: the run's `SaveCheckpoints`, or None where nothing is saved.
        how: what the message ends with: how to go on, or why nothing is saved.
        last_step: step after which the run ends anyway.

    Raises:
        Stopped: the run was stopped; it says how to go on.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self, saver: SaveCheckpoints | None, how: str, last_step: int) -> None:
        super().__init__()
        self.saver, self.how, self.last_step = saver, how, last_step
        self.before: dict[int, Any] = {}

    def on_train_begin(self, logs: Logs = None) -> None:
        heard = [number for number in self.SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self.before = {number: signal.signal(number, self.note) for number in heard}

    def note(self, *_: Any) -> None:
        """Remember the signal, and let the next one interrupt."""
        self.model.asked_to_stop = True
        self.end()

    def end(self) -> None:
        """Set the signal handlers that were in place before the run."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        if self.model.is_over:
            self.model.stop_training = True
            if self.saver is not None:
                self.saver.save()
            return
        if not self.model.stops or self.model.step == self.last_step:
            return
        if self.saver is None:
            raise Stopped(f"Stopped at step {self.model.step}; {self.how}")
        self.saver.save()
        raise Stopped(f"Stopped at step {self.model.step}, which is saved; {self.how}")


class Progress(keras.callbacks.Callback):
    """Progress bar with steps/s, loss, rate, and the share of time spent waiting for data."""

    def __init__(self, name: str, total: int, shown: bool = True) -> None:
        super().__init__()
        self.name, self.total, self.shown = name, total, shown
        self.bar: Any = None

    def on_train_begin(self, logs: Logs = None) -> None:
        self.bar = progress.bar(
            total=self.total, initial=self.model.step, desc=self.name, unit="step", disable=not self.shown
        )
        self.started = time.perf_counter()
        if self.shown:
            tqdm.tqdm.write("Compiling the first step, which takes from seconds to minutes")

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        waiting = self.model.seconds_waiting / (time.perf_counter() - self.started)
        state = f"loss {logs['loss']:.4f}, lr {self.model.rate:.2e}, data {waiting:.1%}"
        self.bar.set_postfix_str(state, refresh=False)
        self.bar.update()

    def close(self) -> None:
        """End the bar's line; Keras calls nothing when a run stops by an error."""
        if self.bar is not None:
            self.bar.close()
