"""Images of a pair on disk, read back by other means than they were written."""

import dataclasses
import gzip
import struct

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from data_util.output.pair_images import draw_pair, pair_name, save_pair
from errors import UserError
from network.evaluation import PairImage
from network.registry import IMAGES, images_of

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
    arrays = {**grey, **segs, **fields}
    return Result({name: image_of(name, array) for name, array in arrays.items()}, *spacings)


def image_of(name, array):
    return PairImage(array, IMAGES[name].kind, IMAGES[name].side)


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
    assert images_of(("seg", "flow")) == ("fixed_seg", "moving_seg", "warped_seg", "flow", "moving")


def test_nifti_files_hold_the_arrays_axis_by_axis(result, tmp_path):
    save_pair(tmp_path / "run", result, tuple(IMAGES))
    folder = tmp_path / "run" / "3_lits_7_lits_12"
    assert {p.name for p in folder.iterdir()} == {f"{name}.nii.gz" for name in result.images}
    for name, image in result.images.items():
        if name == "flow":
            continue
        spacing, stored = raw_nifti(folder / f"{name}.nii.gz")
        expected = image.array * np.float32(255) if name in ("fixed", "moving", "warped") else image.array
        np.testing.assert_array_equal(stored.squeeze(), expected, err_msg=name)
        np.testing.assert_allclose(spacing, result.moving_spacing if "moving" in name else result.fixed_spacing)


@pytest.mark.parametrize("orientation", [None, "LPS", "RPI", "RAS"])
def test_a_saved_flow_warps_the_saved_moving_image_by_simpleitk(tmp_path, orientation):
    """In mm, in ITK's convention, with a spacing of each scan's own."""
    size = (14, 12, 10)
    rng = np.random.default_rng(1)
    moving = np.kron(rng.uniform(0, 1, (7, 6, 5)), np.ones((2, 2, 2))).astype(np.float32)
    flow = rng.uniform(-1.5, 1.5, (*size, 3)).astype(np.float32)
    places = np.moveaxis(np.indices(size), 0, -1) + flow
    warped = ndimage.map_coordinates(moving, np.moveaxis(places, -1, 0), order=1, mode="nearest")
    images = {"flow": flow, "moving": moving, "warped": warped}
    result = Result(
        {name: image_of(name, array) for name, array in images.items()},
        np.array([0.5, 1.5, 3.0], np.float32),
        np.array([2.0, 1.0, 0.25], np.float32),
    )
    save_pair(tmp_path, result, tuple(images), orientation=orientation)
    folder = tmp_path / pair_name(result)
    field = sitk.ReadImage(str(folder / "flow.nii.gz"), sitk.sitkVectorFloat64)
    read = {name: sitk.ReadImage(str(folder / f"{name}.nii.gz")) for name in ("moving", "warped")}
    applied = sitk.Resample(
        read["moving"], read["warped"], sitk.DisplacementFieldTransform(field), sitk.sitkLinear, -1.0
    )
    found, expected = (sitk.GetArrayFromImage(image) for image in (applied, read["warped"]))
    inside = np.moveaxis((places >= 0) & (places <= np.subtract(size, 1)), -1, 0).all(axis=0).T
    assert inside.mean() > 0.4
    np.testing.assert_allclose(found[inside], expected[inside], atol=0.2)


def test_a_flow_of_unknown_spacing_is_in_voxels_and_says_so(result, tmp_path):
    result.moving_spacing = np.full(3, np.nan, np.float32)
    save_pair(tmp_path, result, ("flow",))
    (path,) = (tmp_path / pair_name(result)).iterdir()
    assert path.name == "flow_voxels.nii.gz"
    stored = sitk.GetArrayFromImage(sitk.ReadImage(str(path))).transpose(2, 1, 0, 3)
    np.testing.assert_array_equal(stored, result.images["flow"].array)


def test_npz_holds_all_in_one_file(result, tmp_path):
    save_pair(tmp_path, result, ("flow", "fixed_seg", "moving_seg", "warped_seg", "warped"), "npz")
    (path,) = (tmp_path / pair_name(result)).iterdir()
    with np.load(path) as stored:
        names = {"flow", "fixed_seg", "moving_seg", "warped_seg", "warped", "fixed_spacing", "moving_spacing"}
        assert set(stored) == names
        np.testing.assert_array_equal(stored["flow"], result.images["flow"].array)
        np.testing.assert_array_equal(stored["warped_seg"], result.images["warped_seg"].array)
        np.testing.assert_array_equal(stored["warped"], result.images["warped"].array * np.float32(255))
        np.testing.assert_array_equal(stored["moving_spacing"], result.moving_spacing)


def test_missing_label_maps_are_left_out_and_unknown_spacing_is_1(result, tmp_path):
    result.images["fixed_seg"] = image_of("fixed_seg", np.full(SIZE, -1, np.int32))
    result.fixed_spacing = np.full(3, np.nan, np.float32)
    save_pair(tmp_path, result, ("fixed_seg", "moving_seg", "warped_seg", "fixed"))
    folder = tmp_path / pair_name(result)
    assert sorted(p.name for p in folder.iterdir()) == ["fixed.nii.gz", "moving_seg.nii.gz", "warped_seg.nii.gz"]
    assert raw_nifti(folder / "fixed.nii.gz")[0] == (1, 1, 1)
    save_pair(tmp_path, result, ("fixed_seg", "moving_seg", "warped_seg"), "npz")
    with np.load(folder / "images.npz") as stored:
        assert "fixed_seg" not in stored
        assert np.isnan(stored["fixed_spacing"]).all()


def test_saving_again_replaces(result, tmp_path):
    save_pair(tmp_path, result, ("jacobian",))
    result.images["jacobian"] = image_of("jacobian", result.images["jacobian"].array + 1)
    save_pair(tmp_path, result, ("jacobian",))
    _, stored = raw_nifti(tmp_path / pair_name(result) / "jacobian.nii.gz")
    np.testing.assert_array_equal(stored, result.images["jacobian"].array)


@pytest.mark.parametrize("missing", [(), ("fixed_seg", "warped_seg")])
def test_figure_of_a_pair(result, tmp_path, missing):
    for name in missing:
        result.images[name] = image_of(name, np.full(SIZE, -1, np.int32))
    draw_pair(tmp_path / "run", result)
    assert (tmp_path / "run" / "3_lits_7_lits_12.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_that_cannot_be_written_to(result, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("sitk::ERROR: no space")

    monkeypatch.setattr(sitk, "WriteImage", fail)
    with pytest.raises(UserError, match=r"cannot write .*jacobian\.nii\.gz as an image"):
        save_pair(tmp_path, result, ("jacobian",))
