"""The layout of HDF5 files of scans: `Scan` in memory, and how it is read from a file; `hdf5_writer` writes them.

A scan is a group; its name is the scan's key. Members of a group that are not listed here are ignored.

    volume        dataset [X,Y,Z], 0..255
    segmentation  dataset [X,Y,Z], whole numbers; optional
    mask          dataset [X,Y,Z], 0 where training is not to compare the scan with another; optional
    point         dataset [L,3], landmarks in voxels; optional
    spacing       three numbers, an attribute of the group or a dataset, mm; optional
    flow          dataset [X,Y,Z,3] in voxels, with the id of its source in the attribute `source`; optional
    doubts        attribute of the group, a text: reasons to look at the scan; optional

`data_util.build` adds attributes that are not read with a scan. Of a group:

    source        the image's file name
    crop          what was cropped to, one of `scans.view.CROPS`
    window        (level, width) of the grey values that became 0..255
    affine        [4,4], from places (x, y, z, 1) in the template of --align to places in the scan, mm in LPS
    size, spacing, origin, direction, and the same with source_ before it
                  the frames of the volume and of the scan, as `scans.frame.Frame.save` writes them

Of the file:

    made_by       a digest of the command and of the scans' files, by which a finished build knows its own set
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from data_util.names import plain
from data_util.readers import Reader
from errors import UserError

ARRAYS = ("volume", "segmentation", "mask", "point", "flow")
SPACING, FLOW_SOURCE, DOUBTS = "spacing", "source", "doubts"
SOURCE, CROP, WINDOW, AFFINE, MADE_BY = "source", "crop", "window", "affine", "made_by"


@dataclass(frozen=True, eq=False)
class Scan:
    """One scan of a data set; what it lacks, or was not asked for, is None.

    The arrays of a scan that was read may be shared with other readers: do not write to them.

    Attributes:
        volume: [X,Y,Z], 0..255; uint8 where this project makes it, else of the file's type.
        segmentation: [X,Y,Z], 0 and 255 for a mask, or the values of labels; int32 where it was read.
        points: float32 [L,3], landmarks in this scan's voxels; a missing one is NaN.
        spacing: size of a voxel along x, y, z in mm.
        flow: [X,Y,Z,3], in voxels, on this scan's grid: this scan(p) = source(p + flow(p)).
        flow_source: id of that source scan, such as "phantom/3".
        id: "file/key"; None where the scan is not in a file yet.
        mask: [X,Y,Z], 0 where training is not to compare the scan with another.
    """

    volume: np.ndarray
    segmentation: np.ndarray | None = None
    points: np.ndarray | None = None
    spacing: np.ndarray | tuple[float, float, float] | None = None
    flow: np.ndarray | None = None
    flow_source: str | None = None
    id: str | None = None
    mask: np.ndarray | None = None


class HDF5Reader(Reader):
    """Reads the scans of an HDF5 file; see the layout above.

    Raises:
        UserError: the file is not there, or is no HDF5 file that can be read. So do the methods where the file is
            damaged, or a scan is not as the layout says.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with hdf5_errors(path):
            self._file = h5py.File(path, "r")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def keys(self) -> list[str]:
        """Return the paths of all groups that have a volume."""
        found = []

        def visit(name: str | bytes, item: h5py.Group | h5py.Dataset) -> None:
            if isinstance(item, h5py.Group) and "volume" in item:
                found.append(_text(name))

        with hdf5_errors(self.path):
            self._file.visititems(visit)
        return found

    def exists(self, key: str) -> bool:
        """Return whether the file has anything under that path."""
        with hdf5_errors(self.path):
            return key in self._file

    def matching(self, pattern: str) -> list[str]:
        """Return the paths of groups that a pattern matches, whether they have a volume or not."""
        matches = [""]
        with hdf5_errors(self.path):
            for part in pattern.split("/"):
                matches = [
                    f"{parent}/{name}".lstrip("/")
                    for parent in matches
                    for name in map(_text, self._file[parent] if parent else self._file)
                    if fnmatchcase(name, part) and self._file.get(f"{parent}/{name}", getclass=True) is h5py.Group
                ]
        return matches

    def members(self, key: str) -> dict[str, Any]:
        """Return the arrays of a scan, which are read when they are used, and its attributes."""
        where = f"{self.path}, scan '{key}'"
        with hdf5_errors(self.path):
            group = self._file[key]
            if not isinstance(group, h5py.Group):
                raise UserError(f"{where}: is a dataset; a scan must be a group with a dataset 'volume'")
            if "volume" not in group:
                have = ", ".join(plain(_text(name)) for name in group) or "nothing"
                raise UserError(
                    f"{where}: no dataset 'volume' (it has {have}); a scan must be a group with a dataset 'volume'"
                )
            self._check_place(group, f"{where}: the scan")
            arrays = {}
            for name in (*ARRAYS, SPACING):
                if name in group:
                    self._check_place(group[name], f"{where}: '{name}'")
                    arrays[name] = _Array(group[name], name, where)
            attributes = {name: group.attrs[name] for name in (SPACING, DOUBTS) if name in group.attrs}
            if "flow" in arrays and FLOW_SOURCE in group["flow"].attrs:
                attributes["flow_source"] = group["flow"].attrs[FLOW_SOURCE]
        return attributes | arrays

    def _check_place(self, item: h5py.Group | h5py.Dataset, where: str) -> None:
        """Refuse what would be read from another file than the user gave: a file may name any of the user's."""
        if isinstance(item, h5py.Dataset) and item.external:
            raise UserError(
                f"{where} has its values in another file ({plain(str(item.external[0][0]))}), which may be any; get "
                "them as values within the HDF5 file"
            )
        if self.trusted:
            return
        other, folder = Path(os.path.abspath(item.file.filename)), Path(os.path.abspath(self.path)).parent
        if not other.is_relative_to(folder):
            what = f"is a link to {other}, outside the folder of {self.path}"
        elif isinstance(item, h5py.Dataset) and _maps_files(item):
            what = "is put together of parts of other files (a virtual dataset)"
        else:
            return
        raise UserError(f"{where} {what}; get it as values within the HDF5 file, or give --trust if you trust the file")


def _maps_files(dataset: h5py.Dataset, seen: frozenset[str] = frozenset()) -> bool:
    """Whether a dataset is virtual and has values of other files, also by way of others in its own."""
    if not dataset.is_virtual:
        return bool(dataset.external)
    for source in dataset.virtual_sources():
        name = source.dset_name
        if source.file_name != "." or "%" in name or name in seen:
            return True
        if name in dataset.file and _maps_files(dataset.file[name], seen | {name}):
            return True
    return False


class _Array:
    """A dataset of numbers that is read when NumPy asks for its values."""

    def __init__(self, dataset: h5py.Dataset, name: str, where: str) -> None:
        if not isinstance(dataset, h5py.Dataset):
            raise UserError(f"{where}: '{name}' is no array of numbers; write it again as a dataset of numbers")
        if dataset.shape is None:
            raise UserError(f"{where}: '{name}' has no values at all (a null dataspace); write it again, or delete it")
        missing = _missing_filter(dataset)
        if missing is not None:
            raise UserError(
                f"{where}: '{name}' is compressed by {missing}, which this HDF5 library does not have; write the file "
                "again with gzip (h5repack -f GZIP=4), or name the folder of the filter's plugin in HDF5_PLUGIN_PATH"
            )
        self.shape, self.dtype = dataset.shape, dataset.dtype
        self.has_checksum = dataset.size == 0 or dataset.fletcher32
        self._dataset, self._name, self._where = dataset, name, where

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        try:
            with hdf5_errors(Path(self._dataset.file.filename)):
                return np.asarray(self._dataset[()], dtype)
        except MemoryError as error:
            size = "x".join(map(str, self.shape))
            raise UserError(
                f"{self._where}: '{self._name}' is {size} of {self.dtype}, more than the memory holds; is its size "
                "right? Else close other programs, or use a machine with more memory"
            ) from error


def _text(name: str | bytes) -> str:
    """The name of a member; bytes that are no UTF-8, which h5py gives as they are, are written as escapes."""
    return name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else name


def _missing_filter(dataset: h5py.Dataset) -> str | None:
    """Name of a filter that is needed to read a dataset and is not there; None where all are."""
    properties = dataset.id.get_create_plist()
    for k in range(properties.get_nfilters()):
        number, _, _, name = properties.get_filter(k)
        if not h5py.h5z.filter_avail(number):
            return f"the filter {name.decode(errors='replace') or 'without a name'} (number {number})"
    return None


@contextmanager
def hdf5_errors(path: Path) -> Iterator[None]:
    """Turn what goes wrong in the block into a UserError that says what is the matter with the file at `path`.

    HDF5 reports damage as one of several errors, depending on where in the file it is.
    """
    try:
        yield
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        lines = str(error).strip("'\" ").splitlines()
        reason = lines[0] if lines else type(error).__name__
        if isinstance(error, PermissionError):
            raise UserError(f"{path}: may not be read; change its permissions") from error
        if "unable to lock file" in reason:
            raise UserError(
                f"{path}: is locked, most likely because another program is writing it; wait until that has ended "
                "(on a file system without locks, set HDF5_USE_FILE_LOCKING=FALSE)"
            ) from error
        if "already open for write" in reason or "consistency flags" in reason:
            raise UserError(
                f"{path}: is being written, or its writer ended before it closed the file; wait for it, or write the "
                f"file again ({reason})"
            ) from error
        if "component not found" in reason or "can't open file" in reason:
            raise UserError(
                f"{path}: has a link to something that is not there; put the linked file back, or copy what it links "
                f"to into this file ({reason})"
            ) from error
        raise UserError(
            f"{path}: cannot be read as HDF5, perhaps cut off or damaged; get the file again ({reason})"
        ) from error
