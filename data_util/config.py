"""Dataset configs: a JSON file names the HDF5 files, the subsets of scans and the schemes that mix them.

`datasets/README.md` shows how one is written.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checked import is_finite, read_json, shown
from checksums import SUM, is_changed, sealed
from data_util.names import check_name, plain
from data_util.readers import READERS
from data_util.scans.view import KEYS as VIEW_KEYS
from data_util.scans.view import View
from errors import UserError, listed
from files import write_text

KEYS = (
    SUM,
    "files",
    "image_size",
    "image_type",
    "subsets",
    "schemes",
    "pairs",
    "atlas",
    "segmentation_class_value",
    "task",
    *VIEW_KEYS,
)
LARGEST = 2**15
"""Voxels along an axis of a volume; more is a mistake."""
_KIND = {dict: "an object {...}", list: "a list [...]", str: "a string", int: "a whole number", float: "a number"}


@dataclass(frozen=True)
class DataFile:
    """A file of a data set.

    Attributes:
        path: the file; it need not exist: only files that are read are opened.
        type: how it is read, one of `readers.READERS`.
        trusted: whether it may have values read from files outside its folder.
    """

    path: Path
    type: str = "HDF5"
    trusted: bool = False


@dataclass(frozen=True)
class DatasetConfig:
    """A checked config.

    Attributes:
        path: the config file.
        files: file key -> file.
        image_size: voxels of every scan along x, y, z.
        image_type: "liver", "brain" or whatever the author wrote; for information.
        subsets: name -> scan ids "file/key" or globs ("lits/*"), as written.
        schemes: name -> {subset: fraction}; the fractions of a scheme are positive and add up to 1.
        atlas: id of the scan that is the fixed image of every pair, or None.
        labels: name -> value in the segmentations (JSON key `segmentation_class_value`), or None.
        task: the tasks the config is meant for; "registration" is one of them.
        view: how its volumes show the scans, as far as it says.
        pairs: name of a subset -> its pairs, (fixed id, moving id), where they are listed one by one.
    """

    path: Path
    files: dict[str, DataFile]
    image_size: tuple[int, int, int]
    image_type: str | None
    subsets: dict[str, tuple[str, ...]]
    schemes: dict[str, dict[str, float]]
    atlas: str | None
    labels: dict[str, int] | None
    task: tuple[str, ...]
    view: View = field(default_factory=View)
    pairs: dict[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)


def write_dataset_config(
    path: str | Path,
    data: str | Path,
    image_size: Sequence[int],
    image_type: str,
    subsets: Mapping[str, Sequence[str]],
    schemes: Mapping[str, Mapping[str, float]],
    **others: Any,
) -> None:
    """Write the config of a data set of one HDF5 file.

    Args:
        path: the config.
        data: the HDF5 file; its name without ending is its file key.
        image_size: voxels along x, y, z.
        image_type: what the volumes show.
        subsets: name -> keys of scans in the file.
        schemes: name -> {subset: fraction}.
        others: further keys, such as `atlas`, `pairs` and those of a `View`; ids in them are whole, "file/key".

    Raises:
        UserError: it cannot be written.
    """
    name = Path(data).stem
    content = {
        "files": {name: {"type": "HDF5", "path": Path(data).as_posix()}},
        "image_size": [int(n) for n in image_size],
        "image_type": image_type,
        "subsets": {subset: [f"{name}/{key}" for key in keys] for subset, keys in subsets.items()},
        "schemes": schemes,
        **others,
    }
    save_json(path, content)


def save_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a config's content, whole or not at all, with a checksum.

    Raises:
        UserError: it cannot be written.
    """
    write_text(path, sealed({key: value for key, value in content.items() if key != SUM}, indent=2) + "\n")


def load_dataset_config(path: str | Path, trusted: bool = False) -> DatasetConfig:
    """Read and check a config.

    A relative path in it is looked for from the working directory, then from the config's folder, then from that
    folder's parent.

    Args:
        path: the config, a JSON file.
        trusted: the files may have values read from files outside their folders (`--trust`).

    Returns:
        The checked config.

    Raises:
        UserError: anything is wrong; the message names the file, the key, the value and what is allowed.

    Example:
        >>> config = load_dataset_config("datasets/liver.json")
        >>> config.image_size, config.view.orientation
        ((128, 128, 128), 'RPI')
    """
    path = Path(path)
    raw = _expect(_read_json(path), dict, path, "the config")
    _known(raw, KEYS, path, "the config")
    for key in ("files", "subsets", "schemes"):
        if key not in raw:
            raise UserError(f"{path}: key '{key}' is missing; a config needs files, subsets and schemes")
    subsets = {
        name: tuple(_expect(entry, str, path, f"an entry of subsets.{name}") for entry in entries)
        for name, entries in _table(raw, "subsets", list, path).items()
    }
    return DatasetConfig(
        path=path,
        files={key: _file(key, entry, path, trusted) for key, entry in _table(raw, "files", dict, path).items()},
        image_size=_image_size(raw.get("image_size", [128, 128, 128]), path),
        image_type=_optional(raw, "image_type", path),
        subsets=subsets,
        schemes={
            name: _scheme(name, parts, subsets, path) for name, parts in _table(raw, "schemes", dict, path).items()
        },
        atlas=_optional(raw, "atlas", path),
        labels=_labels(raw, path),
        task=_task(raw.get("task", "registration"), path),
        view=View.from_dict(raw, path),
        pairs=_pairs(raw, subsets, path),
    )


def _read_json(path: Path) -> Any:
    if not path.exists():
        raise UserError(f"{path}: no such dataset config; give the path of a .json file with -d")
    content = read_json(path, "write the dataset config as datasets/README.md says")
    if is_changed(path.read_bytes(), content):  # by its user, most likely: it is a file to be edited
        print(f"{path}: was changed since it was written; where you did that, delete its {SUM!r}", file=sys.stderr)
    return content


def _expect(value: Any, kind: type, path: Path, what: str) -> Any:
    """`value` where it is of `kind` (a float may be written as an int; true and false are no numbers)."""
    allowed = (int, float) if kind is float else kind
    if not isinstance(value, allowed) or isinstance(value, bool) or (kind is float and not is_finite(value)):
        raise UserError(f"{path}: {what} must be {_KIND[kind]}, not {shown(value)}")
    return value


def _known(value: Mapping[str, Any], allowed: Sequence[str], path: Path, what: str) -> None:
    unknown = [key for key in value if key not in allowed]
    if unknown:
        raise UserError(f"{path}: unknown key '{plain(unknown[0])}' in {what}; allowed are {', '.join(allowed)}")


def _table(raw: Mapping[str, Any], key: str, kind: type, path: Path) -> dict[str, Any]:
    """The object raw[key], which has at least one entry and only values of `kind`."""
    table = _expect(raw[key], dict, path, f"'{key}'")
    if not table:
        raise UserError(f"{path}: '{key}' is empty; it needs at least one entry")
    for name in table:
        check_name(name, f"{path}: in '{key}' the name")
    return {name: _expect(value, kind, path, f"{key}.{name}") for name, value in table.items()}


def _optional(raw: Mapping[str, Any], key: str, path: Path) -> str | None:
    return None if raw.get(key) is None else _expect(raw[key], str, path, f"'{key}'")


def _file(key: str, entry: Mapping[str, Any], path: Path, trusted: bool) -> DataFile:
    what = f"files.{key}"
    if key == "" or ("/" in key and key != "/"):
        raise UserError(f"{path}: file key '{key}' cannot be part of a scan id; use a name without '/', or '/' alone")
    _known(entry, ("type", "path"), path, what)
    kind = entry.get("type", "HDF5")
    if not isinstance(kind, str) or kind not in READERS:
        known = ", ".join(f'"{name}"' for name in READERS)
        raise UserError(f"{path}: {what}.type is {shown(kind)}; known are {known}, and those that a --plugin adds")
    if "path" not in entry:
        raise UserError(f"{path}: {what} has no 'path'; give the path of its HDF5 file")
    relative = Path(_expect(entry["path"], str, path, f"{what}.path"))
    folder = path.resolve().parent
    candidates = [base / relative for base in (Path.cwd(), folder, folder.parent)]
    try:
        return DataFile(next((c for c in candidates if c.exists()), candidates[0]), kind, trusted)
    except OSError as error:  # no file can be named so
        raise UserError(f"{path}: {what}.path is {shown(entry['path'])} ({error.strerror}); mend it") from error


def _image_size(size: Any, path: Path) -> tuple[int, int, int]:
    if (
        not isinstance(size, list)
        or len(size) != 3
        or any(not isinstance(s, int) or isinstance(s, bool) or not 1 <= s <= LARGEST for s in size)
    ):
        raise UserError(f"{path}: 'image_size' must be three positive whole numbers up to {LARGEST}, not {shown(size)}")
    x, y, z = size
    return x, y, z


def _scheme(name: str, parts: Mapping[str, Any], subsets: Mapping[str, Any], path: Path) -> dict[str, float]:
    if not parts:
        raise UserError(f"{path}: scheme '{name}' is empty; give it at least one subset with a fraction")
    for subset, fraction in parts.items():
        if subset not in subsets:
            raise UserError(
                f"{path}: scheme '{name}' names unknown subset '{plain(subset)}'; known are {listed(list(subsets))}"
            )
        if not _expect(fraction, float, path, f"schemes.{name}.{subset}") > 0:
            raise UserError(f"{path}: schemes.{name}.{subset} is {fraction:g}; a fraction must be positive")
    total = sum(parts.values())
    if not abs(total - 1) <= 1e-6:
        raise UserError(f"{path}: the fractions of scheme '{name}' add up to {total:g}; they must add up to 1")
    return {subset: float(fraction) for subset, fraction in parts.items()}


def _pairs(raw: dict[str, Any], subsets: Mapping[str, Any], path: Path) -> dict[str, tuple[tuple[str, str], ...]]:
    """Subset -> its pairs, where they are listed."""
    if "pairs" not in raw:
        return {}
    if raw.get("atlas") is not None:
        raise UserError(f"{path}: 'pairs' lists pairs and 'atlas' makes others; leave one of them out")
    table = _table(raw, "pairs", list, path)
    for subset, pairs in table.items():
        if subset not in subsets:
            raise UserError(f"{path}: 'pairs' names unknown subset '{subset}'; known are {listed(list(subsets))}")
        for k, pair in enumerate(pairs):
            if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(scan, str) for scan in pair)):
                raise UserError(f"{path}: pairs.{subset}, entry {k + 1}: is {shown(pair)}; write [fixed id, moving id]")
    return {subset: tuple((fixed, moving) for fixed, moving in pairs) for subset, pairs in table.items()}


def _task(task: Any, path: Path) -> tuple[str, ...]:
    tasks = task if isinstance(task, list) else [task]
    if "registration" not in tasks:
        raise UserError(f"{path}: 'task' is {shown(task)}; only \"registration\", or a list with it, is supported")
    return tuple(_expect(t, str, path, "an entry of 'task'") for t in tasks)


def _labels(raw: dict[str, Any], path: Path) -> dict[str, int] | None:
    """Name -> value of the labels, or None."""
    if "segmentation_class_value" not in raw:
        return None
    labels = _table(raw, "segmentation_class_value", int, path)
    for name, value in labels.items():
        if not 0 < value < 2**31:
            what = "; 0 is the background, which is not scored: leave it out" if value == 0 else ""
            raise UserError(
                f"{path}: segmentation_class_value.{name} is {shown(value)}; a label is a whole number from 1 to "
                f"{2**31 - 1}{what}"
            )
    return labels
