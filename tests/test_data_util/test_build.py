import errno
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
import SimpleITK as sitk

import cli
from data_util import build
from data_util.config import load_dataset_config
from data_util.making import parts
from data_util.scans.frame import Frame
from data_util.store import ScanStore
from errors import UserError
from tests.test_data_util.scans.test_images import write_series

ROOT = pathlib.Path(__file__).parents[2]
SIZE = (24, 20, 18)


def image_of(array, spacing=(1.5, 2, 3), origin=(-10, 20, 5), direction=(1, 0, 0, 0, 1, 0, 0, 0, 1)):
    return Frame(array.shape, spacing, origin, direction).put(array)


def scan_of(seed, size=SIZE):
    """A CT and its mask: a bright box in soft tissue, with air around, different for every seed."""
    rng = np.random.default_rng(seed)
    ct = rng.integers(-20, 20, size).astype(np.int16)
    ct[:2] = -1000
    mask = np.zeros(size, np.uint8)
    low = rng.integers(3, 6, 3)
    mask[tuple(slice(a, a + 10) for a in low)] = 1
    return ct + 150 * mask.astype(np.int16), mask


def write(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))


@pytest.fixture
def scans(tmp_path, monkeypatch):
    """Six scans a1 .. a6 in three formats with masks; the working folder is the one with scans/."""
    monkeypatch.chdir(tmp_path)
    for k in range(1, 7):
        ct, mask = scan_of(k)
        ending = (".nii.gz", ".nrrd", ".mha")[k % 3]
        write(image_of(ct), pathlib.Path(f"scans/images/a{k}{ending}"))
        write(image_of(mask), pathlib.Path(f"scans/labels/a{k}.nii.gz"))
    return pathlib.Path("scans")


def run(*flags, scans="scans"):
    return cli.run(build.main, [scans, "-o", "sets/mine", "--size", "16", "12", "14", *flags])


def fails(capsys, *flags, **options):
    capsys.readouterr()
    assert run(*flags, **options) == 1
    return capsys.readouterr().err


def contents(path):
    """Everything an HDF5 file holds: name -> bytes, type and attributes."""
    found = {}

    def visit(name, item):
        data = (item.dtype.str, item.shape, item[...].tobytes()) if isinstance(item, h5py.Dataset) else None
        found[name] = data, {key: np.asarray(value).tolist() for key, value in item.attrs.items()}

    with h5py.File(path) as file:
        file.visititems(visit)
    return found


def config_of(path="sets/mine.json"):
    return json.loads(pathlib.Path(path).read_text())


def test_a_folder_becomes_a_file_and_a_config_that_loads(scans, capsys):
    assert run("--split", "2/2/2", "--crop", "mask") == 0
    assert "6 scans of 16x12x14 voxels, 6 with labels, 0 with landmarks" in capsys.readouterr().out
    config = load_dataset_config("sets/mine.json")
    assert config.image_size == (16, 12, 14)
    assert config.labels is None
    assert config.schemes == {
        "1": {"train": 1.0},
        "2": {"val": 1.0},
        "test": {"test": 1.0},
    }
    ids = sorted(scan for subset in config.subsets.values() for scan in subset)
    assert ids == [f"mine/a{k}" for k in range(1, 7)]
    store = ScanStore(config.files)
    for k, scan_id in enumerate(ids, start=1):
        scan = store.read(scan_id)
        assert scan.volume.dtype == np.uint8
        assert set(np.unique(scan.segmentation)) == {0, 255}
        # The default window, 40 and 400, of about 150 HU in the mask and about 0 outside, smoothed a little.
        assert np.median(scan.volume[scan.segmentation > 0]) == pytest.approx((150 + 160) * 255 / 400, abs=15)
        # The box is the mask and 5 voxels a side, as far as the scan goes; centres of the first and last voxels agree.
        _, mask = scan_of(k)
        first = np.argwhere(mask)[0]
        voxels = np.minimum(first + 15, SIZE) - np.maximum(first - 5, 0)
        np.testing.assert_allclose(scan.spacing, (voxels - 1) * (1.5, 2, 3) / np.array((15, 11, 13)))
    assert sorted(os.listdir("sets")) == ["mine.h5", "mine.json"]


def test_a_spacing_is_kept_around_the_middle_and_what_is_outside_is_as_dark_as_the_scan(scans):
    assert run("--crop", "mask", "--spacing", "2", "2.5", "9", "--split", "1/0/0") == 0
    with h5py.File("sets/mine.h5") as file:
        for k in range(1, 7):
            frame = Frame.load(file[f"a{k}"].attrs)
            own = Frame.load(file[f"a{k}"].attrs, "source_")
            assert frame.spacing == (2, 2.5, 9)
            box = np.argwhere(scan_of(k)[1])
            low, high = np.maximum(box[0] - 5, 0), np.minimum(box[-1] + 6, SIZE)
            middle = own.to_physical((low + high - 1) / 2)
            np.testing.assert_allclose(frame.to_physical(np.array([7.5, 5.5, 6.5])), middle, atol=1e-9)
            assert (file[f"a{k}"]["volume"][:, :, 0] == 0).all()  # 27 mm and more below the scan: -1000 HU


def test_dicom_folders_and_a_table_with_groups(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = ["id,image,label,landmarks,group"]
    pathlib.Path("in").mkdir()
    for k in range(4):
        write_series(pathlib.Path(f"in/series{k}"), scan_of(k)[0], f"1.2.{k}")
        rows.append(f"s{k},series{k},,,person{k % 2}")
    pathlib.Path("in/list.csv").write_text("\n".join(rows))
    assert run("--pairs", "paired", "--split", "1/1/0", scans="in/list.csv") == 0
    out = capsys.readouterr().out
    assert 'train.py -d sets/mine.json --data_args "paired=True"' in out
    subsets = config_of()["subsets"]
    assert sorted(map(tuple, subsets.values())) == [("mine/s0", "mine/s2"), ("mine/s1", "mine/s3")]
    with h5py.File("sets/mine.h5") as file:
        assert list(file) == ["s0", "s1", "s2", "s3"]
        assert "segmentation" not in file["s0"]
        assert file["s1"].attrs["source"] == "series1"


def test_an_atlas_is_in_no_subset_and_a_split_depends_on_its_seed_alone(scans):
    assert run("--pairs", "atlas=a2", "--split", "3/1/1") == 0
    first = config_of()
    assert first["atlas"] == "mine/a2"
    assert {name: len(ids) for name, ids in first["subsets"].items()} == {"train": 3, "val": 1, "test": 1}
    assert not any("mine/a2" in ids for ids in first["subsets"].values())
    assert run("--pairs", "atlas=a2", "--split", "3/1/1", "--overwrite") == 0
    assert config_of() == first
    splits = set()
    for seed in range(4):
        assert run("--pairs", "atlas=a2", "--split", "3/1/1", "--overwrite", "--seed", str(seed)) == 0
        splits.add(str(config_of()["subsets"]))
    assert len(splits) > 1


def test_labels_are_kept_merged_and_named(scans, capsys):
    labels = np.zeros(SIZE, np.uint16)
    labels[4:8], labels[8:12], labels[12:16], labels[16:20] = 3, 5, 300, 9
    for k in range(1, 7):
        write(image_of(labels), scans / f"labels/a{k}.nii.gz")
    assert "a1: scans/labels/a1.nii.gz: has the labels 3, 5, 9, 300; say which" in fails(capsys)
    for flags, values, table in (
        (["--labels", "all"], {0, 3, 5, 9, 300}, {"3": 3, "5": 5, "9": 9, "300": 300}),
        (["--labels", "big=300, both=5+3"], {0, 5, 300}, {"big": 300, "both": 5}),
        (["--labels", "one=3+9"], {0, 255}, None),
    ):
        assert run("--overwrite", "--split", "1/0/0", *flags) == 0
        assert config_of().get("segmentation_class_value") == table
        with h5py.File("sets/mine.h5") as file:
            assert set(np.unique(file["a1/segmentation"])) == values
    assert "has no voxel of the labels wanted; its values are 3, 5, 9, 300" in fails(
        capsys, "--overwrite", "--labels", "x=77"
    )


def test_the_number_of_workers_changes_nothing(scans):
    assert run("--crop", "mask") == 0
    one, config = contents("sets/mine.h5"), config_of()
    assert run("--crop", "mask", "--workers", "2", "--overwrite") == 0
    assert contents("sets/mine.h5") == one
    assert config_of() == config
    assert len(one) == 18


def alive(pid):
    try:
        return "Z" not in pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def test_a_build_killed_half_way_goes_on_to_the_contents_of_an_undisturbed_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for k in range(10):
        ct, mask = scan_of(k, (80, 70, 60))
        write(image_of(ct), pathlib.Path(f"scans/images/a{k}.nii.gz"))
        write(image_of(mask), pathlib.Path(f"scans/labels/a{k}.nii.gz"))
    flags = ["--size", "48", "48", "48", "--crop", "body"]
    command = [sys.executable, "-m", "data_util.build", "scans", "-o", "sets/mine", *flags, "--workers", "2"]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
    folder = pathlib.Path("sets/mine.parts")
    for _ in range(3000):
        made = sorted(folder.glob("*.h5")) if folder.is_dir() else []
        if len(made) >= 2:
            break
        time.sleep(0.01)
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    made = {path: path.stat().st_mtime_ns for path in folder.glob("*.h5")}
    assert 2 <= len(made) < 10
    assert not pathlib.Path("sets/mine.h5").exists()
    for _ in range(500):
        if not any(alive(child) for child in children):
            break
        time.sleep(0.01)
    else:
        pytest.fail("workers outlive their parent")

    kept = {}
    monkeypatch.setattr(build, "remove_parts", lambda folder: kept.update({p: p.stat().st_mtime_ns for p in made}))
    assert cli.run(build.main, ["scans", "-o", "sets/mine", *flags]) == 0
    assert kept == made  # what was finished was not made again
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert cli.run(build.main, ["scans", "-o", "other/mine", *flags]) == 0
    assert contents("sets/mine.h5") == contents("other/mine.h5")
    config = config_of()
    assert config["files"]["mine"].pop("path") == "sets/mine.h5"
    other = config_of("other/mine.json")
    assert other["files"]["mine"].pop("path") == "other/mine.h5"
    assert config.pop("sum") != other.pop("sum")
    assert config == other


def test_a_scan_that_fails_is_named_and_the_others_are_kept(scans, capsys, monkeypatch):
    (scans / "images/a3.nii.gz").write_bytes(b"no image")
    write(image_of(np.full(SIZE, 7, np.int16)), scans / "images/a5.mha")
    error = fails(capsys)
    lines = [line for line in error.splitlines() if line.startswith(("a3: ", "a5: ", "error: "))]
    assert "cannot be read as an image" in lines[0]
    assert "the scan is 7 everywhere in its crop" in lines[1]
    assert lines[2].startswith("error: 2 of 6 scans failed")
    assert not pathlib.Path("sets/mine.h5").exists()
    assert sorted(p.name for p in pathlib.Path("sets/mine.parts").glob("*.h5")) == ["a1.h5", "a2.h5", "a4.h5", "a6.h5"]
    # Mended, only what is missing or has changed is made.
    for name in ("a3.nii.gz", "a5.mha", "a6.nii.gz"):
        write(image_of(scan_of(9)[0]), scans / "images" / name)
    made = []
    make = parts.make_scan
    monkeypatch.setattr(parts, "make_scan", lambda source, recipe: made.append(source.id) or make(source, recipe))
    assert run() == 0
    assert made == ["a3", "a5", "a6"]


def test_other_options_are_not_mixed_with_finished_parts(scans, capsys):
    (scans / "images/bad.mha").write_bytes(b"no image")
    assert "1 of 7 scans failed" in fails(capsys)
    error = fails(capsys, "--crop", "mask")
    assert "mine.parts holds scans made with crop none, not mask" in error
    assert "--overwrite" in error
    assert "made with size [16, 12, 14], not [8, 8, 8]" in fails(capsys, "--size", "8", "8", "8")
    (scans / "images/bad.mha").unlink()
    assert run("--split", "1/0/0") == 0  # a split makes no scan another
    assert "sets/mine.h5 is there already" in fails(capsys)
    assert run("--crop", "mask", "--overwrite") == 0
    with h5py.File("sets/mine.h5") as file:
        assert file["a1"].attrs["crop"] == "mask"


def test_parts_of_an_older_version_are_not_mixed_with_new_ones(scans, capsys):
    """It made other grey values of the same scans, and did not write its version."""
    (scans / "images/bad.mha").write_bytes(b"no image")
    assert "1 of 7 scans failed" in fails(capsys)
    settings = pathlib.Path("sets/mine.parts/settings.json")
    content = json.loads(settings.read_text())
    del content["version"], content["points_space"]
    settings.write_text(json.dumps(content))
    (scans / "images/bad.mha").unlink()
    assert "holds scans made with points_space None, not lps" in fails(capsys)
    settings.write_text(json.dumps({**content, "points_space": "lps"}))
    assert "holds scans made with version None, not 2" in fails(capsys)
    assert run("--overwrite") == 0


def test_a_folder_of_other_things_is_left_alone(scans, capsys):
    other = pathlib.Path("sets/mine.parts/thesis.txt")
    other.parent.mkdir(parents=True)
    other.write_text("years of work")
    assert "holds other things than parts" in fails(capsys, "--overwrite")
    assert other.read_text() == "years of work"


def test_no_error_of_a_scan_ends_a_build(scans, capsys, monkeypatch):
    """Whatever a scan raises, it is named with its reason, and all others are made."""
    errors = {
        "a1": ValueError("could not convert string to float: '2,0'"),
        "a2": ZeroDivisionError(),
        "a3": RuntimeError("Exception thrown\n  itk::ERROR: no such pixel type\n"),
        "a4": MemoryError(),
        "a5": UserError("scans/a5.mha: is odd;\nmend it"),
    }
    make = parts.make_scan

    def make_or_fail(source, recipe):
        if source.id in errors:
            raise errors[source.id]
        return make(source, recipe)

    monkeypatch.setattr(parts, "make_scan", make_or_fail)
    error = fails(capsys)
    lines = [line for line in error.splitlines() if re.match(r"a\d: |error: ", line)]
    assert lines == [
        "a1: cannot be made (ValueError: could not convert string to float: '2,0'); convert the scan by another tool, "
        "or leave it out",
        "a2: cannot be made (ZeroDivisionError); convert the scan by another tool, or leave it out",
        "a3: cannot be made (RuntimeError: itk::ERROR: no such pixel type); convert the scan by another tool, or leave "
        "it out",
        "a4: does not fit into memory; use fewer --workers or a smaller --size",
        "a5: scans/a5.mha: is odd; mend it",
        "error: 5 of 6 scans failed, for the reasons above; the others are kept in sets/mine.parts: mend or remove "
        "these and give the same command",
    ]
    assert [path.name for path in pathlib.Path("sets/mine.parts").glob("*.h5")] == ["a6.h5"]


def test_a_second_build_of_a_file_is_refused_while_the_first_is_at_work(scans, capsys, monkeypatch):
    make, second = parts.make_scan, []

    def make_while_another_starts(source, recipe):
        if not second:
            command = [sys.executable, "-m", "data_util.build", "scans", "-o", "sets/mine", "--overwrite"]
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            second.append(subprocess.run(command, env=environment, capture_output=True, text=True, check=False))
        return make(source, recipe)

    monkeypatch.setattr(parts, "make_scan", make_while_another_starts)
    assert run() == 0
    assert second[0].returncode == 1
    assert second[0].stderr == (
        "error: another build is making sets/mine.h5; wait until it has ended, or choose another -o\n"
    )
    with h5py.File("sets/mine.h5") as file:
        assert len(file) == 6
    assert sorted(os.listdir("sets")) == ["mine.h5", "mine.json"]


def test_a_file_system_without_locks_is_built_on(scans, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(parts.fcntl, "flock", refuse)
    assert run() == 0


def test_ctrl_c_keeps_what_is_finished(scans, capsys, monkeypatch):
    make = parts.make_scan

    def stop_at_a4(source, recipe):
        if source.id == "a4":
            raise KeyboardInterrupt
        return make(source, recipe)

    monkeypatch.setattr(parts, "make_scan", stop_at_a4)
    assert run() == cli.STOPPED
    assert "Stopped; finished scans are kept in sets/mine.parts: go on" in capsys.readouterr().out
    assert len(list(pathlib.Path("sets/mine.parts").glob("a?.h5"))) == 3


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--workers", "0"], "--workers is 0"),
        (["--size", "1", "8", "8"], "at least 2 voxels"),
        (["--spacing", "1", "0", "1"], "--spacing 1.0 0.0 1.0"),
        (["--window", "5"], "--window 5: give LEVEL,WIDTH"),
        (["--window", "40,-1"], "--window 40,-1"),
        (["--window", "1%,99"], "percentiles LOW%,HIGH%"),
        (["--window", "60%,40%"], "--window 60%,40%"),
        (["--labels", "liver"], "--labels liver: write NAME=VALUE"),
        (["--labels", "a=1,b=1+2"], "'b=1+2' repeats"),
        (["--split", "1/2"], "--split 1/2"),
        (["--split", "1/-1/0"], "--split 1/-1/0"),
        (["--split", "0/0/0"], "leaves every scan out"),
        (["--pairs", "some"], "give all, paired or atlas=ID"),
        (["--pairs", "atlas=zz"], "there is no scan 'zz'"),
        (["--crop", "liver", "--modality", "mr"], "--crop liver looks for Hounsfield units"),
        (["--crop", "liver"], "no liver found"),
    ],
)
def test_wrong_options_are_told_in_one_line(scans, capsys, flags, told):
    assert told in fails(capsys, *flags)


def test_labels_elsewhere_and_labels_that_are_no_labels_are_told(scans, capsys):
    _, mask = scan_of(1)
    write(image_of(mask, origin=(900, 0, 0)), scans / "labels/a1.nii.gz")
    write(image_of(mask * np.float32(0.5)), scans / "labels/a2.nii.gz")
    write(image_of(np.where(mask, np.nan, 0).astype(np.float32)), scans / "images/a5.mha")
    error = fails(capsys, "--crop", "mask")
    assert "a1: scans/labels/a1.nii.gz: marks no voxel where" in error
    assert "a2: scans/labels/a2.nii.gz: has the value 0.5, and labels are whole numbers" in error
    assert "a5: scans/images/a5.mha: has grey values that are no numbers" in error
    assert "a1: scans/labels/a1.nii.gz: marks no voxel of the crop" in fails(capsys, "--overwrite")


def test_building_needs_no_tensorflow():
    code = "import sys, data_util.build, data_util.check; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
