import pathlib

import h5py
import numpy as np
import pytest
import SimpleITK as sitk

from data_util.scans.frame import Frame
from data_util.scans.images import read_image, to_array
from tests.test_data_util.test_build import image_of, run, scan_of, write

# Turned about all three axes; the axes of a right-handed frame in columns.
OBLIQUE = tuple(sitk.VersorTransform((0.3, -0.5, 0.8), 0.4).GetMatrix())


def points_text(points):
    return "x,y,z\n" + "".join(",".join("" if np.isnan(x) else repr(float(x)) for x in p) + "\n" for p in points)


def test_an_oblique_anisotropic_scan_keeps_its_geometry(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    x, y, z = np.indices((30, 26, 22))
    marked = (abs(x - 14) < 9) & (abs(y - 12) < 7) & (abs(z - 10) < 6)
    oblique = {"spacing": (0.7, 1.9, 3.3), "origin": (-81.5, 44.25, 913.0), "direction": OBLIQUE}
    image = image_of((3 * x + 5 * y + 7 * z).astype(np.float32), **oblique)
    write(image, pathlib.Path("scans/images/p.mha"))
    write(image_of(marked.astype(np.uint8), **oblique), pathlib.Path("scans/labels/p.mha"))
    inside = np.random.default_rng(0).uniform((6, 6, 5), (22, 18, 15), (20, 3))
    places = Frame.of(image).to_physical(inside)
    outside = Frame.of(image).to_physical([[0.2, 0.3, 0.4]])
    pathlib.Path("scans/points").mkdir()
    pathlib.Path("scans/points/p.csv").write_text(points_text([*places, *outside, [np.nan] * 3]))
    assert run("--crop", "mask", "--window", "150,300", "--split", "0/0/1", "--pairs", "atlas=p") == 1  # no pair
    assert "too few" in capsys.readouterr().err
    write(image, pathlib.Path("scans/images/q.mha"))
    write(image_of(marked.astype(np.uint8), **oblique), pathlib.Path("scans/labels/q.mha"))
    flags = ["--size", "54", "48", "42", "--crop", "mask", "--window", "150,300"]
    assert run(*flags, "--split", "0/0/1", "--pairs", "all") == 0
    with h5py.File("sets/mine.h5") as file:
        group = file["p"]
        frame, own = Frame.load(group.attrs), Frame.load(group.attrs, "source_")
        points, volume = group["point"][...], group["volume"][...]
        segmentation = group["segmentation"][...]
    assert frame.size == volume.shape == (54, 48, 42)
    read = read_image("scans/images/p.mha")  # in LPS, whose axes may be others than the file's
    assert own == Frame.of(read)
    np.testing.assert_allclose(frame.to_physical(points[:20]), places, atol=1e-4)  # mm
    assert np.isnan(points[20:]).all()
    assert points.dtype == np.float32
    # A linear ramp is the same where it is read: the volume's grey values are those of its voxels' places.
    voxels = np.argwhere(volume >= 0)
    expected = Frame.of(image).to_voxel(frame.to_physical(voxels)) @ (3, 5, 7)
    np.testing.assert_allclose(volume.ravel(), np.floor(np.clip(expected * 255 / 300, 0, 255)), atol=1)
    # Put back into the scan's own space by its frames, the mask is where it was.
    back = to_array(own.resample(frame.put(segmentation), nearest=True)) > 0
    truth = to_array(read_image("scans/labels/p.mha")) > 0
    assert 2 * (back & truth).sum() / (back.sum() + truth.sum()) > 0.97


def test_the_percentiles_of_an_mr_become_black_and_white(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ramp = np.arange(1000, dtype=np.float32).reshape(10, 10, 10) * 4 - 100
    for name in ("m1", "m2"):
        write(image_of(ramp), pathlib.Path(f"scans/{name}.nii.gz"))
    flags = ["--modality", "mr", "--split", "1/0/0", "--size", "10", "10", "10"]
    assert run(*flags) == 0
    with h5py.File("sets/mine.h5") as file:
        volume = file["m1/volume"][...]
        level, width = file["m1"].attrs["window"]
    low, high = np.percentile(ramp, (1, 99))
    assert (level, width) == pytest.approx(((low + high) / 2, high - low))
    np.testing.assert_array_equal(volume, np.clip((ramp - low) * (255 / (high - low)), 0, 255).astype(np.uint8))
    assert (volume == 0).sum() >= 10
    assert run(*flags, "--window", "0%,50%", "--overwrite") == 0
    with h5py.File("sets/mine.h5") as file:
        assert (file["m1/volume"][...] == 255).mean() == pytest.approx(0.5, abs=0.02)


def test_a_crop_that_may_be_wrong_is_told_and_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, mm in (("whole", 3), ("part", 1)):
        write(image_of(scan_of(1, (80, 70, 60))[0], spacing=(mm, mm, mm)), pathlib.Path(f"scans/{name}.nii.gz"))
    assert run("--crop", "body", "--split", "1/0/0") == 0
    out = capsys.readouterr().out
    assert out.count("look at") == 1
    assert "look at part: the body found has 3" in out  # about 330 ml
    with h5py.File("sets/mine.h5") as file:
        assert file["part"].attrs["doubts"].startswith("the body found has")
        assert "doubts" not in file["whole"].attrs


@pytest.mark.parametrize("space", ["lps", "ras", "voxel"])
@pytest.mark.parametrize("ending", ["nii.gz", "mha"])
def test_landmarks_lie_where_their_space_says(tmp_path, monkeypatch, space, ending):
    """Voxels are those of the file's own axes, which are neither LPS nor upright here."""
    monkeypatch.chdir(tmp_path)
    turned = tuple(np.reshape(OBLIQUE, (3, 3))[:, [2, 0, 1]].ravel())
    voxels = np.array([[3, 14, 7.5], [20, 5, 11]])
    bright = np.indices((24, 20, 18)).sum(0).astype(np.float32)
    image = image_of(bright, spacing=(1.5, 2, 3), origin=(-10, 20, 5), direction=turned)
    places = Frame.of(image).to_physical(voxels)
    numbers = {"lps": places, "ras": places * (-1, -1, 1), "voxel": voxels}[space]
    for name in ("p", "q"):
        write(image, pathlib.Path(f"scans/images/{name}.{ending}"))
        pathlib.Path("scans/points").mkdir(exist_ok=True)
        pathlib.Path(f"scans/points/{name}.csv").write_text(points_text([*numbers, [np.nan] * 3]))
    assert run("--points_space", space, "--split", "1/0/0") == 0
    with h5py.File("sets/mine.h5") as file:
        found = Frame.load(file["p"].attrs).to_physical(file["p"]["point"][...])
        assert "doubts" not in file["p"].attrs
    np.testing.assert_allclose(found, [*places, [np.nan] * 3], atol=1e-4)
