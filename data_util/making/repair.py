"""Mended copies of a data set: what `data_util.check` found and what can be mended without asking what was meant."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from data_util.config import DatasetConfig, save_json
from data_util.grey_values import from_unit, to_uint8
from data_util.hdf5 import HDF5Reader
from data_util.hdf5_writer import new_file
from data_util.store import ScanStore
from errors import UserError

# Name -> (member of a scan, what becomes of its array).
MENDS = {
    "mask": ("segmentation", lambda array: np.where(array != 0, 255, 0).astype(np.uint8)),
    "scale": ("volume", lambda array: to_uint8(from_unit(array))),
    "uint8": ("volume", lambda array: array.astype(np.uint8)),
}


def mend(config: DatasetConfig, findings: Iterable[Any]) -> list[Path]:
    """Write a mended copy of what can be mended: NAME_fixed.json, and each HDF5 file with a mended scan.

    Nothing that is there is changed or replaced.

    Args:
        config: the data set.
        findings: of `data_util.check`.

    Returns:
        Paths of the mended files, the config last.

    Raises:
        UserError: a copy is there already or cannot be written.
    """
    path = config.path
    content = json.loads(path.read_text(encoding="utf-8-sig"))
    scans: dict[Path, list] = {}
    for finding in findings:
        if isinstance(finding.mend, tuple):
            _, subset, entry = finding.mend
            content["subsets"][subset].remove(entry)
            if subset in content.get("pairs", {}):
                content["pairs"][subset] = [pair for pair in content["pairs"][subset] if entry not in pair]
        elif finding.mend:
            data, key = ScanStore(config.files).locate(finding.where)
            if data.type != "HDF5":
                raise UserError(f"{data.path}: --fix mends HDF5 files only, and this one is read as {data.type}")
            scans.setdefault(data.path, []).append((key, *MENDS[finding.mend]))
    copies = {file: file.with_name(f"{file.stem}_fixed{file.suffix}") for file in scans}
    new_config = path.with_name(f"{path.stem}_fixed{path.suffix}")
    for target in (*copies.values(), new_config):
        if target.exists():
            raise UserError(f"{target} is there already; move or delete it, and give --fix again")
    for file, copy in copies.items():
        with new_file(copy, copy_of=file) as new:
            reader = HDF5Reader(file)
            for key, member, mended in scans[file]:
                new.replace_array(key, member, mended(np.asarray(reader.members(key)[member])))
            reader.close()
    for key, data in config.files.items():
        if data.path in copies:
            written = Path(content["files"][key]["path"])  # as it was, relative or not
            content["files"][key]["path"] = written.with_name(copies[data.path].name).as_posix()
    save_json(new_config, content)
    return [*copies.values(), new_config]
