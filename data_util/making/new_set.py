"""Write a data set of scans that are at hand: PREFIX.h5 and its config PREFIX.json."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from data_util.config import write_dataset_config
from data_util.hdf5 import Scan
from data_util.hdf5_writer import new_file
from errors import UserError
from files import writing


def check_size(size: Sequence[int], seed: int) -> None:
    """See that volumes are large enough for the smooth flows that deform them, and that a seed is one.

    Raises:
        UserError: one of them is not.
    """
    if len(size) != 3 or min(size) < 16 or seed < 0:
        raise UserError(f"size {tuple(size)}, seed {seed}: give three sizes of at least 16 voxels and a seed from 0 on")


def new_paths(prefix: str | Path, overwrite: bool) -> tuple[Path, Path]:
    """The paths of a new set's HDF5 file and config, whose folder is made.

    Raises:
        UserError: one of them is there already (unless `overwrite`), or the folder cannot be made.
    """
    data, config = Path(f"{prefix}.h5"), Path(f"{prefix}.json")
    for path in (data, config):
        if path.exists() and not overwrite:
            raise UserError(f"{path} is there already; choose another name with -o, or replace it with --overwrite")
    with writing(data.parent):
        data.parent.mkdir(parents=True, exist_ok=True)
    return data, config


def write_scans(
    prefix: str | Path,
    scans: Iterable[Scan],
    size: Sequence[int],
    image_type: str,
    subsets: Mapping[str, Iterable[int]],
    schemes: Mapping[str, Mapping[str, float]],
    overwrite: bool = False,
    **others: object,
) -> tuple[Path, Path]:
    """Write scans and their config.

    Both files are written beside their final names and then renamed, so that no broken set is ever left behind.

    Args:
        prefix: path of both files without their endings.
        scans: made one at a time while they are written; the k-th gets the id "NAME/k", where NAME is the last part of
            the prefix.
        size: voxels of every scan along x, y, z.
        image_type: what the volumes show.
        subsets: name -> numbers of scans.
        schemes: name -> {subset: fraction}.
        overwrite: replace files that are there.
        others: further keys of the config, such as those of a `View`.

    Returns:
        Paths of the HDF5 file and the config.

    Raises:
        UserError: one of them is there already (unless `overwrite`) or cannot be written.
    """
    data, config = new_paths(prefix, overwrite)
    with new_file(data) as file:
        for k, scan in enumerate(scans):
            file.write_scan(str(k), scan)
    keys = {name: [str(k) for k in numbers] for name, numbers in subsets.items()}
    write_dataset_config(config, data, size, image_type, keys, schemes, **others)
    return data, config
