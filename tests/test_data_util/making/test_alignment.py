"""Scans that are brought to a template before they become volumes."""

import json
import pathlib

import h5py
import numpy as np
import pytest
import SimpleITK as sitk

from data_util.making import alignment
from data_util.scans.frame import Frame
from data_util.scans.images import read_image, to_array
from errors import UserError
from tests.test_data_util.scans.test_affine_search import CENTRE, scan, turn
from tests.test_data_util.test_build import run, write

MATRIX, SHIFT = 1.1 * turn(30, (1, 2, -1)), np.array([14.0, -6, 9])  # the scan at p shows the template at these
FLAGS = ("--split", "0/0/1", "--pairs", "all", "--modality", "mr", "--window", "0,400", "--align", "template.mha")


def in_scan(places):
    """Where places in the template are in the scan."""
    return (places - CENTRE - SHIFT) @ np.linalg.inv(MATRIX).T + CENTRE


def exact(fixed, moving, kind):
    """What is to be found: by the scans' one grey value that says which is which."""
    if sitk.GetArrayViewFromImage(moving).max() > 900:
        raise UserError("no affine map found: nothing in common")
    moved = sitk.GetArrayViewFromImage(moving)[0, 0, 0] > 5
    found = sitk.AffineTransform(3)
    if moved:
        found.SetMatrix(np.linalg.inv(MATRIX).ravel().tolist())
        found.SetTranslation(in_scan(np.zeros(3)).tolist())
    return found


def marked(image):
    return sitk.Cast(image > 40, sitk.sitkUInt8)


@pytest.fixture
def scans(tmp_path, monkeypatch):
    """The template as it is, and scan b, turned, shifted and larger, with labels and landmarks."""
    monkeypatch.chdir(tmp_path)
    template, moved = scan(seed=3), scan(MATRIX, SHIFT, seed=4)
    moved[0, 0, 0] = 9
    template[0, 0, 0] = 0
    write(template, pathlib.Path("template.mha"))
    pathlib.Path("scans/points").mkdir(parents=True)
    places = CENTRE + np.array([[0.0, 0, 0], [20, -10, 5], [-15, 12, 22]])
    for name, image, points in (("a", template, places), ("b", moved, in_scan(places))):
        write(image, pathlib.Path(f"scans/images/{name}.mha"))
        write(marked(image), pathlib.Path(f"scans/labels/{name}.mha"))
        text = "".join(",".join(map(repr, row)) + "\n" for row in points.tolist())
        pathlib.Path(f"scans/points/{name}.csv").write_text("x,y,z\n" + text)


def contents(key):
    with h5py.File("sets/mine.h5") as file:
        group = file[key]
        return {name: group[name][...] for name in group} | dict(group.attrs)


@pytest.mark.parametrize("crop", ["none", "mask"])
def test_scans_are_seen_where_the_template_is(scans, monkeypatch, crop):
    monkeypatch.setattr(alignment, "find_affine", exact)
    assert run(*FLAGS, "--crop", crop, "--size", "40", "40", "40", "--align_kind", "similarity") == 0
    a, b = contents("a"), contents("b")
    np.testing.assert_allclose(a["affine"], np.eye(4), atol=1e-9)
    led = np.append(CENTRE + SHIFT, 1) @ b["affine"].T
    np.testing.assert_allclose(led, [*CENTRE, 1], atol=1e-6)
    frame, own = Frame.load(b), Frame.load(b, "source_")
    assert own == Frame.of(read_image("scans/images/b.mha"))
    np.testing.assert_allclose(
        frame.to_physical(b["point"]),
        in_scan(Frame.load(a).to_physical(a["point"])),
        atol=8 if crop == "mask" else 0.01,
    )
    if crop == "none":  # both show the template's own voxels
        np.testing.assert_allclose(b["point"], a["point"], atol=1e-3)
        inside = (a["segmentation"] > 0) & (b["segmentation"] > 0)
        assert 2 * inside.sum() / ((a["segmentation"] > 0).sum() + (b["segmentation"] > 0).sum()) > 0.93
        assert np.corrcoef(a["volume"][inside], b["volume"][inside])[0, 1] > 0.9
    # Put back into the scan by its frames, the mask is where it was.
    back = to_array(own.resample(frame.put(b["segmentation"]), nearest=True)) > 0
    truth = to_array(read_image("scans/labels/b.mha")) > 0
    assert 2 * (back & truth).sum() / (back.sum() + truth.sum()) > 0.9


def test_a_scan_without_a_map_is_named_and_another_template_is_refused(scans, monkeypatch, capsys):
    monkeypatch.setattr(alignment, "find_affine", exact)
    other = scan(seed=7)
    other[1, 1, 1] = 1000
    write(other, pathlib.Path("scans/images/c.mha"))
    assert run(*FLAGS) == 1
    error = capsys.readouterr().err
    assert "c: not brought to the template template.mha: no affine map found" in error
    assert json.loads(pathlib.Path("sets/mine.parts/settings.json").read_text())["align"]["kind"] == "affine"
    write(scan(seed=8), pathlib.Path("template.mha"))  # another one of that name
    assert run(*FLAGS) == 1
    assert "holds scans made with align" in capsys.readouterr().err


def test_mistakes(scans, capsys):
    assert run(*FLAGS[:-2], "--align_kind", "rigid") == 1
    assert "with --align" in capsys.readouterr().err
    assert run(*FLAGS[:-1], "nowhere.nii") == 1
    assert "--align: nowhere.nii" in capsys.readouterr().err


@pytest.mark.slow
def test_the_map_is_found(scans):
    assert run(*FLAGS, "--size", "40", "40", "40") == 0
    a, b = contents("a"), contents("b")
    assert np.linalg.norm(a["point"] - b["point"], axis=1).max() < 1.5
