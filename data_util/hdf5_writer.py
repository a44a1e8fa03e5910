"""HDF5 files of scans, written whole or not at all, with a checksum for all that is in them.

Arrays carry a checksum of each chunk (Fletcher-32), and the newer format of the file (HDF5 1.10 and later) one of
everything else, so that damage is an error when a scan is read.

The HDF5 library cannot close a file whose last parts do not fit on the disk: it ends the whole process. So it writes
into a `_Sink`, which never fails, and which is asked for what went wrong after every scan.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np

from data_util.hdf5 import FLOW_SOURCE, SPACING, Scan, hdf5_errors
from errors import UserError
from files import whole_file

FORMAT = ("v110", "v110")
SLICES = 8  # of a chunk


@contextmanager
def new_file(path: Path, copy_of: Path | None = None) -> Iterator["NewFile"]:
    """Write a new HDF5 file: it gets its name when the block has ended without an error, and replaces what was there.

    Args:
        path: the file's name in the end; its folder must be there.
        copy_of: the file to begin with a copy of; None to begin with nothing.

    Yields:
        The file.

    Raises:
        UserError: it cannot be written.
    """
    with whole_file(path) as unfinished:
        if copy_of is not None:
            shutil.copyfile(copy_of, unfinished)
        with open(unfinished, "w+b" if copy_of is None else "r+b", buffering=0) as file:
            sink = _Sink(file)
            with h5py.File(sink, "w" if copy_of is None else "r+", libver=FORMAT) as hdf5:
                yield NewFile(hdf5, sink)
            sink.check()


class NewFile:
    """An HDF5 file of scans that is being written.

    Attributes:
        attributes: those of the file itself.
    """

    def __init__(self, file: h5py.File, sink: "_Sink") -> None:
        self._file, self._sink = file, sink
        self.attributes = file.attrs

    def write_scan(self, key: str, scan: Scan, attributes: Mapping[str, Any] | None = None) -> None:
        """Write a scan.

        Args:
            key: the scan's key, under which there is nothing yet.
            scan: the scan; its `id` is not written.
            attributes: further attributes of its group, such as `doubts`.

        Raises:
            OSError: the file cannot be written.
        """
        group = self._file.create_group(key)
        _add(group, "volume", scan.volume)
        if scan.segmentation is not None:
            _add(group, "segmentation", scan.segmentation)
        if scan.mask is not None:
            _add(group, "mask", scan.mask)
        if scan.points is not None:
            _add(group, "point", np.asarray(scan.points, dtype=np.float32))
        if scan.spacing is not None:
            group.attrs[SPACING] = np.asarray(scan.spacing, dtype=np.float64)
        if scan.flow is not None:
            _add(group, "flow", scan.flow).attrs[FLOW_SOURCE] = scan.flow_source
        group.attrs.update(attributes or {})
        self._sink.check()

    def copy_scan(self, key: str, path: Path, key_there: str) -> None:
        """Copy a scan, with all that is in its group, from another file.

        Raises:
            OSError: the file cannot be written.
            UserError: the other one cannot be read.
        """
        with hdf5_errors(path), h5py.File(path, "r") as other:
            other.copy(key_there, self._file, name=key)
        self._sink.check()

    def replace_array(self, key: str, name: str, array: np.ndarray) -> None:
        """Put an array in place of one of a scan's arrays, stored and described as the old one was.

        Raises:
            OSError: the file cannot be written.
            UserError: what is replaced lies in another file, to which this one has a link.
        """
        parts = [*key.strip("/").split("/"), name]
        for k in range(len(parts)):
            if isinstance(self._file.get("/".join(parts[: k + 1]), getlink=True), h5py.ExternalLink):
                raise UserError(f"scan '{key}': its '{parts[k]}' is a link into another file; mend that file")
        group = self._file[key]
        old = group[name]
        attributes = dict(old.attrs)
        options = {"compression": old.compression, "compression_opts": old.compression_opts}
        del group[name]
        _add(group, name, array, **options).attrs.update(attributes)
        self._sink.check()


def _add(
    group: h5py.Group, name: str, array: np.ndarray, compression: str | None = "gzip", compression_opts: Any = 4
) -> h5py.Dataset:
    if array.size == 0:  # nothing that could be damaged
        return group.create_dataset(name, data=array)
    return group.create_dataset(
        name,
        data=array,
        chunks=(min(SLICES, array.shape[0]), *array.shape[1:]),
        compression=compression,
        compression_opts=compression_opts,
        fletcher32=True,
    )


class _Sink:
    """A file as HDF5 needs it that takes every write. From the first one that fails on it keeps what it is given.

    Args:
        file: the file, without a buffer.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._place = file, 0
        self._failure: OSError | None = None
        self._kept: list[tuple[int, bytes]] = []  # (place, what belongs there)

    def check(self) -> None:
        """Raise what went wrong so far.

        Raises:
            OSError: as the file raised it.
        """
        if self._failure is not None:
            raise self._failure

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place."""
        if whence == os.SEEK_END:
            ends = [place + len(data) for place, data in self._kept]
            offset += max([self._file.seek(0, os.SEEK_END), *ends])
        self._place = offset + self._place * (whence == os.SEEK_CUR)
        return self._place

    def tell(self) -> int:
        """Return the place."""
        return self._place

    def write(self, data: Any) -> int:
        """Write all of the data."""
        content = memoryview(data).cast("B")
        try:
            self.check()
            self._file.seek(self._place)
            left = content
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            self._failure = error
            self._kept.append((self._place, bytes(content)))
        self._place += len(content)
        return len(content)

    def readinto(self, buffer: Any) -> int:
        """Read what was written, 0 where nothing was."""
        content = memoryview(buffer).cast("B")
        content[:] = bytes(len(content))
        self._file.seek(self._place)
        self._file.readinto(content)  # type: ignore[attr-defined]
        for place, data in self._kept:
            first, last = max(place, self._place), min(place + len(data), self._place + len(content))
            if first < last:
                content[first - self._place : last - self._place] = data[first - place : last - place]
        self._place += len(content)
        return len(content)

    def read(self, size: int) -> bytes:
        """Read as `readinto` does."""
        content = bytearray(size)
        self.readinto(content)
        return bytes(content)

    def truncate(self, size: int) -> int:
        """Cut or extend the file."""
        try:
            self._file.truncate(size)
        except OSError as error:
            self._failure = self._failure or error
        return size

    def flush(self) -> None:
        """Nothing is held back."""
