"""Files appear whole or not at all, and what cannot be written is said in one line."""

import errno
import os
import subprocess
import sys
import time

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


@pytest.fixture
def dead():
    """Number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def unfinished(folder):
    folder.mkdir()
    (folder / "model.data").write_text("half")
    return folder


def test_what_a_killed_process_left_is_removed_and_said(tmp_path, capsys, dead):
    here = f"{files.PARTIAL}{files.machine()}"
    kept = [tmp_path / f"{here}-{os.getppid()}-x", tmp_path / f".partial-other-{dead}-x", tmp_path / ".partial-a8d_x"]
    stale = [tmp_path / f"{here}-{dead}-x", tmp_path / f"{here}-{os.getpid()}-of a container before"]
    for folder in (*kept, *stale):
        unfinished(folder)
    with files.partial_folder(tmp_path) as ours:
        files._cleaned.clear()
        files.write_text(tmp_path / "a.txt", "b")
        assert sorted(tmp_path.iterdir()) == sorted([*kept, ours, tmp_path / "a.txt"])
    told = capsys.readouterr().err.splitlines()
    assert sorted(told) == sorted(f"removed {folder}: a killed process left it unfinished" for folder in stale)


def test_of_another_machine_or_version_it_is_removed_a_day_after_its_last_change(tmp_path, monkeypatch, dead):
    here, now = f"{files.PARTIAL}{files.machine()}", time.time()
    running = unfinished(tmp_path / f"{here}-{os.getppid()}-x")
    for name in (f".partial-other-{dead}-x", ".partial-a8d_x"):
        unfinished(tmp_path / name)
    monkeypatch.setattr(files.time, "time", lambda: now + 23 * 3600)
    assert files.leftovers(tmp_path) == []
    monkeypatch.setattr(files.time, "time", lambda: now + 25 * 3600)
    files.remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [running]


def test_a_replacement_killed_between_its_two_names_is_undone(tmp_path, dead, capsys):
    partial = tmp_path / f"{files.PARTIAL}{files.machine()}-{dead}-x"
    for folder in (partial / files.REPLACED / "out", partial / "out"):
        folder.mkdir(parents=True)
        (folder / "a").write_text(folder.parent.name)
    files.remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    assert (tmp_path / "out" / "a").read_text() == files.REPLACED
    assert f"put {tmp_path / 'out'} back" in capsys.readouterr().err


def test_a_folder_replaces_one(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with files.partial_folder(tmp_path) as partial:
        (partial / "out").mkdir()
        (partial / "out" / "new").touch()
        files.replace_folder(partial / "out", tmp_path / "out")
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["out", "out/new"]


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []

    def fsync(descriptor):
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))

    def replace(source, target):
        done.append(f"rename {os.path.basename(target)}")
        os.rename(source, target)

    monkeypatch.setattr(files.os, "fsync", fsync)
    monkeypatch.setattr(files.os, "replace", replace)
    files.write_text(tmp_path / "a.txt", "x")
    assert done == ["a.txt", "rename a.txt", tmp_path.name]
    done.clear()
    with files.partial_folder(tmp_path) as partial:
        (partial / "out").mkdir()
        files.write_text(partial / "out" / "b.txt", "x")
        assert done == ["rename b.txt"]  # with its folder
        files.publish(partial / "out", tmp_path / "out")
    assert done == ["rename b.txt", "b.txt", "out", "rename out", tmp_path.name]


def test_files_beside_it_appear_first(tmp_path):
    with files.whole_file(tmp_path / "a.mhd") as new:
        new.with_suffix(".zraw").write_text("voxels")
        new.write_text("header")
    assert sorted(os.listdir(tmp_path)) == ["a.mhd", "a.zraw"]


def test_a_folder_is_published_whole(tmp_path):
    with files.partial_folder(tmp_path) as partial:
        made = partial / "out"
        made.mkdir()
        (made / "x").write_text("1")
        (made / "link").symlink_to("nowhere")
        files.publish(made, tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["link", "x"]
    assert os.listdir(tmp_path) == ["out"]


def test_a_limit_is_said_with_the_space_left(tmp_path, file_limit):
    said = r"cannot write .*big.txt \(File too large; \d+ MiB left in .*make space"
    with file_limit(1000), pytest.raises(UserError, match=said):
        files.write_text(tmp_path / "big.txt", "x" * 5000)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_keeps_the_old_file(small_disk):
    path = small_disk / "a.txt"
    path.write_text("old")
    with pytest.raises(UserError, match=r"cannot write .*a.txt \(No space left on device; 0 MiB left in .*make space"):
        files.write_text(path, "x" * 300_000)
    assert os.listdir(small_disk) == ["a.txt"]
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), r"cannot write x \(No space left on device; \d+ MiB left"),
        (OSError(errno.EACCES, "Permission denied"), r"cannot write x \(Permission denied\); may you write there"),
        (RuntimeError("head\nITK: wrote only 0 of 9"), r"cannot write x \(ITK: wrote only 0 of 9; \d+ MiB left"),
        (
            RuntimeError("{{node w}} e.v2; No space left on device\n\tCould not flush [Op:X]"),
            r"\(No space left on device; ",
        ),
        (
            RuntimeError("{{node w}} e.v2; Permission denied\n\tCould not [Op:X]"),
            r"cannot write x \(Permission denied\);",
        ),
        (RuntimeError(), r"cannot write x \(RuntimeError\); may you"),
    ],
)
def test_reasons(error, said):
    with pytest.raises(UserError, match=said), files.writing("x", RuntimeError):
        raise error


def test_a_file_in_an_unfinished_folder_is_named_by_its_place_in_the_end(tmp_path):
    with files.partial_folder(tmp_path) as partial, pytest.raises(UserError) as error:
        files.write_text(partial / "out" / "a.txt", "x")
    assert str(error.value).startswith(f"cannot write {tmp_path / 'out' / 'a.txt'} (No such file or directory)")


def test_a_device_is_written_to_and_never_replaced(tmp_path):
    with pytest.raises(UserError, match=r"cannot write /dev/full \(No space left on device; \d+ MiB left in /dev\)"):
        files.write_text("/dev/full", "x")
    assert os.stat("/dev/full").st_rdev
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE, text=True)
    files.write_text(tmp_path / "pipe", "through")
    assert reader.communicate()[0] == "through"
    assert os.listdir(tmp_path) == ["pipe"]
