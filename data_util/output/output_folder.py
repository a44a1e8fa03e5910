"""The output folder of a registration: made whole or not at all, and replaced only where it holds nothing else.

report.json lists the files that were written. Only a folder all of whose files are on that list is ever replaced.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import files
from errors import UserError, listed

REPORT = "report.json"


def check_folder(output: Path, overwrite: bool = False, inputs: Iterable[str | None] = ()) -> None:
    """See that an output folder can be made, or replaced, before any work is done.

    Args:
        output: the folder.
        overwrite: whether one that is there may be replaced.
        inputs: paths of files and folders that are read; None for those that are not.

    Raises:
        UserError: it cannot be made, is the working directory or one above it, holds an input or other things than what
            a report lists, or is there and not to be replaced.
    """
    place = output.resolve()
    for path in (Path.cwd(), *(Path(source).resolve() for source in inputs if source is not None)):
        if place == path or place in path.parents:
            what = "the working directory" if path == Path.cwd() else f"the input {path}"
            raise UserError(f"-o {output}: {what} is there or below, and would be replaced; name another folder")
    parent = next(folder for folder in place.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"-o {output}: cannot write in {parent}; name a folder in another place")
    files.remove_leftovers(output.parent)  # before it is looked at: of a killed replacement the old one is put back
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"-o {output} is a file; name a folder")
    foreign = _foreign_files(output)
    if foreign:
        raise UserError(
            f"-o {output} has files that were not written by this command: {listed(foreign, 3)}; name another folder"
        )
    if not overwrite and any(output.iterdir()):
        raise UserError(f"-o {output} is not empty; name another folder, or replace it with --overwrite")


@contextmanager
def new_folder(output: Path, report: dict[str, Any]) -> Iterator[Path]:
    """Give an empty folder to write to, which becomes `output` when it is left without an error, with its report.

    An older `output` is removed then. Where other files have come into it since it was checked, it stays, and the new
    folder gets a name beside it.

    Args:
        output: the folder to be.
        report: written to report.json in it, with the list of its `files`.

    Yields:
        The folder to write to.

    Raises:
        UserError: it cannot be written.
    """
    with files.writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with files.partial_folder(output.parent) as partial:
            folder = partial / output.name
            folder.mkdir()
            yield folder
            report["files"] = sorted([*_files_in(folder), REPORT])
            (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
            if not output.exists():
                files.publish(folder, output)
            elif not _foreign_files(output):
                files.replace_folder(folder, output)
            else:
                output = _free_name(output)
                files.publish(folder, output)
                raise UserError(f"files were put into the output folder meanwhile, so the result is in {output}")


def _files_in(folder: Path) -> list[str]:
    """Paths of all files and links below a folder, relative to it."""
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]


def _foreign_files(folder: Path) -> list[str]:
    """The files below a folder that its report does not list; all of them where it has no such list."""
    try:
        known = set(json.loads((folder / REPORT).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        known = set()
    return sorted(set(_files_in(folder)) - known)


def _free_name(output: Path) -> Path:
    return next(path for k in range(1, 10**6) if not (path := output.with_name(f"{output.name}-{k}")).exists())
