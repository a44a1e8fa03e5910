import dataclasses
import hashlib
import io
import json
import subprocess
import sys
import tarfile

import h5py
import numpy as np
import pytest
import SimpleITK as sitk

import cli
from data_util import sample
from data_util.making import packages, slabs
from data_util.making.known_flows import warp
from data_util.scans.images import read_image, to_array
from errors import UserError
from tests.test_data_util.scans.test_images import write_series

ROOT = sample.REFERENCE_FILES
ARCHIVE = sample.TOTALSEGMENTATOR.archive


def liver_image(size, spacing, box, direction=(1, 0, 0, 0, 1, 0, 0, 0, 1), origin=(0, 0, 0)):
    """A made-up CT and its labels: liver (5) a box (x, y, z ranges), a bright spine (30), and fat elsewhere."""
    labels = np.zeros(size, np.uint8)
    labels[tuple(slice(*ends) for ends in box)] = slabs.LIVER
    labels[-6:-3, -6:-3] = 30
    ct = np.full(size, -100, np.int16) + np.random.default_rng(0).integers(0, 20, size).astype(np.int16)
    ct[labels == slabs.LIVER] += 200
    ct[labels == 30] += 700
    images = []
    for array in (ct, labels):
        image = sitk.GetImageFromArray(array.transpose(2, 1, 0))
        image.SetSpacing(spacing)
        image.SetDirection(direction)
        image.SetOrigin(origin)
        images.append(image)
    return images


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A source distribution as the real one is laid out, with small CTs, and with files that must not come out."""
    folder = tmp_path_factory.mktemp("sdist")
    # A flipped grid with liver up to its end along z, and 6 slices of 2.5 mm, 15 mm, all through a liver.
    ct, labels = liver_image((30, 26, 28), (3, 3, 3), ((4, 20), (6, 18), (12, 28)), (-1, 0, 0, 0, -1, 0, 0, 0, 1))
    sitk.WriteImage(ct, str(folder / "example_ct.nii.gz"))
    sitk.WriteImage(labels, str(folder / "example_seg_fast_force_split.nii.gz"))
    ct, labels = liver_image((40, 36, 6), (2, 2, 2.5), ((8, 30), (6, 24), (0, 6)), origin=(-10, 20, 5))
    sitk.WriteImage(sitk.Flip(labels, (False, True, False)), str(folder / "example_seg_dicom.nii.gz"))
    write_series(folder / "example_ct_dicom", to_array(ct), series="", spacing=(2, 2, 2.5))
    path = folder / ARCHIVE
    with tarfile.open(path, "w:gz") as tar:
        for name, _ in sample.CTS:
            tar.add(folder / name, ROOT + name)
        for _, name in sample.CTS:
            tar.add(folder / name, ROOT + name)
        for name in (
            f"{ROOT}example_ct_dicom/../../escaped",
            f"{ROOT}example_ct_dicom/..",
            f"{ROOT}../escaped",
            "/tmp/escaped",
            f"{ROOT}other.nii.gz",
        ):
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"bad"))
        link = tarfile.TarInfo(f"{ROOT}example_ct_dicom/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    return path


@pytest.fixture
def downloads(archive, monkeypatch, tmp_path):
    """Pretend to download: the list of the folders asked for. The cache is a new one."""
    calls = []

    def download(package, folder):
        calls.append(folder)
        (folder / package.archive).write_bytes(archive.read_bytes())

    monkeypatch.setattr(packages, "download", download)
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(sample, "TOTALSEGMENTATOR", dataclasses.replace(sample.TOTALSEGMENTATOR, sha256=sha256))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return calls


def test_pip_is_told_version_and_hash_and_its_failure_is_told_in_one_line(monkeypatch, tmp_path, capsys):
    asked = {}

    def run(command, **_):
        asked["command"] = [str(part) for part in command]
        asked["requirement"] = open(asked["command"][-1]).read()  # noqa: SIM115
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No route to host\nnotice\n")

    monkeypatch.setattr(packages.subprocess, "run", run)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cli.run(sample.main, ["-o", str(tmp_path / "set" / "sample")]) == 1
    error = capsys.readouterr().err
    assert "ERROR: No route to host" in error
    assert "python -m data_util.phantoms" in error
    assert error.count("\n") == 1
    assert asked["command"][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--require-hashes"} <= set(asked["command"])
    assert asked["requirement"].split() == [
        "totalsegmentator==2.18.0",
        f"--hash=sha256:{sample.TOTALSEGMENTATOR.sha256}",
    ]
    assert not list((tmp_path / "set").iterdir())


def test_only_the_wanted_files_come_out_of_the_archive(archive, tmp_path):
    (tmp_path / "out").mkdir()
    sample.extract(archive, tmp_path / "out")
    names = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    slices = {f"example_ct_dicom/empty_{k:03d}.dcm" for k in range(1, 7)}
    assert names == slices | {"example_ct.nii.gz", *(labels for _, labels in sample.CTS)}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_broken_archive_is_refused(archive, tmp_path):
    path = tmp_path / "broken.tar.gz"
    path.write_bytes(archive.read_bytes()[:2000])
    with pytest.raises(UserError, match="cannot be unpacked"):
        sample.extract(path, tmp_path)


def test_liver_and_ct_are_on_one_grid_whatever_their_files_orientation(archive, tmp_path):
    sample.extract(archive, tmp_path)
    for image, labels in sample.CTS:
        scan, liver = slabs.read_ct(tmp_path / image, tmp_path / labels)
        ct = to_array(scan)
        assert ct.shape == liver.shape
        assert ct[liver].min() > 50
        assert ct[~liver & (ct < 300)].max() < 50
        np.testing.assert_allclose(scan.GetSpacing(), read_image(tmp_path / image).GetSpacing())


def test_a_label_image_elsewhere_has_no_liver(archive, tmp_path):
    sample.extract(archive, tmp_path)
    labels = sitk.ReadImage(str(tmp_path / sample.CTS[0][1]))
    labels.SetOrigin((1000, 0, 0))
    sitk.WriteImage(labels, str(tmp_path / "moved.nii.gz"))
    with pytest.raises(UserError, match="no voxel has the liver's value 5"):
        slabs.read_ct(tmp_path / sample.CTS[0][0], tmp_path / "moved.nii.gz")


def test_cts_are_cut_to_the_length_of_liver_they_share_at_its_upper_end():
    long, short = np.zeros((3, 3, 40), bool), np.zeros((3, 3, 9), bool)
    long[1, 1, 4:31] = True  # 27 slices of 2 mm, up to z = 30
    short[1, 1, :8] = True  # 8 slices of 2.5 mm: 20 mm
    z = np.arange(40.0) * np.ones((3, 3, 1))
    scans = []
    for array, thickness in ((z, 2), (z[..., :9], 2.5)):
        scans.append(sitk.GetImageFromArray(array.transpose(2, 1, 0)))
        scans[-1].SetSpacing((1, 1, thickness))
    first, second = slabs.common_slab([(scans[0], long), (scans[1], short)])
    np.testing.assert_array_equal(to_array(first[0])[0, 0], np.arange(21, 31))
    np.testing.assert_array_equal(to_array(second[0])[0, 0], np.arange(8))
    assert first[0].GetOrigin() == (0, 0, 42)
    assert first[1].shape == (3, 3, 10)
    assert first[1].any(axis=(0, 1)).all()


def test_the_set_is_made_of_both_cts_and_their_deformations(downloads, tmp_path, capsys):
    size = (24, 20, 16)
    assert cli.run(sample.main, ["-o", str(tmp_path / "s" / "sample"), "--size", "24", "20", "16"]) == 0
    out = capsys.readouterr().out
    assert "12 training scans" in out
    assert "4 known pairs" in out
    assert out.splitlines()[-1] == f"next: python train.py -d {tmp_path / 's' / 'sample.json'}"
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["sample.h5", "sample.json"]
    config = json.loads((tmp_path / "s" / "sample.json").read_text())
    assert config["image_size"] == list(size)
    assert config["image_type"] == "liver"
    assert config["subsets"]["real"] == ["sample/12", "sample/13"]
    assert [len(config["subsets"][name]) for name in ("train", "real", "known")] == [12, 2, 8]
    assert config["schemes"] == {"1": {"train": 1.0}, "2": {"real": 1.0}, "known": {"known": 1.0}}
    with h5py.File(tmp_path / "s" / "sample.h5") as file:
        assert len(file) == 22
        volumes = [group["volume"][...] for group in file.values()]
        assert len({volume.tobytes() for volume in volumes}) == 22
        for group in file.values():
            assert group["volume"].shape == group["segmentation"].shape == size
            liver = group["segmentation"][...] > 0
            assert 0.2 < liver.mean() < 0.9
            # HU of about 110 in the liver and -90 outside, seen through the window from -25 to 265.
            assert np.median(group["volume"][...][liver]) == pytest.approx((109.5 + 25) * 255 / 290, abs=3)
            assert np.median(group["volume"][...][~liver]) == 0
        for k, spacing in ((12, (3, 3, 3)), (13, (2, 2, 2.5))):
            mm = file[str(k)].attrs["spacing"]
            assert np.all(mm > 0.2)
            # The box and its margin, 5 voxels a side and no more than the scan, from first to last voxel.
            voxels = {12: (25, 22, 5), 13: (32, 28, 6)}[k]  # the first reaches the end of its x axis
            np.testing.assert_allclose(mm * (np.array(size) - 1), (np.array(voxels) - 1) * spacing)
        for k in range(14, 22, 2):
            moved = file[str(k + 1)]
            assert moved["flow"].attrs["source"] == f"sample/{k}"
            assert "flow" not in file[str(k)]
            found = warp(file[str(k)]["volume"][...], moved["flow"][...].astype(np.float32))
            assert np.abs(found - moved["volume"][...]).max() <= 0.5 + 1e-3


def test_nothing_is_fetched_where_the_set_is_there_already(downloads, tmp_path, capsys):
    (tmp_path / "sample.json").write_text("{}")
    assert cli.run(sample.main, ["-o", str(tmp_path / "sample")]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert downloads == []


@pytest.mark.parametrize("options", [["--size", "8", "32", "32"], ["--seed", "-1"]])
def test_sizes_and_seeds_that_make_no_set_are_refused(downloads, tmp_path, options, capsys):
    assert cli.run(sample.main, ["-o", str(tmp_path / "sample"), *options]) == 1
    assert "at least 16" in capsys.readouterr().err
    assert downloads == []


def test_the_second_axis_of_a_read_ct_runs_to_the_back(archive, tmp_path):
    sample.extract(archive, tmp_path)
    flipped = to_array(sitk.ReadImage(str(tmp_path / sample.CTS[0][0])))
    ct, _ = slabs.read_ct(*(tmp_path / name for name in sample.CTS[0]))
    np.testing.assert_array_equal(to_array(ct), flipped[::-1, ::-1])
