"""The pairs of a running evaluation on disk: `<report>.records`.

Each finished pair is a line, so that a stopped evaluation can go on and several jobs can share one scheme. The first
line holds the settings; each further line one pair:

    {"index": 3, "fixed": "yanx_1", "moving": "yanx_4", "seconds": 0.7, "stages": [{"dice": [0.91], ...}],
     "before": {"dice": [0.62], ...}}

`stages` holds the values after every cascade (0 is before registration, 1 after the affine cascade), or the result
alone; the last one is always the result. `before` holds values before registration, and is not in old files. A value
is a number, or a list with one number per label or landmark; null means 'not measured'. Every name is defined in
docs/metrics.md.
"""

import dataclasses
import fcntl
import json
import math
import os
import pathlib
from collections.abc import Collection, Mapping
from typing import IO, Any

import numpy as np

from data_util.output.settings import Settings
from errors import UserError


@dataclasses.dataclass(frozen=True)
class Record:
    """A pair of a records file.

    Attributes:
        index: place of the pair in its scheme.
        fixed, moving: the scans, as reports name them.
        seconds: time that registering and measuring took.
        stages: values after each cascade, or of the result alone: name -> float32, a scalar or an array; NaN means
            'not measured'.
        before: values before registration.
    """

    index: int
    fixed: str
    moving: str
    seconds: float
    stages: tuple[dict[str, np.ndarray], ...]
    before: dict[str, np.ndarray]

    @property
    def values(self) -> dict[str, np.ndarray]:
        """The values of the result."""
        return self.stages[-1]

    @classmethod
    def of(cls, result: Any) -> "Record":
        """The record of a pair that was just evaluated, a `network.evaluation.PairResult`."""
        return cls.from_dict(
            {
                "index": result.index,
                "fixed": result.fixed_id,
                "moving": result.moving_id,
                "seconds": round(result.seconds, 4),
                "stages": [_to_json(stage) for stage in result.stages],
                "before": _to_json(result.before),
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON has it."""
        pair = {"index": self.index, "fixed": self.fixed, "moving": self.moving, "seconds": self.seconds}
        before = {"before": _to_json(self.before)} if self.before else {}
        return {**pair, "stages": [_to_json(stage) for stage in self.stages], **before}

    @classmethod
    def from_dict(cls, line: Mapping[str, Any]) -> "Record":
        """The record of a line of JSON."""
        return cls(
            line["index"],
            line["fixed"],
            line["moving"],
            line["seconds"],
            tuple(_from_json(stage) for stage in line["stages"]),
            _from_json(line.get("before", {})),
        )


class Records:
    """The records file of a running evaluation, as a context manager; left by an error before any pair, it is removed.

    While it is open no other process can open it.

    Args:
        path: the file; its folder is made.
        settings: what is evaluated; a run goes on only with the same settings.
        resume: go on with the pairs that are there already, if any.

    Attributes:
        done: indices of the pairs that the file holds.

    Raises:
        UserError: another process has the file open; or it holds pairs already, and `resume` is not given or it was
            written with other settings.
    """

    def __init__(self, path: str | os.PathLike, settings: Settings, resume: bool = False) -> None:
        self.path = pathlib.Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _open_locked(self.path) as old:
            kept = self._kept(settings, resume) if os.fstat(old.fileno()).st_size else []
            self.done = {record.index for record in kept}
            # A kill may have cut the last line: what is whole is written anew before going on. The new file is locked
            # before it takes the place of the old one.
            new = pathlib.Path(f"{self.path}.new")
            self._file = new.open("w")
            fcntl.flock(self._file, fcntl.LOCK_EX)
            for line in (settings.to_dict(), *(record.to_dict() for record in kept)):
                self._write(line)
            os.replace(new, self.path)

    def _kept(self, settings: Settings, resume: bool) -> list[Record]:
        """The pairs of a stopped evaluation that this one goes on with."""
        before, kept = read_records(self.path)
        if kept and not resume:
            raise UserError(
                f"{self.path} holds {len(kept)} pairs of a stopped evaluation; go on by --resume, or delete "
                "the file to start anew"
            )
        changed = before.difference(settings)
        if kept and changed:
            raise UserError(
                f"{self.path} was written with {changed}; give the same flags to go on, or delete the "
                "file to start anew"
            )
        return kept

    def add(self, result: Any) -> None:
        """Append a pair, a `network.evaluation.PairResult`; it is on disk when this returns."""
        record = Record.of(result)
        self._write(record.to_dict())
        self.done.add(record.index)

    def remove(self) -> None:
        """Remove the file: its pairs are in a report."""
        self.path.unlink()
        self.done.clear()

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error and not self.done:
            self.path.unlink(missing_ok=True)
        self._file.close()


def _open_locked(path: pathlib.Path) -> IO[str]:
    """The file at a path, made where there is none, and locked until it is closed.

    Raises:
        UserError: another process has locked it.
    """
    while True:
        file = path.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UserError(
                f"{path} is being written by another process; wait until it is done, or give this one a --name or "
                "another --shard"
            ) from None
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()  # another process has replaced or removed it in the meantime


def remaining(
    pairs: int, batch: int, shard: tuple[int, int] = (1, 1), done: Collection[int] = frozenset()
) -> list[int]:
    """Indices that a job has still to evaluate, in the order of evaluation.

    The pairs of a batch are the same whatever the shards and wherever a run was stopped, and a batch is done again
    unless all of it is done: a pair's numbers may depend, in the last digit, on the pairs beside it.

    Args:
        pairs: number of pairs.
        batch: number of pairs that are registered at a time.
        shard: (i, n) for part i of n, from 1; the parts take turns by batch.
        done: the indices that are done.

    >>> remaining(7, batch=2, shard=(2, 2), done={2})
    [2, 3, 6]
    """
    part, parts = shard
    batches = [range(start, min(start + batch, pairs)) for start in range(0, pairs, batch)]
    return [index for group in batches[part - 1 :: parts] if not set(group).issubset(done) for index in group]


def read_records(path: str | os.PathLike) -> tuple[Settings, list[Record]]:
    """Settings and whole records of a records file; a cut last line is left out.

    Raises:
        UserError: the file is missing or is not a records file.
    """
    try:
        text = pathlib.Path(path).read_text()
        settings, *records = (json.loads(line) for line in text.split("\n")[:-1])
        return Settings.from_dict(settings), [Record.from_dict(record) for record in records]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is not a file of evaluation records; give the .records files of eval.py") from error


def replace_file(path: str | os.PathLike, text: str) -> None:
    """Write a file such that at any moment there is the old one or the whole new one."""
    new = pathlib.Path(f"{path}.new")
    new.write_text(text)
    os.replace(new, path)


def _to_json(values: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Values as JSON has them."""
    return {name: _json_value(np.asarray(value)) for name, value in values.items()}


def _json_value(value: np.ndarray) -> Any:
    """A value of up to one dimension as JSON has it: what is not finite becomes None."""
    if value.ndim:
        return [_json_value(v) for v in value]
    return float(value) if math.isfinite(value) else None


def _from_json(values: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Values read from JSON: float32, a scalar or an array, NaN where None."""
    return {
        name: np.array(np.nan if value is None else value, np.float32)
        if not isinstance(value, list)
        else np.array([np.nan if v is None else v for v in value], np.float32)
        for name, value in values.items()
    }
