"""Where the scans of a new data set are: a folder, as `folders` describes it, or a CSV table.

A table has one row per scan, with columns id and image and, where known, label, landmarks and group; its paths are
relative to its own folder. Scans of one group, such as a patient's, stay together in a split.
"""

import csv
import os
import re
from dataclasses import dataclass
from pathlib import Path

from data_util.making.folders import list_folder, scan_in
from data_util.names import check_name
from data_util.store import natural_order
from errors import UserError

COLUMNS = ("id", "image", "label", "landmarks", "group")
RULE = (
    "put one file (NIfTI, NRRD, MHA or MHD, Analyze) or one folder of DICOM slices per scan into SCANS/images, label "
    "images of the same names into SCANS/labels, landmarks into SCANS/points; or give a CSV with columns "
    + ", ".join(COLUMNS)
)


@dataclass(frozen=True)
class Source:
    """The files of one scan.

    Attributes:
        id: the scan's key in the data set.
        image: image file, or folder of DICOM slices.
        label: label image, or None.
        points: table of landmarks, or None.
        group: name of its group, or None.
        problem: why the scan cannot be made, or None.
    """

    id: str
    image: Path
    label: Path | None = None
    points: Path | None = None
    group: str | None = None
    problem: str | None = None


def find_sources(scans: str | Path) -> tuple[list[Source], list[str]]:
    """List the scans of a folder or a CSV.

    Args:
        scans: the folder or the CSV.

    Returns:
        The `Source` of each scan, in natural order of their ids or in that of the CSV's rows; and remarks on what was
        passed over or matched by name, each a sentence.

    Raises:
        UserError: there is nothing, an id is not unique or cannot be a key, or a file belongs to no image.
    """
    scans = Path(scans)
    remarks: list[str] = []
    if scans.is_dir():
        listing = list_folder(scans)
        remarks = listing.remarks
        sources = [
            Source(i, path, listing.labels.get(i), listing.points.get(i), problem=listing.problems.get(i))
            for i, path in sorted(listing.images.items(), key=lambda item: natural_order(item[0]))
        ]
    elif scans.suffix.lower() == ".csv":
        sources = _of_table(scans, remarks)
    else:
        raise UserError(f"{scans}: is neither a folder nor a CSV; {RULE}")
    if not sources:
        raise UserError("; ".join([f"{scans}: no scans found", *remarks, RULE]))
    for source in sources:
        check_name(source.id, f"{scans}: id")
        if not source.id or re.search(r"[/*?\[\]]", source.id) or source.id.startswith("."):
            raise UserError(f"{scans}: id '{source.id}' cannot name a scan; rename it without / * ? [ ] or a first dot")
    return sources, remarks


def _of_table(path: Path, remarks: list[str]) -> list[Source]:
    columns, rows = _read_table(path)
    sources: dict[str, Source] = {}
    for number, cells in rows:
        where = f"{path}, line {number}"
        if any(cell.strip() for cell in cells[len(columns) :]):
            raise UserError(f"{where}: has {len(cells)} cells and the header {len(columns)}; write one per column")
        row = dict(zip(columns, (cell.strip() for cell in cells), strict=False))
        scan_id = row.get("id", "")
        if not (scan_id and row.get("image")):
            raise UserError(f"{where}: has no id or no image; every scan needs both")
        if scan_id in sources:
            raise UserError(f"{where}: id '{scan_id}' is there twice; give every scan its own")
        files = {n: path.parent / row[n] for n in ("image", "label", "landmarks") if row.get(n)}
        for name, file in files.items():
            if not file.exists():
                link = f"is a link to {os.readlink(file)}, which is not there" if file.is_symlink() else "no such file"
                raise UserError(f"{where}: {name} {file}: {link}; mend the path")
        problem = None
        try:
            files["image"], beside = scan_in(files["image"], remarks)
            if beside is not None:
                files.setdefault("label", beside)
        except UserError as error:
            problem = str(error)
        sources[scan_id] = Source(
            scan_id, files["image"], files.get("label"), files.get("landmarks"), row.get("group") or None, problem
        )
    return list(sources.values())


def _read_table(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The columns of a CSV, and its rows with their line numbers, without empty ones."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            delimiter = max(",;\t", key=first.count)
            file.seek(0)
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a CSV in UTF-8 ({error}); {RULE}") from error
    columns = [name.strip().lower() for name in rows[0][1]] if rows else []
    for k, name in enumerate(columns):
        if name not in COLUMNS or name in columns[:k]:
            fault = "two columns" if name in COLUMNS else "unknown column"
            raise UserError(f"{path}: {fault} '{name}'; allowed are {', '.join(COLUMNS)}, once each")
    return columns, rows[1:]
