"""Files appear whole or not at all, and what cannot be written is said in one line."""

import errno
import os
import resource
import socket
import subprocess
import sys

import pytest

import files
from errors import UserError


@pytest.fixture(autouse=True)
def _not_looked_at():
    files._cleaned.clear()


def test_a_file_gets_its_name_at_the_end(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with files.whole_file(path) as new:
        new.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_an_error_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), files.whole_file(path) as new:
        raise ZeroDivisionError(new.write_text("half"))
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_links_beside_the_place_lead_nowhere(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    for name in ("a.txt", "a.txt.new", ".partial"):
        (tmp_path / name).symlink_to(precious)
    files.write_text(tmp_path / "a.txt", "report")
    assert precious.read_text() == "mine"
    assert not (tmp_path / "a.txt").is_symlink()


def test_what_a_killed_process_left_is_removed_and_said(tmp_path, capsys):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = socket.gethostname()
    kept = [tmp_path / f".partial-{host}-{os.getppid()}-x", tmp_path / f".partial-other-{dead.pid}-x"]
    stale = tmp_path / f".partial-{host}-{dead.pid}-x"
    for folder in (*kept, stale):
        folder.mkdir()
        (folder / "model.data").write_text("half")
    files.write_text(tmp_path / "a.txt", "b")
    assert sorted(tmp_path.iterdir()) == sorted([*kept, tmp_path / "a.txt"])
    assert capsys.readouterr().err == f"removed {stale}: a killed process left it unfinished\n"


def test_a_folder_is_published_whole(tmp_path):
    with files.partial_folder(tmp_path) as partial:
        made = partial / "out"
        made.mkdir()
        (made / "x").write_text("1")
        (made / "link").symlink_to("nowhere")
        files.publish(made, tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["link", "x"]
    assert os.listdir(tmp_path) == ["out"]


def test_a_full_disk_is_said_with_the_space_left(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*big.txt \(File too large; \d+ MiB left in .*make space"):
            files.write_text(tmp_path / "big.txt", "x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), r"cannot write x \(No space left on device; \d+ MiB left"),
        (OSError(errno.EACCES, "Permission denied"), r"cannot write x \(Permission denied\); may you write there"),
        (RuntimeError("head\nITK: wrote only 0 of 9"), r"cannot write x \(ITK: wrote only 0 of 9; \d+ MiB left"),
        (RuntimeError(), r"cannot write x \(RuntimeError\); may you"),
    ],
)
def test_reasons(error, said):
    with pytest.raises(UserError, match=said), files.writing("x", RuntimeError):
        raise error
