"""demo.py from its command line, and register() from Python: files that other tools understand, and clear mistakes."""

import json
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
import tensorflow as tf
from matplotlib.image import imread
from scipy import ndimage

import cli
import demo
import registration
from data_util.output import registration_files
from data_util.scans.frame import Frame
from data_util.scans.images import read_image, to_array
from data_util.scans.preprocessing import find_frame, prepare
from data_util.scans.view import PRESETS, View
from errors import UserError
from network import checkpoints
from network.training import adam
from registration import Input, register
from tests import cases
from tests.test_data_util.scans.test_dicom import write_slices
from tests.test_data_util.scans.test_pair_transform import oblique
from tests.test_data_util.scans.test_regions import person
from tests.test_network.golden import rule_network

SIZE = (32, 28, 24)
FIXED = oblique((36, 30, 20), (1.3, 1.1, 2.5), (-30, 12, 80), (12, -8, 5))
MOVING = oblique((30, 34, 26), (1.5, 1.0, 2.0), (9, -40, 10), (-7, 5, 9))


def run(*arguments):
    """Exit status of demo.py, run in this process and in the current folder."""
    return cli.run(demo.main, [str(a) for a in ("-g", "-1", *arguments)])


def texture(size, seed):
    """A CT of nothing in particular: int16, with air."""
    coarse = np.random.default_rng(seed).uniform(-1000, 400, [-(-n // 5) for n in size])
    return np.kron(coarse, np.ones((5, 5, 5)))[tuple(map(slice, size))].astype(np.int16)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a run, its published twin, two oblique scans (DICOM, NIfTI), labels and landmarks of the second."""
    home = tmp_path_factory.mktemp("demo")
    network = rule_network("VoxelMorph", 1, image_size=SIZE, channels=4)
    for name in ("own", "published"):
        folder = home / "weights" / name
        folder.mkdir(parents=True)
        checkpoints.save(folder, network, adam(network), 7)
    (home / "weights" / "own" / "config.json").write_text(
        json.dumps({**network.config.to_dict(), "data": {"orientation": "LPS"}})
    )
    set_of_axes = {"files": {"a": {"path": "a.h5"}}, "subsets": {"a": ["a/1"]}, "schemes": {"1": {"a": 1}}}
    (home / "rpi.json").write_text(json.dumps({**set_of_axes, "orientation": "RPI", "crop": "none"}))
    args = {"base_network": "VoxelMorph", "n_cascades": 1, "net_args": "channels=4", "dataset": str(home / "rpi.json")}
    (home / "weights" / "published" / "args.json").write_text(json.dumps(args))
    fixed = FIXED.put(texture(FIXED.size, 0))
    places = [fixed.TransformIndexToPhysicalPoint((0, 0, k)) for k in range(FIXED.size[2])]
    axes = np.reshape(FIXED.direction, (3, 3))
    patient = {"_0010_0010": "Doe^Jane", "_0010_0020": "77"}
    write_slices(home / "fixed", to_array(fixed), places, axes, FIXED.spacing, **patient)
    sitk.WriteImage(MOVING.put(texture(MOVING.size, 1)), str(home / "moving.nii.gz"))
    labels = np.random.default_rng(2).integers(0, 3, MOVING.size).astype(np.uint8)
    sitk.WriteImage(MOVING.put(labels), str(home / "labels.nii.gz"))
    points = MOVING.to_physical([(8, 9, 7), (20, 15, 12), (14, 20, 18)])
    np.savetxt(home / "points.csv", points, "%.5f", ",", header="x,y,z", comments="")
    return home


PAIR = ("-c", "own", "-f", "fixed", "-m", "moving.nii.gz", "--preprocess", "none")


@pytest.fixture(scope="module")
def done(home, tmp_path_factory):
    """The output folder of one whole registration."""
    output = tmp_path_factory.mktemp("done") / "result"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert run(*PAIR, "-o", output, "--labels", "labels.nii.gz", "--points", "points.csv") == 0
    return output


@pytest.fixture(scope="module")
def registered(home):
    """The registration of `done` from Python."""
    return register(home / "fixed", home / "moving.nii.gz", home / "weights" / "own", "none")


def test_everything_is_there_and_nothing_else(done):
    names = {"fixed", "moving", "warped_moving_0", "warped_moving_1"}
    files = {"flow_0.png", "flow_1.png", "warped.nii.gz", "displacement.nii.gz", "affine.tfm", "labels.nii.gz"}
    files |= {"transform.h5", "inverse.h5", "points.csv", "report.json", "report.html", "summary.png"}
    expected = names | {f"{name}.png" for name in names} | files
    assert {p.name for p in done.iterdir()} == expected
    assert [p.name for p in done.parent.iterdir()] == [done.name]
    for name in names:
        assert len(list((done / name).iterdir())) == SIZE[2]


def test_the_field_gives_the_warped_scan_in_the_fixed_scans_space(home, done):
    fixed, moving = read_image(home / "fixed"), read_image(home / "moving.nii.gz")
    warped = sitk.ReadImage(str(done / "warped.nii.gz"))
    field = sitk.ReadImage(str(done / "displacement.nii.gz"), sitk.sitkVectorFloat64)
    assert warped.GetSize() == FIXED.size
    assert warped.GetPixelID() == moving.GetPixelID()
    np.testing.assert_allclose(Frame.of(warped).matrix, Frame.of(fixed).matrix, atol=1e-5)
    np.testing.assert_allclose(warped.GetOrigin(), FIXED.origin, atol=1e-4)
    lowest = float(to_array(moving).min())
    expected = to_array(
        Frame.of(fixed).resample(moving, outside=lowest, transform=sitk.DisplacementFieldTransform(field))
    )
    assert np.mean(expected > lowest) > 0.3
    difference = np.abs(to_array(warped) - expected)
    # Where NIfTI's float32 geometry moves a place across the rim, tissue and outside change places.
    assert np.mean(difference > 1) < 1e-3


def test_landmarks_and_labels_are_carried_to_the_fixed_scan(home, done):
    field = sitk.ReadImage(str(done / "displacement.nii.gz"), sitk.sitkVectorFloat64)
    through = sitk.DisplacementFieldTransform(field)
    rows = np.loadtxt(done / "points.csv", delimiter=",", skiprows=1)
    given = np.loadtxt(home / "points.csv", delimiter=",", skiprows=1)
    assert rows.shape == (3, 4)
    assert rows[:, 3].max() < 0.01
    back = [through.TransformPoint(place) for place in rows[:, :3]]
    # ITK interpolates the field between the fixed scan's voxels, the transform on the network's frame.
    np.testing.assert_allclose(back, given, atol=0.7)
    labels = read_image(home / "labels.nii.gz")
    carried = sitk.ReadImage(str(done / "labels.nii.gz"))
    expected = Frame.of(carried).resample(labels, nearest=True, transform=through)
    assert set(np.unique(to_array(carried))) == {0, 1, 2}
    assert np.mean(to_array(carried) != to_array(expected)) < 1e-3


def test_the_affine_file_is_the_affine_step(done, registered):
    result = registered
    affine = sitk.ReadTransform(str(done / "affine.tfm"))
    voxels = np.moveaxis(np.indices(SIZE), 0, -1).reshape(-1, 3)[::97]
    places = result.fixed.frame.to_physical(voxels)
    expected = result.moving.frame.to_physical(voxels + result.stages[0].composed_flow[tuple(voxels.T)])
    np.testing.assert_allclose([affine.TransformPoint(p) for p in places], expected, atol=1e-3)


def test_the_transform_file_is_the_whole_transform(home, done, registered):
    """ITK reads through it what warped.nii.gz has, and its inverse leads back where the report says."""
    transform, inverse = (sitk.ReadTransform(str(done / name)) for name in ("transform.h5", "inverse.h5"))
    places = FIXED.to_physical(np.random.default_rng(0).uniform(0, 1, (500, 3)) * np.subtract(FIXED.size, 1))
    led = registered.transform.to_moving(places)
    np.testing.assert_allclose([transform.TransformPoint(p) for p in places], led, atol=1e-3)
    moving = read_image(home / "moving.nii.gz")
    warped = sitk.ReadImage(str(done / "warped.nii.gz"))
    read = Frame.of(warped).resample(moving, outside=float(to_array(moving).min()), transform=transform)
    assert np.mean(np.abs(to_array(read) - to_array(warped)) > 1) < 1e-3
    report = json.loads((done / "report.json").read_text())["transform"]
    assert report["from_displacement_mm"]["largest"] < 1e-3
    frame = registered.fixed.frame
    inside = frame.to_physical(np.moveaxis(np.indices(SIZE), 0, -1).reshape(-1, 3))
    error = np.linalg.norm([inverse.TransformPoint(transform.TransformPoint(p)) for p in inside] - inside, axis=1)
    assert report["inverse_error_mm"]["largest"] == pytest.approx(error.max(), abs=2e-3)
    assert report["inverse_error_mm"]["mean"] == pytest.approx(error.mean(), abs=2e-3)
    assert report["inverse_error_above_1_mm"] == pytest.approx(np.mean(error > 1), abs=1e-3)


def test_dicom_series_have_their_patient_place_and_grey_values(done, home):
    fixed = read_image(home / "fixed")
    frame = find_frame(fixed, View(), SIZE)
    series = read_image(done / "fixed")
    np.testing.assert_allclose(Frame.of(series).matrix, frame.matrix, atol=1e-5)
    np.testing.assert_allclose(series.GetOrigin(), frame.origin, atol=1e-4)
    expected = to_array(frame.resample(sitk.Cast(fixed, sitk.sitkFloat32)))
    np.testing.assert_allclose(to_array(series), expected, atol=0.51)
    header = sitk.ReadImage(str(done / "fixed" / "0003.dcm"))
    assert header.GetMetaData("0010|0010").strip() == "Doe^Jane"
    moved, last = (sitk.ReadImage(str(done / name / "0003.dcm")) for name in ("moving", "warped_moving_1"))
    assert not moved.GetMetaData("0010|0010").strip()
    assert moved.GetMetaData("0020|000d") == last.GetMetaData("0020|000d")
    warped = read_image(done / "warped_moving_1")
    np.testing.assert_allclose(Frame.of(warped).matrix, frame.matrix, atol=1e-5)
    # The same place has the same value as in the whole warped scan, but for interpolation.
    whole = Frame.of(warped).resample(sitk.ReadImage(str(done / "warped.nii.gz"), sitk.sitkFloat32))
    assert np.corrcoef(to_array(whole).ravel(), to_array(warped).ravel())[0, 1] > 0.95


def test_the_report_tells_settings_and_measures(done):
    report = json.loads((done / "report.json").read_text())
    assert report["settings"]["checkpoint"].endswith("own/model-7")
    assert report["settings"]["orientation"] == "LPS"
    assert report["settings"]["network"]["image_size"] == list(SIZE)
    assert len(report["similarity"]) == len(report["folding"]) == 3
    assert all(-1 <= value <= 1 for value in report["similarity"])
    names = {"read", "load", "preprocess", "affine", "network", "warp", "measure", "inverse", "write"}
    assert set(report["seconds"]) == names
    assert not any("orientation" in doubt or "axes" in doubt for doubt in report["doubts"])
    files = {str(path.relative_to(done)) for path in done.rglob("*") if path.is_file()}
    assert set(report["files"]) == files


def test_pictures_show_the_volume_and_the_flow(done):
    assert imread(done / "fixed.png").shape[0] > 500
    assert imread(done / "summary.png").shape[1] > 1500
    assert imread(done / "flow_1.png").shape[:2] == (SIZE[1], SIZE[0])


def test_the_flow_picture_is_white_at_rest_and_falls_to_1_over_e_every_15_voxels(tmp_path):
    flow = np.zeros((8, 6, 5, 3), np.float32)
    flow[2, 4, 2] = (15, 0, -30)
    registration_files.registration_figures.flow_image(tmp_path / "a.png", flow)
    picture = imread(tmp_path / "a.png")
    np.testing.assert_allclose(picture[4, 2, :3], [np.exp(-1), 1, np.exp(-2)], atol=3e-3)
    assert np.all(picture[[0, 1, 2, 3, 5], :, :3] == 1)


def test_a_published_network_sees_the_axes_that_it_was_trained_on(home):
    """They run to the right, back and feet, as in the original; the flow is on that frame, the rest in LPS."""
    flips = (0, 2)
    scans = [read_image(home / name) for name in ("fixed", "moving.nii.gz")]
    volumes = [np.flip(prepare(s, find_frame(s, View(), SIZE), PRESETS["none"])[0], flips) for s in scans]
    network = checkpoints.load_model(home / "weights" / "published", image_size=SIZE)
    output = network([tf.constant(v[None, ..., None] / np.float32(255)) for v in volumes])
    result = register(*scans, home / "weights" / "published", "none", image_size=SIZE)
    assert result.report["settings"]["orientation"] == "RPI"
    np.testing.assert_allclose(result.stages[-1].composed_flow, output.flow[0], atol=2e-2)
    np.testing.assert_allclose(result.fixed.in_lps(result.fixed.volume), np.flip(volumes[0], flips), atol=1)
    signs = np.where(np.isin(range(3), flips), -1, 1)
    np.testing.assert_array_equal(
        result.fixed.in_lps(result.stages[-1].composed_flow), np.flip(result.stages[-1].composed_flow, flips) * signs
    )
    voxel = np.array([[11.0, 9, 13]])
    led = result.moving.frame.to_voxel(result.transform.to_moving(result.fixed.frame.to_physical(voxel)))
    np.testing.assert_allclose(led - voxel, output.flow[0, 11, 9, 13][None], atol=2e-2)


@pytest.mark.slow
def test_the_same_scan_twice_under_a_network_of_no_flow_is_left_as_it_is(home, tmp_path):
    network = rule_network("VoxelMorph", 1, image_size=SIZE, channels=4)
    for name, weight in network.named_weights().items():
        if "conv7_" in name or "/flow/" in name:
            weight.assign(tf.zeros_like(weight))
    checkpoints.save(tmp_path, network, adam(network), 1)
    (tmp_path / "config.json").write_text(json.dumps(network.config.to_dict()))
    scan = read_image(home / "fixed")
    result = register(scan, scan, tmp_path, "none")
    np.testing.assert_allclose(sitk.GetArrayFromImage(result.displacement), 0, atol=1e-3)
    np.testing.assert_allclose(to_array(result.warped), to_array(scan), atol=1)


def test_a_liver_is_found_unless_a_mask_takes_its_place(home, tmp_path):
    (fixed, organ), (moving, _) = person(), person((4.0, 3.0, 5.0), seed=1)
    mask = Frame.of(fixed).put(np.where(organ, 7, 0).astype(np.uint8))
    sitk.WriteImage(mask, str(tmp_path / "mask.nii.gz"))
    result = register(Input(fixed, tmp_path / "mask.nii.gz"), moving, home / "weights" / "own", "liver")
    np.testing.assert_array_equal(result.fixed.region, organ)
    for scan in (result.fixed, result.moving):
        assert scan.frame.size == SIZE
        centre = Frame.of(scan.image).to_physical(np.mean(scan.box, axis=0))
        np.testing.assert_allclose(centre, (-65, -5, 140), atol=15)
    assert not any(doubt.startswith(("fixed", "moving")) for doubt in result.report["doubts"])
    assert 500 < result.report["moving"]["region_ml"] < 1500


@pytest.mark.slow
def test_repeats_and_refinement_are_told(work, capsys, monkeypatch):
    monkeypatch.setattr(registration_files, "draw_summary", lambda *_: None)
    assert run(*PAIR, "-o", "out", "-r", "auto", "--refine", "3") == 0
    report = json.loads((work / "out" / "report.json").read_text())
    rep = report["settings"]["rep"]
    assert f"Each cascade was applied {rep} times" in capsys.readouterr().out
    assert len(report["similarity"]) == len(report["folding"]) == 3 + rep
    assert "refine" in report["seconds"]
    assert (work / "out" / f"warped_moving_{1 + rep}").is_dir()


@pytest.mark.slow
def test_without_a_checkpoint_refinement_registers_alone():
    """Two cuts of one texture, three voxels apart, are brought together."""
    texture_of_both = ndimage.gaussian_filter(texture((39, 28, 24), 5).astype(np.float32), 2)
    scans = [oblique(SIZE, (1, 1.2, 2), (0, 0, 0), (3, 5, -4)).put(texture_of_both[k : k + 32]) for k in (0, 3)]
    scans[0].SetMetaData("0008|0060", "CT")
    scans[1].SetMetaData("0008|0060", "MR")
    result = register(*scans, view="none", refine=40, image_size=SIZE, affine="none")
    assert result.report["settings"]["checkpoint"] is None
    assert result.report["settings"]["network"]["similarity"] == "mi"  # of two modalities
    assert result.report["doubts"] == []
    before, _, after = result.report["similarity"]
    assert after > (1 + before) / 2
    np.testing.assert_array_equal(result.stages[0].composed_flow, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("-f", "moving.nii.gz", "-m", "moving.nii.gz", "--refine", "0", "--affine", "none"),
            "nothing to register with",
        ),
        (("-f", "flat.nii.gz", "-m", "moving.nii.gz"), "fixed scan: the scan is 7 everywhere"),
        (("-c", "own", "-m", "moving.nii.gz"), "--fixed is missing"),
        (("-c", "own", "-f", "moving.nii.gz"), "--moving is missing"),
        ((*PAIR, "-c", "gone"), "checkpoint folder 'gone' does not exist"),
        ((*PAIR, "-f", "gone"), "gone: no such file or folder"),
        ((*PAIR, "-f", "weights"), "no DICOM slices in this folder"),
        ((*PAIR, "-f", "points.csv"), "cannot be read as an image"),
        ((*PAIR, "-r", "0"), "-r '0' is neither"),
        ((*PAIR, "--refine", "-1"), "--refine '-1' is neither"),
        ((*PAIR, "--preprocess", "heart"), "unknown kind of scan 'heart'"),
        ((*PAIR, "--preprocess", "liver"), "fixed scan: no liver found"),
        ((*PAIR, "-f", "mr.nii.gz", "--preprocess", "body"), "fixed scan: the scan's lowest grey value is"),
        ((*PAIR, "--orientation", "LSP"), "orientation 'LSP'"),
        ((*PAIR, "--fixed_series", "1.2"), "no series '1.2'; there are 1.2.9"),
        ((*PAIR, "--moving_series", "1.2"), "is a file, which has no series"),
        ((*PAIR, "--labels", "gone.nii.gz"), "gone.nii.gz: no such file"),
        ((*PAIR, "--points", "fixed"), "cannot be read (Is a directory)"),
        ((*PAIR, "-o", "points.csv"), "points.csv is a file"),
        ((*PAIR, "-o", "weights"), "files that were not written by this command"),
        ((*PAIR, "--net_args", "channel=3"), "unknown key 'channel'"),
        ((*PAIR, "-g", "x"), "not a list of GPU ids"),
        ((*PAIR, "--moving_mask", "empty.nii.gz"), "moving scan: the mask is empty"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(work, capsys, arguments, message):
    sitk.WriteImage(MOVING.put(np.zeros(MOVING.size, np.uint8)), "empty.nii.gz")
    sitk.WriteImage(MOVING.put(np.full(MOVING.size, 7, np.uint8)), "flat.nii.gz")
    sitk.WriteImage(sitk.Cast(sitk.Abs(MOVING.put(texture(MOVING.size, 1))), sitk.sitkInt16), "mr.nii.gz")
    before = sorted(p.name for p in work.iterdir())
    assert run(*arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(p.name for p in work.iterdir()) == before


def test_an_output_folder_is_replaced_only_whole_and_only_when_asked(work, registered, capsys, monkeypatch):
    monkeypatch.setattr(registration, "register", lambda *_, **__: registered)
    monkeypatch.setattr(registration_files, "draw_summary", lambda *_: None)
    (work / "output").mkdir()  # an empty folder may be filled
    assert run(*PAIR) == 0
    assert run(*PAIR) == 1
    assert "is not empty; name another folder, or replace it with --overwrite" in capsys.readouterr().err
    made = (work / "output" / "report.json").stat().st_ino

    def fail(*_):
        raise UserError("the disk is full")

    before = sorted(p.name for p in work.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(registration_files, "draw_summary", fail)
        assert run(*PAIR, "--overwrite") == 1
        assert run(*PAIR, "-o", "other") == 1
    assert sorted(p.name for p in work.iterdir()) == before
    assert (work / "output" / "report.json").stat().st_ino == made
    assert run(*PAIR, "--overwrite") == 0
    assert (work / "output" / "report.json").stat().st_ino != made
    assert sorted(p.name for p in work.iterdir()) == before


@pytest.mark.parametrize("name", ["notes.txt", "warped_moving_0/mine.dcm", "fixed/deep/er/note"])
def test_a_folder_that_holds_something_else_is_never_replaced(work, quick, capsys, name):
    assert run(*PAIR) == 0
    mine = work / "output" / name
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text("precious")
    assert run(*PAIR, "--overwrite") == 1
    assert f"files that were not written by this command: {name}" in capsys.readouterr().err
    assert mine.read_text() == "precious"


def test_a_folder_with_somebody_elses_report_is_never_replaced(work, capsys):
    for content in ("{}", "[]", "no json", '{"files": 3}'):
        folder = work / "study"
        folder.mkdir(exist_ok=True)
        (folder / "report.json").write_text(content)
        (folder / "data.csv").write_text("1")
        assert run(*PAIR, "-o", "study", "--overwrite") == 1
        assert "not written by this command" in capsys.readouterr().err
        assert (folder / "data.csv").exists()


def test_files_that_come_during_the_work_are_kept(work, registered, capsys, monkeypatch):
    def intrude(*_, **__):
        (work / "output" / "late.txt").write_text("precious")
        return replace(registered, report=deepcopy(registered.report))

    monkeypatch.setattr(registration_files, "draw_summary", lambda *_: None)
    monkeypatch.setattr(registration, "register", lambda *_, **__: replace(registered, report={**registered.report}))
    assert run(*PAIR) == 0
    monkeypatch.setattr(registration, "register", intrude)
    assert run(*PAIR, "--overwrite") == 1
    assert "so the result is in output-1" in capsys.readouterr().err
    assert (work / "output" / "late.txt").read_text() == "precious"
    assert (work / "output-1" / "warped.nii.gz").exists()


@pytest.mark.parametrize("output", [".", "..", "./", "fixed", "results/.."])
def test_an_output_that_would_replace_what_is_read_or_stood_in_is_refused_at_once(work, capsys, monkeypatch, output):
    monkeypatch.setattr(registration, "register", None)
    (work / "results").mkdir()
    assert run(*PAIR, "-o", output, "--overwrite") == 1
    assert "would be replaced; name another folder" in capsys.readouterr().err


@pytest.fixture
def quick(registered, monkeypatch):
    """demo.py with its registration done before, and without pictures."""
    monkeypatch.setattr(
        registration, "register", lambda *_, **__: replace(registered, report=deepcopy(registered.report))
    )
    monkeypatch.setattr(registration_files, "draw_summary", lambda *_: None)


@pytest.mark.parametrize("space", ["lps", "ras", "voxel"])
def test_landmarks_of_every_space_are_carried_alike_and_missing_ones_stay_missing(work, done, quick, space):
    places = np.loadtxt("points.csv", delimiter=",", skiprows=1)
    numbers = {"lps": places, "ras": places * (-1, -1, 1), "voxel": MOVING.to_voxel(places)}[space]
    rows = [" ".join(repr(float(number)) for number in row) for row in numbers]
    (work / "landmarks.txt").write_text("\n".join(["X Y Z", rows[0], "nan nan nan", *rows[1:]]))
    assert run(*PAIR, "--points", "landmarks.txt", "--points_space", space) == 0
    expected = np.loadtxt(done / "points.csv", delimiter=",", skiprows=1)
    found = np.loadtxt("output/points.csv", delimiter=",", skiprows=1)
    np.testing.assert_allclose(found[[0, 2, 3]], expected, atol=0.01)  # NIfTI keeps its geometry in single precision
    assert np.isnan(found[1]).all()


def test_malformed_landmarks_are_refused(work, capsys, quick):
    for name, text in cases.POINTS.items():
        (work / "malformed.csv").write_text(text)
        assert run(*PAIR, "--points", "malformed.csv") == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: malformed.csv, line {1 if name == 'id_and_no_header' else 2}: ")
        assert error.count("\n") == 1
    assert run(*PAIR, "--points", "points.csv", "--points_space", "mm") == 1
    assert "the space is one of lps, ras, voxel" in capsys.readouterr().err
    assert not (work / "output").exists()


def test_landmarks_and_labels_that_lie_elsewhere_are_said(work, capsys, quick):
    (work / "outside.csv").write_text("1000,1000,1000\n")
    sitk.WriteImage(sitk.GetImageFromArray(np.ones(MOVING.size[::-1], np.uint8)), "lost.nii.gz")
    assert run(*PAIR, "--points", "outside.csv", "--labels", "lost.nii.gz") == 0
    out = capsys.readouterr().out
    told = "the only landmark lies outside the scan", "was it saved without the scan's geometry?"
    report = json.loads((work / "output/report.json").read_text())
    for reason in told:
        assert reason in out
        assert any(reason in doubt for doubt in report["doubts"])


def test_help_names_every_flag_of_the_original():
    done = subprocess.run([sys.executable, demo.__file__, "--help"], capture_output=True, text=True, check=True)
    for flag in ("-c", "-f", "-m", "-o", "-r", "-g", "--fast_reconstruction", "--net_args"):
        assert f" {flag}" in done.stdout
    assert "tensorflow" not in done.stderr
