"""From a folder of scans to a trained and evaluated network, as README.md says."""

import pathlib

import numpy as np
import pytest
import SimpleITK as sitk

import cli
import eval as eval_script
import train
from data_util import build, check
from data_util.making.anatomy import make_phantom
from data_util.scans.frame import Frame


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with scans/: six phantoms as CTs of unequal voxels, their organ labelled 5, and landmarks."""
    monkeypatch.chdir(tmp_path)
    for name in ("images", "labels", "points"):
        pathlib.Path("scans", name).mkdir(parents=True)
    for k in range(6):
        phantom = make_phantom((36, 32, 28), k)
        frame = Frame((36, 32, 28), (6.5, 7, 9), (-100, -90, 800 + k), (1, 0, 0, 0, 1, 0, 0, 0, 1))
        # Black is air and the organ's 150 about 60 HU.
        hu = np.where(phantom.volume < 30, -1000, (phantom.volume.astype(np.int16) - 120) * 2)
        sitk.WriteImage(frame.put(hu.astype(np.int16)), f"scans/images/p{k}.nii.gz")
        sitk.WriteImage(frame.put(phantom.segmentation // 51), f"scans/labels/p{k}.nii.gz")
        places = frame.to_physical(phantom.points)
        lines = ["x,y,z", *(",".join(f"{float(mm)!r}" for mm in place) for place in places)]
        pathlib.Path(f"scans/points/p{k}.csv").write_text("\n".join(lines))
    return tmp_path


def test_four_commands(folder, capsys):
    options = ["--crop", "mask", "--labels", "liver=5", "--size", "16", "16", "16", "--split", "2/1/1"]
    assert cli.run(build.main, ["scans", "-o", "datasets/mine", *options]) == 0
    assert cli.run(check.main, ["datasets/mine.json", "--figure", "mine.png"]) == 0
    assert "datasets/mine.json: 6 scans, 0 errors, 0 warnings" in capsys.readouterr().out
    flags = ["-n", "0", "-d", "datasets/mine.json", "-g", "-1", "--batch", "2", "--round", "2", "--epochs", "1"]
    assert cli.run(train.main, [*flags, "--val_steps", "2", "--net_args", "channels=2", "--name", "mine"]) == 0
    assert "validation of 2 pairs: dice_score 0." in capsys.readouterr().out
    (run,) = pathlib.Path("weights").glob("*_mine")
    assert cli.run(eval_script.main, ["-c", str(run), "-g", "-1", "--batch", "2", "-v", "test"]) == 0
    (report,) = pathlib.Path("evaluate").glob("*.txt")
    text = report.read_text()
    assert "Dice score" in text
    assert "Landmark distance" in text
