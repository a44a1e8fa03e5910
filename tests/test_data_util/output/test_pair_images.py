"""Images of a pair on disk, read back by other means than they were written."""

import dataclasses
import gzip
import struct

import numpy as np
import pytest
import SimpleITK as sitk

from data_util.output.pair_images import FIGURE_ITEMS, ITEMS, draw_pair, images_of, pair_name, save_pair
from errors import UserError

SIZE = (7, 6, 5)


@dataclasses.dataclass
class Result:
    """What these functions read of a PairResult."""

    images: dict
    fixed_spacing: np.ndarray
    moving_spacing: np.ndarray
    index: int = 3
    fixed_id: str = "lits_7"
    moving_id: str = "lits_12"


@pytest.fixture
def result():
    rng = np.random.default_rng(0)
    grey = {name: rng.uniform(0, 1, SIZE).astype(np.float32) for name in ("fixed", "moving", "warped")}
    segs = {f"{name}_seg": rng.choice([0, 4, 900], SIZE).astype(np.int32) for name in grey}
    fields = {"flow": rng.normal(0, 2, (*SIZE, 3)).astype(np.float32), "jacobian": grey["fixed"] - 0.5}
    spacings = np.array([[0.5, 1.5, 3.0], [2.0, 1.0, 0.25]], np.float32)
    return Result({**grey, **segs, **fields}, *spacings)


def raw_nifti(path):
    """Shape, spacing and voxels of a NIfTI-1 file, by the standard's byte offsets; the first axis runs fastest."""
    data = gzip.decompress(path.read_bytes())
    dims = struct.unpack_from("<8h", data, 40)
    dtype = {4: "<i2", 8: "<i4", 16: "<f4"}[struct.unpack_from("<h", data, 70)[0]]
    spacing = struct.unpack_from("<8f", data, 76)[1:4]
    shape = dims[1 : dims[0] + 1]
    start = int(struct.unpack_from("<f", data, 108)[0])
    return spacing, np.frombuffer(data, dtype, np.prod(shape), start).reshape(shape, order="F")


def test_items_stand_for_images():
    assert images_of(("seg", "flow")) == ("fixed_seg", "moving_seg", "warped_seg", "flow")
    assert images_of((*FIGURE_ITEMS, "flow")) == images_of(FIGURE_ITEMS)


def test_nifti_files_hold_the_arrays_axis_by_axis(result, tmp_path):
    save_pair(tmp_path / "run", result, tuple(ITEMS))
    folder = tmp_path / "run" / "3_lits_7_lits_12"
    assert {p.name for p in folder.iterdir()} == {f"{name}.nii.gz" for name in result.images}
    for name, array in result.images.items():
        spacing, stored = raw_nifti(folder / f"{name}.nii.gz")
        expected = array * np.float32(255) if name in ("fixed", "moving", "warped") else array
        np.testing.assert_array_equal(stored.squeeze(), expected, err_msg=name)
        np.testing.assert_allclose(spacing, result.moving_spacing if "moving" in name else result.fixed_spacing)
    flow = sitk.ReadImage(str(folder / "flow.nii.gz"))
    assert flow.GetSize() == SIZE
    np.testing.assert_array_equal(flow.GetPixel(4, 1, 2), result.images["flow"][4, 1, 2])
    np.testing.assert_allclose(flow.GetDirection(), np.eye(3).ravel())


def test_npz_holds_all_in_one_file(result, tmp_path):
    save_pair(tmp_path, result, ("flow", "seg", "warped"), "npz")
    (path,) = (tmp_path / pair_name(result)).iterdir()
    with np.load(path) as stored:
        names = {"flow", "fixed_seg", "moving_seg", "warped_seg", "warped", "fixed_spacing", "moving_spacing"}
        assert set(stored) == names
        np.testing.assert_array_equal(stored["flow"], result.images["flow"])
        np.testing.assert_array_equal(stored["warped_seg"], result.images["warped_seg"])
        np.testing.assert_array_equal(stored["warped"], result.images["warped"] * np.float32(255))
        np.testing.assert_array_equal(stored["moving_spacing"], result.moving_spacing)


def test_missing_label_maps_are_left_out_and_unknown_spacing_is_1(result, tmp_path):
    result.images["fixed_seg"] = np.full(SIZE, -1, np.int32)
    result.fixed_spacing = np.full(3, np.nan, np.float32)
    save_pair(tmp_path, result, ("seg", "fixed"))
    folder = tmp_path / pair_name(result)
    assert sorted(p.name for p in folder.iterdir()) == ["fixed.nii.gz", "moving_seg.nii.gz", "warped_seg.nii.gz"]
    assert raw_nifti(folder / "fixed.nii.gz")[0] == (1, 1, 1)
    save_pair(tmp_path, result, ("seg",), "npz")
    with np.load(folder / "images.npz") as stored:
        assert "fixed_seg" not in stored
        assert np.isnan(stored["fixed_spacing"]).all()


def test_saving_again_replaces(result, tmp_path):
    save_pair(tmp_path, result, ("jacobian",))
    result.images["jacobian"] = result.images["jacobian"] + 1
    save_pair(tmp_path, result, ("jacobian",))
    _, stored = raw_nifti(tmp_path / pair_name(result) / "jacobian.nii.gz")
    np.testing.assert_array_equal(stored, result.images["jacobian"])


@pytest.mark.parametrize("missing", [(), ("fixed_seg", "warped_seg")])
def test_figure_of_a_pair(result, tmp_path, missing):
    for name in missing:
        result.images[name] = np.full(SIZE, -1, np.int32)
    draw_pair(tmp_path / "run", result)
    assert (tmp_path / "run" / "3_lits_7_lits_12.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_that_cannot_be_written_to(result, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("sitk::ERROR: no space")

    monkeypatch.setattr(sitk, "WriteImage", fail)
    with pytest.raises(UserError, match=r"jacobian\.nii\.gz: cannot be written"):
        save_pair(tmp_path, result, ("jacobian",))
