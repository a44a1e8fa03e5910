import dataclasses
import hashlib
import io
import subprocess
import tarfile
import zipfile

import pytest

from data_util.making import packages
from data_util.making.packages import Package, fetch, unpack
from errors import UserError
from files import cache_folder

CONTENT = {"a/scan.nii": b"scan", "a/series/1.dcm": b"one", "a/series/2.dcm": b"two", "a/series/more/3.dcm": b"bad"}
WANTED = {"a/scan.nii": "s.nii", "a/series": "slices"}


def tar_of(content, kind="gz"):
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode=f"w:{kind}") as tar:
        for name, value in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(value)
            tar.addfile(member, io.BytesIO(value))
    return written.getvalue()


def debian_of(content):
    """An `ar` archive as dpkg makes it; the first member has an odd length, after which a byte is left out."""
    members = {"debian-binary": b"2.0\nx", "data.tar.xz": tar_of({f"./{name}": v for name, v in content.items()}, "xz")}
    written = b"!<arch>\n"
    for name, value in members.items():
        written += f"{name:16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(value):<10}`\n".encode() + value
        written += b"\n" * (len(value) % 2)
    return written


def wheel_of(content):
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as wheel:
        wheel.writestr("a/series/", b"")
        for name, value in content.items():
            wheel.writestr(name, value)
    return written.getvalue()


ARCHIVES = {"p.tar.gz": tar_of, "p.whl": wheel_of, "p.deb": debian_of}


@pytest.mark.parametrize("name", ARCHIVES)
def test_what_is_wanted_comes_out_of_each_kind_of_archive_and_nothing_else(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(ARCHIVES[name](CONTENT | {"a/series/../../escaped": b"bad", "other": b"bad"}))
    unpack(path, WANTED, tmp_path / "out")
    found = {p.relative_to(tmp_path / "out").as_posix(): p.read_bytes() for p in (tmp_path / "out").rglob("*.*")}
    assert found == {"s.nii": b"scan", "slices/1.dcm": b"one", "slices/2.dcm": b"two"}
    assert not (tmp_path / "escaped").exists()


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_that_is_damaged_or_lacks_a_file_is_refused(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(ARCHIVES[name]({"a/scan.nii": b"scan"}))
    with pytest.raises(UserError, match="has no a/series; delete it"):
        unpack(path, WANTED, tmp_path / "out")
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2])
    with pytest.raises(UserError, match="cannot be unpacked"):
        unpack(path, WANTED, tmp_path / "out")


@pytest.fixture
def package(monkeypatch, tmp_path):
    """A package that can be fetched; the list of the folders that it was downloaded to is its `calls`."""
    content = b"archive"
    made = Package("p", "1.0", "p-1.0.tar.gz", hashlib.sha256(content).hexdigest())
    calls = []

    def download(package, folder):
        calls.append(folder)
        (folder / package.archive).write_bytes(content)

    monkeypatch.setattr(packages, "download", download)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return made, calls


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "recursive-cascaded-networks"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "recursive-cascaded-networks"


def test_what_is_in_the_cache_whole_is_not_fetched_again(package):
    package, calls = package
    path = fetch(package)
    assert path == cache_folder() / package.archive
    assert fetch(package) == path
    assert len(calls) == 1
    path.write_bytes(path.read_bytes()[:-5])
    fetch(package)
    assert len(calls) == 2
    assert [p.name for p in path.parent.iterdir()] == [package.archive]


def test_another_file_than_the_pinned_one_is_refused(package):
    with pytest.raises(UserError, match="with sha256 000"):
        fetch(dataclasses.replace(package[0], sha256="0" * 64))
    assert not list(cache_folder().iterdir())


def test_apt_is_asked_for_the_version_and_its_failure_is_told(monkeypatch, tmp_path):
    package, asked = Package("p", "1:2", "p_2_all.deb", ""), []

    def run(command, cwd, **_):
        asked.append(command)
        (cwd / "p_1%3a2_all.deb").write_bytes(b"deb")
        return subprocess.CompletedProcess(command, 0 if len(asked) == 1 else 100, "", "W: slow\nE: not found\n")

    monkeypatch.setattr(packages.subprocess, "run", run)
    packages.download(package, tmp_path)
    assert asked == [["apt-get", "download", "p=1:2"]]
    assert (tmp_path / "p_2_all.deb").read_bytes() == b"deb"
    with pytest.raises(UserError, match=r"apt-get could not download p 1:2 \(E: not found\)"):
        packages.download(package, tmp_path)


def test_where_there_is_no_apt_the_archive_may_be_put_into_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"no apt-get here; put its archive p_2_all\.deb into"):
        packages.download(Package("p", "2", "p_2_all.deb", ""), tmp_path)
