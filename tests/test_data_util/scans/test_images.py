import numpy as np
import pytest
import SimpleITK as sitk

from data_util.scans.frame import Frame
from data_util.scans.images import match_labels, orient, read_image, to_array, write_image
from errors import UserError


def ramp(size):
    x, y, z = np.indices(size)
    return (3 * x + 50 * y + 700 * z).astype(np.int16)


def image_of(array, spacing=(1.5, 2.0, 3.0), origin=(-10.0, 20.0, 5.0), direction=(1, 0, 0, 0, 1, 0, 0, 0, 1)):
    image = sitk.GetImageFromArray(array.transpose(2, 1, 0))
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    image.SetDirection(direction)
    return image


def write_series(folder, volume, series="1.2.9", spacing=(1.5, 2.0, 3.0), slope=None):
    """Write a DICOM slice a file, the file names in the reverse order of the slices."""
    folder.mkdir(exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for k in range(volume.shape[2]):
        image = image_of(volume[:, :, k : k + 1], spacing)
        tags = {
            "0008|0018": f"1.2.{len(series)}.{k + 1}",
            "0008|0060": "CT",
            "0020|000d": "1.2.3",
            "0020|000e": series,
            "0020|0013": str(k),
            "0020|0032": f"-10\\20\\{5 + k * spacing[2]}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
        }
        if slope:
            tags |= {"0028|1052": str(slope[1]), "0028|1053": str(slope[0])}
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{series or 'empty'}_{volume.shape[2] - k:03d}.dcm"))
        writer.Execute(image)


def value_at(image, place):
    return image[image.TransformPhysicalPointToIndex(place)]


def test_arrays_are_x_y_z_and_come_back_with_their_geometry():
    array = ramp((4, 5, 6))
    image = image_of(array)
    assert image.GetSize() == (4, 5, 6)
    np.testing.assert_array_equal(to_array(image), array)
    assert image[3, 1, 2] == to_array(image)[3, 1, 2]
    back = Frame.of(image).put(array.astype(np.float32))
    assert back.GetOrigin() == image.GetOrigin()
    assert back.GetSpacing() == image.GetSpacing()
    np.testing.assert_array_equal(to_array(back), array)


@pytest.mark.parametrize(
    "direction",
    [
        (-1, 0, 0, 0, -1, 0, 0, 0, 1),
        (1, 0, 0, 0, -1, 0, 0, 0, -1),
        (0, 0, 1, -1, 0, 0, 0, -1, 0),
        (0, 1, 0, 1, 0, 0, 0, 0, 1),
    ],
)
def test_orient_brings_any_axes_to_lps_and_keeps_each_voxels_place(direction):
    image = image_of(ramp((4, 5, 6)), direction=direction)
    turned = orient(image)
    np.testing.assert_allclose(turned.GetDirection(), np.eye(3).ravel(), atol=1e-12)
    for index in [(0, 0, 0), (3, 4, 5), (1, 0, 4), (2, 3, 1)]:
        assert value_at(turned, image.TransformIndexToPhysicalPoint(index)) == image[index]
    # LPS: a step along x goes to larger first coordinates (left), along z to larger third ones (head).
    steps = np.diff([turned.TransformIndexToPhysicalPoint(i) for i in [(0, 0, 0), (1, 0, 0)]], axis=0)[0]
    np.testing.assert_allclose(steps, [turned.GetSpacing()[0], 0, 0], atol=1e-9)


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
def test_a_written_image_is_read_back(tmp_path, ending):
    image = image_of(ramp((4, 5, 6)), direction=(-1, 0, 0, 0, -1, 0, 0, 0, 1))
    write_image(image, tmp_path / f"scan{ending}")
    read = read_image(tmp_path / f"scan{ending}")
    np.testing.assert_array_equal(to_array(read), ramp((4, 5, 6))[::-1, ::-1])
    np.testing.assert_allclose(read.GetOrigin(), image.TransformIndexToPhysicalPoint((3, 4, 0)), atol=1e-4)
    np.testing.assert_allclose(read.GetSpacing(), (1.5, 2, 3), atol=1e-6)


@pytest.mark.parametrize("series", ["", "1.2.9"])
def test_a_dicom_folder_is_read_by_position_in_its_unit(tmp_path, series):
    volume = ramp((6, 5, 4))
    write_series(tmp_path / "dicom", volume, series)
    image = read_image(str(tmp_path / "dicom"))
    np.testing.assert_array_equal(to_array(image), volume)
    np.testing.assert_allclose(image.GetSpacing(), (1.5, 2, 3))
    np.testing.assert_allclose(image.GetOrigin(), (-10, 20, 5))


def test_stored_numbers_become_hounsfield_units(tmp_path):
    write_series(tmp_path / "dicom", ramp((6, 5, 4)), slope=(2, -1024))
    stored = sitk.ReadImage(str(tmp_path / "dicom" / "1.2.9_004.dcm"))
    assert stored.GetMetaData("0028|1052").strip() == "-1024"
    np.testing.assert_allclose(to_array(read_image(tmp_path / "dicom"))[..., 0], ramp((6, 5, 4))[..., 0], atol=2)


@pytest.mark.parametrize(("named", "unnamed", "largest"), [(5, 3, "named"), (3, 5, "unnamed")])
def test_of_several_series_the_largest_is_read(tmp_path, named, unnamed, largest):
    write_series(tmp_path, ramp((4, 4, named)), "1.2.9")
    write_series(tmp_path, ramp((4, 4, unnamed)) + 1, "")
    (tmp_path / "notes.txt").write_text("no slice")
    array = to_array(read_image(tmp_path))
    assert array.shape == (4, 4, 5)
    assert array[0, 0, 0] == (0 if largest == "named" else 1)


def test_labels_are_matched_by_place_not_by_index():
    image = image_of(np.zeros((8, 8, 8), np.int16), spacing=(1, 1, 1), origin=(0, 0, 0))
    labels = np.zeros((4, 8, 8), np.uint8)
    labels[1, 2, 3] = 7  # 2 mm voxels along a flipped x: centre at x = 6 - 2
    matched = to_array(match_labels(image_of(labels, (2, 1, 1), (6, 0, 1), (-1, 0, 0, 0, 1, 0, 0, 0, 1)), image))
    assert matched.shape == (8, 8, 8)
    assert set(np.unique(matched)) == {0, 7}
    places = np.argwhere(matched)
    assert [4, 2, 4] in places.tolist()
    assert np.all(places[:, 1:] == [2, 4])
    assert len(places) == 2


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone.nii.gz: no such file or folder"):
        read_image(tmp_path / "gone.nii.gz")


def test_a_file_that_is_no_image_is_refused(tmp_path):
    path = tmp_path / "scan.nii.gz"
    path.write_text("no image")
    with pytest.raises(UserError, match="cannot be read as an image"):
        read_image(path)


def test_a_cut_off_image_is_refused(tmp_path):
    write_image(image_of(np.random.default_rng(0).integers(0, 999, (20, 20, 20)).astype(np.int16)), tmp_path / "a.mha")
    whole = (tmp_path / "a.mha").read_bytes()
    (tmp_path / "a.mha").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="was cut short"):
        read_image(tmp_path / "a.mha")


def test_a_folder_without_dicom_is_refused_in_one_line(tmp_path, capfd):
    (tmp_path / "notes.txt").write_text("no slice")
    with pytest.raises(UserError, match="no DICOM slices"):
        read_image(tmp_path)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("array", [np.zeros((5, 4), np.uint8), np.zeros((3, 2, 5, 4), np.uint8)])
def test_other_than_three_dimensions_are_refused(tmp_path, array):
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=False), str(tmp_path / "a.mha"))
    with pytest.raises(UserError, match=f"{array.ndim} dimensions"):
        read_image(tmp_path / "a.mha")


def test_colours_are_refused(tmp_path):
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((3, 5, 4, 3), np.uint8), isVector=True), str(tmp_path / "a.mha"))
    with pytest.raises(UserError, match="3 values per voxel"):
        read_image(tmp_path / "a.mha")


@pytest.mark.parametrize("name", ["gone/scan.nii.gz", "scan.ending"])
def test_an_image_that_cannot_be_written_is_an_error(tmp_path, name):
    with pytest.raises(UserError, match="cannot write"):
        write_image(image_of(ramp((3, 3, 3))), tmp_path / name)
