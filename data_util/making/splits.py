"""How scans are split into subsets for training, validation and test, by their groups."""

import hashlib
from collections.abc import Sequence

from data_util.making.sources import Source
from errors import UserError

SUBSETS = ("train", "val", "test")


def split(
    sources: Sequence[Source], shares: Sequence[float], seed: int, pairing: str, atlas: str | None = None
) -> dict[str, list[str]]:
    """Split scans into subsets, so that the scans of a group stay together and every subset gets a pair at least.

    Args:
        sources: the scans; one without a group is a group of its own.
        shares: the three subsets' shares of the scans, of any sum; 0 leaves a subset out.
        seed: decides the order in which groups are dealt; further scans do not change the order of the others.
        pairing: 'all', 'paired' (a group is a pair; without groups, every two neighbours are one) or 'atlas'.
        atlas: id of the scan that is in no subset, or None.

    Returns:
        The ids of each subset, by its name in `SUBSETS`.

    Raises:
        UserError: the scans are too few, or do not make pairs.

    Example:
        >>> from pathlib import Path
        >>> scans = [Source(f"p{k}", Path(f"p{k}.nii.gz")) for k in range(6)]
        >>> split(scans, (0.7, 0.3, 0), seed=0, pairing="all")
        {'train': ['p0', 'p2', 'p4', 'p5'], 'val': ['p1', 'p3']}
    """
    units = _units([source for source in sources if source.id != atlas], pairing)
    if not any(shares):
        raise UserError("--split 0/0/0 leaves every scan out; give the shares of training/validation/test")
    units.sort(key=lambda unit: hashlib.blake2b(f"{seed} {unit[0]}".encode()).digest())
    total, least = sum(len(ids) for _, ids in units), 1 if atlas else 2
    first, *others = [name for name, share in zip(SUBSETS, shares, strict=True) if share]
    subsets: dict[str, list[str]] = {first: []}
    for name in others:
        wanted = max(least, round(total * shares[SUBSETS.index(name)] / sum(shares)))
        subsets[name] = []
        while units and len(subsets[name]) < wanted:
            subsets[name] += units.pop()[1]
    subsets[first] = [scan_id for _, ids in units for scan_id in ids]
    for name, ids in subsets.items():
        if len(ids) < least:
            asked = "/".join(f"{share:g}" for share in shares)
            raise UserError(
                f"{total} scans are too few for --split {asked}: '{name}' would get {len(ids)} and needs {least} to "
                "make a pair; add scans, or leave subsets out as in --split 1/0/0"
            )
    if pairing == "paired":
        return subsets
    order = [source.id for source in sources]
    return {name: sorted(ids, key=order.index) for name, ids in subsets.items()}


def _units(sources: Sequence[Source], pairing: str) -> list[tuple[object, list[str]]]:
    """What a split must keep together, as (name, ids)."""
    if pairing == "paired" and not any(source.group for source in sources):
        if len(sources) % 2:
            raise UserError(
                f"--pairs paired: {len(sources)} scans; every two neighbours make a pair, so their number must be even"
            )
        ids = [source.id for source in sources]
        return [(first, [first, second]) for first, second in zip(ids[::2], ids[1::2], strict=True)]
    units: dict[tuple[str, str], list[str]] = {}
    for source in sources:
        units.setdefault(("group", source.group) if source.group else ("scan", source.id), []).append(source.id)
    for (kind, name), ids in units.items():
        if pairing == "paired" and len(ids) != 2:
            raise UserError(f"--pairs paired: {kind} '{name}' has {len(ids)} scans ({', '.join(ids)}); a pair has two")
    return list(units.items())
