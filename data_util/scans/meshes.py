"""Surfaces and other meshes: the places of their vertices are read and replaced, and all else in the file stays.

Legacy VTK (.vtk), PLY and STL, as text or binary. Faces, colours and values of a mesh are those of its file to the
byte, and so are normals that VTK and PLY files keep at their vertices. STL has the corners of its faces only, and the
normals of these, which are computed again.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from errors import UserError

ENDINGS = (".vtk", ".ply", ".stl")
SPACE = re.compile(rb"SPACE=(LPS|RAS)")  # how 3D Slicer says it, in a comment
VTK_MESHES = ("POLYDATA", "UNSTRUCTURED_GRID", "STRUCTURED_GRID")
VTK_POINTS = re.compile(rb"\nPOINTS[ \t]+(\d+)[ \t]+(\w+)[ \t]*\r?\n", re.IGNORECASE)
FLOATS = {"float": "f4", "double": "f8", "float32": "f4", "float64": "f8"}
PLY_TYPES = FLOATS | {"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4"}
PLY_TYPES |= {"int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4"}
PLY_ORDERS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}
STL_FACE = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("more", "<u2")])
STL_HEADER = 84  # bytes, the last four the number of faces
NUMBER = rb"[-+0-9.eEinfaINFA]+"
STL_TEXT = re.compile(rb"facet\s+normal(?:\s+%b){3}|vertex((?:\s+%b){3})" % (NUMBER, NUMBER))


@dataclass(frozen=True, eq=False)
class Mesh:
    """A mesh of a file.

    Attributes:
        points: places of its vertices as the file has them, float64 [n, 3].
        space: 'lps' or 'ras' where the file says in which its places are, or None.
        has_normals: whether it keeps normals that do not follow its vertices.
        content: function of places [n, 3] that gives the content of the file with these instead of its own.
    """

    points: np.ndarray
    space: str | None
    has_normals: bool
    content: Callable[[np.ndarray], bytes]


def read_mesh(path: str | Path) -> Mesh:
    """Read a mesh.

    Raises:
        UserError: it cannot be read, is no mesh of one of `ENDINGS`, cut short, empty, or has NaN among its places.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a mesh") from error
    read = {".vtk": _vtk, ".ply": _ply, ".stl": _stl}.get(path.suffix.lower())
    if read is None:
        raise UserError(f"{path}: is no mesh by its name; known are {', '.join(ENDINGS)}")
    try:
        mesh = read(content)
    except ValueError as error:
        raise UserError(f"{path}: cannot be read as a mesh ({error}); save it as legacy VTK, PLY or STL") from error
    if not len(mesh.points):
        raise UserError(f"{path}: is a mesh without vertices; make it again")
    wrong = np.count_nonzero(~np.isfinite(mesh.points).all(axis=1))
    if wrong:
        raise UserError(f"{path}: has {wrong} vertices that are NaN or infinite, of {len(mesh.points)}; make it again")
    return mesh


def _space(header: bytes) -> str | None:
    found = SPACE.search(header)
    return found[1].decode().lower() if found else None


def _vtk(content: bytes) -> Mesh:
    if not content.startswith(b"# vtk DataFile"):
        raise ValueError("its header is not that of a legacy VTK file")
    lines = [line.strip().decode("latin-1") for line in content[:4096].splitlines()]
    words = next((line.split() for line in lines if line.upper().startswith("DATASET")), ["", "none"])
    if words[1].upper() not in VTK_MESHES:
        raise ValueError(f"its data set is {words[1]}, and meshes are {', '.join(VTK_MESHES)}")
    found = VTK_POINTS.search(content)
    if found is None:
        raise ValueError("it has no POINTS")
    count, kind = int(found[1]), found[2].decode().lower()
    if kind not in ("float", "double"):
        raise ValueError(f"its POINTS are of type {kind}, not float or double")
    before, after = content[: found.end()], content[found.end() :]
    normals = b"\nNORMALS " in content
    if "BINARY" in (line.upper() for line in lines[:3]):
        stored = np.dtype(f">{FLOATS[kind]}")
        length = 3 * count * stored.itemsize
        if len(after) < length:
            raise ValueError("it is cut short")
        points = np.frombuffer(after[:length], stored).reshape(-1, 3).astype(np.float64)
        return Mesh(points, _space(before), normals, lambda new: before + new.astype(stored).tobytes() + after[length:])
    numbers = after.split(None, 3 * count)
    if len(numbers) < 3 * count:
        raise ValueError("it is cut short")
    points = np.array(numbers[: 3 * count], np.float64).reshape(-1, 3)
    rest = b"".join(numbers[3 * count :])
    return Mesh(points, _space(before), normals, lambda new: before + _text(new) + rest)


def _text(points: np.ndarray) -> bytes:
    return b"".join(b"%.9g %.9g %.9g\n" % tuple(point) for point in points.tolist())


def _ply(content: bytes) -> Mesh:
    end = re.search(rb"\nend_header\r?\n", content)
    if not content.startswith(b"ply") or end is None:
        raise ValueError("its header is not that of a PLY file")
    header, body = content[: end.end()], content[end.end() :]
    lines = [line.split() for line in header.decode("latin-1").splitlines()]
    form = next((words[1] for words in lines if words[:1] == ["format"]), "none")
    elements = [k for k, words in enumerate(lines) if words[:1] == ["element"]]
    if form not in PLY_ORDERS or not elements or lines[elements[0]][1] != "vertex":
        raise ValueError(f"its format is {form}, or its first element is not vertex")
    last = elements[1] if len(elements) > 1 else len(lines)
    columns = [words[1:] for words in lines[elements[0] : last] if words[:1] == ["property"]]
    names = [words[-1] for words in columns]
    types = [words[0] for words in columns if words[0] in PLY_TYPES]
    if len(types) < len(names) or not all(axis in names and types[names.index(axis)] in FLOATS for axis in "xyz"):
        raise ValueError("its vertices have no x, y and z of type float or double, or lists")
    count = int(lines[elements[0]][2])
    if form == "ascii":
        return _ply_text(header, body, count, names)
    kind = np.dtype([(name, PLY_ORDERS[form] + PLY_TYPES[kind]) for name, kind in zip(names, types, strict=True)])
    if len(body) < count * kind.itemsize:
        raise ValueError("it is cut short")
    vertices = np.frombuffer(body, kind, count)
    points = np.stack([vertices[axis] for axis in "xyz"], axis=-1).astype(np.float64)

    def replaced(new: np.ndarray) -> bytes:
        changed = vertices.copy()
        for k, axis in enumerate("xyz"):
            changed[axis] = new[:, k]
        return header + changed.tobytes() + body[count * kind.itemsize :]

    return Mesh(points, _space(header), "nx" in names, replaced)


def _ply_text(header: bytes, body: bytes, count: int, names: list[str]) -> Mesh:
    *lines, rest = (body if body.endswith(b"\n") else body + b"\n").split(b"\n", count)
    rows = [line.split() for line in lines]
    if len(rows) < count or any(len(row) != len(names) for row in rows):
        raise ValueError("it is cut short, or a vertex has too few or too many numbers")
    columns = [names.index(axis) for axis in "xyz"]
    points = np.array([[row[k] for k in columns] for row in rows], np.float64).reshape(-1, 3)

    def replaced(new: np.ndarray) -> bytes:
        changed = [list(row) for row in rows]
        for row, place in zip(changed, new.tolist(), strict=True):
            for k, mm in zip(columns, place, strict=True):
                row[k] = b"%.9g" % mm
        return header + b"".join(b" ".join(row) + b"\n" for row in changed) + rest

    return Mesh(points, _space(header), "nx" in names, replaced)


def _stl(content: bytes) -> Mesh:
    count = int.from_bytes(content[STL_HEADER - 4 : STL_HEADER], "little")
    if len(content) != STL_HEADER + count * STL_FACE.itemsize or len(content) < STL_HEADER:
        return _stl_text(content)
    faces = np.frombuffer(content, STL_FACE, count, STL_HEADER)

    def replaced(new: np.ndarray) -> bytes:
        changed = faces.copy()
        changed["corners"] = new.reshape(-1, 3, 3)
        changed["normal"] = _normals(new)
        return content[:STL_HEADER] + changed.tobytes()

    return Mesh(faces["corners"].reshape(-1, 3).astype(np.float64), _space(content[:STL_HEADER]), False, replaced)


def _stl_text(content: bytes) -> Mesh:
    if not content.startswith(b"solid") or b"endsolid" not in content:
        raise ValueError("it is cut short, or no STL file")
    corners = [found[1].split() for found in STL_TEXT.finditer(content) if found[1] is not None]
    faces = len(STL_TEXT.findall(content)) - len(corners)
    if len(corners) != 3 * faces:
        raise ValueError(f"it has {faces} faces and {len(corners)} corners of them")
    points = np.array(corners, np.float64).reshape(-1, 3)

    def replaced(new: np.ndarray) -> bytes:
        normals, places = iter(_normals(new).tolist()), iter(new.tolist())

        def one(found: re.Match[bytes]) -> bytes:
            what, numbers = (b"facet normal", normals) if found[1] is None else (b"vertex", places)
            return what + b" %.9g %.9g %.9g" % tuple(next(numbers))

        return STL_TEXT.sub(one, content)

    return Mesh(points, _space(content.splitlines()[0]), False, replaced)


def _normals(corners: np.ndarray) -> np.ndarray:
    """Unit normals [n, 3] of faces with these corners, [3 n, 3]; 0 for a face without area."""
    first, second, third = np.moveaxis(corners.reshape(-1, 3, 3), 1, 0)
    normals = np.cross(second - first, third - first)
    return normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), np.finfo(float).tiny)
