"""Variants of what users' scans are like, of each kind: read right at every place or refused, never read wrong."""

import gzip
import os
import shutil
import struct

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_util.scans.dicom import list_series
from data_util.scans.frame import Frame
from data_util.scans.images import read_image, read_native, to_array
from errors import UserError
from tests import cases
from tests.test_data_util.scans.test_dicom import places_of, write_slices

FEW = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def assert_shows(image, show=cases.grey, atol=1.0, within=None):
    """Every voxel, or those at places within, have the grey value of their place."""
    frame = Frame.of(image)
    places = frame.to_physical(np.moveaxis(np.indices(frame.size), 0, -1).reshape(-1, 3))
    known = np.full(len(places), True) if within is None else within(places)
    assert known.sum() > 0.3 * np.prod(cases.SIZE)
    np.testing.assert_allclose(to_array(image).ravel()[known], show(places)[known], atol=atol)


def assert_refused(path, match):
    with pytest.raises(UserError, match=match) as error:
        read_image(path)
    assert "\n" not in str(error.value)


def inside(matrix):
    """Whether places lie within a grid of the usual size, half a voxel away from its rim."""

    def within(where):
        voxels = (where - cases.ORIGIN) @ np.linalg.inv(matrix).T
        return ((voxels > 0.5) & (voxels < np.array(cases.SIZE) - 1.5)).all(-1)

    return within


# ------------------------------------------------------------------------------------------- files, kind A


@pytest.mark.parametrize(
    "kind", [np.uint8, np.int8, np.uint16, np.int16, np.int32, np.uint32, np.int64, np.float64, ">i2"]
)
@pytest.mark.parametrize("form", [nibabel.Nifti1Image, nibabel.Nifti2Image, nibabel.Nifti1Pair])
def test_every_type_of_nifti(tmp_path, kind, form):
    array = (cases.scan() // 8 % 100).astype(kind)
    name = "a.img" if form is nibabel.Nifti1Pair else "a.nii.gz"
    image = form(array.astype(np.dtype(kind).newbyteorder("=")), cases.affine(), dtype=np.dtype(kind).newbyteorder("="))
    nibabel.save(image, tmp_path / name)
    np.testing.assert_array_equal(to_array(read_native(tmp_path / name)), array)
    assert Frame.of(read_native(tmp_path / name)).origin == pytest.approx(cases.ORIGIN)


@pytest.mark.parametrize(("slope", "intercept"), [(1, 0), (0, 0), (np.nan, 0), (2, -1024), (0.25, 3.5), (1, -1024)])
def test_slopes_of_nifti(tmp_path, slope, intercept):
    array = cases.scan()
    cases.write_nifti(tmp_path / "a.nii", array)
    content = bytearray((tmp_path / "a.nii").read_bytes())
    content[112:120] = struct.pack("<ff", slope, intercept)
    (tmp_path / "a.nii").write_bytes(content)
    used = slope if np.isfinite(slope) and slope else 1
    added = intercept if np.isfinite(slope) and slope else 0
    np.testing.assert_allclose(to_array(read_image(tmp_path / "a.nii")), array * used + added)


@pytest.mark.parametrize("named", ["a.nii", "a.nii.gz", "a.mgz"])
def test_gzip_by_any_name_and_with_anything_behind_it(tmp_path, named):
    plain = tmp_path / ("b.mgh" if named == "a.mgz" else "b.nii")
    nibabel.save((nibabel.MGHImage if named == "a.mgz" else nibabel.Nifti1Image)(cases.scan(), cases.affine()), plain)
    packed = gzip.compress(plain.read_bytes()[:9000]) + gzip.compress(plain.read_bytes()[9000:])
    for content in (plain.read_bytes(), packed, packed + b"\0garbage", plain.read_bytes() + b"garbage"):
        (tmp_path / named).write_bytes(content)
        assert_shows(read_image(tmp_path / named))
    (tmp_path / named).write_bytes(packed[:-8] + bytes(4) + packed[-4:])
    assert_refused(tmp_path / named, "damaged")


@pytest.mark.parametrize("ending", ["mha", "mhd", "nrrd", "nii.gz", "mgz"])
def test_a_flipped_byte_in_compressed_voxels_is_refused(tmp_path, ending):
    array = np.random.default_rng(0).integers(0, 999, cases.SIZE).astype(np.int16)
    if ending == "mgz":
        nibabel.save(nibabel.MGHImage(array, cases.affine()), tmp_path / "a.mgz")
    else:
        cases.write_other(tmp_path / f"a.{ending}", array, compress=True)
    path = tmp_path / ("a.zraw" if ending == "mhd" else f"a.{ending}")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    assert_refused(tmp_path / f"a.{ending}", "damaged|data read error|cannot be read")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["a.nii.gz", "a.hdr", "a.nrrd", "a.mha", "a.mgz"])
def test_one_voxel_that_is_no_number(tmp_path, value, name):
    array = cases.scan().astype(np.float32)
    array[3, 4, 5] = value
    if name == "a.mgz":
        nibabel.save(nibabel.MGHImage(array, cases.affine()), tmp_path / name)
    else:
        cases.write_other(tmp_path / name, array)
    assert_refused(tmp_path / name, r"has grey values that are no numbers \(NaN or infinite\), in 1 of its voxels")


@pytest.mark.parametrize("ending", ["vtk", "gipl"])
def test_formats_whose_damage_nobody_tells_are_refused(tmp_path, ending):
    sitk.WriteImage(sitk.GetImageFromArray(cases.scan().T), str(tmp_path / f"a.{ending}"))
    assert_refused(tmp_path / f"a.{ending}", "give DICOM, NIfTI")


@given(st.integers(0, 47), st.floats(-0.4, 0.4), st.floats(-0.4, 0.4), st.floats(-0.4, 0.4))
@FEW
def test_any_axes_rotated_in_any_way_are_read_at_their_places(tmp_path, turn, a, b, c):
    order = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)][turn // 8]
    signs = np.where([turn & 1, turn & 2, turn & 4], -1, 1)
    rotation = cases_rotation(a, b, c)
    matrix = rotation @ (np.eye(3)[:, order] * signs) * cases.SPACING
    values = cases.grey(cases.places(matrix=matrix)).astype(np.float32)
    cases.write_nifti(tmp_path / "a.nii", values, matrix)
    for image in (read_native(tmp_path / "a.nii"), read_image(tmp_path / "a.nii")):
        assert_shows(image, atol=0.01)
    assert read_native(tmp_path / "a.nii").GetSize() == cases.SIZE


def cases_rotation(a, b, c):
    x, y, z = (np.array([[np.cos(t), -np.sin(t)], [np.sin(t), np.cos(t)]]) for t in (a, b, c))
    about_x, about_y, about_z = np.eye(3), np.eye(3), np.eye(3)
    about_x[1:, 1:], about_z[:2, :2] = x, z
    about_y[np.ix_((0, 2), (0, 2))] = y
    return about_x @ about_y @ about_z


@given(st.lists(st.floats(-0.5, 0.5), min_size=3, max_size=3))
@FEW
def test_any_shear_is_set_upright_or_of_no_account(tmp_path, shear):
    matrix = np.array(((1, shear[0], shear[1]), (0, 1, shear[2]), (0, 0, 1))) * cases.SPACING
    values = cases.grey(cases.places(matrix=matrix)).astype(np.float32)
    cases.write_nifti(tmp_path / "a.nii", values, matrix, qform=cases.MATRIX)
    image = read_image(tmp_path / "a.nii")
    np.testing.assert_allclose(np.reshape(image.GetDirection(), (3, 3)), np.eye(3), atol=1e-6)
    assert_shows(image, atol=0.5, within=inside(matrix))


def test_sheared_labels_are_not_blended(tmp_path):
    labels = np.zeros(cases.SIZE, np.uint8)
    labels[5:15, 5:11], labels[5:15, 11:17] = 1, 30
    cases.write_nifti(tmp_path / "a.nii", labels, cases.SHEAR)
    assert set(np.unique(to_array(read_image(tmp_path / "a.nii", is_label=True)))) == {0, 1, 30}


def test_an_image_given_in_python_is_left_as_it_is():
    image = sitk.Image(4, 5, 6, sitk.sitkInt16)
    direction = (1, 1e-5, 0, -1e-5, 1, 0, 0, 0, 1)
    image.SetDirection(direction)
    read_image(image)
    assert image.GetDirection() == direction


@pytest.mark.parametrize(
    "image",
    [
        sitk.Image((4, 5, 6), sitk.sitkLabelUInt8),
        sitk.Image((4, 5, 6), sitk.sitkVectorFloat32),
        sitk.Image((4, 5, 6, 2), sitk.sitkFloat32),
        sitk.Image((0, 5, 6), sitk.sitkFloat32),
        sitk.Image((4, 5, 1), sitk.sitkFloat32),
        sitk.Image((1, 5, 7), sitk.sitkFloat32),
    ],
)
def test_images_of_other_kinds_are_refused(image):
    with pytest.raises(UserError, match="the image: has"):
        read_image(image)


def test_analyze_lies_where_spm_says(tmp_path):
    for name, form in (("a.img", nibabel.Spm99AnalyzeImage), ("b.img", nibabel.Spm2AnalyzeImage)):
        nibabel.save(form(cases.scan(), cases.affine()), tmp_path / name)
        assert_shows(read_image(tmp_path / name))
        assert_shows(read_image((tmp_path / name).with_suffix(".hdr")))
    (tmp_path / "a.mat").write_bytes(b"no matrix")
    assert_refused(tmp_path / "a.img", "its header cannot be right")


def test_metres_of_nifti(tmp_path):
    image = nibabel.Nifti1Image(cases.scan(), np.diag((0.001, 0.001, 0.001, 1)) @ cases.affine())
    image.header.set_xyzt_units("meter")
    nibabel.save(image, tmp_path / "a.nii")
    assert_shows(read_image(tmp_path / "a.nii"))


# ------------------------------------------------------------------------------------------- DICOM, kinds B to D


def test_phases_in_an_enhanced_image_are_refused_by_name(tmp_path):
    cases.write_enhanced(
        tmp_path / "a.dcm", [*range(24), *range(24)], show=lambda where, j: cases.grey(where) + j // 24
    )
    assert_refused(tmp_path, r"two slices at one place, a\.dcm.* and a\.dcm \(frame \d+\)")


def test_halves_of_an_enhanced_image_are_one_volume(tmp_path):
    def named(uid):
        return lambda data: setattr(data, "SOPInstanceUID", uid)

    cases.write_enhanced(tmp_path / "a.dcm", range(0, 24, 2), named("1.2.3.1"))
    cases.write_enhanced(tmp_path / "b.dcm", range(1, 24, 2), named("1.2.3.2"))
    assert_shows(read_image(tmp_path))


def test_padding_by_a_range_of_either_sign(tmp_path):
    """-2000 to -1500 is padding; grey values below 0 are none."""

    def change(k, data):
        array = np.frombuffer(data.PixelData, "<u2").reshape(data.Rows, data.Columns).view("<i2").copy()
        array[~cases.body(cases.slice_places(cases.usual_positions()[k])).T] = -1800 + k
        data.PixelRepresentation, data.PixelData = 1, array.tobytes()
        data.add_new((0x0028, 0x0120), "US", 63536)
        data.add_new((0x0028, 0x0121), "SS", 50)

    cases.write_series(tmp_path, change=change, intercept=-2000)
    image = read_image(tmp_path)
    assert_shows(image, within=cases.body)
    assert to_array(image)[~cases.body(cases.places())].max() < -1000


@pytest.mark.parametrize("step", [0.625, 1.25, 3.0])
def test_places_rounded_to_hundredths_are_even(tmp_path, step):
    positions = [(-30.0, -25.0, round(-40 + step * k, 2)) for k in range(24)]
    cases.write_series(tmp_path, positions)
    assert read_image(tmp_path).GetSpacing()[2] == pytest.approx(step, abs=0.001)


@given(st.integers(1, 22), st.integers(1, 5))
@FEW
def test_a_gap_anywhere_is_refused(tmp_path, first, count):
    folder = tmp_path / f"{first}-{count}"
    shutil.rmtree(folder, ignore_errors=True)
    kept = [place for k, place in enumerate(cases.usual_positions()) if not first <= k < min(first + count, 23)]
    cases.write_series(folder, kept)
    assert_refused(folder, rf"slices {first} and {first + 1} lie .* mm apart, others 3\.00")


WRONG = [(word, value) for word in ("ImageOrientationPatient", "PixelSpacing") for value in ([], ["1"], ["nan"], ["0"])]
WRONG += [("ImagePositionPatient", value) for value in ([], ["1"], ["nan"])]
WRONG += [("RescaleSlope", value) for value in (["nan"], ["0"])]
NUMBERS = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2, "RescaleSlope": 1}


@pytest.mark.parametrize(("keyword", "value"), WRONG)
def test_numbers_that_cannot_be_right(tmp_path, keyword, value):
    wanted = value * (1 if value == ["1"] else NUMBERS[keyword])

    def change(k, data):
        if k == 7:
            setattr(data, keyword, wanted)

    cases.write_series(tmp_path, change=change)
    assert_refused(tmp_path, r"007\.dcm")


def test_a_slice_whose_header_ends_early_is_named(tmp_path):
    cases.write_series(tmp_path)
    path = tmp_path / "023.dcm"
    path.write_bytes(path.read_bytes()[:500])
    assert_refused(tmp_path, r"023\.dcm: ")


@pytest.mark.parametrize("compressor", ["JPEG2000", "JPEG", "JPEG-LS", "RLE"])
@pytest.mark.parametrize("share", [1, 0.6, 0.95, 0.99])
def test_compressed_slices_are_read_exactly_or_named(tmp_path, compressor, share):
    array = np.random.default_rng(0).integers(0, 900, (20, 24, 6)).astype(np.int16)
    write_slices(tmp_path, array, places_of(6), compressor=compressor)
    path = sorted(tmp_path.iterdir())[2]
    path.write_bytes(path.read_bytes()[: round(len(path.read_bytes()) * share)])
    if share == 1:
        np.testing.assert_array_equal(to_array(read_image(tmp_path)), array)
    else:
        assert_refused(tmp_path, rf"{path.name}: ")


def test_what_lies_beside_a_series_does_no_harm(tmp_path):
    cases.write_series(tmp_path / "far" / "away")
    (tmp_path / "linked").mkdir()
    os.symlink(tmp_path / "far", tmp_path / "linked" / "series")
    os.symlink(tmp_path / "linked", tmp_path / "linked" / "round")
    for name, content in (("DICOMDIR", b"\0" * 300), ("notes.txt", b"text"), ("empty", b""), ("._x.dcm", b"\0\5\26\7")):
        (tmp_path / "linked" / name).write_bytes(content)
    assert_shows(read_image(tmp_path / "linked"))


def test_a_film_or_a_segmentation_does_not_hide_a_scan(tmp_path):
    cases.write_series(tmp_path, series=1)

    def film(data):
        del data.PerFrameFunctionalGroupsSequence, data.SharedFunctionalGroupsSequence
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7.3"

    cases.write_enhanced(tmp_path / "film.dcm", range(30), film, series=2)
    cases.write_enhanced(tmp_path / "seg.dcm", range(40), lambda data: setattr(data, "Modality", "SEG"), series=3)
    assert [series.slices for series in list_series(tmp_path)] == [24, 1, 40]
    assert_shows(read_image(tmp_path))
