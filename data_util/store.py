"""The scans of a data set, whatever files they are in: the id "file/key" -> `Scan`, checked."""

import difflib
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_util.config import DataFile
from data_util.hdf5 import Scan
from data_util.names import check_name, plain
from data_util.readers import Reader, open_file
from errors import UserError

INT32 = np.iinfo(np.int32)
ROUNDED = 1e-3  # what a label that is stored as a float may differ from a whole number


@dataclass(frozen=True)
class Description:
    """What a scan holds, without its large arrays.

    Attributes:
        shape: (X, Y, Z) of its volume.
        dtype: type of the volume's numbers.
        landmarks: number of its landmarks, missing ones included; 0 where it has none, or all are missing.
        lost_landmarks: number of landmarks where each of them is stored as NaN, else 0.
        has_segmentation: whether it has one.
        has_mask: whether it has a mask of what training compares.
        has_spacing: whether the size of its voxels is known.
        flow_source: id of the scan that it was made of by a known flow, or None.
        doubts: reasons to look at the scan, a text, or None.
        without_checksum: number of its arrays in whose file damage can go unnoticed.
    """

    shape: tuple[int, int, int]
    dtype: np.dtype
    landmarks: int
    lost_landmarks: int
    has_segmentation: bool
    has_mask: bool
    has_spacing: bool
    flow_source: str | None
    doubts: str | None
    without_checksum: int = 0


class ScanStore:
    """Reads scans from the files of a data set, which are opened when they are first needed.

    It may be used by several threads. One lock guards all of it: the HDF5 library reads one array at a time in a
    process anyway, and under the lock no scan is decoded twice at the same time.

    Args:
        files: file key -> `DataFile`, or the path of an HDF5 file. An id's part before the first "/" is its file key;
            where there is no such file, the whole id is a key in the file whose file key is "/".
        cache_bytes: limit of the memory for arrays; the least recently used ones are dropped first.

    Raises:
        UserError: (by every method) an unknown file key, a missing or damaged file, a missing scan, or a scan that is
            not as `data_util.readers` describes it.
    """

    def __init__(self, files: Mapping[str, DataFile | Path], cache_bytes: int = 2**30) -> None:
        self._files = {key: file if isinstance(file, DataFile) else DataFile(Path(file)) for key, file in files.items()}
        self._cache_bytes = cache_bytes
        self._lock = threading.RLock()
        self._readers: dict[Path, Reader] = {}
        self._described: dict[str, tuple[Description, np.ndarray | None, np.ndarray | None]] = {}
        # (id, member) -> array, the most recently used last.
        self._arrays: OrderedDict[tuple[str, str], np.ndarray] = OrderedDict()
        self._array_bytes = 0

    def close(self) -> None:
        """Close the files and forget what was read; the store can still be used."""
        with self._lock:
            for reader in self._readers.values():
                reader.close()
            self._readers.clear()
            self._described.clear()
            self._arrays.clear()
            self._array_bytes = 0

    def locate(self, scan_id: str) -> tuple[DataFile, str]:
        """Return the file of a scan, and its key in it; neither needs to exist."""
        return self._locate(scan_id)[1:]

    def exists(self, scan_id: str) -> bool:
        """Return whether a scan's file has something under its key."""
        file, key = self.locate(scan_id)
        with self._lock:
            return self._reader(file).exists(key)

    def ids(self, file_key: str) -> list[str]:
        """Return the ids of all scans in the file of that key, in natural order."""
        with self._lock:
            keys = self._reader(self._files[file_key]).keys()
        return [_id(file_key, key) for key in sorted(keys, key=natural_order)]

    def expand(self, entries: Iterable[str]) -> list[str]:
        """Return the ids that a list of ids and globs names, each once.

        Ids keep their order; a glob gives the scans that it matches in natural order (1, 2, 10), `*` within one level.

        Raises:
            UserError: an id does not exist or cannot be one, or a glob matches nothing.
        """
        ids: dict[str, None] = {}
        for entry in entries:
            check_name(entry, "scan")
            named = self._glob(entry) if any(c in entry for c in "*?[") else [self._existing(entry)]
            for scan_id in named:
                check_name(scan_id, f"{self.locate(scan_id)[0].path}: scan")
            ids.update(dict.fromkeys(named))
        return list(ids)

    def describe(self, scan_id: str) -> Description:
        """Return what a scan holds; checks that its members fit together, and reads no large array."""
        return self._describe(scan_id)[0]

    def read(self, scan_id: str, segmentation: bool = True, flow: bool = False, mask: bool = False) -> Scan:
        """Return the scan of that id; segmentation, flow and mask are read only where they are asked for.

        Raises:
            UserError: the volume has NaN or infinite values, the segmentation others than labels, or the mask NaN.
        """
        with self._lock:
            description, points, spacing = self._describe(scan_id)
            return Scan(
                id=scan_id,
                volume=self._array(scan_id, "volume"),
                segmentation=(
                    # The cache keeps the file's type: in the published files a quarter of this.
                    self._array(scan_id, "segmentation").astype(np.int32)
                    if segmentation and description.has_segmentation
                    else None
                ),
                points=points,
                spacing=spacing,
                flow=self._array(scan_id, "flow") if flow and description.flow_source else None,
                flow_source=description.flow_source,
                mask=self._array(scan_id, "mask") if mask and description.has_mask else None,
            )

    def _locate(self, scan_id: str) -> tuple[str, DataFile, str]:
        file_key, _, key = scan_id.partition("/")
        if file_key not in self._files:
            file_key, key = "/", scan_id
        if file_key not in self._files:
            known = ", ".join(self._files)
            raise UserError(f"scan '{scan_id}': its part before '/' must be one of the config's files ({known})")
        if not key.strip("/"):
            raise UserError(f"scan '{scan_id}' has no key after the file; write it as file/key")
        return file_key, self._files[file_key], key

    def _reader(self, file: DataFile) -> Reader:
        if file.path not in self._readers:
            if not file.path.exists():
                raise UserError(
                    f"{file.path}: no such {file.type} file; download or make it, or mend its path in the config"
                )
            self._readers[file.path] = open_file(file.path, file.type, file.trusted)
        return self._readers[file.path]

    def _existing(self, scan_id: str) -> str:
        _, file, key = self._locate(scan_id)
        with self._lock:
            reader = self._reader(file)
            if reader.exists(key):
                return scan_id
            known = reader.keys()
        near = [plain(name) for name in difflib.get_close_matches(key, known, n=5, cutoff=0)]
        raise UserError(
            f"scan '{scan_id}': no key '{key}' in {file.path}; the nearest there are {', '.join(near) or 'none'}: "
            "mend the id or get the right file"
        )

    def _glob(self, pattern: str) -> list[str]:
        file_key, file, key_pattern = self._locate(pattern)
        with self._lock:
            keys = self._reader(file).matching(key_pattern)
        if not keys:
            raise UserError(f"'{pattern}' matches no scan in {file.path}; mend the pattern or get the right file")
        return [_id(file_key, key) for key in sorted(keys, key=natural_order)]

    def _members(self, scan_id: str) -> tuple[Mapping[str, Any], str]:
        """A scan's members, and how messages name the scan."""
        file, key = self.locate(self._existing(scan_id))
        return self._reader(file).members(key), f"{file.path}, scan '{key}'"

    def _describe(self, scan_id: str) -> tuple[Description, np.ndarray | None, np.ndarray | None]:
        with self._lock:
            if scan_id not in self._described:
                with _reader_errors(*self.locate(scan_id)):
                    self._described[scan_id] = _describe(*self._members(scan_id))
            return self._described[scan_id]

    def _array(self, scan_id: str, name: str) -> np.ndarray:
        """A large array of a scan, from the cache where it is there."""
        if (scan_id, name) in self._arrays:
            self._arrays.move_to_end((scan_id, name))
            return self._arrays[scan_id, name]
        with _reader_errors(*self.locate(scan_id)):
            members, where = self._members(scan_id)
            array = np.asarray(members[name])
            if name == "mask" and array.shape != members["volume"].shape:  # only where training asks for it
                raise UserError(f"{where}: mask is {array.shape}; it must be as its volume, {members['volume'].shape}")
        array = _CHECKED[name](array, where)
        array.flags.writeable = False
        self._arrays[scan_id, name] = array
        self._array_bytes += array.nbytes
        while self._array_bytes > self._cache_bytes:
            self._array_bytes -= self._arrays.popitem(last=False)[1].nbytes
        return array


@contextmanager
def _reader_errors(file: DataFile, key: str) -> Iterator[None]:
    """Say which scan a reader of one's own failed at; HDF5's says what is wrong itself."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if file.type == "HDF5":
            raise
        reason = (str(error) or "no message").splitlines()[0]
        raise UserError(
            f"{file.path}, scan '{key}': the {file.type} reader failed ({type(error).__name__}: {reason})"
        ) from error


def report_id(scan_id: str) -> str:
    """Return the name of a scan in reports and batches.

    Example:
        >>> report_id("lits/7")
        'lits_7'
    """
    return scan_id.replace("/", "_")


def natural_order(key: str) -> tuple[list[tuple[int, str]], str]:
    """Sort key under which numbers within names count as numbers.

    Example:
        >>> sorted(["S10", "S2", "S1"], key=natural_order)
        ['S1', 'S2', 'S10']
    """
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", key)], key


def _id(file_key: str, key: str) -> str:
    return key if file_key == "/" else f"{file_key}/{key}"


# ---------------------------------------------------------------------------------------- checks of what was stored


def _describe(members: Mapping[str, Any], where: str) -> tuple[Description, np.ndarray | None, np.ndarray | None]:
    """Check a scan's members and return its Description, points and spacing."""
    volume = _numbers(members, "volume", where)
    if volume is None:
        raise UserError(f"{where}: has no 'volume', which every scan must have")
    if len(volume.shape) != 3 or 0 in volume.shape:
        size = "x".join(map(str, volume.shape)) or "a single number"
        raise UserError(f"{where}: volume is {size}; it must have voxels along three axes, x, y and z")
    segmentation = _numbers(members, "segmentation", where)
    if segmentation is not None and segmentation.shape != volume.shape:
        raise UserError(f"{where}: segmentation is {segmentation.shape}; it must be as its volume, {volume.shape}")
    points, lost = _points(members, where)
    spacing = _spacing(members, where)
    description = Description(
        shape=volume.shape,
        dtype=volume.dtype,
        landmarks=0 if points is None else len(points),
        lost_landmarks=lost,
        has_segmentation=segmentation is not None,
        has_mask="mask" in members,
        has_spacing=spacing is not None,
        flow_source=_flow_source(members, volume.shape, where),
        doubts=" ".join(_text(members.get("doubts")).split()) or None,
        without_checksum=sum(getattr(member, "has_checksum", True) is False for member in members.values()),
    )
    return description, points, spacing


def _numbers(members: Mapping[str, Any], name: str, where: str) -> Any:
    """The array of numbers of that name, not read yet; None where the scan has none."""
    if name not in members:
        return None
    member = members[name]
    if getattr(getattr(member, "dtype", None), "kind", None) not in ("b", "i", "u", "f"):
        raise UserError(f"{where}: '{name}' is no array of numbers; write it again as a dataset of numbers")
    return member


def _points(members: Mapping[str, Any], where: str) -> tuple[np.ndarray | None, int]:
    """Landmarks float32 [L,3] with NaN for missing ones, or None; and their number where all are stored as NaN.

    A missing one is stored as NaN or, in the published files, as negative numbers.
    """
    member = _numbers(members, "point", where)
    if member is None or 0 in member.shape:
        return None, 0
    if len(member.shape) != 2 or member.shape[1] != 3:
        raise UserError(f"{where}: point is {member.shape}; it must be (number of landmarks, 3)")
    with np.errstate(over="ignore"):  # what is too large becomes infinite, which is an error
        points = np.array(member, np.float32)
    if np.isinf(points).any():
        raise UserError(f"{where}: point has infinite values; store voxel coordinates [x, y, z], NaN for a missing one")
    is_nan = np.isnan(points).any(axis=1)
    points[is_nan | (points < 0).all(axis=1)] = np.nan
    return None if np.isnan(points).all() else points, len(points) if is_nan.all() else 0


def _spacing(members: Mapping[str, Any], where: str) -> np.ndarray | None:
    """Size of a voxel in mm, float64 [3], or None where it is not known."""
    if "spacing" not in members:
        return None
    stored = np.asarray(members["spacing"])
    if stored.shape != (3,) or stored.dtype.kind not in "iuf" or not (np.isfinite(stored) & (stored > 0)).all():
        raise UserError(f"{where}: spacing is {stored.tolist()}; it must be three positive numbers, in mm")
    return stored.astype(np.float64)


def _flow_source(members: Mapping[str, Any], shape: tuple[int, ...], where: str) -> str | None:
    """Id of the scan that a known flow deformed into this one; None where there is no flow."""
    flow = _numbers(members, "flow", where)
    if flow is None:
        return None
    if flow.shape != (*shape, 3):
        raise UserError(f"{where}: flow is {flow.shape}; it must be as its volume with 3 channels")
    source = _text(members.get("flow_source"))
    if not source:
        raise UserError(f"{where}: flow has no attribute 'source'; it must name the scan that was deformed")
    return source


def _text(value: Any) -> str:
    """A text that a file holds as str, bytes or an array of one of them; "" for anything else."""
    value = value.item() if isinstance(value, (np.ndarray, np.generic)) and value.size == 1 else value
    value = value.decode(errors="replace") if isinstance(value, bytes) else value
    return value if isinstance(value, str) else ""


def _check_volume(volume: np.ndarray, where: str) -> np.ndarray:
    wrong = np.count_nonzero(~np.isfinite(volume)) if volume.dtype.kind == "f" else 0
    if wrong:
        raise UserError(f"{where}: volume has {wrong} voxels that are NaN or infinite; write it again without")
    return volume


def _check_labels(labels: np.ndarray, where: str) -> np.ndarray:
    """Labels as int32 or a smaller type; those stored as floats are rounded where they are nearly whole numbers."""
    if labels.dtype.kind == "f":
        rounded = np.rint(labels)
        with np.errstate(invalid="ignore"):  # of infinite ones, which are wrong like NaN
            wrong = ~(np.abs(labels - rounded) <= ROUNDED)
        if wrong.any():
            raise UserError(
                f"{where}: segmentation has values that are not whole numbers, such as {float(labels[wrong][0])!r}; "
                "store the values of labels"
            )
        labels = rounded
    if labels.dtype.kind == "f" or labels.dtype.itemsize >= 4:
        for value in (int(labels.min()), int(labels.max())):
            if not INT32.min <= value <= INT32.max:
                raise UserError(
                    f"{where}: segmentation has the value {value}; labels are whole numbers up to {INT32.max}: "
                    "give them smaller ones"
                )
        labels = labels.astype(np.int32)
    return labels


def _check_mask(mask: np.ndarray, where: str) -> np.ndarray:
    """Where a mask is not 0, bool."""
    if mask.dtype.kind == "f" and np.isnan(mask).any():
        raise UserError(f"{where}: mask has NaN; write it again with 0 and 1")
    return mask != 0


def _check_flow(flow: np.ndarray, where: str) -> np.ndarray:
    if np.isinf(flow).any():
        raise UserError(f"{where}: flow has infinite values; write it again, NaN where it is not known")
    return np.asarray(flow, np.float32)


_CHECKED = {"volume": _check_volume, "segmentation": _check_labels, "mask": _check_mask, "flow": _check_flow}
