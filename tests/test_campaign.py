"""The campaign finds what it is there to find: each planted fault is lost, and a command without one survives."""

import dataclasses
import random
import sys
import time
from pathlib import Path

import pytest

import files
from errors import UserError
from tests.campaign import crashes, damage, full_disk
from tests.campaign.commands import Command
from tests.campaign.trying import Ended, Try, call, side_by_side

TEXT = "x" * 3000


class Fake(Command):
    """A command that is a function of this file."""

    def run(self, flags=None):
        return globals()[self.module]


def careful():
    Path("out").mkdir(exist_ok=True)
    try:
        files.write_text("out/a.txt", TEXT)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def in_place():
    Path("a.txt").write_text(TEXT)
    return 0


def without_fsync():
    Path("b").write_text(TEXT)
    Path("b").rename("a.txt")
    return 0


def blocked_by_its_own_folder():
    Path("out").mkdir()
    files.write_text("a.txt", TEXT)
    Path("out").rmdir()
    return 0


def one_file_at_a_time():
    Path("out").mkdir()
    for name in ("a", "b"):
        files.write_text(f"out/{name}", TEXT)
    return 0


def tries_of(name, tmp_path, **options):
    return list(crashes.crashes(Fake(name, name, (), **options), tmp_path, tmp_path / "work", random.Random(0), 50))


@pytest.mark.parametrize(
    ("name", "how", "what"),
    [
        ("in_place", "kill before", "a.txt is neither the old file nor the new one"),
        ("without_fsync", "power failure before", "a.txt has its name, and is not on the disk"),
        ("blocked_by_its_own_folder", "kill before", "run again: status 70"),
    ],
)
def test_a_planted_crash_is_lost(name, how, what, tmp_path):
    lost = [one for one in tries_of(name, tmp_path) if one.lost is not None]
    assert any(one.how.startswith(how) and what in one.lost for one in lost), lost


def test_a_folder_that_is_there_in_parts_is_lost(tmp_path):
    lost = [one.lost for one in tries_of("one_file_at_a_time", tmp_path, folders=("out",)) if one.lost]
    assert any("out is there in parts: 1 files" in what for what in lost)


def test_a_careful_command_loses_nothing(tmp_path):
    tries = tries_of("careful", tmp_path)
    assert [one for one in tries if one.lost is not None] == []
    assert len(tries) > 10
    assert {one.outcome.split(":")[0] for one in tries} == {"kill", "power failure"}


@pytest.mark.parametrize(("name", "is_lost"), [("careful", False), ("in_place", True)])
def test_a_full_disk(name, is_lost, tmp_path):
    tries = list(full_disk.full_disk(Fake(name, name, ()), tmp_path, tmp_path / "work", random.Random(0), 3))
    assert len(tries) >= 3
    assert any(one.lost is not None for one in tries) == is_lost


def test_refusals_are_one_line():
    assert Ended(1, "10 %\rerror: no\n").refusal() is None
    assert "a traceback" in Ended(1, "Traceback ...\nerror: no").refusal()
    assert "status 2 and 1 lines" in Ended(2, "error: no").refusal()
    assert "status 1 and 2 lines" in Ended(1, "error: no\nerror: never\n").refusal()
    assert Ended(None, "").refusal() == "hangs"


def test_a_command_is_ended_at_its_limit_and_the_file_limit_holds(tmp_path):
    assert call(lambda: time.sleep(60), tmp_path, seconds=0.2).status is None
    ended = call(in_place, tmp_path, file_limit=100)
    assert (ended.status, (tmp_path / "a.txt").stat().st_size) == (70, 100)
    assert "File too large" in ended.output


def test_tries_side_by_side_all_come_back_and_a_broken_one_is_lost(capfd):
    def one(k):
        return lambda: [Try(str(k), "done")]

    def broken():
        raise RuntimeError

    done = list(side_by_side([one(1), broken, one(2), one(3)]))
    assert sorted(each.how for each in done) == ["1", "2", "3", "a try"]
    assert [each.lost is not None for each in done].count(True) == 1
    assert "RuntimeError" in capfd.readouterr().err


def reads_digits(folder):
    def read():
        text = (folder / "a.txt").read_text(encoding="ascii", errors="strict" if "s" in READER else "replace")
        if "h" in READER and text.count("7") != 10:
            time.sleep(60)
        if "c" in READER and (text != "7" * 10):
            raise UserError("damaged")
        return text

    return read


READER = ""


@pytest.mark.parametrize(
    ("reader", "outcomes"),
    [("c", {"refused"}), ("", {"another"}), ("s", {"another", "traceback"}), ("h", {"died"})],
)
def test_damage(reader, outcomes, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "READER", reader)
    monkeypatch.setattr(damage, "SECONDS", 0.1)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "a.txt").write_text("7" * 10)
    kinds = (damage.flip, damage.other_digit, damage.cut)
    form = damage.Format("digits", ("a.txt",), reads_digits, damages=kinds)
    tries = list(damage.damage(form, tmp_path / "home", tmp_path / "work", 0, 6 if reader == "h" else 30))
    assert {one.outcome for one in tries} - {"not changed"} == outcomes
    assert all((one.lost is None) == (one.outcome in ("refused", "not changed")) for one in tries)
    unsure = dataclasses.replace(form, unsure="cannot be known")
    if not reader:
        assert all(one.lost is None for one in damage.damage(unsure, tmp_path / "home", tmp_path / "again", 0, 30))
