"""Landmarks: the one reader of their tables, for data sets and for single pairs.

A table has one row per landmark, in a text file whose cells are parted by commas, semicolons, tabs or blanks:

    name;X;Y;Z                 -10.5 -4.25 -4.5
    tip of the liver;1;2.5;3   -12   -6     2

With a header the columns named x, y and z are read, in any order and in small or capital letters; other columns, such
as an id or a name, are passed over. Without a header every row has exactly three numbers. Every row has as many cells
as the first one; a number has a decimal point. A row whose three cells are empty or `nan` is a landmark that this scan
lacks. What does not keep to this is refused, since nothing that comes later notices a number that was read wrong.
"""

import csv
import re
from pathlib import Path

import numpy as np
import SimpleITK as sitk

import files
from data_util.scans.frame import SET_UPRIGHT, Frame
from errors import UserError

SPACES = ("lps", "ras", "voxel")
AXES = ("x", "y", "z")
DELIMITERS = (";", "\t", ",", " ")
ENCODINGS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}  # by the byte order mark
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
MISSING = ("", "nan")


def frame_for_voxels(native: sitk.Image, path: str | Path) -> Frame:
    """The frame by which landmarks in voxels of a scan's file become places.

    Args:
        native: the scan as `images.read_native` reads it.
        path: the table of landmarks, for the message.

    Raises:
        UserError: the scan's axes are not at right angles in its file, so it was resampled and has other voxels.
    """
    if native.HasMetaDataKey(SET_UPRIGHT):
        raise UserError(
            f"{path}: landmarks in voxels of a scan whose axes are not at right angles, which was set upright; give "
            "them in mm"
        )
    return Frame.of(native)


def read_points(path: str | Path, space: str = "lps", frame: Frame | None = None) -> np.ndarray:
    """Read the landmarks of a scan.

    Args:
        path: table of landmarks, as the text above describes it.
        space: what the numbers are. 'lps': mm, with x, y, z to the patient's left, back and head, as in DICOM and ITK;
            'ras': mm, with x and y to the right and to the front, as in NIfTI and 3D Slicer; 'voxel': voxels of the
            scan's file, along its own axes, 0 being the centre of the first one.
        frame: for 'voxel', the `Frame` of the grid that the scan's file has (not turned to LPS).

    Returns:
        Places in mm (LPS), float64 [L, 3]; NaN where a landmark is missing.

    Raises:
        UserError: the file is no such table, with the line; the space is unknown, or lacks its frame.

    Example:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp(), "p1.csv")
        >>> _ = file.write_text("id,x,y,z\\n1,10,20,30\\n2,,,\\n")
        >>> read_points(file, space="ras")
        array([[-10., -20.,  30.],
               [ nan,  nan,  nan]])
    """
    if space not in SPACES:
        raise UserError(f"landmarks in {space!r}; the space is one of {', '.join(SPACES)}")
    if space == "voxel" and frame is None:
        raise UserError(f"{path}: landmarks in voxels need the frame of their scan; give it, or landmarks in mm")
    return to_lps(_read_table(Path(path)), space, frame)


def to_lps(points: np.ndarray, space: str, frame: Frame | None = None) -> np.ndarray:
    """Places in mm (LPS) of points in one of `SPACES`; 'voxel' is that of `frame`."""
    if space == "voxel" and frame is not None:
        return frame.to_physical(points)
    return points * (-1, -1, 1) if space == "ras" else points


def from_lps(places: np.ndarray, space: str, frame: Frame | None = None) -> np.ndarray:
    """Points in one of `SPACES` of places in mm (LPS); the inverse of `to_lps`."""
    if space == "voxel" and frame is not None:
        return frame.to_voxel(places)
    return places * (-1, -1, 1) if space == "ras" else places


def write_points(path: str | Path, points: np.ndarray, error: np.ndarray | None = None) -> None:
    """Write a table of landmarks with the header x,y,z, or x,y,z,error.

    Args:
        path: where to.
        points: [n, 3], NaN where one is missing.
        error: how far off each may be, [n], or None.

    Raises:
        UserError: it cannot be written.
    """
    rows, header = (points, "x,y,z") if error is None else (np.column_stack([points, error]), "x,y,z,error")
    with files.whole_file(path) as new:
        np.savetxt(new, rows, "%.4f", ",", header=header, comments="")


def _read_table(path: Path) -> np.ndarray:
    """The three columns of a table as they are written, float64 [L, 3]."""
    lines = _lines(path)
    if not lines:
        raise UserError(f"{path}: has no landmarks; write a header x,y,z and one row per landmark, or remove the file")
    delimiter, columns, has_header = _dialect(path, *lines[0])
    asked = f"the header has {len(columns)}" if has_header else "without a header a row has three numbers"
    rows = []
    below = lines[has_header:]
    while below and not below[0][1].strip(" "):
        below = below[1:]
    for number, line in below:
        where = f"{path}, line {number}"
        if not line.strip() and not (delimiter == "\t" and line):
            raise UserError(f"{where}: is empty; remove it, or write nan for each number of a landmark that is missing")
        cells = _cells(line, delimiter)
        if len(cells) != len(columns):
            counted = f"{len(cells)} cell{'s' * (len(cells) != 1)}"
            raise UserError(
                f"{where}: {line.strip()!r} has {counted} and {asked}; write one cell per column, name every column "
                "in a header such as id,x,y,z, and numbers with a decimal point"
            )
        _check_unnamed(where, cells, columns)
        rows.append(_place(where, [cells[columns.index(axis)] for axis in AXES]))
    if not rows:
        raise UserError(f"{path}: has a header and no landmarks; write one row per landmark, or remove the file")
    return np.array(rows, np.float64)


def _lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a file with their numbers, without the empty ones before and after the table."""
    try:
        content = path.read_bytes()
        encoding = next((name for mark, name in ENCODINGS.items() if content.startswith(mark)), "utf-8")
        text = content.decode(encoding)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a table of landmarks") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is no text in UTF-8 ({error.reason}); save the landmarks as CSV in UTF-8") from error
    lines = list(enumerate(re.split(r"\r*\n|\r", text), start=1))
    if not text.strip(" \t\r\n;,"):
        return []
    written = [k for k, (_, line) in enumerate(lines) if line.strip(" ")]
    return lines[written[0] : written[-1] + 1]


def _dialect(path: Path, number: int, line: str) -> tuple[str, list[str], bool]:
    """The delimiter, the names of the columns, and whether the first line is a header that names them."""
    for delimiter in DELIMITERS:
        names = [cell.lower() for cell in _cells(line.lstrip("# "), delimiter)]  # NumPy writes headers behind a '#'
        if set(AXES) <= set(names):
            twice = next((axis for axis in AXES if names.count(axis) > 1), None)
            if twice:
                raise UserError(f"{path}, line {number}: has two columns {twice}; leave one")
            return delimiter, names, True
    for delimiter in DELIMITERS:
        cells = _cells(line, delimiter)
        if len(cells) == 3 and all(cell.lower() in MISSING or NUMBER.fullmatch(cell) for cell in cells):
            return delimiter, list(AXES), False
    raise UserError(
        f"{path}, line {number}: {line.strip()!r} is neither a header with x, y and z nor a row of three numbers; "
        "write a header such as id,x,y,z first, and numbers with a decimal point"
    )


def _cells(line: str, delimiter: str) -> list[str]:
    """The cells of a line, without blanks and quotation marks around them."""
    if delimiter == " ":
        return [cell.strip('"') for cell in line.split()]
    line = re.sub(f'" +(?={delimiter}|$)', '"', line)
    try:
        (cells,) = csv.reader([line], delimiter=delimiter, skipinitialspace=True, strict=True)
    except (csv.Error, ValueError):
        return [line]
    return [cell.strip() for cell in cells]


def _check_unnamed(where: str, cells: list[str], columns: list[str]) -> None:
    """Raise where a column without a name holds something; only the first may, as pandas writes row numbers there."""
    for k, (cell, name) in enumerate(zip(cells, columns, strict=True)):
        if cell and not name and k:
            raise UserError(
                f"{where}: has {cell!r} in column {k + 1}, which has no name in the header; name or empty it"
            )


def _place(where: str, cells: list[str]) -> list[float]:
    """The numbers of three cells; NaN for three that are empty."""
    missing = [cell.lower() in MISSING for cell in cells]
    if all(missing):
        return [np.nan] * 3
    for axis, cell, lacks in zip(AXES, cells, missing, strict=True):
        if lacks:
            raise UserError(f"{where}: has no {axis}; give all three coordinates, or none for a missing landmark")
        if not NUMBER.fullmatch(cell) or not np.isfinite(float(cell)):
            remedy = "write a decimal point" if "," in cell else "give coordinates as plain numbers"
            raise UserError(f"{where}: {axis} is {cell!r}, which is no number; {remedy}")
    return [float(cell) for cell in cells]
