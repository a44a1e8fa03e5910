"""A Learn2Reg task, from its folder to the fields that are handed in."""

import json
import pathlib
import subprocess
import types

import h5py
import nibabel
import numpy as np
import pytest

import cli
from data_util.challenge import read_task
from data_util.config import load_dataset_config
from data_util.output import pair_images
from tests.test_data_util.learn2reg_task import (
    AFFINE,
    SHIFT,
    SIZE,
    SPACING,
    SUBJECTS,
    body,
    command,
    describe,
    entry,
    fails,
    pair,
    save,
    scores,
    smooth_field,
)

# ------------------------------------------------------------------------------------------------------ import


def test_import_keeps_every_voxel_and_the_files_axes(task, capsys):
    save(task / "imagesTr" / "T_0004_0000.nii.gz", body(SHIFT)[0])
    assert command("import", "task", "-o", "sets/t", "--window", "-250,1300") == 0
    config = load_dataset_config("sets/t.json")
    assert config.image_size == SIZE
    assert config.view.orientation == "LAS"
    assert config.view.spacing == pytest.approx(SPACING)
    assert config.labels == {"liver": 1, "spleen": 2}
    assert config.schemes == {"1": {"train": 1.0}, "2": {"val": 1.0}}
    assert config.subsets == {"train": ("t/T_0001_0000", "t/T_0002_0000"), "val": ("t/T_0003_0000", "t/T_0004_0000")}
    assert config.pairs == {"val": (("t/T_0003_0000", "t/T_0004_0000"),)}
    grey, labels = body(SHIFT)
    with h5py.File("sets/t.h5") as file:
        scan = file["T_0004_0000"]
        np.testing.assert_array_equal(scan["segmentation"], labels)
        assert np.abs(scan["volume"][...] - np.clip((grey + 900) * 255 / 1300, 0, 255)).max() < 1
        np.testing.assert_allclose(scan["point"][1], (14, 6, 10.25), atol=1e-4)
        assert scan.attrs["spacing"] == pytest.approx(SPACING)
    assert "all pairs" in capsys.readouterr().out


def test_import_and_check_agree(task, capsys):
    from data_util import check

    assert command("import", "task", "-o", "t") == 0
    assert cli.run(check.main, ["t.json"]) == 0, capsys.readouterr()


def test_older_and_newer_descriptions(task):
    older = ["imagesTr/T_0001_0000.nii.gz", "imagesTr/T_0002_0000.nii.gz", "imagesTr/T_0004_0000.nii.gz"]
    changes = {"training": older, "labels": {"0": "background", "1": "liver"}, "tensorImageSize": "4D"}
    describe(task, **changes, registration_val=..., tensorImageShape=..., pairs=[pair("0001", "0004")])
    found = read_task(task)
    assert found.labels == {"liver": 1}
    assert found.pairs["val"] == (("T_0001_0000", "T_0004_0000"),)
    assert found.training == ("T_0002_0000",)
    assert found.cases["T_0002_0000"].label == task / "labelsTr" / "T_0002_0000.nii.gz"
    describe(task, **changes, registration_val=[])
    (task / "pairs_val.csv").write_text("fixed,moving\n4,2\n1,4\n")
    assert read_task(task / "T_dataset.json").pairs["val"] == (
        ("T_0004_0000", "T_0002_0000"),
        ("T_0001_0000", "T_0004_0000"),
    )


def test_landmarks_that_are_named_as_images_are_found(task):
    (task / "keypoints01Tr").mkdir()
    (task / "keypoints01Tr" / "T_0001_0000.csv").write_text("1,2,3\n")
    named = entry("T_0001_0000") | {"keypoints01": "./keypoints01Tr/T_0001_0000.nii.gz"}
    describe(task, training=[named, *(entry(f"T_{k}_0000") for k in SUBJECTS[1:])])
    landmarks = read_task(task).cases["T_0001_0000"].landmarks
    assert landmarks == {"keypoints01": task / "keypoints01Tr" / "T_0001_0000.csv"}


def test_training_pairs_are_listed_and_leave_validation_images_out(task, capsys):
    pairs = [pair("0001", "0002"), pair("0002", "0003"), pair("0002", "0001")]
    describe(task, training_paired_images=pairs, registration_test=[pair("0009", "0003")], test=[entry("T_0009_0000")])
    assert command("import", "task", "-o", "t") == 0
    assert "no scheme 'test'" in capsys.readouterr().err
    config = load_dataset_config("t.json")
    assert config.pairs["train"] == (("t/T_0001_0000", "t/T_0002_0000"), ("t/T_0002_0000", "t/T_0001_0000"))
    assert "test" not in config.schemes


def test_what_cannot_be_imported_is_said_in_one_line(task, capsys):
    assert "no such folder" in fails(capsys, "import", "nothing", "-o", "t")
    pathlib.Path("empty").mkdir()
    assert "empty: has no dataset.json" in fails(capsys, "import", "empty", "-o", "t")
    describe(task, registration_val=[pair("0003", "0777")])
    told = fails(capsys, "import", "task", "-o", "t")
    assert "registration_val, entry 1" in told
    assert "T_0777_0000" in told
    describe(task, registration_val=[{"fixed": 3}])
    assert "registration_val, entry 1" in fails(capsys, "import", "task", "-o", "t")
    describe(task)
    save(task / "imagesTr" / "T_0002_0000.nii.gz", np.arange(60.0).reshape(3, 4, 5))
    (task / "labelsTr" / "T_0002_0000.nii.gz").unlink()
    told = fails(capsys, "import", "task", "-o", "t")
    assert "T_0002_0000" in told
    assert "3x4x5" in told
    assert not pathlib.Path("t.h5").exists()
    (task / "T_dataset.json").write_text("{")
    assert "T_dataset.json: cannot be read as JSON" in fails(capsys, "import", "task", "-o", "t")


# ------------------------------------------------------------------------------------------------------ export


def kept(folder, flow, file_format, spacing=SPACING, orientation="LAS"):
    """Keep a flow of the pair as eval.py --save flow does."""
    grey = np.zeros((*SIZE, 1), np.float32)[..., 0]
    images = {
        "flow": types.SimpleNamespace(array=flow, kind="flow", side="fixed"),
        "moving": types.SimpleNamespace(array=grey, kind="grey", side="moving"),
    }
    ids = [f"t_T_{subject}_0000" for subject in ("0003", "0004")]
    result = types.SimpleNamespace(
        index=0, fixed_id=ids[0], moving_id=ids[1], images=images, fixed_spacing=spacing, moving_spacing=spacing * 2
    )
    pair_images.save_pair(folder, result, list(images), file_format, orientation)


@pytest.mark.parametrize("kind", ["npz", "mm", "voxels"])
def test_flows_of_an_evaluation_become_fields_in_voxels(task, kind):
    assert command("import", "task", "-o", "t") == 0
    flow = smooth_field(0)
    spacing = np.full(3, np.nan) if kind == "voxels" else SPACING
    kept("evaluate/r", flow, "npz" if kind == "npz" else "nii", spacing)
    assert command("export", "task", "-d", "t.json", "--flows", "evaluate/r", "-o", "out") == 0
    image = nibabel.load("out/disp_0003_0004.nii.gz")
    assert image.get_data_dtype() == np.float32
    assert image.shape == (*SIZE, 3)
    np.testing.assert_allclose(image.affine, AFFINE)
    np.testing.assert_allclose(image.get_fdata(), flow, atol=1e-5 if kind == "mm" else 0)
    assert [path.name for path in pathlib.Path("out").iterdir()] == ["disp_0003_0004.nii.gz"]


def test_long_names_where_asked_for_and_where_short_ones_would_be_the_same(task):
    assert read_task(task).field_names(("T_0003_0000", "T_0004_0000")) == ["disp_0003_0004", "disp_0003_0000_0004_0000"]
    followups = [f"T_0001_000{k}" for k in range(3)]
    described = [
        {"fixed": f"imagesTr/{name}.nii.gz", "moving": f"imagesTr/{followups[0]}.nii.gz"} for name in followups
    ]
    describe(task, training=[entry(name) for name in followups], registration_val=described[1:])
    found = read_task(task)
    names = [found.field_names(ids) for ids in found.pairs["val"]]
    assert names == [["disp_0001_0001_0001_0000"], ["disp_0001_0002_0001_0000"]]


def test_a_run_is_evaluated_by_eval_py(task, monkeypatch, capsys):
    given = []

    def evaluation(command, **_):
        given.extend(map(str, command[1:]))
        kept("evaluate/r-2", smooth_field(1), "npz")
        return subprocess.CompletedProcess(command, 0, "Dice 0.5\nReport: evaluate/r-2.txt\nnext: look\n")

    monkeypatch.setattr(subprocess, "run", evaluation)
    assert command("import", "task", "-o", "t") == 0
    assert command("export", "task", "-d", "t.json", "-c", "RUN", "-o", "out", "-g", "-1", "--refine", "5") == 0
    assert pathlib.Path(given[0]).is_file()
    assert " ".join(given[1:]) == ("-c RUN -d t.json -v 2 --save flow --save_format npz --resume -g -1 --refine 5")
    np.testing.assert_array_equal(nibabel.load("out/disp_0003_0004.nii.gz").get_fdata(), smooth_field(1))
    failed = subprocess.CompletedProcess([], 1, "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    assert "eval.py failed" in fails(capsys, "export", "task", "-d", "t.json", "-c", "RUN", "-o", "new")
    assert not pathlib.Path("new").exists()


def test_what_cannot_be_exported_is_said_in_one_line(task, capsys):
    assert command("import", "task", "-o", "t") == 0
    flags = ["export", "task", "-d", "t.json", "--flows", "evaluate/r", "-o", "out"]
    assert "evaluate/r: no such folder" in fails(capsys, *flags)
    pathlib.Path("evaluate/r").mkdir(parents=True)
    assert "no flow of the pair fixed t_T_0003_0000, moving t_T_0004_0000" in fails(capsys, *flags)
    assert "no pairs of the subset 'test'" in fails(capsys, *flags, "--subset", "test")
    kept("evaluate/r", smooth_field(0)[:-1], "npz")
    assert "23x20x16" in fails(capsys, *flags)
    kept("evaluate/r", smooth_field(0), "npz")
    assert command(*flags) == 0
    assert "out/disp_0003_0004.nii.gz is there already" in fails(capsys, *flags)
    assert command(*flags, "--overwrite") == 0
    with h5py.File("t.h5", "r+") as file:  # as data_util.build would have turned it
        file["T_0004_0000"].attrs["direction"] = np.eye(3).ravel()
    assert "T_0004_0000 is not on the grid" in fails(capsys, *flags, "--overwrite")
    with h5py.File("t.h5", "r+") as file:
        del file["T_0004_0000"]
    assert "T_0004_0000 is not in it" in fails(capsys, *flags, "--overwrite")


@pytest.mark.slow  # trains and evaluates: TensorFlow twice
def test_three_commands_with_a_network(task, capsys):
    import train

    assert command("import", "task", "-o", "datasets/t") == 0
    flags = ["-n", "0", "-d", "datasets/t.json", "-g", "-1", "--batch", "2", "--round", "1", "--epochs", "1"]
    assert cli.run(train.main, [*flags, "--val_steps", "1", "--net_args", "channels=2", "--name", "t"]) == 0
    (run,) = pathlib.Path("weights").iterdir()
    flags = ["-d", "datasets/t.json", "-c", run, "-o", "fields", "-g", "-1", "--batch", "1"]
    assert command("export", "task", *flags) == 0
    report = json.loads(next(pathlib.Path("evaluate").glob("*.json")).read_text())["summary"]
    (case,) = scores(capsys)["cases"]
    # Both read an affine flow, the one linearly and the other by splines; labels are voted on by other rules.
    assert case["tre_keypoints"] == pytest.approx(report["landmark_distance_mm"]["mean"], rel=0.01)
    assert case["dice"] == pytest.approx(report["dice"]["mean"], abs=0.05)
