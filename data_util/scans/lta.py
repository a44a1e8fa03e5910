"""Linear maps of FreeSurfer, .lta: text that leads from a source scan to a target scan.

    type      = 1                 0: voxels to voxels, 1: mm (RAS) to mm (RAS)
    nxforms   = 1
    1 4 4                         and the four rows of the matrix
    src volume info, dst volume info: size, spacing and axes of both scans, which voxels need

FreeSurfer's programs register a moving scan, the source, to a fixed one, the target. So the map of places in the fixed
scan to those in the moving scan is the inverse of what the file has.
"""

from pathlib import Path

import numpy as np
import SimpleITK as sitk

from data_util.scans.nibabel_formats import TO_LPS
from data_util.scans.transform_chain import linear
from errors import UserError

VOXELS, PLACES = 0, 1
KINDS = {VOXELS: "voxels to voxels", PLACES: "RAS to RAS"}
VOLUMES = ("src", "dst")


def read(path: Path) -> sitk.AffineTransform:
    """Read an .lta file: transform from places in its target (dst) to places in its source (src), in mm (LPS).

    Raises:
        UserError: it is no such file, or has a map of another kind.
    """
    try:
        lines = [line.split("#")[0].strip() for line in path.read_text("latin-1").splitlines()]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        kind, matrix = _matrix(lines)
        if kind not in KINDS:
            known = ", ".join(f"{number} ({text})" for number, text in KINDS.items())
            raise UserError(f"{path}: has a map of type {kind}; known are {known}: lta_convert makes one of these")
        if kind == VOXELS:
            source, target = (_voxel_to_ras(lines, role) for role in VOLUMES)
            matrix = target @ matrix @ np.linalg.inv(source)
        back = np.linalg.inv(matrix)
    except (ValueError, KeyError, IndexError, np.linalg.LinAlgError) as error:
        raise UserError(f"{path}: is no whole .lta file of FreeSurfer ({error}); write or copy it again") from error
    return linear(TO_LPS @ back[:3, :3] @ TO_LPS, TO_LPS @ back[:3, 3])


def _matrix(lines: list[str]) -> tuple[int, np.ndarray]:
    """The type of the map and its matrix, [4, 4]."""
    fields = _fields(lines)
    if int(fields["nxforms"]) != 1:
        raise ValueError(f"it has {fields['nxforms']} maps, not one")
    start = lines.index("1 4 4") + 1
    matrix = np.array([[float(part) for part in line.split()] for line in lines[start : start + 4]])
    if matrix.shape != (4, 4) or not np.allclose(matrix[3], (0, 0, 0, 1)):
        raise ValueError("its matrix is not one of four rows, the last 0 0 0 1")
    return int(fields["type"]), matrix


def _fields(lines: list[str]) -> dict[str, str]:
    return {key.strip(): value.strip() for key, mark, value in (line.partition("=") for line in lines) if mark}


def _voxel_to_ras(lines: list[str], role: str) -> np.ndarray:
    """Matrix [4, 4] from voxels of the source or the target to mm (RAS)."""
    start = lines.index(f"{role} volume info")
    fields = _fields(lines[start : start + 9])
    if int(fields["valid"].split()[0]) != 1:
        raise ValueError(f"it does not know the grid of its {role}")
    size, spacing, *axes, centre = (
        np.array([float(part) for part in fields[name].split()])
        for name in ("volume", "voxelsize", "xras", "yras", "zras", "cras")
    )
    matrix = np.eye(4)
    matrix[:3, :3] = np.stack(axes, axis=1) * spacing
    matrix[:3, 3] = centre - matrix[:3, :3] @ (size / 2)
    return matrix
