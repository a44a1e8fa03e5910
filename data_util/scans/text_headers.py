"""Headers in text, of MetaImage (.mha, .mhd) and NRRD files: what SimpleITK passes over in them is looked at here.

It reads on where a spacing is negative or a place is no number, and says something else of a file that was cut short.
"""

import math
import re
import zlib
from pathlib import Path

from errors import UserError

ENDINGS = (".mha", ".mhd", ".nrrd", ".nhdr")
LONGEST = 2**16  # bytes of a header
BYTES = {"CHAR": 1, "UCHAR": 1, "SHORT": 2, "USHORT": 2, "INT": 4, "UINT": 4, "LONG": 4, "ULONG": 4, "FLOAT": 4}
BYTES |= {"DOUBLE": 8, "LONG_LONG": 8, "ULONG_LONG": 8}
# What places the voxels; keys in lower case.
PLACES = {"offset", "position", "origin", "transformmatrix", "rotation", "orientation", "elementspacing", "elementsize"}
PLACES |= {"space directions", "space origin", "spacings"}


def check_header(path: Path) -> None:
    """See that the header of a MetaImage or NRRD file makes sense, and that the voxels it promises are there.

    Raises:
        UserError: a number of its geometry is none or not above 0, or voxels are missing.
    """
    try:
        with path.open("rb") as file:
            begin = file.read(LONGEST)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    fields, length = _fields(begin)
    for key, value in fields.items():
        numbers = re.findall(r"[-+]?(?:nan|inf)\b", value, re.IGNORECASE) if key in PLACES else []
        if numbers:
            raise UserError(f"{path}: its {key} is {value!r}, which is no place; mend its header")
    spacing = fields.get("elementspacing") or fields.get("elementsize") or fields.get("spacings") or "1"
    if not all(_is_positive(part) for part in spacing.split()):
        raise UserError(f"{path}: its voxels are {spacing} mm, which must be above 0; mend its header")
    if "elementdatafile" in fields:
        _check_voxels(path, fields, length)


def _fields(begin: bytes) -> tuple[dict[str, str], int]:
    """The fields of a header by their keys in lower case, and how long it is."""
    fields: dict[str, str] = {}
    place = 0
    for line in begin.split(b"\n"):
        place += len(line) + 1
        text = line.decode("latin-1").strip()
        key, mark, value = text.partition("=" if "=" in text.split(":")[0] else ":")
        if mark:
            fields[key.strip().lower()] = value.strip()
        if "elementdatafile" in fields or (not text and fields):
            break
    return fields, place


def _check_voxels(path: Path, fields: dict[str, str], length: int) -> None:
    """See that a MetaImage has as many bytes of voxels as it promises."""
    source = fields["elementdatafile"]
    data = path if source.upper() == "LOCAL" else path.parent / source
    if source.upper().startswith("LIST") or "%" in source:
        return
    if not data.is_file():
        raise UserError(f"{path}: its voxels should be in {data}, which is not there; get that file too")
    is_compressed = fields.get("compresseddata", "false").lower() == "true"
    try:
        if is_compressed:
            promised = int(fields.get("compresseddatasize", 0))
        else:
            voxels = math.prod(int(part) for part in fields["dimsize"].split())
            kind = fields["elementtype"].removeprefix("MET_").removesuffix("_ARRAY")
            promised = voxels * int(fields.get("elementnumberofchannels", 1)) * BYTES[kind]
    except (KeyError, ValueError):  # SimpleITK will say what it cannot read
        return
    start = length if data == path else 0
    there = data.stat().st_size - start
    if there < promised:
        raise UserError(f"{path}: has {there} bytes of voxels of {promised}, so it was cut short; get {data} again")
    if is_compressed:
        _check_compressed(path, data, start)


def _check_compressed(path: Path, data: Path, start: int) -> None:
    """Read compressed voxels to their end, where their checksum is: SimpleITK reads on where they are damaged."""
    inflater = zlib.decompressobj(zlib.MAX_WBITS | 32)
    try:
        with data.open("rb") as file:
            file.seek(start)
            while not inflater.eof and (piece := file.read(2**20)):
                inflater.decompress(piece)
    except zlib.error as error:
        raise UserError(f"{path}: the compressed voxels in {data} are damaged ({error}); get the file again") from error
    if not inflater.eof:
        raise UserError(f"{path}: the compressed voxels in {data} do not end, so it was cut short; get the file again")


def _is_positive(text: str) -> bool:
    try:
        return float(text) > 0 or text.lower() == "nan"  # NRRD writes nan for an axis that has no spacing
    except ValueError:
        return False
