"""Transforms taken apart, composed, inverted, written and read: against ITK itself, and against closed forms."""

import h5py
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from scipy.io import savemat

from data_util.output.pair_images import save_pair
from data_util.output.registration_report import doubts_about_inverse
from data_util.scans import pair_transform, transform_chain, transform_files
from data_util.scans.frame import Frame
from data_util.scans.images import to_array
from errors import UserError
from tests.test_data_util.scans.test_pair_transform import FIXED_SCAN, centres, oblique, pair, scan_on

PLACES = np.array([[-3.0, 12.0, 101.5], [4.5, 20.25, 111.0], [400.0, -300.0, 5.0]])
MATRIX, OFFSET = np.array([[1.1, 0.1, 0], [-0.2, 0.9, 0.05], [0, 0.03, 1.2]]), np.array([3.0, -4.0, 5.0])


def by_itk(transform, places):
    return np.array([transform.TransformPoint(place) for place in np.asarray(places).tolist()])


@pytest.mark.parametrize("flips", [(), (0, 2), (1,)])
def test_the_composite_is_the_transform_in_the_whole_fixed_scan(flips):
    transform = pair(flips)
    composite = transform.composite(FIXED_SCAN)
    places = centres(FIXED_SCAN)
    assert (np.abs(transform.fixed.to_voxel(places) - 6) > 8).any()  # some lie outside the frame of the network
    np.testing.assert_allclose(by_itk(composite, places), transform.to_moving(places), atol=1e-5)
    far = [[900.0, 0.0, 0.0]]
    np.testing.assert_allclose(by_itk(composite, far), by_itk(transform.affine, far), atol=1e-9)


def test_the_field_of_the_composite_has_no_edge_at_which_it_jumps():
    transform = pair(amplitude=3)
    composite = transform.composite(FIXED_SCAN)
    field = sitk.DisplacementFieldTransform(transform_chain.parts(composite)[0]).GetDisplacementField()
    array = np.swapaxes(sitk.GetArrayFromImage(field), 0, 2)
    for axis in range(3):
        faces = np.moveaxis(array, axis, 0)[[0, -1]]
        assert np.abs(faces).max() == 0
        first = np.abs(np.diff(np.moveaxis(array, axis, 0)[:5], axis=0))
        assert first.max() <= 0.51 * min(transform.fixed.spacing)
    assert np.abs(array).max() > 1


def test_a_scan_that_is_too_large_is_held_in_part(monkeypatch):
    transform = pair()
    monkeypatch.setattr(pair_transform, "LARGEST_FIELD", 29 * 33 * 26)
    composite = transform.composite(FIXED_SCAN)
    size = transform_chain.field_frame(transform_chain.parts(composite)[0]).size
    assert np.prod(size) <= 29 * 33 * 26
    inside = transform.fixed.to_physical(np.random.default_rng(0).uniform(0, 1, (50, 3)) * np.subtract(SIZE, 1))
    np.testing.assert_allclose(by_itk(composite, inside), transform.to_moving(inside), atol=1e-5)


SIZE = (14, 18, 11)


def test_many_points_go_as_itk_leads_each(monkeypatch):
    transform = pair()
    jumps = transform_chain.field_transform(transform.fixed, transform.displacement(transform.fixed))
    composite = transform_chain.chain([jumps, transform.affine])
    field = transform.fixed
    rng = np.random.default_rng(0)
    # Around the edge too, where a field of ITK ends half a voxel beside its last voxel.
    places = field.to_physical(rng.uniform(-2, np.add(field.size, 1), (4000, 3)))
    expected = by_itk(composite, places)
    monkeypatch.setattr(transform_chain, "FEW", 0)
    np.testing.assert_allclose(transform_chain.map_points(composite, places), expected, atol=1e-5)


def test_a_chain_goes_through_the_first_one_first():
    shift, scale = sitk.TranslationTransform(3, (1, 0, 0)), sitk.ScaleTransform(3, (2, 2, 2))
    both = transform_chain.chain([shift, scale])
    assert both.TransformPoint((1, 1, 1)) == (4, 2, 2)
    assert transform_chain.chain([both, shift]).TransformPoint((1, 1, 1)) == (5, 2, 2)
    matrix, offset = transform_chain.linear_map(both)
    np.testing.assert_allclose(matrix, 2 * np.eye(3))
    np.testing.assert_allclose(offset, (2, 0, 0))


def test_the_inverse_of_linear_parts_is_exact():
    about = sitk.Euler3DTransform((5, 6, 7), 0.3, -0.2, 0.1, (1, 2, 3))
    both = transform_chain.chain([about, transform_chain.linear(MATRIX, OFFSET)])
    inverse = transform_chain.inverse(both)
    np.testing.assert_allclose(by_itk(inverse, by_itk(both, PLACES)), PLACES, atol=1e-10)
    found, error = transform_chain.inverse_points(both, by_itk(both, PLACES))
    np.testing.assert_allclose(found, PLACES, atol=1e-10)
    assert error.max() < 1e-10


def test_the_inverse_of_a_field_leads_back():
    """A sinusoidal shift along x, whose inverse is known where its argument does not change: along y and z."""
    grid = oblique((40, 20, 12), (1.5, 1.2, 2.5), (-20, 31, 100), (20, -8, 12))
    voxels = np.moveaxis(np.indices(grid.size), 0, -1)
    shift = 2 * np.sin(np.pi * np.arange(20) / 19)[None, :, None, None] * np.ones((40, 1, 12, 1))
    vectors = (shift * (1.0, 0, 0)) @ grid.matrix.T
    inverse = transform_chain.inverse(transform_chain.field_transform(grid, vectors))
    wider = transform_chain.field_frame(transform_chain.parts(inverse)[0])
    assert wider.size == (42, 20, 12)  # the field leads two voxels out of its grid along x
    places = grid.to_physical(voxels[4:, 1:-1, 1:-1].reshape(-1, 3))
    found = grid.to_voxel(by_itk(inverse, places)) - voxels[4:, 1:-1, 1:-1].reshape(-1, 3)
    np.testing.assert_allclose(found[:, 0], -np.broadcast_to(shift[4:, 1:-1, 1:-1, 0], (36, 18, 10)).ravel(), atol=0.01)
    np.testing.assert_allclose(found[:, 1:], 0, atol=0.01)


def test_the_inverse_of_a_swirl_is_the_swirl_back():
    """Turned about z by up to 80 degrees: an iteration that is not slowed down runs away from it."""
    grid = oblique((41, 33, 7), (1.5, 1.2, 2.5), (-20, 31, 100), (20, -8, 12))
    voxels = np.moveaxis(np.indices(grid.size), 0, -1).astype(float)
    x, y = voxels[..., 0] - 20, voxels[..., 1] - 16
    angle = 1.4 * np.exp(-(x**2 + y**2) / 60)

    def turned(sign):
        cosine, sine = np.cos(sign * angle), np.sin(sign * angle)
        return np.stack([cosine * x - sine * y - x, sine * x + cosine * y - y, 0 * x], axis=-1)

    inverse = transform_chain.inverse(transform_chain.field_transform(grid, turned(1) @ grid.matrix.T))
    found = grid.to_voxel(by_itk(inverse, grid.to_physical(voxels.reshape(-1, 3)))) - voxels.reshape(-1, 3)
    error = np.linalg.norm(found - turned(-1).reshape(-1, 3), axis=1)
    assert np.abs(turned(1)).max() > 4
    assert error.max() < 0.2  # what is linear between the voxels of the field
    assert error.mean() < 0.02


def test_beside_a_field_that_jumps_places_stay_on_the_way_back_too():
    """A shift of 3 mm along x from 0 to 19 mm: it leads nothing to 1 mm, and leaves what is far away."""
    grid = Frame((20, 20, 20), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))
    shift = transform_chain.field_transform(grid, np.ones((20, 20, 20, 1)) * (3.0, 0, 0))
    wanted = np.array([[10.0, 5, 5], [21.0, 5, 5], [60.0, 5, 5], [-30.0, 5, 5]])
    expected = [[7.0, 5, 5], [18.0, 5, 5], [60.0, 5, 5], [-30.0, 5, 5]]
    found, error = transform_chain.inverse_points(shift, wanted)
    np.testing.assert_allclose(found, expected, atol=0.01)
    assert error.max() < 0.01
    np.testing.assert_allclose(by_itk(transform_chain.inverse(shift), wanted), expected, atol=0.02)


@pytest.mark.parametrize("flips", [(), (0, 2)])
def test_the_inverse_undoes_the_transform(flips):
    transform = pair(flips)
    composite = transform.composite(FIXED_SCAN)
    inverse = transform_chain.inverse(composite)
    places = centres(transform.fixed)
    back = by_itk(inverse, by_itk(composite, places))
    error = np.linalg.norm(back - places, axis=1)
    assert error.max() < 0.2
    np.testing.assert_allclose(transform_chain.inverse_error(composite, inverse, places), error, atol=1e-4)
    assert doubts_about_inverse(error) == []
    found, off = transform_chain.inverse_points(composite, by_itk(composite, places))
    np.testing.assert_allclose(found, places, atol=0.02)
    assert off.max() < 0.02


def test_where_the_flow_folds_the_error_tells():
    grid = Frame((30, 10, 10), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))
    x = np.arange(30)[:, None, None, None]
    vectors = (np.clip(x - 15, -4, 4) * -2.0) * np.ones((1, 10, 10, 1)) * (1.0, 0, 0)  # mirrors the middle
    folded = transform_chain.field_transform(grid, vectors)
    inverse = transform_chain.inverse(folded)
    error = transform_chain.inverse_error(folded, inverse, centres(grid))
    (doubt,) = doubts_about_inverse(error)
    assert "inverse.h5 is more than 1 mm off at" in doubt
    assert np.mean(error > 1) > 0.1


def test_other_transforms_lead_points_back_but_not_images():
    spline = sitk.BSplineTransformInitializer(FIXED_SCAN.put(np.zeros(FIXED_SCAN.size, np.float32)), (4, 4, 4))
    rng = np.random.default_rng(0)
    spline.SetParameters(rng.normal(0, 0.5, len(spline.GetParameters())).tolist())
    found, error = transform_chain.inverse_points(spline, by_itk(spline, PLACES))
    np.testing.assert_allclose(found, PLACES, atol=0.01)
    assert error.max() < 0.01
    with pytest.raises(UserError, match="BSplineTransform cannot be inverted"):
        transform_chain.inverse(spline)
    with pytest.raises(UserError, match="is not linear"):
        transform_chain.linear_map(spline)


def test_our_file_is_itks(tmp_path):
    composite = pair().composite(FIXED_SCAN)
    transform_files.write_transform(composite, tmp_path / "a.h5")
    sitk.WriteTransform(composite, str(tmp_path / "itk.h5"))
    places = centres(FIXED_SCAN)
    ours, itks = (sitk.ReadTransform(str(tmp_path / name)) for name in ("a.h5", "itk.h5"))
    np.testing.assert_allclose(by_itk(ours, places), by_itk(itks, places), atol=1e-6)
    np.testing.assert_allclose(by_itk(transform_files.read_transform(tmp_path / "a.h5"), places), by_itk(ours, places))
    assert (tmp_path / "a.h5").stat().st_size < 0.6 * (tmp_path / "itk.h5").stat().st_size
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["TransformGroup/0/TransformType"][0] == b"CompositeTransform_double_3_3"


def test_a_changed_bit_in_any_number_of_our_file_is_found(tmp_path):
    path = tmp_path / "a.h5"
    transform_files.write_transform(pair().composite(FIXED_SCAN), path)
    with h5py.File(path) as file:
        found = [place[name] for place in file["TransformGroup"].values() for name in place if "Parameters" in name]
        arrays = [dataset for dataset in found if dataset.size]
        chunks = [array.id.get_chunk_info(k) for array in arrays for k in (0, array.id.get_num_chunks() - 1)]
    assert len(chunks) >= 8
    whole = path.read_bytes()
    for chunk in chunks:
        damaged = bytearray(whole)
        damaged[chunk.byte_offset + chunk.size // 2] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged or cut short"):
            transform_files.read_transform(path)


def test_a_full_disk_is_said(monkeypatch):
    with pytest.raises(UserError, match=r"cannot write /dev/full \(No space left on device"):
        transform_files.write_transform(sitk.AffineTransform(3), "/dev/full")


@pytest.mark.parametrize("name", ["a.tfm", "a.txt", "a.h5"])
def test_what_itk_wrote_is_read(name, tmp_path):
    linear = transform_chain.chain(
        [sitk.Euler3DTransform((5, 6, 7), 0.3, -0.2, 0.1), sitk.ScaleTransform(3, (2, 1, 1))]
    )
    sitk.WriteTransform(linear, str(tmp_path / name))
    read = transform_files.read_transform(tmp_path / name)
    np.testing.assert_allclose(by_itk(read, PLACES), by_itk(linear, PLACES))
    matrix, offset = transform_files.read_linear(tmp_path / name)
    np.testing.assert_allclose(PLACES @ matrix.T + offset, by_itk(linear, PLACES))


def test_a_composite_of_single_precision_is_read(tmp_path):
    """As antsRegistration writes it with --float: the names of the types and the numbers are of single precision."""
    composite = pair().composite(FIXED_SCAN)
    sitk.WriteTransform(composite, str(tmp_path / "double.h5"))
    with h5py.File(tmp_path / "double.h5") as double, h5py.File(tmp_path / "single.h5", "w") as single:
        for number, place in double["TransformGroup"].items():
            for name, data in place.items():
                value = data[()]
                value = value.astype("f4") if value.dtype == "f8" else [value[0].replace(b"double", b"float")]
                kind = None if name != "TransformType" else h5py.string_dtype("ascii")
                single.create_dataset(f"TransformGroup/{number}/{name}", data=value, dtype=kind)
    read = transform_files.read_transform(tmp_path / "single.h5")
    places = centres(FIXED_SCAN)[::5]
    np.testing.assert_allclose(by_itk(read, places), by_itk(composite, places), atol=1e-4)


def test_an_affine_map_of_ants_is_read(tmp_path):
    """ANTs stores matrix, translation and centre: p -> M (p - c) + c + t."""
    centre = np.array([10.0, 20.0, 30.0])
    parameters = np.r_[MATRIX.ravel(), OFFSET][:, None]
    savemat(tmp_path / "a.mat", {"AffineTransform_double_3_3": parameters, "fixed": centre[:, None]}, format="4")
    read = transform_files.read_transform(tmp_path / "a.mat")
    np.testing.assert_allclose(by_itk(read, PLACES), (PLACES - centre) @ MATRIX.T + centre + OFFSET)


LTA = """# transform file of a test
type      = {kind}  # a comment
nxforms   = 1
mean      = 0.0 0.0 0.0
sigma     = 1.0
1 4 4
{rows}
src volume info
valid = 1  # volume info valid
filename = moving.mgz
volume = 30 40 50
voxelsize = 1.0 1.5 2.0
xras   = -1.0 0.0 0.0
yras   = 0.0 0.0 -1.0
zras   = 0.0 1.0 0.0
cras   = 3.0 -4.0 5.0
dst volume info
valid = 1  # volume info valid
filename = fixed.mgz
volume = 20 24 28
voxelsize = 2.0 1.0 1.5
xras   = 1.0 0.0 0.0
yras   = 0.0 1.0 0.0
zras   = 0.0 0.0 1.0
cras   = -7.0 8.0 9.0
"""
RAS = np.diag((-1.0, -1.0, 1.0, 1.0))
SOURCE = np.array(
    [[-1.0, 0, 0, 3 + 15], [0, 0, 2, -4 - 50], [0, -1.5, 0, 5 + 30], [0, 0, 0, 1]]
)  # voxel -> RAS, by hand
TARGET = np.array([[2.0, 0, 0, -7 - 20], [0, 1, 0, 8 - 12], [0, 0, 1.5, 9 - 21], [0, 0, 0, 1]])


@pytest.mark.parametrize("kind", [0, 1])
def test_a_map_of_freesurfer_leads_from_its_target_to_its_source(kind, tmp_path):
    ras = np.eye(4)
    ras[:3, :3], ras[:3, 3] = MATRIX, OFFSET  # from moving to fixed places, RAS
    stored = ras if kind == 1 else np.linalg.inv(TARGET) @ ras @ SOURCE
    rows = "\n".join(" ".join(f"{number:.15e}" for number in row) for row in stored)
    (tmp_path / "a.lta").write_text(LTA.format(kind=kind, rows=rows))
    read = transform_files.read_transform(tmp_path / "a.lta")
    moving = PLACES
    fixed = (RAS @ ras @ RAS @ np.c_[moving, np.ones(3)].T)[:3].T
    np.testing.assert_allclose(by_itk(read, fixed), moving, atol=1e-9)


@pytest.mark.parametrize("name", ["f.nii", "f.nii.gz", "f.nrrd", "f.mha"])
def test_a_displacement_field_is_read_from_an_image(name, tmp_path):
    _, field = pair().warp(scan_on(FIXED_SCAN), FIXED_SCAN)
    sitk.WriteImage(field, str(tmp_path / name))
    expected = sitk.DisplacementFieldTransform(sitk.Cast(field, sitk.sitkVectorFloat64))
    places = centres(FIXED_SCAN)[::7]
    read = transform_files.read_transform(tmp_path / name)
    np.testing.assert_allclose(by_itk(read, places), by_itk(expected, places), atol=1e-4)


class Result:
    """A pair as eval.py has it."""

    index, fixed_id, moving_id = 0, "a", "b"

    def __init__(self, flow, moving, fixed_spacing, moving_spacing):
        image = {"array": flow, "kind": "flow", "side": "fixed"}
        self.images = {
            "flow": type("Image", (), image),
            "moving": type("Image", (), {"array": moving, "kind": "grey", "side": "moving"}),
        }
        self.fixed_spacing, self.moving_spacing = np.array(fixed_spacing), np.array(moving_spacing)


@pytest.mark.parametrize("spacing", [(2.0, 1.5, 3.0), (np.nan,) * 3])
@pytest.mark.parametrize("orientation", ["LPS", "RPI", "ASL"])
def test_the_flow_that_eval_saves_warps_the_moving_image_beside_it(spacing, orientation, tmp_path):
    """warped(p) = moving(p + flow(p)) on the arrays is what ITK reads through the file."""
    from scipy import ndimage

    rng = np.random.default_rng(0)
    moving = ndimage.gaussian_filter(rng.normal(size=SIZE), 2)
    moving = ((moving - moving.min()) / np.ptp(moving)).astype(np.float32)
    flow = np.stack([ndimage.gaussian_filter(rng.normal(0, 30, SIZE), 3) for _ in range(3)], axis=-1).astype(np.float32)
    save_pair(tmp_path, Result(flow, moving, (1.0, 1.2, 0.8), spacing), ["flow", "moving"], "nii", orientation)
    (folder,) = tmp_path.iterdir()
    file = folder / ("flow.nii.gz" if np.isfinite(spacing).all() else "flow_voxels.nii.gz")
    transform = transform_files.read_transform(file)
    frame = transform_chain.field_frame(transform)
    image = sitk.ReadImage(str(folder / "moving.nii.gz"))
    warped = to_array(frame.resample(image, outside=-1, transform=transform))
    where = np.indices(SIZE) + np.moveaxis(flow, -1, 0)
    expected = ndimage.map_coordinates(to_array(image), where, order=1, mode="nearest")
    inside = np.all([(part > 0.01) & (part < n - 1.01) for part, n in zip(where, SIZE, strict=True)], axis=0)
    assert inside.mean() > 0.5
    assert np.abs(flow).max() > 1
    np.testing.assert_allclose(warped[inside], expected[inside], atol=0.05)


def write_nifti(path, shape, intent, fill=0.5):
    image = nib.Nifti1Image(np.full(shape, fill, np.float32), np.diag([-1, -1, 1, 1.0]))
    image.header["intent_code"] = intent
    image.to_filename(path)


def damaged(folder):
    """Files that are no transforms, by name, with what is said of them."""
    composite = pair().composite(FIXED_SCAN)
    transform_files.write_transform(composite, folder / "whole.h5")
    whole = (folder / "whole.h5").read_bytes()
    (folder / "cut.h5").write_bytes(whole[: len(whole) // 2])
    middle = len(whole) // 2
    (folder / "bits.h5").write_bytes(
        whole[:middle] + bytes(255 - b for b in whole[middle : middle + 64]) + whole[middle + 64 :]
    )
    (folder / "text.h5").write_text("hello")
    (folder / "text.tfm").write_text("hello")
    (folder / "fsl.mat").write_text("1 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1\n")
    (folder / "a.lta").write_text(LTA.format(kind=1, rows="1 0 0 0\n0 1 0 0"))
    (folder / "tk.lta").write_text(LTA.format(kind=14, rows="1 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1"))
    (folder / "empty.lta").write_text("")
    (folder / "scan.jpg").write_text("a picture")
    with h5py.File(folder / "data.h5", "w") as file:
        file["volume"] = np.zeros(3)
    sitk.WriteTransform(sitk.AffineTransform(2), str(folder / "flat.tfm"))
    sitk.WriteTransform(sitk.ScaleTransform(3, (1, 1, 0)), str(folder / "plane.tfm"))
    sitk.WriteTransform(sitk.TranslationTransform(3, (1, 1, np.nan)), str(folder / "nan.h5"))
    write_nifti(folder / "grey.nii.gz", (5, 6, 7), 0)
    write_nifti(folder / "four.nii.gz", (5, 6, 7, 3), 0)
    write_nifti(folder / "fsl.nii.gz", (5, 6, 7, 3), 2006)
    write_nifti(folder / "five.nii.gz", (5, 6, 7, 1, 3), 0)
    write_nifti(folder / "nan.nii.gz", (5, 6, 7, 1, 3), 1007, np.nan)
    write_nifti(folder / "short.nii", (5, 6, 7, 1, 3), 1007)
    (folder / "short.nii").write_bytes((folder / "short.nii").read_bytes()[:-100])
    sitk.WriteImage(scan_on(FIXED_SCAN), str(folder / "grey.nrrd"))
    return {
        "none.h5": "no such file",
        "cut.h5": "is damaged or cut short",
        "bits.h5": "is damaged or cut short",
        "text.h5": "is damaged or cut short",
        "text.tfm": "cannot be read as a transform of ITK",
        "fsl.mat": "FSL and SPM write other files",
        "a.lta": "is no whole .lta file",
        "tk.lta": "has a map of type 14",
        "empty.lta": "is empty, a file of 0 bytes",
        "scan.jpg": "is no transform by its name",
        "data.h5": "is HDF5 without a transform",
        "flat.tfm": "of 2 dimensions",
        "plane.tfm": "leads all places to a plane",
        "nan.h5": "1 numbers that are NaN",
        "grey.nii.gz": "which is no displacement field",
        "four.nii.gz": "which is no displacement field",
        "fsl.nii.gz": "which is no displacement field",
        "five.nii.gz": "which is no displacement field",
        "nan.nii.gz": "630 numbers that are NaN",
        "short.nii": "is cut short",
        "grey.nrrd": "and 1 values per voxel",
    }


def test_what_is_no_transform_is_refused_in_a_line(tmp_path):
    for name, message in damaged(tmp_path).items():
        with pytest.raises(UserError) as caught:
            assert not transform_files.read_transform(tmp_path / name), name
        assert message in str(caught.value), name
        assert "\n" not in str(caught.value), name
        assert str(tmp_path / name) in str(caught.value)
