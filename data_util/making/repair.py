"""Mended copies of a data set: what `data_util.check` found and what can be mended without asking what was meant."""

import json
import os
import shutil
from pathlib import Path

import h5py
import numpy as np

from data_util.hdf5 import ScanStore
from errors import UserError

# Name -> (member of a scan, what becomes of its array).
MENDS = {
    "mask": ("segmentation", lambda array: np.where(array != 0, 255, 0).astype(np.uint8)),
    "scale": ("volume", lambda array: np.rint(array * 255.0).astype(np.uint8)),
    "uint8": ("volume", lambda array: array.astype(np.uint8)),
}


def mend(config, findings):
    """Write a mended copy of what `findings` can mend: NAME_fixed.json, and each file with a mended scan; return paths.

    Nothing that is there is changed or replaced. Raises UserError where a copy is there already or cannot be written.
    """
    path = config.path
    content = json.loads(path.read_text(encoding="utf-8"))
    scans = {}
    for finding in findings:
        if isinstance(finding.mend, tuple):
            _, subset, entry = finding.mend
            content["subsets"][subset].remove(entry)
        elif finding.mend:
            file, key = ScanStore(config.files).locate(finding.where)
            scans.setdefault(file, []).append((key, *MENDS[finding.mend]))
    copies = {file: file.with_name(f"{file.stem}_fixed{file.suffix}") for file in scans}
    new_config = path.with_name(f"{path.stem}_fixed{path.suffix}")
    for copy in (*copies.values(), new_config):
        if copy.exists():
            raise UserError(f"{copy} is there already; move or delete it, and give --fix again")
    unfinished = {file: copy.with_name(f"{copy.name}.{os.getpid()}.tmp") for file, copy in copies.items()}
    try:
        for file, new in unfinished.items():
            shutil.copyfile(file, new)
            with h5py.File(new, "r+") as target:
                for key, member, mended in scans[file]:
                    _replace(target[key], member, mended(target[key][member][...]))
            os.replace(new, copies[file])
        for key, file in config.files.items():
            if file in copies:
                written = Path(content["files"][key]["path"])  # as it was, relative or not
                content["files"][key]["path"] = written.with_name(copies[file].name).as_posix()
        new_config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {new_config} and its files ({error}); is there space beside them?") from error
    finally:
        for new in unfinished.values():
            new.unlink(missing_ok=True)
    return [*copies.values(), new_config]


def _replace(group, member, array):
    """Put an array in place of a dataset, stored and described as it was."""
    old = group[member]
    attributes = dict(old.attrs)
    options = {"chunks": old.chunks, "compression": old.compression, "compression_opts": old.compression_opts}
    del group[member]
    group.create_dataset(member, data=array, **options).attrs.update(attributes)
