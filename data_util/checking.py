"""A data set looked over: `Check` counts its scans and pairs and makes a `Finding` of all that is wrong with them."""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import tqdm

from data_util.config import DatasetConfig
from data_util.names import plain
from data_util.near_copies import coarse, near_copies
from data_util.store import ScanStore
from errors import UserError, listed

ERROR, WARNING = "error", "warning"
CACHE_BYTES = 2**28


@dataclass(frozen=True)
class Finding:
    """Something wrong.

    Attributes:
        level: ERROR or WARNING.
        where: a scan's id, a subset or a scheme.
        what: what is wrong, and the remedy.
        mend: how --fix mends it: one of `repair.MENDS` for a scan, ("entry", subset, id) for an id to be left out of
            the config, or None where it does not.
    """

    level: str
    where: str
    what: str
    mend: str | tuple | None = None


class Check:
    """A config (DatasetConfig) looked over.

    Args:
        config: the config.
        schemes: names of the schemes to look at; all where None.
        paired: whether the pairs are neighbouring scans.
        quick: read what describes the scans, and no array: their values are not looked at.

    Attributes:
        findings: list of Finding.
        rows: a (scheme, subset, scans, pairs, pairs with --paired) for each subset of a scheme.
        scans: ids of all scans looked at.
        readable: those of them that could be read whole.

    Raises:
        UserError: there is no such scheme.
    """

    def __init__(
        self, config: DatasetConfig, schemes: Sequence[str] | None = None, paired: bool = False, quick: bool = False
    ) -> None:
        for name in schemes or ():
            if name not in config.schemes:
                raise UserError(f"{config.path}: no scheme '{name}'; known are {', '.join(config.schemes)}")
        self.config, self.paired, self.quick = config, paired, quick
        self.findings: list[Finding] = []
        self.rows: list[tuple] = []
        self.store = ScanStore(config.files, CACHE_BYTES)
        self._schemes = {name: config.schemes[name] for name in schemes or config.schemes}
        wanted = {subset for parts in self._schemes.values() for subset in parts}
        self._subsets = {name: self._expand(name) for name in config.subsets if name in wanted}
        self._atlas = [] if config.atlas is None else self._expand("atlas", (config.atlas,))
        self.scans = list(dict.fromkeys(scan for ids in (*self._subsets.values(), self._atlas) for scan in ids))
        self._descriptions: dict[str, Any] = {}
        self._labels: dict[str, Any] = {}
        self._coarse: dict[str, np.ndarray] = {}
        hashes: dict[Any, list] = {}
        self.readable: list[str] = []
        for scan_id in tqdm.tqdm(self.scans, desc=config.path.name, unit="scan"):
            try:
                self._look_at(scan_id, hashes)
                self.readable.append(scan_id)
            except UserError as error:
                file, key = self.store.locate(scan_id)
                # Without the scan's name, which the table tells: so equal findings are one line.
                self._add(ERROR, scan_id, f"{error}".removeprefix(f"{file.path}, scan '{key}': "))
        self._compare_copies(hashes)
        self._compare_labels()
        self._count()
        self._compare_schemes()
        if schemes is None:
            self._find_unused()
        self.store.close()

    @property
    def arrays_without_checksum(self) -> int:
        """Number of arrays of the scans in which damage can go unnoticed."""
        return sum(description.without_checksum for description in self._descriptions.values())

    def _add(self, level: str, where: str, what: str, mend: str | tuple | None = None) -> None:
        self.findings.append(Finding(level, where, what, mend))

    def _expand(self, name: str, entries: Sequence[str] | None = None) -> list[str]:
        """The ids of a subset; each entry that gives none is a finding."""
        ids = []
        for entry in self.config.subsets[name] if entries is None else entries:
            try:
                ids += self.store.expand([entry])
            except UserError as error:
                mendable = entries is None and self._is_absent(entry)
                self._add(ERROR, f"subset {name}", f"{error}", ("entry", name, entry) if mendable else None)
        return list(dict.fromkeys(ids))

    def _is_absent(self, entry: str) -> bool:
        """Whether an id's file is there, whole, and the scan is not in it."""
        with suppress(UserError):
            return not any(c in entry for c in "*?[") and not self.store.exists(entry)
        return False

    # ------------------------------------------------------------------------------------------------- one scan

    def _look_at(self, scan_id: str, hashes: dict[bytes, list[str]]) -> None:
        description = self.store.describe(scan_id)
        self._descriptions[scan_id] = description
        if description.shape != self.config.image_size:
            size, wanted = ("x".join(map(str, shape)) for shape in (description.shape, self.config.image_size))
            self._add(ERROR, scan_id, f"volume is {size}, but image_size is {wanted}; resample it or change image_size")
        if description.lost_landmarks:
            self._add(WARNING, scan_id, f"all its {description.lost_landmarks} landmarks are missing (NaN)")
        if description.doubts:
            self._add(WARNING, scan_id, f"look at this scan: {description.doubts}")
        if description.flow_source is not None:
            self.store.describe(description.flow_source)
        if self.quick:
            return
        scan = self.store.read(scan_id, segmentation=False, flow=True)
        hashes.setdefault(hashlib.blake2b(scan.volume.tobytes(), digest_size=16).digest(), []).append(scan_id)
        self._coarse[scan_id] = coarse(scan.volume)
        self._look_at_volume(scan_id, scan.volume)
        if scan.points is not None:
            self._look_at_points(scan_id, scan.points, description.shape)
        if description.has_segmentation:
            self._look_at_segmentation(scan_id, self.store.read(scan_id).segmentation)

    def _look_at_volume(self, scan_id: str, volume: np.ndarray) -> None:
        low, high = volume.min(), volume.max()
        if low == high:
            self._add(ERROR, scan_id, f"volume is {low:g} everywhere; look at its source")
        elif low < 0 or high > 255:
            self._add(ERROR, scan_id, f"volume goes from {low:g} to {high:g}; map its grey values to 0..255")
        elif high <= 1:
            mend = "scale" if volume.dtype.kind == "f" else None
            self._add(ERROR, scan_id, f"volume goes from {low:g} to {high:g}, all but black; map it to 0..255", mend)
        elif volume.dtype != np.uint8:
            whole = volume.dtype.kind in "iu" or not (volume % 1).any()
            what = f"volume is {volume.dtype}; uint8 is smaller and read faster"
            self._add(WARNING, scan_id, what, "uint8" if whole else None)

    def _look_at_points(self, scan_id: str, points: np.ndarray, shape: Sequence[int]) -> None:
        outside = np.flatnonzero(((points < 0) | (points > np.array(shape) - 1)).any(axis=1))
        if len(outside):
            place = ", ".join(f"{part:g}" for part in points[outside[0]])
            self._add(
                ERROR,
                scan_id,
                f"{len(outside)} of {len(points)} landmarks lie outside the volume, number {outside[0]} at ({place}); "
                "store voxel coordinates [x, y, z], NaN for a missing one",
            )

    def _look_at_segmentation(self, scan_id: str, segmentation: Any) -> None:
        values = [int(value) for value in np.unique(segmentation)]
        inside = [value for value in values if value != 0]
        self._labels[scan_id] = inside
        if not inside:
            self._add(ERROR, scan_id, "segmentation is 0 everywhere, so it has no Dice; leave it out or mend it")
        elif self.config.labels is None and set(inside) != {255}:
            shown = ", ".join(map(str, values[:8])) + ", ..." * (len(values) > 8)
            if len(inside) == 1:
                what = f"mask has the values {shown}, not 0 and 255, so its Dice is 0 or NaN; write it as 0 and 255"
                self._add(ERROR, scan_id, what, "mask")
            else:
                what = f"mask has the values {shown}, not 0 and 255; name the labels in segmentation_class_value"
                self._add(ERROR, scan_id, what)

    # ------------------------------------------------------------------------------------------------- all scans

    def _compare_copies(self, hashes: dict[bytes, list[str]]) -> None:
        """Name scans that are the same, or nearly, worst where one is trained on and another evaluated."""
        copies = [ids for ids in hashes.values() if len(ids) > 1]
        same = {frozenset((a, b)) for ids in copies for a in ids for b in ids if a != b}
        alike = [pair for pair in near_copies(self._coarse) if frozenset(pair) not in same]
        # A scan and the one that a known flow made of it may be as alike as they are meant to be.
        made = {frozenset((scan, description.flow_source)) for scan, description in self._descriptions.items()}
        alike = [pair for pair in alike if frozenset(pair) not in made]
        training = self._training_schemes()
        trained = {scan for name in training for scan in self._scans_of(name)} - set(self._atlas)
        evaluated = {scan for name in self._schemes if name not in training for scan in self._scans_of(name)}
        evaluated -= {*self._atlas, *trained}
        for ids, what in [*((ids, "the very same") for ids in copies), *((pair, "nearly the same") for pair in alike)]:
            what = f"these scans have {what} volume"
            if trained.intersection(ids) and evaluated.intersection(ids):
                self._add(ERROR, listed(ids), f"{what}, and are both trained on and evaluated; keep one of them")
            else:
                self._add(WARNING, listed(ids), f"{what}; keep one of them")

    def _training_schemes(self) -> list[str]:
        return [name for name in self._schemes if name == "1" or name.startswith("finetune-train-")]

    def _scans_of(self, scheme: str) -> list[str]:
        return [scan for name in self._schemes[scheme] for scan in self._subsets[name]]

    def _compare_labels(self) -> None:
        for what, having in (
            (
                "segmentation",
                [scan for scan, description in self._descriptions.items() if description.has_segmentation],
            ),
            ("landmarks", [scan for scan, description in self._descriptions.items() if description.landmarks]),
        ):
            for name, ids in self._subsets.items():
                without = [scan for scan in ids if scan in self._descriptions and scan not in having]
                if without and any(scan in having for scan in ids):
                    self._add(WARNING, f"subset {name}", f"no {what} in {listed(without)}; their pairs are not scored")
        if self.config.labels is None or self.quick:
            return
        for name, value in self.config.labels.items():
            without = [scan for scan, found in self._labels.items() if value not in found]
            if without:
                level = ERROR if len(without) == len(self._labels) else WARNING
                self._add(level, f"label {name}", f"no voxel of its value {value} in {listed(without)}")
        unknown = sorted({v for found in self._labels.values() for v in found} - set(self.config.labels.values()))
        if unknown:
            what = f"segmentations have values that it does not name: {listed(list(map(str, unknown)))}; not scored"
            self._add(WARNING, "segmentation_class_value", what)

    def _count(self) -> None:
        """Count pairs, and see that the scans of a pair go together."""
        for scheme, parts in self._schemes.items():
            for name in parts:
                ids, n = self._subsets[name], len(self._subsets[name])
                if name in self.config.pairs:
                    self._count_listed(scheme, name)
                    continue
                others = [scan for scan in ids if scan not in self._atlas]
                pairs = len(others) if self._atlas else n * (n - 1)
                self.rows.append((scheme, name, n, pairs, "-" if self._atlas else n if n % 2 == 0 else "odd"))
                if self.paired and self._atlas:
                    self._add(ERROR, f"scheme {scheme}", "the config has an atlas, which does not go with --paired")
                elif self.paired and n % 2:
                    what = f"subset {name} has {n} scans, an odd number; with --paired every two neighbours are a pair"
                    self._add(ERROR, f"scheme {scheme}", what)
                if pairs == 0:
                    self._add(ERROR, f"scheme {scheme}", f"subset {name} has {n} scans and so no pair; add scans")
                neighbours = [ids[k : k + 2] for k in range(0, n - 1, 2)]
                for group in neighbours if self.paired else [[*others, *self._atlas] if self._atlas else ids]:
                    self._compare_landmarks(f"scheme {scheme}", group)

    def _count_listed(self, scheme: str, name: str) -> None:
        """Count the pairs that the config lists for a subset, and see that the scans of each go together."""
        ids, pairs = self._subsets[name], self.config.pairs[name]
        self.rows.append((scheme, name, len(ids), len(pairs), "-"))
        if self.paired:
            self._add(ERROR, f"scheme {scheme}", f"the pairs of subset {name} are listed, which excludes --paired")
        if not pairs:
            self._add(ERROR, f"scheme {scheme}", f"the list of pairs of subset {name} is empty; add pairs")
        for fixed, moving in pairs:
            lost = [scan for scan in (fixed, moving) if scan not in ids]
            if lost:
                what = f"a pair of subset {name} names {listed(lost)}, which is not in the subset; add it there"
                self._add(ERROR, f"scheme {scheme}", what)
            self._compare_landmarks(f"scheme {scheme}", (fixed, moving))

    def _compare_landmarks(self, where: str, ids: Sequence[str]) -> None:
        counts: dict[int, list[str]] = {}
        for scan_id in ids:
            if scan_id in self._descriptions and self._descriptions[scan_id].landmarks:
                counts.setdefault(self._descriptions[scan_id].landmarks, []).append(scan_id)
        if len(counts) > 1:
            numbers = ", ".join(f"{count} in {listed(scans, 3)}" for count, scans in sorted(counts.items()))
            what = f"landmarks differ in number: {numbers}; store the same ones in every scan, NaN for a missing one"
            self._add(ERROR, where, what)

    def _compare_schemes(self) -> None:
        """Name scans that a scheme for training shares with others."""
        training = self._training_schemes()
        for trained_on in training:
            trained = set(self._scans_of(trained_on)) - set(self._atlas)
            for scheme in self._schemes:
                shared = [] if scheme in training else [scan for scan in self._scans_of(scheme) if scan in trained]
                if shared:
                    what = f"shares {listed(shared)} with scheme {trained_on}, which is trained on; keep them apart"
                    self._add(ERROR, f"scheme {scheme}", what)

    def _find_unused(self) -> None:
        """Name what is in the files and not in the config, or in the config and of no use."""
        for name in ("1", "2"):
            if name not in self.config.schemes:
                use = "train.py needs it" if name == "1" else "without it a training is not validated"
                self._add(WARNING, "schemes", f"there is no scheme '{name}'; {use}")
        for name in self.config.subsets:
            if name not in self._subsets:
                self._add(WARNING, f"subset {name}", "is in no scheme, so it is never used")
        used = set(self.scans)
        for key, file in self.config.files.items():
            with suppress(UserError):  # of a file that cannot be read its subsets tell
                unused = [scan for scan in self.store.ids(key) if scan not in used]
                if unused:
                    self._add(WARNING, f"file {file.path}", f"{listed(list(map(plain, unused)))} are in no subset")
