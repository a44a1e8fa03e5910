"""Scans in HDF5 files: the id "file/key" -> Scan.

Layout: one group a scan, with `volume` [X,Y,Z] (0..255) and, where known, `segmentation` [X,Y,Z], `point` [L,3],
`spacing` (attribute or dataset, 3 numbers) and `flow` [X,Y,Z,3]. Other members of a group are ignored.
"""

import difflib
import re
import threading
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

import h5py
import numpy as np

from errors import UserError


@dataclass(frozen=True)
class Description:
    """What a scan holds, without its arrays: `landmarks` counts them (0 for none), `flow_source` is as in Scan."""

    shape: tuple[int, ...]
    dtype: np.dtype
    landmarks: int
    has_segmentation: bool
    has_spacing: bool
    flow_source: str | None


@dataclass(frozen=True, eq=False)
class Scan:
    """One scan; what it lacks, or was not asked for, is None. Arrays may be shared with other readers: do not write.

    id:           "file/key".
    volume:       [X,Y,Z], 0..255, in the file's dtype.
    segmentation: int32 [X,Y,Z].
    points:       float32 [L,3], landmarks in this scan's voxel coordinates; a missing one is NaN.
    spacing:      float64 [3], size of a voxel along x, y, z in mm.
    flow:         float32 [X,Y,Z,3], in voxels, on this scan's grid: this scan(p) = source(p + flow(p)).
    flow_source:  id of that source scan.
    """

    id: str
    volume: np.ndarray
    segmentation: np.ndarray | None
    points: np.ndarray | None
    spacing: np.ndarray | None
    flow: np.ndarray | None
    flow_source: str | None


def report_id(scan_id):
    """The name of a scan in reports and batches: "lits/7" -> "lits_7"."""
    return scan_id.replace("/", "_")


class ScanStore:
    """Reads scans from HDF5 files, which are opened when first needed.

    files:       file key -> path. An id's part before the first "/" is its file key; where there is no such file, the
                 whole id is a group's path in the file with key "/".
    cache_bytes: limit of the memory for decoded arrays; the least recently used go first.

    May be used by several threads. One lock guards it all: HDF5 itself reads one array at a time in a process, so
    a handle a thread would gain nothing, and under the lock no scan is ever decoded twice at once.
    Every method raises UserError for an unknown file key, a missing or damaged file, a missing scan or a wrong member.
    """

    def __init__(self, files, cache_bytes=2**30):
        self._files = dict(files)
        self._cache_bytes = cache_bytes
        self._lock = threading.RLock()
        self._handles = {}
        self._described = {}  # id -> (Description, points, spacing), all small
        self._arrays = OrderedDict()  # (id, member) -> array, the most recently used last
        self._array_bytes = 0

    def close(self):
        """Close the files and forget what was read; the store can go on being used."""
        with self._lock:
            for handle in self._handles.values():
                handle.close()
            self._handles.clear()
            self._described.clear()
            self._arrays.clear()
            self._array_bytes = 0

    def locate(self, scan_id):
        """The file and the key in it of a scan: "lits/7" -> (Path, "7"). Neither needs to exist."""
        return self._locate(scan_id)[1:]

    def expand(self, entries):
        """Ids and globs -> list of ids, each once.

        Ids keep their order; a glob gives the groups it matches in natural order (1, 2, 10), `*` within one level.
        An id that does not exist and a glob without a match are UserErrors.
        """
        found = {}
        for entry in entries:
            matches = self._glob(entry) if any(c in entry for c in "*?[") else [self._existing(entry)]
            found.update(dict.fromkeys(matches))
        return list(found)

    def describe(self, scan_id):
        """The scan's Description; checks that its members fit together, and reads no volume."""
        return self._describe(scan_id)[0]

    def read(self, scan_id, segmentation=True, flow=False):
        """The Scan of that id; segmentation and flow are read only where asked for."""
        with self._lock:
            about, points, spacing = self._describe(scan_id)
            return Scan(
                id=scan_id,
                volume=self._array(scan_id, "volume"),
                segmentation=self._labels(scan_id) if segmentation and about.has_segmentation else None,
                points=points,
                spacing=spacing,
                flow=self._array(scan_id, "flow", np.float32) if flow and about.flow_source else None,
                flow_source=about.flow_source,
            )

    def _describe(self, scan_id):
        with self._lock:
            if scan_id not in self._described:
                with self._group(scan_id) as (group, where):
                    self._described[scan_id] = _describe(group, where)
            return self._described[scan_id]

    def _locate(self, scan_id):
        file_key, _, key = scan_id.partition("/")
        if file_key not in self._files:
            file_key, key = "/", scan_id
        if file_key not in self._files:
            known = ", ".join(self._files)
            raise UserError(f"scan '{scan_id}': its part before '/' must be one of the config's files ({known})")
        if not key.strip("/"):
            raise UserError(f"scan '{scan_id}' has no key after the file; write it as file/key")
        return file_key, self._files[file_key], key

    def _open(self, path):
        with self._lock:
            if path not in self._handles:
                if not path.is_file():
                    raise UserError(f"{path}: no such HDF5 file; download or make it, or mend its path in the config")
                with _reading(path):
                    self._handles[path] = h5py.File(path, "r")
            return self._handles[path]

    def _existing(self, scan_id):
        _, path, key = self._locate(scan_id)
        handle = self._open(path)
        with _reading(path):
            if key in handle:
                return scan_id
            parent, _, name = key.rpartition("/")
            siblings = list(handle[parent] if parent and isinstance(handle.get(parent), h5py.Group) else handle)
        near = difflib.get_close_matches(name if parent in handle else key, siblings, n=5, cutoff=0)
        raise UserError(
            f"scan '{scan_id}': no key '{key}' in {path}; the nearest there are {', '.join(near) or 'none'}: "
            "mend the id or get the right file"
        )

    def _glob(self, pattern):
        file_key, path, key = self._locate(pattern)
        handle = self._open(path)
        with _reading(path):
            matches = [""]
            for part in key.split("/"):
                matches = [
                    f"{parent}/{name}".lstrip("/")
                    for parent in matches
                    for name in (handle[parent] if parent else handle)
                    if fnmatchcase(name, part) and isinstance(handle[f"{parent}/{name}"], h5py.Group)
                ]
        if not matches:
            raise UserError(f"'{pattern}' matches no scan in {path}; mend the pattern or get the right file")
        prefix = "" if file_key == "/" else f"{file_key}/"
        return [prefix + match for match in sorted(matches, key=natural_order)]

    @contextmanager
    def _group(self, scan_id):
        _, path, key = self._locate(self._existing(scan_id))
        with _reading(path):
            group = self._open(path)[key]
            where = f"{path}, scan '{key}'"
            if not isinstance(group, h5py.Group):
                raise UserError(f"{where}: is a dataset; a scan must be a group with a dataset 'volume'")
            yield group, where

    def _array(self, scan_id, member, dtype=None):
        """A member's array, from the cache where it is there."""
        name = (scan_id, member)
        if name in self._arrays:
            self._arrays.move_to_end(name)
            return self._arrays[name]
        with self._group(scan_id) as (group, _):
            array = np.asarray(group[member][...], dtype)
        array.flags.writeable = False
        self._arrays[name] = array
        self._array_bytes += array.nbytes
        while self._array_bytes > self._cache_bytes:
            self._array_bytes -= self._arrays.popitem(last=False)[1].nbytes
        return array

    def _labels(self, scan_id):
        """The segmentation as int32; the cache keeps the file's dtype, a quarter of that in the published files."""
        stored = self._array(scan_id, "segmentation")
        if stored.dtype.kind == "f" and not (np.mod(stored, 1) == 0).all():
            path, key = self.locate(scan_id)
            raise UserError(f"{path}, scan '{key}': segmentation has values that are not whole numbers; store labels")
        return stored.astype(np.int32)


@contextmanager
def _reading(path):
    """HDF5 reports damage as one of several errors, depending on what it met; all become one UserError."""
    try:
        yield
    except (OSError, RuntimeError, KeyError) as error:
        reason = str(error).strip("'\" ").splitlines()[0]
        raise UserError(
            f"{path}: cannot be read as HDF5, perhaps cut off or damaged; get the file again ({reason})"
        ) from error


def natural_order(key):
    """Sort key under which numbers within names count as numbers: S2 before S10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", key)], key


def _describe(group, where):
    """A scan's group -> (Description, points, spacing)."""
    volume = _member(group, "volume", where)
    if volume is None:
        have = ", ".join(group) or "nothing"
        raise UserError(f"{where}: no dataset 'volume' (it has {have}); a scan must be a group with a dataset 'volume'")
    segmentation = _member(group, "segmentation", where)
    if segmentation is not None and segmentation.shape != volume.shape:
        raise UserError(f"{where}: segmentation is {segmentation.shape}; it must be as its volume, {volume.shape}")
    flow, source = _member(group, "flow", where), None
    if flow is not None:
        if flow.shape != (*volume.shape, 3):
            raise UserError(f"{where}: flow is {flow.shape}; it must be as its volume with 3 channels")
        source = flow.attrs.get("source")
        source = source.decode() if isinstance(source, bytes) else source
        if not isinstance(source, str) or not source:
            raise UserError(f"{where}: flow has no attribute 'source'; it must name the scan that was deformed")
    points, spacing = _points(group, where), _spacing(group, where)
    about = Description(
        shape=volume.shape,
        dtype=volume.dtype,
        landmarks=0 if points is None else len(points),
        has_segmentation=segmentation is not None,
        has_spacing=spacing is not None,
        flow_source=source,
    )
    return about, points, spacing


def _member(group, name, where):
    """The dataset of numbers of that name in a scan's group, or None."""
    if name not in group:
        return None
    member = group[name]
    if not isinstance(member, h5py.Dataset) or member.dtype.kind not in "biuf":
        raise UserError(f"{where}: '{name}' is no array of numbers; write it again as a dataset of numbers")
    return member


def _points(group, where):
    """Landmarks float32 [L,3] with NaN for missing ones (stored as NaN or as negative numbers); None without any."""
    member = _member(group, "point", where)
    if member is None or member.size == 0:
        return None
    if member.ndim != 2 or member.shape[1] != 3:
        raise UserError(f"{where}: point is {member.shape}; it must be (number of landmarks, 3)")
    points = np.asarray(member[...], np.float32)
    points[np.isnan(points).any(axis=1) | (points < 0).all(axis=1)] = np.nan
    return None if np.isnan(points).all() else points


def _spacing(group, where):
    member = _member(group, "spacing", where)
    if member is None and "spacing" not in group.attrs:
        return None
    stored = np.asarray(group.attrs["spacing"] if member is None else member[...])
    if stored.shape != (3,) or stored.dtype.kind not in "iuf" or not (np.isfinite(stored) & (stored > 0)).all():
        raise UserError(f"{where}: spacing is {stored.tolist()}; it must be three positive numbers, in mm")
    return stored.astype(np.float64)
