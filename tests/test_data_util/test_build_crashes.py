"""A build that is killed at any step goes on with the same command to the same data set, and leaves nothing."""

import json
import os
import re
import resource
import shutil

import h5py
import numpy as np
import pytest
import SimpleITK as sitk

import cli
from data_util import build
from tests.campaign.crash_points import crash_points, run_killed, tree
from tests.test_data_util.test_build import contents

FLAGS = ["scans", "-o", "sets/mine", "--size", "6", "5", "4", "--split", "1/0/0"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Two tiny scans, one with labels, and a function that removes whatever was made of them."""
    monkeypatch.chdir(tmp_path)
    for name in ("images", "labels"):
        (tmp_path / "scans" / name).mkdir(parents=True)
    for k in range(2):
        array = np.random.default_rng(k).integers(-100, 200, (6, 7, 8)).astype(np.int16)
        sitk.WriteImage(sitk.GetImageFromArray(array), f"scans/images/p{k}.nii")
    sitk.WriteImage(sitk.GetImageFromArray((array > 0).astype(np.uint8)), "scans/labels/p1.nii")
    return tmp_path


def command(*flags):
    return lambda: cli.run(build.main, [*FLAGS, *flags])


def made(folder):
    return contents(folder / "mine.h5"), json.loads((folder / "mine.json").read_text())


def never(sets):
    """Nothing was built before."""


def other_parts_and_an_old_set(sets):
    """A set is there, and parts that a stopped build left, both made with other options."""
    assert command("--crop", "mask", "--labels", "all")() == 1  # p0 has no labels
    for name in ("mine.h5", "mine.json"):
        (sets / name).write_text("old")


@pytest.mark.parametrize(("flags", "before"), [([], never), (["--overwrite"], other_parts_and_an_old_set)])
def test_every_crash_point_of_a_build(place, flags, before):
    sets, start, points = place / "sets", place / "start", []
    before(sets)
    shutil.copytree(sets, start) if sets.exists() else start.mkdir()

    def prepare():
        shutil.rmtree(sets, ignore_errors=True)
        if before is not never:
            shutil.copytree(start, sets)

    assert run_killed(command(*flags)).status == 0
    expected = made(sets)
    old = {path.name: path.read_bytes() for path in start.glob("mine.*") if path.is_file()}
    for killed in crash_points(command(*flags), prepare):
        left = tree(place)
        for name in ("mine.h5", "mine.json"):  # what is there is whole
            if (sets / name).exists() and (sets / name).read_bytes() != old.get(name):
                assert (
                    contents(sets / name) == expected[0] if name == "mine.h5" else json.loads((sets / name).read_text())
                )
        again = run_killed(command(*flags))
        assert again.status == 0, (killed, left, again)
        assert made(sets) == expected, (killed, left)
        assert tree(sets) == ["mine.h5", "mine.json"], (killed, left)
        points.append(killed.step)
    assert {point.split()[0] for point in points} == {"open", "write", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}
    for what in ("settings.json", "p0.h5", "p1.h5", "mine.h5", "mine.json"):
        assert any(point.startswith("os.rename") and point.endswith(what) for point in points), what
    assert len(points) > 30


def old_leftovers():
    """What kills left in the folder of the parts before, name -> content; None is a part."""
    settings = '{"size": [6, 5'
    return [
        {".lock": ""},
        {".lock": "", "settings.json.tmp": settings},
        {".lock": "", "settings.json": settings},
        {".lock": "", "settings.json": "[1]", "p0.h5": None},
        {".lock": "", "p0.h5": None, "p1.h5": None},
        {".lock": "", "p0.h5": None, ".p1.h5.4711": "half"},
        {".lock": "", "p1.h5": "torn", "settings.json": settings},
        {".partial-elsewhere-12-abc": "", "p0.h5": None},
    ]


@pytest.mark.parametrize("there", old_leftovers(), ids=lambda there: "+".join(there))
@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_what_older_versions_and_power_failures_left_is_gone_on_with(place, flags, there):
    folder = place / "sets/mine.parts"
    folder.mkdir(parents=True)
    for name, content in there.items():
        if content is not None:
            (folder / name).write_text(content)
        else:  # of other scans, made by another recipe
            with h5py.File(folder / name, "w") as file:
                file.attrs["stamp"] = "0"
    assert command(*flags)() == 0
    assert tree(place / "sets") == ["mine.h5", "mine.json"]
    assert list(contents(place / "sets/mine.h5")) == ["p0", "p0/volume", "p1", "p1/segmentation", "p1/volume"]


def test_what_others_put_there_stays(place):
    thesis = place / "sets/mine.parts/thesis.h5"
    (place / "scans/images/bad.nii").write_text("no image")
    assert command()() == 1
    thesis.write_text("years of work")
    (place / "scans/images/bad.nii").unlink()
    assert command()() == 0
    assert tree(place / "sets") == ["mine.h5", "mine.json", "mine.parts", "mine.parts/thesis.h5"]
    assert thesis.read_text() == "years of work"


def test_the_same_command_once_more_has_nothing_to_do(place, capsys):
    assert command()() == 0
    before = (place / "sets/mine.h5").stat().st_mtime_ns
    assert command()() == 0
    assert (place / "sets/mine.h5").stat().st_mtime_ns == before
    assert "sets/mine.h5 is there already, made by the same command of the same files" in capsys.readouterr().err
    os.utime("scans/images/p1.nii", (1, 1))
    assert command()() == 1
    assert "sets/mine.h5 is there already; choose another name" in capsys.readouterr().err
    assert command("--overwrite")() == 0
    assert command("--crop", "body")() == 1
    assert command("--split", "0/1/0")() == 1


@pytest.mark.parametrize("limit", [0, 100, 1000, 3000, 5000, 6000, 8000, 10000, 12000, 14000])
def test_a_disk_that_is_full_at_any_place_is_said_in_one_line(place, limit):
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return command()()

    ended = run_killed(limited)
    size = sum(path.stat().st_size for path in (place / "sets").rglob("*.h5"))
    if ended.status == 0:
        assert limit >= 10000
        assert size <= limit
        return
    lines = [line for line in ended.output.splitlines() if line.startswith(("error", "p0", "p1"))]
    assert ended.status == 1
    assert len(lines) == 1, ended.output
    assert re.match(
        r"error: cannot write sets/\S+ \(File too large; \d+ MiB left in /\S+\); make space, or name", lines[0]
    )
    assert "Traceback" not in ended.output
    assert not (place / "sets/mine.h5").exists()
    assert run_killed(command()).status == 0
    assert tree(place / "sets") == ["mine.h5", "mine.json"]
