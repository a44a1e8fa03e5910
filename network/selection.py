"""Which checkpoint of a run is the best by its validation, and when a run ends because none is better any more."""

import dataclasses
import math
import os
import pathlib

import numpy as np

from errors import UserError

from . import runs
from .registry import METRICS, Value


def chosen_value(name: str) -> tuple[str, Value]:
    """The metric in whose row a value of that name is, and the value.

    Raises:
        UserError: no metric has such a value of which more or less is better.
    """
    known = {
        each: (metric, value) for metric, row in METRICS.items() for each, value in row.values.items() if value.better
    }
    if name not in known:
        raise UserError(f"--best is {name!r}; it must be one of {', '.join(known)}")
    return known[name]


def not_measured(name: str) -> str:
    """What to say where a value can be measured on no pair."""
    return (
        f"--best {name}: it can be measured on no pair of the validation, which has no labels or landmarks for it; "
        "choose another, such as similarity, or give --best ''"
    )


@dataclasses.dataclass
class Selection:
    """The best validation of a run so far; what is needed to go on with it is kept in every checkpoint.

    Attributes:
        metric: name of the value that chooses.
        patience: after so many validations that were no better, one after the other, the run ends; 0 is never.
        value, step: the best one and its step; NaN and 0 before the first validation.
        waited: validations since.
        folder: of the run that holds the best one's checkpoint, where it is not the run itself but one before it.
    """

    metric: str
    patience: int = 0
    value: float = math.nan
    step: int = 0
    waited: int = 0
    folder: pathlib.Path | None = None

    def consider(self, step: int, value: float | None) -> bool:
        """Take note of a validation; whether it is the best so far. Equal values are no better, as in Keras.

        Raises:
            UserError: there is no value: it was not measured on any pair.
        """
        if value is None:
            raise UserError(not_measured(self.metric))
        higher = chosen_value(self.metric)[1].better == "higher"
        if math.isnan(self.value) or (value > self.value if higher else value < self.value):
            self.value, self.step, self.waited, self.folder = value, step, 0, None
            return True
        self.waited += 1
        return False

    @property
    def is_over(self) -> bool:
        """Whether the patience is at its end."""
        return 0 < self.patience <= self.waited

    def why_over(self) -> str:
        """Why the run ends, for a message."""
        return f"no {self.metric} better than {self.value:.4f} of step {self.step} in {self.waited} validations"

    def state(self) -> dict[str, np.ndarray]:
        """What a checkpoint keeps, by name."""
        return {runs.BEST_PREFIX + self.metric: np.array([self.value, self.step, self.waited], np.float64)}

    def go_on(self, source: pathlib.Path, state: np.ndarray) -> bool:
        """Take over the state that the checkpoint `source`, FOLDER/model-<step>, kept.

        Returns:
            Whether it did; not where the best checkpoint that it tells of is gone.
        """
        value, step, waited = state.tolist()
        best = runs.load_best(source.parent)
        same = best if best is not None and best.step == step else runs.Best(int(step), self.metric, value)
        folder = runs.best_folder(source.parent, same)
        if not math.isnan(value) and not (folder.is_dir() and int(step) in runs.list_steps(folder)):
            return False
        self.folder = folder
        self.value, self.step, self.waited = value, int(step), int(waited)
        return True

    def write(self, run: pathlib.Path) -> None:
        """Write into a run's folder which checkpoint is its best, where this is on the disk."""
        folder = self.folder or run
        if self.step in runs.list_steps(folder):
            runs.save_best(run, runs.Best(self.step, self.metric, self.value, os.path.relpath(folder, run)))
