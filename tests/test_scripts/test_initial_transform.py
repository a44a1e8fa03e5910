"""A registration that starts from a linear transform of a file."""

import json

import numpy as np
import pytest
import SimpleITK as sitk

import cli
import register
from data_util.scans import transform_chain
from data_util.scans.images import to_array
from errors import UserError
from tests.test_scripts.test_register import FRAME, SIZE, head

START = sitk.Euler3DTransform((10.0, 0.0, -5.0), 0.1, -0.2, 0.15, (9.0, -6.0, 4.0))


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A current folder with two scans, and transforms that do and do not fit."""
    monkeypatch.chdir(tmp_path)
    fixed = FRAME.put(head())
    sitk.WriteImage(fixed, "fixed.nii.gz")
    sitk.WriteImage(FRAME.put(head((2, -1, 1))), "moving.nii.gz")
    sitk.WriteTransform(START, "start.tfm")
    sitk.WriteTransform(sitk.TranslationTransform(3, (0.0, 4000.0, 0.0)), "far.tfm")
    for name in ("empty.tfm", "empty.nii"):
        (tmp_path / name).touch()
    vectors = np.zeros((*FRAME.size, 3), np.float32)
    sitk.WriteTransform(transform_chain.field_transform(FRAME, vectors), "field.h5")
    return tmp_path


def run(*arguments):
    flags = ("-o", "out", "--refine", "0", "-g", "-1", "--size", *SIZE, "--preprocess", "none")
    return cli.run(register.main, ["fixed.nii.gz", "moving.nii.gz", *map(str, (*flags, *arguments))])


def test_it_is_taken_as_it_is(work):
    assert run("--initial_transform", "start.tfm") == 0
    written = sitk.ReadTransform("out/transform.h5")
    places = FRAME.to_physical(np.random.default_rng(0).uniform(0, 1, (50, 3)) * np.subtract(SIZE, 1))
    expected = [START.TransformPoint(place) for place in places]
    np.testing.assert_allclose([written.TransformPoint(place) for place in places], expected, atol=1e-3)
    moving, fixed = sitk.ReadImage("moving.nii.gz"), sitk.ReadImage("fixed.nii.gz")
    warped = to_array(sitk.ReadImage("out/warped.nii.gz"))
    read = to_array(sitk.Resample(moving, fixed, START, sitk.sitkLinear, float(to_array(moving).min())))
    np.testing.assert_allclose(warped, read, atol=0.5)
    settings = json.loads((work / "out/report.json").read_text())["settings"]
    assert (settings["affine"], settings["initial_transform"]) == ("given", "start.tfm")


def test_a_transform_from_python():
    fixed, moving = FRAME.put(head()), FRAME.put(head((2, -1, 1)))
    shift = sitk.TranslationTransform(3, (FRAME.matrix @ (2, -1, 1)).tolist())
    result = register.register(fixed, moving, view="none", image_size=SIZE, refine=0, initial_transform=shift)
    assert result.report["similarity"][-1] > 0.998 > 0.02 + result.report["similarity"][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--initial_transform", "none.tfm"), "none.tfm: no such file"),
        (("--initial_transform", "field.h5"), "field.h5: a DisplacementFieldTransform is not linear"),
        (
            ("--initial_transform", "far.tfm"),
            "where the initial transform leads, nothing is seen of the moving scan (the",
        ),
        (("--initial_transform", "far.tfm"), "is it of these scans, from places in the fixed one"),
        (("--initial_transform", "empty.tfm"), "empty.tfm: is empty, a file of 0 bytes"),
        (
            ("--initial_transform", "fixed.nii.gz"),
            "fixed.nii.gz: has 30x26x22 numbers of intent 0, which is no displacement",
        ),
        (("--fixed_mask", "empty.nii"), "fixed scan: empty.nii: is empty, a file of 0 bytes"),
        (("--initial_transform", "start.tfm", "--affine", "rigid"), "give one of them"),
    ],
)
def test_one_that_does_not_fit_is_a_line(work, capsys, arguments, message):
    assert run(*arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (work / "out").exists()


def test_a_field_from_python_is_refused():
    field = transform_chain.field_transform(FRAME, np.zeros((*FRAME.size, 3), np.float32))
    with pytest.raises(UserError, match="the transform: a DisplacementFieldTransform is not linear"):
        register.register(FRAME.put(head()), FRAME.put(head()), initial_transform=field)
