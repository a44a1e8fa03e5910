"""Where the scans of a new data set lie: a folder or a CSV table -> sources, and how they are split.

A folder has three subfolders, in which files of the same name belong together; the name up to its ending is the id:

    SCANS/images/   p1.nii.gz, p2.nrrd, p3.mha, p4/ (a folder of DICOM slices)
    SCANS/labels/   p1.nii.gz, ...   where known: label images, on whatever grid, by place in the patient
    SCANS/points/   p1.csv, ...      where known: landmarks, columns x,y,z, in mm, LPS as in DICOM

A folder without images/ holds images alone. A table has a row a scan, with columns id and image and, where known,
label, landmarks and group; its paths are relative to its own folder. Scans of one group (a person's, say) are never
parted by a split.
"""

import csv
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from data_util.hdf5 import natural_order
from errors import UserError

IMAGE_ENDINGS = (".nii", ".nii.gz", ".nrrd", ".mha")
COLUMNS = ("id", "image", "label", "landmarks", "group")
SUBSETS = ("train", "val", "test")
RULE = (
    "put one file (NIfTI, NRRD, MHA) or one folder of DICOM slices a scan into SCANS/images, label images of the same "
    "names into SCANS/labels, landmarks into SCANS/points; or give a CSV with columns " + ", ".join(COLUMNS)
)


@dataclass(frozen=True)
class Source:
    """The files of one scan: Paths, None where it has none; `group` is the name of its group, or None."""

    id: str
    image: Path
    label: Path | None = None
    points: Path | None = None
    group: str | None = None


def find_sources(scans):
    """List the Sources of a folder or a CSV (str or Path), in natural order of their ids, or in that of the CSV's rows.

    Raises UserError where there is nothing, an id is not unique or of use as a key, or a file belongs to no image.
    """
    scans = Path(scans)
    if scans.is_dir():
        sources = _of_folder(scans)
    elif scans.suffix.lower() == ".csv":
        sources = _of_table(scans)
    else:
        raise UserError(f"{scans}: is neither a folder nor a CSV; {RULE}")
    if not sources:
        raise UserError(f"{scans}: no scans found; {RULE}")
    for source in sources:
        if not source.id or re.search(r"[/*?\[\]]", source.id) or source.id.startswith("."):
            raise UserError(f"{scans}: id '{source.id}' cannot name a scan; rename it without / * ? [ ] or a first dot")
    return sources


def _of_folder(scans):
    folder = scans / "images" if (scans / "images").is_dir() else scans
    images = _by_id(folder, IMAGE_ENDINGS, folders=True)
    labels, points = {}, {}
    if folder != scans:
        labels = _by_id(scans / "labels", IMAGE_ENDINGS)
        points = _by_id(scans / "points", (".csv",))
    else:
        for scan_id in images:
            stem, _, word = scan_id.rpartition("_")
            if stem in images and word.lower() in ("seg", "segmentation", "label", "labels", "mask"):
                raise UserError(f"{images[scan_id]}: looks like the labels of '{stem}', not like a scan; {RULE}")
    for scan_id, path in (labels | points).items():
        if scan_id not in images:
            raise UserError(f"{path}: there is no image '{scan_id}' in {folder}; name it as its image is named")
    return [Source(i, images[i], labels.get(i), points.get(i)) for i in sorted(images, key=natural_order)]


def _by_id(folder, endings, folders=False):
    """The files with one of the endings, and the folders if wanted, in a folder: id -> path. Others are passed over."""
    found = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        ending = next((e for e in sorted(endings, key=len, reverse=True) if path.name.lower().endswith(e)), None)
        if path.name.startswith(".") or not (folders if path.is_dir() else ending):
            continue
        name = path.name if path.is_dir() else path.name[: -len(ending)]
        if name in found:
            raise UserError(f"{path} and {found[name]}: both would get the id '{name}'; rename one")
        found[name] = path
    return found


def _of_table(path):
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a CSV in UTF-8 ({error}); {RULE}") from error
    columns = list(rows[0]) if rows else []
    for name in columns:
        if name not in COLUMNS:
            raise UserError(f"{path}: unknown column '{name}'; allowed are {', '.join(COLUMNS)}")
    sources = {}
    for number, row in enumerate(rows, start=2):
        scan_id, image, label, points, group = ((row.get(name) or "").strip() for name in COLUMNS)
        if not (scan_id and image):
            raise UserError(f"{path}, line {number}: has no id or no image; every scan needs both")
        if scan_id in sources:
            raise UserError(f"{path}, line {number}: id '{scan_id}' is there twice; give every scan its own")
        files = [path.parent / name if name else None for name in (image, label, points)]
        for name, file in zip(COLUMNS[1:], files, strict=False):
            if file is not None and not file.exists():
                raise UserError(f"{path}, line {number}: {name} {file}: no such file; mend the path")
        sources[scan_id] = Source(scan_id, *files, group or None)
    return list(sources.values())


def split(sources, shares, seed, pairing, atlas=None):
    """Split scans into subsets by their groups, each scan without one by itself: -> {name of SUBSETS: list of ids}.

    Args:
        sources: list of Source.
        shares: the three subsets' shares of the scans, of any sum; 0 leaves a subset out.
        seed: another one, another split. Adding scans does not change the order in which the others are dealt.
        pairing: 'all', 'paired' (a group is a pair; without groups, every two neighbours are one) or 'atlas'.
        atlas: id of the scan that is in no subset, or None.

    Every subset gets a pair at least. Raises UserError where the scans are too few or do not make pairs.
    """
    units = list(_units([source for source in sources if source.id != atlas], pairing).items())
    if not any(shares):
        raise UserError("--split 0/0/0 leaves every scan out; give the shares of training/validation/test")
    units.sort(key=lambda unit: hashlib.blake2b(f"{seed} {unit[0]}".encode()).digest())
    total, least = sum(len(ids) for _, ids in units), 1 if atlas else 2
    first, *others = [name for name, share in zip(SUBSETS, shares, strict=True) if share]
    found = {first: []}
    for name in others:
        wanted = max(least, round(total * shares[SUBSETS.index(name)] / sum(shares)))
        found[name] = []
        while units and len(found[name]) < wanted:
            found[name] += units.pop()[1]
    found[first] = [scan_id for _, ids in units for scan_id in ids]
    for name, ids in found.items():
        if len(ids) < least:
            asked = "/".join(f"{share:g}" for share in shares)
            raise UserError(
                f"{total} scans are too few for --split {asked}: '{name}' would get {len(ids)} and needs {least} to "
                "make a pair; add scans, or leave subsets out as in --split 1/0/0"
            )
    if pairing == "paired":
        return found
    order = [source.id for source in sources]
    return {name: sorted(ids, key=order.index) for name, ids in found.items()}


def _units(sources, pairing):
    """What a split must not part: name -> list of ids."""
    if pairing == "paired" and not any(source.group for source in sources):
        if len(sources) % 2:
            raise UserError(
                f"--pairs paired: {len(sources)} scans; every two neighbours make a pair, so their number must be even"
            )
        ids = [source.id for source in sources]
        return {first: [first, second] for first, second in zip(ids[::2], ids[1::2], strict=True)}
    units = {}
    for source in sources:
        units.setdefault(("group", source.group) if source.group else ("scan", source.id), []).append(source.id)
    for (kind, name), ids in units.items():
        if pairing == "paired" and len(ids) != 2:
            raise UserError(f"--pairs paired: {kind} '{name}' has {len(ids)} scans ({', '.join(ids)}); a pair has two")
    return units
