"""What a data set knows of its volumes goes into the run, and from the run into the registration of raw scans."""

import json

import h5py
import numpy as np
import pytest
import SimpleITK as sitk

import cli
import train
from data_util import build
from data_util.config import load_dataset_config
from data_util.scans.frame import Frame
from data_util.scans.view import View
from registration import register
from views import run_view

SIZE = ("16", "18", "20")
SCANS = Frame((34, 30, 26), (2.0, 2.2, 3.0), (-30, -25, -40), (1, 0, 0, 0, 1, 0, 0, 0, 1))
TRAINING = ["-b", "VoxelMorph", "-g", "-1", "--batch", "1", "--round", "1", "--epochs", "1", "--net_args", "channels=2"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A built set (LPS), the same set with axes as RPI, and a run trained on each; the second continues the first."""
    home = tmp_path_factory.mktemp("travels")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        (home / "scans").mkdir()
        for k in range(4):
            grey = np.random.default_rng(k).uniform(-900, 300, SCANS.size).astype(np.int16)
            # Written as RAS, so that a file's own axes are neither of the two.
            sitk.WriteImage(sitk.DICOMOrient(SCANS.put(grey), "RAS"), str(home / "scans" / f"p{k}.nii.gz"))
        options = ["scans", "-o", "lps", "--size", *SIZE, "--window=-300,1200", "--split", "1/0/0"]
        assert cli.run(build.main, options) == 0
        content = json.loads((home / "lps.json").read_text())
        content["orientation"] = "RPI"
        content["files"]["lps"]["path"] = "rpi.h5"
        (home / "rpi.json").write_text(json.dumps(content))
        with h5py.File("lps.h5") as lps, h5py.File("rpi.h5", "w") as rpi:
            for name, group in lps.items():
                rpi[f"{name}/volume"] = group["volume"][...][::-1, :, ::-1]
        assert cli.run(train.main, [*TRAINING, "-d", "rpi.json", "--name", "rpi"]) == 0
        (first,) = (home / "weights").glob("*_rpi")
        assert (
            cli.run(train.main, ["-c", str(first), "-g", "-1", "-d", "lps.json", "--epochs", "2", "--name", "lps"]) == 0
        )
    return home


@pytest.mark.parametrize("name", ["rpi", "lps"])
def test_a_network_sees_raw_scans_as_the_volumes_it_was_trained_on(home, monkeypatch, name):
    monkeypatch.chdir(home)
    (run,) = (home / "weights").glob(f"*_{name}")
    assert run_view(run) == load_dataset_config(f"{name}.json").view
    result = register("scans/p0.nii.gz", "scans/p1.nii.gz", run)
    with h5py.File(f"{name}.h5") as file:
        for scan, key in ((result.fixed, "p0"), (result.moving, "p1")):
            np.testing.assert_array_equal(scan.volume, file[key]["volume"])
    assert result.report["settings"]["orientation"] == name.upper()
    assert not any("axes" in doubt or "--preprocess" in doubt for doubt in result.report["doubts"])
    # The result lies on the fixed file's own voxels.
    assert Frame.of(result.warped) == Frame.of(sitk.ReadImage("scans/p0.nii.gz"))


def test_what_a_run_does_not_know_is_said(home, monkeypatch, tmp_path):
    monkeypatch.chdir(home)
    (run,) = (home / "weights").glob("*_rpi")
    for file in run.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((run / "config.json").read_text())
    del config["sum"]  # as who edits the file
    del config["data"]
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert run_view(tmp_path) == load_dataset_config("rpi.json").view  # its args.json names the set, which is here
    (home / "rpi.json").rename(home / "away.json")
    assert run_view(tmp_path) == View()
    found = register("scans/p0.nii.gz", "scans/p1.nii.gz", tmp_path, View(crop="none")).report
    (home / "away.json").rename(home / "rpi.json")
    assert found["settings"]["orientation"] == "LPS"
    assert any("does not say where the axes" in doubt and "--orientation" in doubt for doubt in found["doubts"])


def test_a_data_set_that_says_something_else_than_the_run_is_named(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    (run,) = (home / "weights").glob("*_rpi")
    view = train.trained_view(load_dataset_config("lps.json"), next(run.glob("model-*.index")))
    assert view.orientation == "LPS"
    assert "lps.json: orientation LPS, not RPI as in the run that is continued" in capsys.readouterr().err


def test_a_loaded_model_registers_without_being_read_again(home, monkeypatch):
    from network import checkpoints, load_model

    monkeypatch.chdir(home)
    (run,) = (home / "weights").glob("*_rpi")
    model = load_model(run)
    monkeypatch.setattr(checkpoints, "restore", None)
    pair = "scans/p0.nii.gz", "scans/p1.nii.gz"
    result = register(*pair, model)
    assert result.report["settings"]["orientation"] == "RPI"
    monkeypatch.undo()
    monkeypatch.chdir(home)
    again = register(*pair, run)
    np.testing.assert_array_equal(result.stages[-1].composed_flow, again.stages[-1].composed_flow)
