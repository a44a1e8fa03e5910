"""The curves of a run: what TensorBoard shows of it."""

import pathlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import tensorflow as tf

import files

# A record of TensorFlow: length of the content and its check sum, the content, the content's check sum; in bytes.
_LENGTH, _HEAD, _TAIL = 8, 12, 4


class Curves:
    """Writer of a run's events; what cannot be written is a UserError.

    TensorFlow reports a full disk as exhausted resources, as it does exhausted memory, or not at all: so the records
    are looked at once they are written.

    Args:
        folder: where TensorBoard looks for the run; made where it is not there.

    Raises:
        UserError: it cannot be written, here or in a method.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        with self._writing():
            before = set(folder.glob("*"))
            self._writer = tf.summary.create_file_writer(str(folder))
            (self._file,) = set(folder.glob("*")) - before
            self._whole = 0  # bytes that are known to be whole records

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """Write values of a step, by name; None is left out."""
        known = {name: value for name, value in values.items() if value is not None}
        with self._writing(), self._writer.as_default(step):
            for name, value in known.items():
                tf.summary.scalar(name, value)
        if known:
            self._check()

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Write pictures of a step, by name: uint8 [H, W, 1 or 3]."""
        with self._writing(), self._writer.as_default(step):
            for name, picture in pictures.items():
                tf.summary.image(name, picture[None])
        if pictures:
            self._check()

    def _check(self) -> None:
        """See that the file has grown by whole records, which `as_default` has handed to the system."""
        with self._writing(), self._file.open("rb") as file:
            size = file.seek(0, 2)
            place = file.seek(self._whole)
            while place < size:
                head = file.read(_HEAD)
                place = file.seek(place + _HEAD + int.from_bytes(head[:_LENGTH], "little") + _TAIL)
            if place > size or size == self._whole:
                raise RuntimeError(f"wrote only {size - self._whole} bytes of a record")
            self._whole = size

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with files.writing(self.folder, tf.errors.OpError, RuntimeError):
            yield
