"""apply.py from its command line: against ITK's own resampling, and the registration that wrote the transform."""

import re

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

import apply
import cli
from data_util.scans import transform_chain
from data_util.scans.frame import Frame
from data_util.scans.images import to_array
from data_util.scans.transform_files import End, read_ends, write_transform
from tests.test_data_util.scans.test_pair_transform import FIXED_SCAN, MOVING_SCAN, pair, scan_on

TRANSFORM = pair((0, 2))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A registration of two oblique, anisotropic scans as demo.py leaves it, with labels, landmarks and a mesh."""
    home = tmp_path_factory.mktemp("apply")
    composite = TRANSFORM.composite(FIXED_SCAN)
    ends = End("fixed", FIXED_SCAN), End("moving", MOVING_SCAN)
    write_transform(composite, home / "transform.h5", ends)
    write_transform(transform_chain.inverse(composite), home / "inverse.h5", ends[::-1])
    sitk.WriteTransform(TRANSFORM.affine, str(home / "affine.tfm"))
    moving = sitk.Cast(scan_on(MOVING_SCAN), sitk.sitkInt16)
    sitk.WriteImage(moving, str(home / "moving.nii.gz"))
    sitk.WriteImage(scan_on(FIXED_SCAN, 2), str(home / "fixed.nii.gz"))
    sitk.WriteImage(MOVING_SCAN.put(label_array(MOVING_SCAN.size)), str(home / "labels.nii.gz"))
    warped, field = TRANSFORM.warp(sitk.ReadImage(str(home / "moving.nii.gz")), FIXED_SCAN)
    sitk.WriteImage(warped, str(home / "warped.nii.gz"))
    sitk.WriteImage(field, str(home / "displacement.nii.gz"))
    np.savetxt(home / "fixed.csv", fixed_points(), "%.6f", ",", header="x,y,z", comments="")
    np.savetxt(home / "moving.csv", TRANSFORM.to_moving(fixed_points()), "%.6f", ",", header="x,y,z", comments="")
    return home


def label_array(size):
    texture = ndimage.gaussian_filter(np.random.default_rng(3).normal(size=size), 3)
    return np.digitize(texture, np.quantile(texture, [0.4, 0.7, 0.9])).astype(np.uint8) * 60


def fixed_points():
    return TRANSFORM.fixed.to_physical([(3, 4, 2), (8.5, 12.25, 6), (11, 9, 8)])


def run(*arguments):
    return cli.run(apply.main, [str(argument) for argument in arguments])


def read(name):
    return sitk.ReadImage(str(name))


def table(name):
    return np.loadtxt(name, delimiter=",", skiprows=1, ndmin=2)


CARRY = ("-t", "transform.h5", "-i", "moving.nii.gz", "-r", "fixed.nii.gz", "-o", "out.nii.gz")


def test_an_image_is_read_as_itk_reads_it(work, capsys):
    assert run(*CARRY) == 0
    said = capsys.readouterr().out
    assert "moving scan -> fixed scan: grey values read by interpolation linear on 30x26x19 voxels" in said
    out, moving = read("out.nii.gz"), read("moving.nii.gz")
    assert out.GetPixelID() == moving.GetPixelID()
    lowest = float(to_array(moving).min())
    wide = sitk.Cast(moving, sitk.sitkFloat64)
    expected = to_array(
        Frame.of(read("fixed.nii.gz")).resample(wide, outside=lowest, transform=sitk.ReadTransform("transform.h5"))
    )
    assert np.mean(expected > lowest) > 0.3
    assert np.abs(to_array(out) - expected).max() <= 0.5
    # And as the registration itself, of which NIfTI keeps places in float32.
    assert np.mean(np.abs(to_array(out).astype(int) - to_array(read("warped.nii.gz"))) > 1) < 1e-3


def test_the_displacement_field_of_the_registration_does_the_same(work):
    assert run(*CARRY) == 0
    assert run("-t", "displacement.nii.gz", *CARRY[2:-1], "field.nii.gz") == 0
    assert np.mean(np.abs(to_array(read("field.nii.gz")).astype(int) - to_array(read("out.nii.gz"))) > 1) < 1e-3


@pytest.mark.parametrize("interpolation", ["nearest", "bspline", "linear"])
def test_each_interpolation_is_itks(work, interpolation):
    assert run(*CARRY, "--interpolation", interpolation, "--outside", "-7") == 0
    how = {"nearest": sitk.sitkNearestNeighbor, "bspline": sitk.sitkBSpline, "linear": sitk.sitkLinear}[interpolation]
    wide = sitk.Cast(read("moving.nii.gz"), sitk.sitkFloat64)
    expected = to_array(sitk.Resample(wide, read("fixed.nii.gz"), sitk.ReadTransform("transform.h5"), how, -7.0))
    assert (expected == -7).any()
    assert np.abs(to_array(read("out.nii.gz")) - expected).max() <= 0.501


def test_labels_are_seen_and_not_mixed(work, capsys):
    carry = ("-t", "transform.h5", "-i", "labels.nii.gz", "-r", "fixed.nii.gz", "-o")
    assert run(*carry, "a.nii.gz") == 0
    assert "labels read by interpolation nearest" in capsys.readouterr().out
    nearest, labels = read("a.nii.gz"), read("labels.nii.gz")
    assert nearest.GetPixelID() == sitk.sitkUInt8
    frame = Frame.of(read("fixed.nii.gz"))
    transform = sitk.ReadTransform("transform.h5")
    np.testing.assert_array_equal(
        to_array(nearest), to_array(frame.resample(labels, nearest=True, transform=transform))
    )
    assert run(*carry, "b.nii.gz", "--interpolation", "labels") == 0
    shares = [
        to_array(frame.resample(sitk.Cast(labels == value, sitk.sitkFloat32), transform=transform))
        for value in (0, 60, 120, 180)
    ]
    voted = to_array(read("b.nii.gz"))
    np.testing.assert_array_equal(voted, np.argmax(shares, axis=0) * 60)
    assert 0 < np.mean(voted != to_array(nearest)) < 0.2


def test_inverse_carries_the_fixed_scan_to_the_moving_one(work, capsys):
    carry = ("-i", "fixed.nii.gz", "-r", "moving.nii.gz", "--interpolation", "linear", "-o")
    assert run("-t", "transform.h5", "--inverse", *carry, "a.nii.gz") == 0
    said = capsys.readouterr().out
    assert "fixed scan -> moving scan" in said
    largest = float(re.search(r"the inverse is (\S+) mm off at most", said)[1])
    assert 0 < largest < 1
    assert run("-t", "inverse.h5", *carry, "b.nii.gz") == 0
    said = capsys.readouterr().out
    assert "fixed scan -> moving scan" in said
    assert "Check" not in said
    one, other = to_array(read("a.nii.gz")), to_array(read("b.nii.gz"))
    assert (one != one.min()).mean() > 0.2
    np.testing.assert_allclose(one, other, atol=0.02 * np.ptp(one))


def test_a_file_tells_its_scans_and_others_are_doubted(work, capsys):
    assert [end.role for end in read_ends("transform.h5")] == ["fixed", "moving"]
    np.testing.assert_allclose(read_ends("inverse.h5")[0].frame.matrix, MOVING_SCAN.matrix)
    assert read_ends("affine.tfm") is None
    assert run("-t", "inverse.h5", "--inverse", *CARRY[2:]) == 0
    said = capsys.readouterr().out
    assert "moving scan -> fixed scan" in said
    assert "Check" not in said
    coarse = MOVING_SCAN.box((0, 0, 0), MOVING_SCAN.size, np.array(MOVING_SCAN.size) - 2)
    moving = read("moving.nii.gz")
    sitk.WriteImage(coarse.resample(moving), "coarse.nii.gz")  # of the same scan, on another grid
    assert run("-t", "transform.h5", "-i", "coarse.nii.gz", *CARRY[4:-1], "b.nii.gz") == 0
    assert "Check" not in capsys.readouterr().out
    sitk.WriteImage(moving[5:], "other.nii.gz")
    assert run("-t", "transform.h5", "-i", "other.nii.gz", *CARRY[4:-1], "c.nii.gz") == 0
    (doubt,) = [line for line in capsys.readouterr().out.splitlines() if "Check" in line]
    assert "other.nii.gz is not the moving scan of transform.h5" in doubt


def test_the_inverse_of_an_affine_map_is_exact(work):
    carry = ("-i", "fixed.nii.gz", "-r", "moving.nii.gz", "-o", "a.nii.gz")
    assert run("-t", "affine.tfm", "--inverse", *carry) == 0
    inverse = sitk.ReadTransform("affine.tfm").GetInverse()
    fixed = read("fixed.nii.gz")
    expected = sitk.Resample(fixed, read("moving.nii.gz"), inverse, sitk.sitkLinear, float(to_array(fixed).min()))
    np.testing.assert_allclose(to_array(read("a.nii.gz")), to_array(expected), atol=1e-2)


def test_the_first_transform_is_gone_through_first(work):
    shift = sitk.TranslationTransform(3, (3.0, -2.0, 4.0))
    sitk.WriteTransform(shift, "shift.tfm")
    assert run("-t", "transform.h5", "-t", "shift.tfm", *CARRY[2:]) == 0
    whole = sitk.CompositeTransform([shift, sitk.ReadTransform("transform.h5")])  # ITK goes through the last one first
    moving = read("moving.nii.gz")
    lowest = float(to_array(moving).min())
    wide = sitk.Cast(moving, sitk.sitkFloat64)
    expected = to_array(Frame.of(read("fixed.nii.gz")).resample(wide, outside=lowest, transform=whole))
    assert np.abs(to_array(read("out.nii.gz")) - expected).max() <= 0.5


@pytest.mark.parametrize("space", ["lps", "ras"])
def test_points_of_the_moving_scan_come_to_the_fixed_one_and_back(work, capsys, space):
    flip = np.array((-1, -1, 1)) if space == "ras" else 1
    np.savetxt("m.csv", table("moving.csv") * flip, "%.6f", ",", header="x,y,z", comments="")
    assert run("-t", "transform.h5", "-i", "m.csv", "-o", "f.csv", "--points_space", space) == 0
    assert "moving scan -> fixed scan: 3 points led by the transform's inverse" in capsys.readouterr().out
    rows = table("f.csv")
    np.testing.assert_allclose(rows[:, :3] * flip, fixed_points(), atol=0.01)
    assert rows.shape == (3, 4)
    assert rows[:, 3].max() < 0.01
    np.savetxt("g.csv", rows[:, :3], "%.6f", ",", header="x,y,z", comments="")
    assert run("-t", "transform.h5", "--inverse", "-i", "g.csv", "-o", "n.csv", "--points_space", space) == 0
    assert "fixed scan -> moving scan: 3 points led by the transform itself" in capsys.readouterr().out
    np.testing.assert_allclose(table("n.csv"), table("m.csv"), atol=0.01)


def test_points_in_voxels_become_voxels_of_the_reference(work):
    voxels = MOVING_SCAN.to_voxel(table("moving.csv"))
    np.savetxt("m.csv", voxels, "%.6f", ",", header="x,y,z", comments="")
    grids = ("--points_space", "voxel", "--points_scan", "moving.nii.gz", "-r", "fixed.nii.gz")
    assert run("-t", "transform.h5", "-i", "m.csv", "-o", "f.csv", *grids) == 0
    np.testing.assert_allclose(table("f.csv")[:, :3], FIXED_SCAN.to_voxel(fixed_points()), atol=0.01)


def test_a_missing_point_stays_missing(work):
    (work / "m.csv").write_text("id,x,y,z\n1,0,31,90\n2,,,\n")
    assert run("-t", "affine.tfm", "-i", "m.csv", "-o", "f.csv") == 0
    rows = table("f.csv")
    assert np.isfinite(rows[0]).all()
    assert np.isnan(rows[1]).all()


PLY = """ply
format ascii 1.0
comment SPACE=RAS
element vertex 3
property float x
property float y
property float z
property uchar red
element face 1
property list uchar int vertex_indices
end_header
{}
3 0 1 2
"""


def test_a_mesh_goes_as_its_points_and_keeps_the_rest(work, capsys):
    ras = table("moving.csv") * (-1, -1, 1)
    rows = "\n".join(f"{x:.6f} {y:.6f} {z:.6f} {10 * k}" for k, (x, y, z) in enumerate(ras))
    (work / "m.ply").write_text(PLY.format(rows))
    assert run("-t", "transform.h5", "-i", "m.ply", "-o", "f.ply") == 0
    assert "3 vertices, read as ras, led by the transform's inverse" in capsys.readouterr().out
    lines = (work / "f.ply").read_text().splitlines()
    assert lines[:11] == PLY.splitlines()[:11]
    assert lines[-1] == "3 0 1 2"
    numbers = np.array([line.split() for line in lines[11:14]], float)
    np.testing.assert_allclose(numbers[:, :3] * (-1, -1, 1), fixed_points(), atol=0.01)
    assert numbers[:, 3].tolist() == [0, 10, 20]


def far_scan(frame, mm):
    return Frame(frame.size, frame.spacing, tuple(np.add(frame.origin, mm).tolist()), frame.direction)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (CARRY[2:], "--transform is missing"),
        (CARRY[:2] + CARRY[4:], "--input is missing"),
        (CARRY[:-2], "--output is missing"),
        (CARRY[:4] + CARRY[6:], "--reference is missing; name the fixed scan"),
        (CARRY[:4] + CARRY[6:] + ("--inverse",), "--reference is missing; name the moving scan"),
        (CARRY[:-1] + ("out.jpg",), "-i is read as image, so the name must end in"),
        (CARRY[:-1] + ("nowhere/out.nii.gz",), "lies in none"),
        (CARRY[:-1] + ("warped.nii.gz",), "is there already"),
        (CARRY[:-1] + ("moving.nii.gz", "--overwrite"), "is read too"),
        (CARRY + ("--labels", "--interpolation", "linear"), "would mix labels"),
        (("-t", "cut.h5", *CARRY[2:]), "cut.h5: is damaged or cut short"),
        ((*CARRY[:3], "none.nii.gz", *CARRY[4:]), "no such file or folder"),
        ((*CARRY[:3], "far.nii.gz", *CARRY[4:]), "nothing of the image lies where the transform leads"),
        ((*CARRY[:5], "far.nii.gz", *CARRY[6:]), "the transform is of other scans, or the order of -t is wrong"),
        (("-t", "transform.h5", "-i", "empty.csv", "-o", "f.csv"), "has no landmarks"),
        (("-t", "transform.h5", "-i", "missing.csv", "-o", "f.csv"), "all its 2 points are missing"),
        (("-t", "transform.h5", "-i", "nan.ply", "-o", "f.ply"), "1 vertices that are NaN"),
        (("-t", "transform.h5", "-i", "moving.csv", "-o", "f.txt"), "must end in .csv"),
        (("-t", "transform.h5", "-i", "moving.csv", "-o", "f.csv", "--points_space", "voxel"), "needs --points_scan"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(work, capsys, arguments, message):
    (work / "cut.h5").write_bytes((work / "transform.h5").read_bytes()[:9000])
    sitk.WriteImage(far_scan(FIXED_SCAN, (0, 5000, 0)).put(np.zeros(FIXED_SCAN.size, np.float32)), "far.nii.gz")
    (work / "empty.csv").write_text("")
    (work / "missing.csv").write_text("x,y,z\n,,\n,,\n")
    (work / "nan.ply").write_text(PLY.format("1 2 3 4\n1 nan 3 4\n1 2 3 4"))
    before = sorted(path.name for path in work.iterdir())
    assert run(*arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in work.iterdir()) == before


def test_points_beside_the_field_are_doubted(work, capsys):
    (work / "m.csv").write_text("x,y,z\n5000,0,0\n")
    assert run("-t", "transform.h5", "-i", "m.csv", "-o", "f.csv") == 0
    assert "Check f.csv: a displacement field lies about" in capsys.readouterr().out


def test_an_output_is_replaced_where_it_is_asked_for(work):
    (work / "out.nii.gz").write_text("old")
    assert run(*CARRY) == 1
    assert (work / "out.nii.gz").read_text() == "old"
    assert run(*CARRY, "--overwrite") == 0
    assert read("out.nii.gz").GetSize() == FIXED_SCAN.size
