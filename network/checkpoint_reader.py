"""The variables of a checkpoint as its file has them; TensorFlow checks each against its checksum."""

import concurrent.futures
import pathlib
from collections.abc import Iterable, Iterator

import numpy as np
import tensorflow as tf

from errors import UserError, first_line

# What TensorFlow's readers raise at a file that is missing, damaged or cut off.
_ERRORS = (tf.errors.OpError, ValueError, IndexError, RuntimeError)
# So many variables are read in one go, and so many such parts at once.
_PART, _THREADS = 16, 4


class CheckpointReader:
    """Reads the variables of a checkpoint, several at a time and ahead of their use; a context that ends the reading.

    Args:
        prefix: FOLDER/model-<step>.

    Attributes:
        prefix: the same.
        shapes: name -> shape of every variable.

    Raises:
        UserError: the file is damaged; so do the methods.
    """

    def __init__(self, prefix: str | pathlib.Path) -> None:
        self.prefix = prefix
        try:
            reader = tf.train.load_checkpoint(str(prefix))
        except _ERRORS as error:
            raise UserError(damaged(prefix, error)) from error
        self.shapes: dict[str, list[int]] = reader.get_variable_to_shape_map()
        self._types = reader.get_variable_to_dtype_map()
        self._pool = concurrent.futures.ThreadPoolExecutor(_THREADS)
        self._begun: dict[str, concurrent.futures.Future[dict[str, tf.Tensor]]] = {}

    def __enter__(self) -> "CheckpointReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def begin(self, names: Iterable[str]) -> None:
        """Begin to read variables that will be asked for, while the caller does something else."""
        names = [name for name in names if name not in self._begun]
        for k in range(0, len(names), _PART):
            part = names[k : k + _PART]
            self._begun |= dict.fromkeys(part, self._pool.submit(self._part, part))

    def read(self, name: str) -> np.ndarray:
        """A variable's value; float32 where it was saved as float16."""
        [(_, value)] = self.read_all([name])
        return value.numpy()

    def read_all(self, names: Iterable[str]) -> Iterator[tuple[str, tf.Tensor]]:
        """(name, value) of several variables, in order; a variable that takes a value copies nothing."""
        names = list(names)
        for k, name in enumerate(names):
            if k % _PART == 0:
                self.begin(names[k : k + _THREADS * _PART])  # no more, as each takes memory until it is asked for
            yield name, self._begun.pop(name).result()[name]

    def _part(self, names: list[str]) -> dict[str, tf.Tensor]:
        """Variables by name."""
        try:
            with tf.device("CPU:0"):
                values = tf.raw_ops.RestoreV2(
                    prefix=str(self.prefix),
                    tensor_names=names,
                    shape_and_slices=[""] * len(names),
                    dtypes=[self._types.get(name, tf.float32) for name in names],  # a name that it lacks is an error
                )
                values = [tf.cast(v, tf.float32) if v.dtype == tf.float16 else v for v in values]  # of `save_weights`
                return dict(zip(names, values, strict=True))
        except tf.errors.ResourceExhaustedError:
            raise
        except _ERRORS as error:
            raise UserError(damaged(self.prefix, error)) from error


def damaged(prefix: str | pathlib.Path, error: Exception) -> str:
    """What to say of a checkpoint that cannot be read."""
    reason = first_line(error)
    return f"checkpoint {prefix} cannot be read ({reason}); copy or download it again, or name another with FOLDER:STEP"
