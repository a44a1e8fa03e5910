"""How the files of a data set are read: `Reader`, and the table `READERS` of the types that a config may name.

A config says with `files.<key>.type` how each of its files is read. A reader of your own is a class derived from
`Reader` and a row in the table; docs/extending.md shows one. What is read is checked alike for all types, in
`data_util.store`.
"""

import abc
import importlib
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any


class Reader(abc.ABC):
    """Reads the scans of one file of a data set; what a file is depends on the type: it may also be a folder.

    A reader is used by one thread at a time. `keys` and `members` are what a type of your own has to define.

    Attributes:
        path: the file.
        trusted: whether the user trusts the file (`--trust`), so that it may have values read from files elsewhere.
    """

    trusted = False

    def __init__(self, path: Path) -> None:
        self.path = path

    @abc.abstractmethod
    def keys(self) -> list[str]:
        """Return the keys of all scans in the file, in any order; a "/" in a key makes levels, as in folders."""

    @abc.abstractmethod
    def members(self, key: str) -> Mapping[str, Any]:
        """Return what the file has of one scan; other names than these are ignored.

        Args:
            key: one of the keys for which `exists` is true.

        Returns:
            Name -> value. Arrays may be anything with `shape` and `dtype` that `numpy.asarray` reads, so that a large
            one is read only when it is needed:
                volume        numbers [X,Y,Z], 0..255; the only one that every scan must have.
                segmentation  whole numbers [X,Y,Z]: 0 and 255 for a mask, or the values of labels.
                mask          numbers [X,Y,Z], 0 where training is not to compare the scan with another.
                point         [L,3] landmarks in voxels, counted from 0; NaN for a missing one.
                spacing       three numbers, the size of a voxel along x, y, z in mm.
                flow          [X,Y,Z,3] in voxels where the scan is a known deformation of another one:
                              this scan(p) = source(p + flow(p)).
                flow_source   the id of that other scan, "file/key".
                doubts        a text, where there are reasons to look at the scan.

        Raises:
            UserError: the scan cannot be read.
        """

    def exists(self, key: str) -> bool:
        """Return whether the file has something under a key."""
        return key in self.keys()

    def matching(self, pattern: str) -> list[str]:
        """Return the keys that a pattern with `*`, `?` and `[..]` matches; these stay within one level of a key."""
        parts = pattern.split("/")
        return [
            key
            for key in self.keys()
            if len(levels := key.split("/")) == len(parts) and all(map(fnmatchcase, levels, parts))
        ]

    def close(self) -> None:  # noqa: B027  Most have nothing to close.
        """Close the file; the reader is not used afterwards."""


# Type in a config -> what opens a file of that type: a class derived from Reader, or where it is.
READERS: dict[str, Callable[[Path], Reader] | str] = {"HDF5": "data_util.hdf5:HDF5Reader"}


def open_file(path: Path, kind: str, trusted: bool = False) -> Reader:
    """Open a file of a data set by the reader of its type, which is imported now if it is not yet."""
    reader = READERS[kind]
    if isinstance(reader, str):
        module, _, name = reader.partition(":")
        reader = getattr(importlib.import_module(module), name)
    opened = reader(path)
    opened.trusted = trusted
    return opened
