"""A scheme of a config as `tf.data` datasets of batches.

A Batch is a dict of tensors; B pairs of volumes X,Y,Z with at most L landmarks:

    fixed, moving                   float32 [B,X,Y,Z,1]  0..1
    seed                            int32   [B,2]        training only: differs for every draw of a run
    fixed_seg, moving_seg           int32   [B,X,Y,Z,1]  labels; -1 everywhere where a scan has no segmentation
    fixed_points, moving_points     float32 [B,L,3]      voxel coordinates in their own scan, NaN where missing
                                    (both in training where asked for)
    fixed_mask, moving_mask         float32 [B,X,Y,Z,1]  training where asked for: 1 where the scan is compared, else 0
    fixed_spacing, moving_spacing   float32 [B,3]        mm, NaN where unknown
    true_flow                       float32 [B,X,Y,Z,3]  only if a scan was made by a known flow; NaN for other pairs
    affine_matrix, affine_shift     float32 [B,3,3], [B,3]  where asked for: the affine map fixed -> moving in voxels,
                                    x -> (matrix + I) x + shift from the volume's centre; zeros where none is found
    affine_found                    float32 [B]          where asked for: 1 where it is found, else 0
    valid                           bool    [B]          False where the last batch is filled up
    ids                             string  [B,2]        (fixed, moving) as reports name scans
    index                           int64   [B]          number of the pair in the scheme, -1 where not valid
"""

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from data_util.batches import batches
from data_util.config import DatasetConfig
from data_util.grey_values import to_unit
from data_util.hdf5 import Scan
from data_util.pairs import AllPairs, TrainingOrder, adjacent_pairs, atlas_pairs, listed_pairs, permute
from data_util.store import Description, ScanStore, report_id
from errors import UserError


@dataclass(frozen=True)
class Subset:
    """A subset as one scheme uses it.

    Attributes:
        name: as in the config.
        fraction: its share of the pairs that training draws.
        ids: ids of its scans, in order.
        scans: the ids, and the atlas last where it is not one of them.
        pairs: (fixed, moving), both as indices into `scans`.
    """

    name: str
    fraction: float
    ids: tuple[str, ...]
    scans: tuple[str, ...]
    pairs: Sequence[tuple[int, int]]

    def pair(self, k: int) -> tuple[str, str]:
        """Pair number k as (fixed id, moving id)."""
        fixed, moving = self.pairs[k]
        return self.scans[fixed], self.scans[moving]


def open_scheme(config: DatasetConfig, scheme: str, paired: bool = False, store: ScanStore | None = None) -> "Scheme":
    """Open scheme `scheme` (its name) of a DatasetConfig; every scan it uses is looked at, but not read.

    Pairs are all ordered pairs of a subset's scans; where the config lists a subset's pairs, these alone; where it has
    an atlas, the atlas as the fixed image of every other scan.

    Args:
        config: the data set.
        scheme: name of the scheme.
        paired: pair scans 0 and 1, 2 and 3, .. both ways round, and no others.
        store: reads the scans; several schemes may share one. None: a store of its own.

    Returns:
        The scheme's pairs.

    Raises:
        UserError: the scheme is unknown, a subset has no pair or, with `paired`, an odd number of scans or a list of
            pairs, a file or a scan is missing or damaged, or a volume is not of the config's image size.
    """
    if scheme not in config.schemes:
        raise UserError(f"{config.path}: no scheme '{scheme}'; known are {', '.join(config.schemes)}")
    if paired and config.atlas is not None:
        raise UserError(f"{config.path}: paired does not go with an atlas ('{config.atlas}'); leave one of them out")
    store = ScanStore(config.files) if store is None else store
    subsets = []
    for name, fraction in config.schemes[scheme].items():
        ids = scans = tuple(store.expand(config.subsets[name]))
        if config.atlas is not None:
            scans = tuple(dict.fromkeys((*ids, *store.expand([config.atlas]))))
            pairs: Any = atlas_pairs(len(scans), scans.index(config.atlas))
        else:
            pairs = _subset_pairs(config, name, ids, paired)
        if len(pairs) == 0:
            raise UserError(
                f"{config.path}: subset '{name}' of scheme '{scheme}' has no pair ({len(ids)} scans); add scans to it"
            )
        subsets.append(Subset(name, fraction, ids, scans, pairs))
    for scan_id in dict.fromkeys(s for subset in subsets for s in subset.scans):
        shape = store.describe(scan_id).shape
        if shape != config.image_size:
            file, key = store.locate(scan_id)
            raise UserError(
                f"{file.path}, scan '{key}': volume is {_size(shape)}, but image_size in {config.path} is "
                f"{_size(config.image_size)}; resample the scan or change image_size"
            )
    return Scheme(config, tuple(subsets), store)


def _subset_pairs(config: DatasetConfig, name: str, ids: Sequence[str], paired: bool) -> Any:
    """The pairs of a subset without an atlas: a sequence of (fixed, moving), indices into its scans."""
    try:
        if name in config.pairs and paired:
            raise UserError("its pairs are listed in the config, which does not go with paired; leave paired out")
        if name in config.pairs:
            return listed_pairs(ids, config.pairs[name])
        return adjacent_pairs(len(ids)) if paired else AllPairs(len(ids))
    except UserError as error:
        raise UserError(f"{config.path}: subset '{name}': {error}") from error


class Scheme(Sequence):
    """The pairs of a scheme, subset after subset: `len(scheme)`, `scheme[k] -> (fixed id, moving id)`; see open_scheme.

    Attributes:
        image_size: (X, Y, Z).
        labels: name -> value in the segmentations, or None.
        orientation: where the axes of its volumes run to, such as 'LPS'; None where it is unknown.
        label_values: the values alone, or None.
        subsets: tuple of Subset.
        has_flow: whether some pair is a scan and the scan it was made from by a known flow.
        has_spacings: whether the size of the voxels is known of every scan.
        landmarks: the largest number of landmarks of a scan.
    """

    def __init__(self, config: DatasetConfig, subsets: tuple[Subset, ...], store: ScanStore) -> None:
        self.image_size = config.image_size
        self.labels = config.labels
        self.orientation = config.view.orientation
        self.label_values = None if config.labels is None else tuple(config.labels.values())
        self.subsets = subsets
        self._store = store
        self._starts = (0, *itertools.accumulate(len(s.pairs) for s in subsets))
        self._descriptions = {scan: store.describe(scan) for subset in subsets for scan in subset.scans}
        self.has_flow = any(
            not {self._descriptions[scan].flow_source for scan in subset.scans}.isdisjoint(subset.scans)
            for subset in subsets
        )
        self.has_spacings = all(description.has_spacing for description in self._descriptions.values())
        self.landmarks = max(description.landmarks for description in self._descriptions.values())

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, k: int) -> tuple[str, str]:  # type: ignore[override]
        k = range(len(self))[k]
        which = next(i for i, end in enumerate(self._starts[1:]) if k < end)
        return self.subsets[which].pair(k - self._starts[which])

    def sample(self, n: int, seed: int) -> list[int]:
        """At most `n` different pair numbers, sorted; the same for the same seed, and all where there are no more."""
        return sorted(permute(k, len(self), seed) for k in range(min(n, len(self))))

    def training_pair_ids(self, batch: int, seed: int, step: int) -> list[tuple[str, str]]:
        """The pairs of training step `step` (from 0): list of `batch` (fixed id, moving id)."""
        order = self._order(seed)
        return [self._drawn(order, n) for n in range(step * batch, (step + 1) * batch)]

    def training(
        self,
        batch: int,
        seed: int,
        start_step: int,
        stop_step: int,
        devices: int = 1,
        worker: int = 0,
        workers: int = 1,
        members: Collection[str] = (),
    ) -> tf.data.Dataset:
        """Batches of training steps start_step .. stop_step - 1, counted from 0: fixed, moving, seed, and `members`.

        A step's pairs depend on `batch`, `seed` and the step alone, so a run that is continued at a later step sees
        what it would have seen. Pairs are decoded by several threads and batched ahead of their use.

        Args:
            batch: pairs of a step, divided evenly and in order among the workers, and a worker's share among its
                devices.
            seed: chooses the order of the pairs.
            start_step: the first step.
            stop_step: the step after the last one.
            devices: number of devices of all workers; an element of the dataset is the part of one device.
            worker: number of this worker.
            workers: how many there are.
            members: what is read of the scans beside their volumes, as in `check_members`.

        Returns:
            A dataset of Batches.
        """
        order = self._order(seed)
        spec = {"seed": tf.TensorSpec((2,), tf.int32), **self._scan_spec(("volume", *members))}
        share = batch // workers

        def read(k: int) -> dict[str, Any]:
            n = k // share * batch + worker * share + k % share
            fixed, moving = (
                self._store.read(scan, segmentation="seg" in members, mask="mask" in members)
                for scan in self._drawn(order, n)
            )
            return {
                **self._of_scans(fixed, moving, spec),
                "seed": np.array([seed % 2**31, n % 2**31], np.int32),
            }

        return batches(read, spec, range(start_step * share, stop_step * share), batch // devices)

    def evaluation(
        self, batch: int, indices: Sequence[int] | None = None, affine: str | None = None
    ) -> tf.data.Dataset:
        """Full Batches of the pairs `indices` (default: all) in that order; the last one is filled up to `batch`.

        Args:
            batch: number of pairs in a Batch.
            indices: numbers of pairs; None: all.
            affine: kind of the affine map to find for each pair, as in `find_affine`; None: none. It takes seconds.

        Returns:
            A dataset of Batches.

        Raises:
            UserError: the two scans of a pair have landmarks, but not equally many.
        """
        indices = range(len(self)) if indices is None else [range(len(self))[k] for k in indices]
        self._check_landmarks(indices)
        spec = self._evaluation_spec(affine is not None)

        def read(n: int) -> dict[str, Any]:
            k = indices[n] if n < len(indices) else -1
            if k < 0:
                images = ("fixed", "moving", *_AFFINE)
                return {name: np.zeros(spec[name].shape, np.float32) for name in images if name in spec}
            fixed_id, moving_id = self[k]
            true_flow = self._descriptions[fixed_id].flow_source == moving_id
            fixed, moving = self._store.read(fixed_id, flow=true_flow), self._store.read(moving_id)
            sample = self._of_scans(fixed, moving, spec)
            if true_flow:
                sample["true_flow"] = fixed.flow
            if affine is not None:
                sample |= _affine_map(fixed, moving, affine)
            ids = np.array([report_id(fixed_id), report_id(moving_id)], object)
            return sample | {"valid": np.array(True), "ids": ids, "index": np.array(k, np.int64)}

        n_batches = -(-len(indices) // batch)
        return batches(read, spec, range(n_batches * batch), batch)

    def some_pair_has(self, member: str) -> bool:
        """Whether both scans of some pair have a member of `_MEMBERS`; of a mask, one of them."""
        sides, has = any if member == "mask" else all, _MEMBERS[member][1]
        return any(sides(has(self._descriptions[scan]) for scan in pair) for pair in self)

    def check_members(self, members: Collection[str], asked_by: Sequence[str]) -> None:
        """Check that some pair has what is asked for in training: what `members` names, of both scans (a mask: of one).

        Args:
            members: out of 'seg' (segmentations), 'points' (landmarks) and 'mask'.
            asked_by: for each of them, the option that asks for it.

        Raises:
            UserError: no pair has it; or two scans of a pair have landmarks, but not equally many.
        """
        for member, option in zip(members, asked_by, strict=True):
            name = _MEMBERS[member][0]
            where, off = ("", "None") if member == "mask" else (" in both scans", "0")
            if not self.some_pair_has(member):
                raise UserError(
                    f"{option}: no pair to train on has {name}{where}; add {name} to the data set "
                    f"(datasets/README.md), or give {option}={off}"
                )
        if "points" in members:
            self._check_landmarks(range(len(self)))

    def _order(self, seed: int) -> TrainingOrder:
        return TrainingOrder([len(s.pairs) for s in self.subsets], [s.fraction for s in self.subsets], seed)

    def _drawn(self, order: TrainingOrder, n: int) -> tuple[str, str]:
        which, k = order[n]
        return self.subsets[which].pair(k)

    def _check_landmarks(self, indices: Sequence[int]) -> None:
        if len({description.landmarks for description in self._descriptions.values()} - {0}) <= 1:
            return
        for fixed, moving in map(self.__getitem__, indices):
            counts = self._descriptions[fixed].landmarks, self._descriptions[moving].landmarks
            if all(counts) and counts[0] != counts[1]:
                raise UserError(
                    f"scans '{fixed}' and '{moving}' make a pair but have {counts[0]} and {counts[1]} landmarks; "
                    "store the same landmarks in both, missing ones as NaN"
                )

    def _scan_spec(self, members: Collection[str]) -> dict[str, tf.TensorSpec]:
        """What of both scans is in a Batch: of 'volume', 'seg', 'points', 'mask' and 'spacing'."""
        specs = {
            "volume": ("", tf.TensorSpec((*self.image_size, 1), tf.float32)),
            "seg": ("_seg", tf.TensorSpec((*self.image_size, 1), tf.int32)),
            "points": ("_points", tf.TensorSpec((self.landmarks, 3), tf.float32)),
            "mask": ("_mask", tf.TensorSpec((*self.image_size, 1), tf.float32)),
            "spacing": ("_spacing", tf.TensorSpec((3,), tf.float32)),
        }
        return {f"{side}{specs[name][0]}": specs[name][1] for side in ("fixed", "moving") for name in members}

    def _of_scans(self, fixed: Scan, moving: Scan, spec: Collection[str]) -> dict[str, Any]:
        """What two scans have of what is in `spec`."""
        found: dict[str, Any] = {}
        for side, scan in (("fixed", fixed), ("moving", moving)):
            found[side] = to_unit(scan.volume)[..., None]
            if scan.segmentation is not None:
                found[f"{side}_seg"] = scan.segmentation[..., None]
            if scan.points is not None:
                rest = (0, self.landmarks - len(scan.points)), (0, 0)
                found[f"{side}_points"] = np.pad(scan.points, rest, constant_values=np.nan)
            if f"{side}_mask" in spec:
                mask = np.ones(self.image_size) if scan.mask is None else scan.mask
                found[f"{side}_mask"] = mask.astype(np.float32)[..., None]
            if scan.spacing is not None:
                found[f"{side}_spacing"] = np.asarray(scan.spacing, np.float32)
        return {name: value for name, value in found.items() if name in spec}

    def _evaluation_spec(self, affine: bool) -> dict[str, tf.TensorSpec]:
        of_pair = {
            "valid": tf.TensorSpec((), tf.bool),
            "ids": tf.TensorSpec((2,), tf.string),
            "index": tf.TensorSpec((), tf.int64),
        }
        of_pair |= self._scan_spec(("volume", "seg", "points", "spacing"))
        if self.has_flow:
            of_pair["true_flow"] = tf.TensorSpec((*self.image_size, 3), tf.float32)
        if affine:
            of_pair |= {name: tf.TensorSpec(shape, tf.float32) for name, shape in _AFFINE.items()}
        return of_pair


_AFFINE = {"affine_matrix": (3, 3), "affine_shift": (3,), "affine_found": ()}


def _affine_map(fixed: Scan, moving: Scan, kind: str) -> dict[str, np.ndarray]:
    """The affine map of a pair, as it is in a Batch. Where a spacing is unknown, voxels of both count as 1 mm."""
    from data_util.scans.affine_search import find_voxel_affine  # SimpleITK is needed for nothing else here

    spacings = [scan.spacing for scan in (fixed, moving) if scan.spacing is not None]
    found = 1.0
    try:
        matrix, shift = find_voxel_affine(
            (fixed.volume, moving.volume), spacings if len(spacings) == 2 else [np.ones(3)] * 2, kind
        )
    except UserError:  # the scans have nothing in common: the pair stays as it is
        matrix, shift, found = np.zeros((3, 3)), np.zeros(3), 0.0
    return {name: np.asarray(value, np.float32) for name, value in zip(_AFFINE, (matrix, shift, found), strict=True)}


# What training can ask for: how messages call it, and whether a scan has it.
_MEMBERS: dict[str, tuple[str, Callable[[Description], bool]]] = {
    "seg": ("segmentations", lambda description: description.has_segmentation),
    "points": ("landmarks", lambda description: description.landmarks > 0),
    "mask": ("masks", lambda description: description.has_mask),
}


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
