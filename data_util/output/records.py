"""The pairs of a running evaluation on disk: `<report>.records`.

Each finished pair is a line, so that a stopped evaluation can go on and several jobs can share one scheme. The first
line holds the settings; each further line one pair:

    {"index": 3, "fixed": "yanx_1", "moving": "yanx_4", "seconds": 0.7, "stages": [{"dice": [0.91], ...}],
     "before": {"dice": [0.62], ...}, "sum": "9b1c2f0d5e6a7788"}

`stages` holds the values after every cascade (0 is before registration, 1 after the affine cascade), or the result
alone; the last one is always the result. `before` holds values before registration, and is not in old files. A value
is a number, or a list with one number per label or landmark; null means 'not measured'. Every name is defined in
docs/metrics.md. `sum` is a checksum of the line and of the settings (`checksums`), so that a line that was damaged, or
comes from another evaluation, is found; lines of old files have none.
"""

import contextlib
import dataclasses
import fcntl
import math
import os
import pathlib
import re
import sys
from collections.abc import Collection, Mapping
from typing import IO, Annotated, Any, NamedTuple

import numpy as np

import files
from checked import INDEX, Limit, build, parse_json
from checksums import is_whole, sealed, sum_of
from data_util.output.settings import Settings
from errors import UserError, listed

_REMEDY = "evaluate it again with the same flags and --resume, which does again what is damaged"
_ANEW = "delete the file to start anew"
_LARGEST = float(np.finfo(np.float32).max)
_Number = Annotated[float, Limit(lambda value: abs(value) <= _LARGEST, f"a number up to {_LARGEST:.2g}")] | None
_Values = Mapping[str, tuple[_Number, ...] | _Number]


@dataclasses.dataclass(frozen=True)
class _Line:
    """A pair as JSON has it: the fields of `Record`."""

    index: Annotated[int, INDEX]
    fixed: str
    moving: str
    seconds: float
    stages: Annotated[tuple[_Values, ...], Limit(bool, "a list that is not empty")]
    before: _Values = dataclasses.field(default_factory=dict)


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
        return cls(
            result.index,
            result.fixed_id,
            result.moving_id,
            round(result.seconds, 4),
            tuple(_from_json(_to_json(stage)) for stage in result.stages),
            _from_json(_to_json(result.before)),
        )

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON has it."""
        pair = {"index": self.index, "fixed": self.fixed, "moving": self.moving, "seconds": self.seconds}
        before = {"before": _to_json(self.before)} if self.before else {}
        return {**pair, "stages": [_to_json(stage) for stage in self.stages], **before}

    @classmethod
    def from_dict(cls, values: Any, where: str, settings: Settings) -> "Record":
        """The record of a line of JSON.

        Args:
            values: what the JSON holds.
            where: the line, for messages.
            settings: of the evaluation.

        Raises:
            UserError: a value is not of the right type, or the settings have no such pair or labels.
        """
        line = build(_Line, values, where, _REMEDY)
        if line.index >= settings.pairs:
            raise UserError(f"{where}: there is no pair {line.index} among {settings.pairs}; {_REMEDY}")
        labels = 1 if settings.labels is None else len(settings.labels)
        for name, value in ((name, value) for part in (*line.stages, line.before) for name, value in part.items()):
            if settings.per(name) == "label" and (not isinstance(value, tuple) or len(value) != labels):
                raise UserError(f"{where}: {name} must be a list of {labels}, one for each label; {_REMEDY}")
        stages = tuple(_from_json(stage) for stage in line.stages)
        return cls(line.index, line.fixed, line.moving, line.seconds, stages, _from_json(line.before))


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
            with files.writing(self.path), files.partial_folder(self.path.parent) as partial:
                new = partial / self.path.name
                self._file = new.open("w")
                fcntl.flock(self._file, fcntl.LOCK_EX)
                first = sealed(settings.to_dict())
                self._evaluation = str(sum_of(first.encode()))
                self._write(first, *(self._line(record) for record in kept))
                files.publish(new, self.path)

    def _kept(self, settings: Settings, resume: bool) -> list[Record]:
        """The pairs of a stopped evaluation that this one goes on with; damaged ones are left out, and said."""
        found = _read(self.path, settings)
        before, kept = found.settings, _without_contradictions(found)
        if before is None and found.others:
            raise UserError(f"{self.path}: line 1 is damaged, so nobody knows what the others are of; {_ANEW}")
        if kept and not resume:
            raise UserError(
                f"{self.path} holds {len(kept)} pairs of a stopped evaluation; go on by --resume, or {_ANEW}"
            )
        changed = None if before is None else before.difference(settings)
        if kept and changed:
            raise UserError(f"{self.path} was written with {changed}; give the same flags to go on, or {_ANEW}")
        if found.damaged:
            lines = listed([f"line {number}{_pair_on(found.lines[number])}" for number in sorted(found.damaged)])
            print(
                f"{self.path}: damaged, and left out: {lines}; {len(kept)} pairs are kept, all others evaluated",
                file=sys.stderr,
            )
        return kept

    def add(self, result: Any) -> None:
        """Append a pair, a `network.evaluation.PairResult`; it is on disk when this returns."""
        record = Record.of(result)
        self._write(self._line(record))
        self.done.add(record.index)

    def remove(self) -> None:
        """Remove the file: its pairs are in a report."""
        self.path.unlink()
        self.done.clear()

    def _line(self, record: Record) -> str:
        return sealed(record.to_dict(), of=self._evaluation)

    def _write(self, *lines: str) -> None:
        with files.writing(self.path):
            self._file.write("".join(f"{line}\n" for line in lines))
            self._file.flush()
            os.fsync(self._file.fileno())

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error and not self.done:
            self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # of a line that could not be written, which was raised then
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
    """Settings and records of a records file.

    Raises:
        UserError: the file is missing or is not a records file; a line is damaged, or unfinished; a pair is there
            twice.
    """
    found = _read(path)
    if found.damaged:
        raise UserError(min(found.damaged.items())[1])
    if found.settings is None:
        raise UserError(f"{path} is not a file of evaluation records; give the .records files of eval.py")
    if found.unfinished:
        raise UserError(f"{path}, line {len(found.lines) + 1}: is unfinished; {_REMEDY}")
    first: dict[int, int] = {}
    for number, record in found.records.items():
        if record.index in first:
            lines = f"line {first[record.index]} and line {number}"
            raise UserError(f"{path}: pair {record.index} is on {lines}; delete one of them")
        first[record.index] = number
    return found.settings, list(found.records.values())


class _Contents(NamedTuple):
    """What can be read of a records file; its lines are counted from 1.

    Attributes:
        settings: None where the first line is damaged.
        records: line -> record.
        damaged: line -> what is wrong with it.
        lines: line -> its bytes.
        others: how many damaged lines look like whole records.
        unfinished: whether the file ends within a line.
    """

    settings: Settings | None
    records: dict[int, Record]
    damaged: dict[int, str]
    lines: dict[int, bytes]
    others: int
    unfinished: bool


def _read(path: str | os.PathLike, expected: Settings | None = None) -> _Contents:
    """What can be read of a records file.

    Where its first line is damaged, lines with the checksums of the `expected` settings are records of these.

    Raises:
        UserError: the file cannot be opened.
    """
    try:
        *whole, rest = pathlib.Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    lines = dict(enumerate(whole, 1))
    summed = any(sum_of(line) for line in whole)  # if not, it is an old file
    found = _Contents(None, {}, {}, lines, 0, bool(rest))
    for number, line in lines.items():
        where = f"{path}, line {number}"
        try:
            if number == 1:
                found = found._replace(settings=_settings_on(line, where, summed))
                continue
        except UserError as error:
            found.damaged[1] = str(error)  # it may be a record, where the settings were lost
        settings, of = found.settings, str(sum_of(whole[0]))
        if settings is None and expected is not None and summed:
            settings, of = expected, str(sum_of(sealed(expected.to_dict()).encode()))
        try:
            found.records[number] = _record_on(line, where, settings, of if summed else None)
            found.damaged.pop(number, None)
        except UserError as error:
            found.damaged.setdefault(number, str(error))
    looks = sum(b'"index"' in lines[number] and b'"stages"' in lines[number] for number in found.damaged)
    return found._replace(others=0 if found.records else looks)


def _settings_on(line: bytes, where: str, summed: bool) -> Settings:
    """The settings on the first line; raises UserError where it is damaged."""
    if summed and not is_whole(line):
        raise UserError(f"{where}: is damaged; {_REMEDY}")
    remedy = "give the .records files of eval.py"
    try:
        return Settings.from_dict(parse_json(line, where, remedy), where, remedy)
    except UserError as error:
        raise UserError(f"{where.rpartition(',')[0]} is not a file of evaluation records ({error})") from error


def _record_on(line: bytes, where: str, settings: Settings | None, of: str | None) -> Record:
    """The record on a line; `of` is its evaluation's checksum, None in old files. Raises UserError where damaged."""
    if settings is None or (of is not None and not is_whole(line, of)):
        raise UserError(f"{where}: is damaged, or of another evaluation; {_REMEDY}")
    return Record.from_dict(parse_json(line, where, _REMEDY), where, settings)


def _without_contradictions(found: _Contents) -> list[Record]:
    """One record for each pair; none of a pair whose records differ, the lines of which then count as damaged."""
    by_pair: dict[int, list[int]] = {}
    for number, record in found.records.items():
        by_pair.setdefault(record.index, []).append(number)
    kept = []
    for numbers in by_pair.values():
        if len({found.lines[number] for number in numbers}) == 1:
            kept.append(found.records[numbers[0]])
        else:
            found.damaged.update(dict.fromkeys(numbers, "another line has other values for its pair"))
    return kept


def _pair_on(line: bytes) -> str:
    """The pair that a damaged line seems to be of, for a message."""
    found = re.match(rb'\{"index": (\d{1,9}),', line)
    return "" if found is None else f" (pair {int(found[1])})"


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
        if not isinstance(value, (list, tuple))
        else np.array([np.nan if v is None else v for v in value], np.float32)
        for name, value in values.items()
    }
