"""Scans as people have them (`tests.cases`), each read right or refused in one line."""

import numpy as np
import pytest
import SimpleITK as sitk

from data_util.scans.dicom import list_series
from data_util.scans.frame import Frame
from data_util.scans.images import read_image, to_array
from errors import UserError
from tests import cases


def differs(image, show=cases.grey):
    """Largest difference of an image from what is there, at its own voxels' places."""
    frame = Frame.of(image)
    voxels = np.moveaxis(np.indices(frame.size), 0, -1)
    return np.abs(to_array(image) - show(frame.to_physical(voxels.reshape(-1, 3))).reshape(frame.size)).max()


def scans_in(folder):
    """The scans of a case: image files by their endings, else folders of DICOM."""
    files = [p for p in sorted(folder.rglob("*")) if p.name.endswith((".nii", ".nii.gz", ".nrrd", ".mha", ".mhd"))]
    return files or sorted({p.parent for p in folder.rglob("*") if p.is_file()})


@pytest.fixture
def made(tmp_path):
    return lambda name: cases.make(name, tmp_path) or tmp_path


def refused(path, message="."):
    with pytest.raises(UserError, match=message) as error:
        read_image(path)
    assert "\n" not in str(error.value)


def test_files_that_are_cut_off(made):
    scans = scans_in(made("cut_off_nifti"))
    assert len(scans) >= 4
    for path in scans:
        refused(path, "cut short")


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.hdr", "a.mha", "a.nrrd", "a.mgz"])
def test_no_file_is_read_short(tmp_path, name, share):
    array = np.random.default_rng(0).integers(0, 3000, (20, 22, 24)).astype(np.int16)
    if name == "a.mgz":
        import nibabel

        nibabel.save(nibabel.MGHImage(array, np.eye(4)), tmp_path / name)
    else:
        sitk.WriteImage(sitk.GetImageFromArray(array), str(tmp_path / name))
    read_image(tmp_path / name)
    cases.cut(tmp_path / ("a.img" if name == "a.hdr" else name), share)
    refused(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "show"), [("monochrome1", cases.grey), ("direction_jitter", cases.grey), ("sheared_sform", cases.grey)]
)
def test_scans_that_are_read(made, name, show):
    for path in scans_in(made(name)):
        image = read_image(path)
        inside = differs(image, show) if name != "sheared_sform" else 0
        assert inside < 1.01, path


def test_slopes_of_their_own(made):
    folder = made("slope_per_slice")
    for path, show, step in ((folder / "pet", cases.activity, 0.51), (folder / "ct", cases.grey, 0.6)):
        image = read_image(path)
        assert image.GetPixelID() == sitk.sitkFloat32
        assert differs(image, show) < step


@pytest.mark.parametrize("name", ["enhanced_shuffled", "enhanced_rescale_per_frame"])
def test_frames_are_read_by_their_own_place_and_rescale(made, name):
    for path in scans_in(made(name)):
        image = read_image(path)
        assert image.GetSize()[2] == 24
        np.testing.assert_allclose(image.GetSpacing(), cases.SPACING, atol=1e-6)
        assert differs(image) < 1.1  # half of the largest slope


def test_the_series_with_most_slices_is_read(made):
    for path in scans_in(made("scouts_beside_enhanced")):
        assert list_series(path)[0].slices == 24
        assert differs(read_image(path)) < 0.6


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("enhanced_gap", "12.00 mm apart, others 3.00; add the missing slices"),
        ("drifting_slices", "from where even slices would put it"),
        ("pixel_spacing_zero", r"pixel spacing \(0028,0030\) .* is 0\\0, not above 0"),
        ("nan_outside_body", "no numbers"),
        ("broken_link", "this link leads to nothing"),
    ],
)
def test_scans_that_are_refused(made, name, message):
    scans = scans_in(made(name))
    assert scans
    for path in scans:
        refused(path, message)


def test_a_single_slice_is_refused(made):
    folder = made("one_slice")
    refused(folder / "scan.nii.gz", "a single slice")
    assert differs(read_image(folder / "other.nii.gz")) < 1.01


def test_padding_is_air(made):
    for path in scans_in(made("padding_unsigned")):
        image = read_image(path)
        frame = Frame.of(image)
        places = frame.to_physical(np.moveaxis(np.indices(frame.size), 0, -1).reshape(-1, 3))
        outside = ~cases.body(places).reshape(frame.size)
        array = to_array(image)
        assert array[outside].max() <= -1000
        assert np.abs(array - cases.grey(places).reshape(frame.size))[~outside].max() < 1.01


def test_a_copied_slice_is_read_once_and_another_one_refused(made):
    for path in scans_in(made("copied_slice")):
        image = read_image(path)
        assert image.GetSize()[2] == 24
        assert differs(image) < 1.01


def test_sheared_axes_are_set_upright_at_their_places(made):
    scans = scans_in(made("sheared_fixed"))
    assert scans
    for path in scans:
        image = read_image(path)
        direction = np.reshape(image.GetDirection(), (3, 3))
        np.testing.assert_allclose(direction @ direction.T, np.eye(3), atol=1e-9)
        frame = Frame.of(image)
        array = to_array(image)
        expected = cases.grey(frame.to_physical(np.moveaxis(np.indices(frame.size), 0, -1).reshape(-1, 3)))
        inside = array > array.min()  # what lies outside of the sheared box is as its darkest voxel
        assert inside.mean() > 0.4
        # Along the rim a voxel's edge is repeated.
        assert np.mean(np.abs(array - expected.reshape(frame.size))[inside] <= 1.01) > 0.8


@pytest.mark.parametrize("source", [np.zeros((4, 4, 4)), None, 7, sitk.Image(8, 8, sitk.sitkFloat32)])
def test_what_is_no_scan_is_refused(source):
    refused(source)


@pytest.mark.parametrize("kind", [sitk.sitkComplexFloat32, sitk.sitkVectorUInt8])
def test_images_of_other_numbers_are_refused(kind):
    refused(sitk.Image([8, 8, 8], kind, 3 if kind == sitk.sitkVectorUInt8 else 0))


def test_plain_scans_are_read(made):
    folder = made("plain")
    for name in ("scan.nii.gz", "scan.nrrd", "scan.mha", "series", "enhanced"):
        assert differs(read_image(folder / name)) < 1.01, name
