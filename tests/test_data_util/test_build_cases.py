"""Data sets of scans as people have them: what build makes of them, or says."""

import json
import shutil

import h5py
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

import cli
from data_util import build, check
from data_util.scans.frame import Frame
from tests import cases

SIZE = (24, 22, 20)
WINDOW = (-400, 1600)  # level and width that hold all grey values of the cases


def run(folder, *flags):
    """Build a data set beside a folder of scans; return its exit status."""
    level, width = WINDOW
    flags = ["--size", *map(str, SIZE), f"--window={level},{width}", "--split", "1/0/0", *flags]
    return cli.run(build.main, [str(folder), "-o", str(folder / "../set"), *flags])


def assert_right(folder, shift, labels=True, points=None):
    """The scans of a built set show what they should at every voxel's place; shift is id -> mm of a person."""
    level, width = WINDOW
    with h5py.File(folder / "../set.h5") as file:
        assert set(file) == set(shift)
        for name, mm in shift.items():
            group = file[name]
            voxels = np.moveaxis(np.indices(SIZE), 0, -1)
            places = Frame.load(group.attrs).to_physical(voxels.reshape(-1, 3)).reshape(*SIZE, 3)
            expected = (cases.grey(places - (mm, 0, 0)) - level + width / 2) * 255 / width
            np.testing.assert_allclose(group["volume"], np.clip(expected, 0, 255), atol=1.1)
            assert ("segmentation" in group) == labels
            if labels:
                organ = cases.organ(places - (mm, 0, 0))
                found = group["segmentation"][...] > 0
                assert 2 * (organ & found).sum() / (organ.sum() + found.sum()) > 0.9
            if points is not None:
                np.testing.assert_allclose(Frame.load(group.attrs).to_physical(group["point"][...]), points, atol=1e-4)


PERSONS = {f"p{k}": 1.5 * k for k in range(4)}
INSIDE = [(-10.5, -4.25, -4.5), (-12, -6, 2)]


def test_a_plain_set_is_read(tmp_path, capsys):
    folder = cases.make("plain", tmp_path / "plain") / "set"
    assert run(folder) == 0
    assert_right(folder, PERSONS, points=INSIDE)
    told = capsys.readouterr()
    assert "look at" not in told.out
    assert "passed over" not in told.err


def write_other_set(folder, image, label=None):
    """The four persons as files of any format; the names have {} for the number."""
    for k in range(4):
        shown, organ = cases.person(k)
        for name, array in ((image, shown), (label, organ)):
            if name is None:
                continue
            path = folder / name.format(k)
            if path.suffix == ".mgz":
                path.parent.mkdir(parents=True, exist_ok=True)
                nibabel.save(nibabel.MGHImage(array, cases.affine()), path)
            else:
                cases.write_other(path, array)


@pytest.mark.parametrize(
    ("image", "label", "ids"),
    [
        ("images/p{}.mhd", "labels/p{}.mhd", "p{}"),
        ("images/p{}.hdr", "labels/p{}.hdr", "p{}"),
        ("images/p{}.nii", "labels/p{}.mhd", "p{}"),
        ("images/p{}.NRRD", "labels/p{}.hdr", "p{}"),
        ("images/p{}.mgz", "labels/p{}.mgz", "p{}"),
        ("p{}/imaging.nii.gz", "p{}/segmentation.nii.gz", "p{}"),
        ("volume-{}.nii", "segmentation-{}.nii", "volume-{}"),
        ("volume-{}.nii.gz", "segmentation-{}.nii.gz", "volume-{}"),
        ("images/liver-orig00{}.mhd", "labels/liver-seg00{}.mhd", "liver-orig00{}"),
        ("imagesTr/case_{}_0000.nii.gz", "labelsTr/case_{}.nii.gz", "case_{}"),
        ("imagesTr/Abdomen_000{}_0000.nii.gz", "labelsTr/Abdomen_000{}_0000.nii.gz", "Abdomen_000{}"),
        ("imagesTr/liver_{}.nii.gz", None, "liver_{}"),
    ],
)
def test_every_layout_gives_the_same_scans(tmp_path, image, label, ids):
    write_other_set(tmp_path / "scans", image, label)
    assert run(tmp_path / "scans") == 0
    assert_right(tmp_path / "scans", {ids.format(k): 1.5 * k for k in range(4)}, labels=label is not None)


@pytest.mark.parametrize("name", ["lits_in_one_folder", "mhd_raw/all", "mhd_raw/labels"])
def test_folders_of_other_data_sets(tmp_path, name):
    case, _, inner = name.partition("/")
    folder = cases.make(case, tmp_path / "case") / inner
    assert run(folder) == 0
    prefix = "volume-" if case == "lits_in_one_folder" else "p"
    assert_right(folder, {f"{prefix}{k}": 1.5 * k for k in range(4)})


def test_a_compressed_header_and_data_pair_that_changes_is_made_anew(tmp_path, monkeypatch, capsys):
    """The voxels of a changed .raw file are read, though its header is as before."""
    folder = tmp_path / "scans"
    write_other_set(folder, "images/p{}.mhd")
    (folder / "images/bad.mhd").write_text("no header")
    assert run(folder) == 1
    shutil.copy(folder / "images/p3.raw", folder / "images/p0.raw")
    (folder / "images/bad.mhd").unlink()
    assert run(folder) == 0
    assert_right(folder, PERSONS | {"p0": PERSONS["p3"]}, labels=False)


@pytest.mark.parametrize("name", sorted(cases.POINTS))
def test_malformed_landmarks_are_refused_with_their_line(tmp_path, capsys, name):
    folder = cases.make("points_malformed", tmp_path / "case") / name
    assert run(folder) == 1
    error = capsys.readouterr().err
    line = 1 if name == "id_and_no_header" else 2
    for k in range(2):
        assert f"p{k}: {folder}/points/p{k}.csv, line {line}: " in error
    assert "error: 2 of 2 scans failed, for the reasons above; nothing is kept" in error
    assert not list(folder.parent.glob("set*"))


def test_one_landmark_without_a_header_is_a_landmark(tmp_path, capsys):
    folder = cases.make("one_landmark_without_header", tmp_path / "case")
    assert run(folder) == 0
    assert_right(folder, {"p0": 0, "p1": 1.5}, labels=False, points=INSIDE[:1])
    assert "2 with landmarks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("landmarks_outside", "all 2 landmarks lie outside the scan, the first at (110, 111, 112) mm"),
        ("label_without_geometry", "was it saved without the scan's geometry?"),
    ],
)
def test_geometry_that_cannot_be_right_is_said_by_build_and_by_check(tmp_path, capsys, case, told):
    folder = cases.make(case, tmp_path / "case")
    assert run(folder) == 0
    out = capsys.readouterr().out
    assert f"{0 if case == 'landmarks_outside' else 4} with landmarks" in out
    for k in range(4):
        assert any(told in line for line in out.splitlines() if line.startswith(f"look at p{k}: "))
    check.main([str(folder / "../set.json")])
    assert told in capsys.readouterr().out


def test_label_images_among_the_scans_are_said(tmp_path, capsys):
    write_other_set(tmp_path / "scans", "images/p{}.nii")
    cases.write_other(tmp_path / "scans/images/tumour.nii", cases.person(0)[1])
    assert run(tmp_path / "scans") == 0
    assert "look at tumour: the scan's only grey values are 0, 1; is it a label image?" in capsys.readouterr().out


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_scan_with_malformed_tags_ends_no_build(tmp_path, capsys, workers):
    folder = cases.make("pixel_spacing_comma", tmp_path / "case")
    assert run(folder, "--workers", workers) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("p", "error: "))]
    assert [line[:4] for line in lines] == ["p1: ", "erro"]
    assert "error: 1 of 3 scans failed" in lines[1]
    assert sorted(path.name for path in tmp_path.glob("set.parts/*.h5")) == ["p0.h5", "p2.h5"]


def unusable(folder):
    """Scans that are none, each of another kind: id -> what makes it."""
    x = np.linspace(-1000, 1000, 20 * 22 * 24).reshape(20, 22, 24)

    def write(name, array, vector=False):
        sitk.WriteImage(sitk.GetImageFromArray(array, isVector=vector), str(folder / name))

    write("slice.nii.gz", x[:1].astype(np.int16))
    write("complex.nii.gz", x.astype(np.complex64))
    write("flat.nrrd", x[0].astype(np.int16))
    write("time.nii.gz", np.stack([x, x]).astype(np.float32))
    write("colours.nrrd", np.stack([x, x, x], -1).astype(np.uint8), vector=True)
    write("nan.nrrd", np.where(x > 0, np.nan, x).astype(np.float32))
    (folder / "empty.nii.gz").write_bytes(b"")
    (folder / "text.mha").write_text("Dear colleague")
    (folder / "nothing").mkdir()
    (folder / "letters").mkdir()
    (folder / "letters" / "a.txt").write_text("Dear colleague")
    return ["colours", "complex", "empty", "flat", "letters", "nan", "nothing", "slice", "text", "time"]


def test_bad_scans_of_every_kind_are_named_and_the_others_made(tmp_path, capsys):
    folder = tmp_path / "scans"
    write_other_set(folder, "images/p{}.nii")
    names = unusable(folder / "images")
    assert run(folder) == 1
    lines = capsys.readouterr().err.splitlines()
    reasons = [line for line in lines if line.partition(": ")[0] in names]
    assert [line.partition(": ")[0] for line in reasons] == names
    assert all(len(line.partition(": ")[2]) > 20 for line in reasons)
    assert lines[-1].startswith(f"error: {len(names)} of {len(names) + 4} scans failed")
    assert not any("Traceback" in line for line in lines)
    assert sorted(path.stem for path in tmp_path.glob("set.parts/*.h5")) == list(PERSONS)


def test_labels_that_were_resampled_are_rounded(tmp_path):
    folder = cases.make("float_labels", tmp_path / "case")
    assert run(folder) == 0
    assert_right(folder, PERSONS)
    with h5py.File(folder / "../set.h5") as file:
        assert set(np.unique(file["p0/segmentation"])) == {0, 255}
    assert "segmentation_class_value" not in json.loads((folder / "../set.json").read_text())
