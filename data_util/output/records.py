"""The pairs of a running evaluation on disk: `<report>.records`.

Each finished pair is a line, so that a stopped evaluation can go on and several jobs can share one scheme. The first
line holds the settings; each further line one pair:

    {"index": 3, "fixed": "yanx_1", "moving": "yanx_4", "seconds": 0.7, "stages": [{"dice": [0.91], ...}]}

`stages` holds the values after every cascade (0 is before registration, 1 after the affine cascade), or the result
alone; the last one is always the result. A value is a number, or a list with one a label or landmark; null is 'not
measured'. Every name is defined in docs/metrics.md.
"""

import json
import math
import os
import pathlib

from errors import UserError


class Records:
    """The records file of a running evaluation, as a context manager; left by an error before any pair, it is removed.

    Args:
        path: the file; its folder is made.
        settings: dict that says what is evaluated; a run goes on only with the same settings.
        resume: go on with the pairs that are there already, if any.

    Attributes:
        done: indices of the pairs that the file holds.

    Raises:
        UserError: the file holds pairs already, and `resume` is not given or it was written with other settings.
    """

    def __init__(self, path, settings, resume=False):
        self.path = pathlib.Path(path)
        kept = []
        if self.path.exists():
            before, kept = read_records(self.path)
            if kept and not resume:
                raise UserError(
                    f"{self.path} holds {len(kept)} pairs of a stopped evaluation; go on by --resume, or delete "
                    "the file to start anew"
                )
            changed = difference(before, as_read(settings))
            if kept and changed:
                raise UserError(
                    f"{self.path} was written with {changed}; give the same flags to go on, or delete the "
                    "file to start anew"
                )
        self.done = {record["index"] for record in kept}
        # A kill may have cut the last line: what is whole is written anew before going on.
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.path, "".join(json.dumps(line) + "\n" for line in (settings, *kept)))
        self.file = self.path.open("a")

    def add(self, result):
        """Append a pair, given as a `PairResult`; it is on disk when this returns."""
        record = {
            "index": result.index,
            "fixed": result.fixed_id,
            "moving": result.moving_id,
            "seconds": round(result.seconds, 4),
            "stages": [{name: _json_value(value) for name, value in stage.items()} for stage in result.stages],
        }
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())
        self.done.add(result.index)

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        self.file.close()
        if error and not self.done:
            self.path.unlink()


def remaining(pairs, batch, shard=(1, 1), done=()):
    """Indices that a job has still to evaluate, out of `pairs`, in batches of `batch`.

    A batch is always of the same pairs, whatever the shards and wherever a run was stopped, and done again unless all
    of it is: a pair's numbers may depend, in the last digit, on the pairs beside it.

    Args:
        pairs, batch: numbers of pairs.
        shard: (i, n) for part i of n, from 1; the parts take turns by batch.
        done: set of the indices that are done.
    """
    part, parts = shard
    batches = [range(start, min(start + batch, pairs)) for start in range(0, pairs, batch)]
    return [index for group in batches[part - 1 :: parts] if not set(group).issubset(done) for index in group]


def read_records(path):
    """Settings and whole records of a records file; a cut last line is left out.

    Raises:
        UserError: the file is missing or is not a records file.
    """
    try:
        text = pathlib.Path(path).read_text()
        settings, *records = (json.loads(line) for line in text.split("\n")[:-1])
        if not {"report", "pairs", "labels"} <= set(settings) or not all(
            {"index", "stages"} <= set(r) for r in records
        ):
            raise ValueError("settings or values are missing")
        return settings, records
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not a file of evaluation records; give the .records files of eval.py") from error


def replace_file(path, text):
    """Write a file such that at any moment there is the old one or the whole new one."""
    new = pathlib.Path(f"{path}.new")
    new.write_text(text)
    os.replace(new, path)


def as_read(settings):
    """Settings as they come back from JSON."""
    return json.loads(json.dumps(settings))


def difference(old, new, prefix=""):
    """The first entry in which two settings differ, as a text "key old, not new"; None where there is none."""
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found = difference(before, after, f"{prefix}{key}.")
        else:
            found = f"{prefix}{key} {before!r}, not {after!r}" if before != after else None
        if found:
            return found
    return None


def _json_value(value):
    """A NumPy value of up to one dimension as JSON has it: NaN becomes None."""
    if value.ndim:
        return [_json_value(v) for v in value]
    return float(value) if math.isfinite(value) else None
