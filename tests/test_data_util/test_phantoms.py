import json

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

import cli
from data_util import phantoms
from data_util.hdf5 import Scan
from data_util.making import known_flows
from data_util.making.anatomy import make_phantom
from data_util.making.known_flows import (
    carry_points,
    deform,
    individual_flow,
    known_pair,
    placement_flow,
    slope,
    smooth_flow,
    warp,
)
from data_util.making.new_set import write_scans
from data_util.phantoms import write_dataset
from errors import UserError

SIZE = (28, 22, 34)


def dice(a, b):
    a, b = a > 0, b > 0
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def ramp(size):
    x, y, z = np.indices(size, dtype=np.float32)
    return 1 + 2 * x + 1.5 * y + 0.75 * z


# flows


def test_slope_of_a_linear_flow_is_the_norm_of_its_matrix():
    matrix = np.array([[0.1, -0.2, 0.05], [0.0, 0.3, 0.1], [-0.25, 0.02, 0.15]])
    flow = np.moveaxis(np.indices(SIZE), 0, -1) @ matrix.T
    assert slope(flow) == pytest.approx(np.linalg.norm(matrix))


def test_slope_sees_a_step_between_two_voxels_along_each_axis():
    for axis in range(3):
        flow = np.zeros((*SIZE, 3))
        np.moveaxis(flow, axis, 0)[10:, ..., 1] = 0.7
        assert slope(flow) == pytest.approx(0.7)


@settings(max_examples=20, deadline=None)
@given(st.tuples(*[st.integers(16, 30)] * 3), st.integers(0, 2**32), st.floats(0, 20))
def test_a_smooth_flow_never_folds_and_keeps_the_border(size, seed, amplitude):
    flow = smooth_flow(size, seed, amplitude)
    assert flow.shape == (*size, 3)
    assert flow.dtype == np.float32
    assert np.linalg.norm(flow, axis=-1).max() <= amplitude * 1.0001
    assert slope(flow) <= known_flows.MAX_SLOPE * 1.0001
    jacobian = np.stack([np.gradient(flow.astype(float), axis=axis) for axis in range(3)], axis=-1)
    assert np.linalg.det(np.eye(3) + jacobian).min() > 0
    for axis in range(3):
        np.testing.assert_allclose(flow.take([0, -1], axis), 0, atol=1e-5)


def test_a_small_smooth_flow_has_the_asked_amplitude_and_depends_on_the_seed():
    flows = [smooth_flow((64, 60, 62), seed, 1.5) for seed in (1, 1, 2)]
    assert np.linalg.norm(flows[0], axis=-1).max() == pytest.approx(1.5, rel=1e-5)
    np.testing.assert_array_equal(flows[0], flows[1])
    assert np.abs(flows[0] - flows[2]).max() > 0.3


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32))
def test_a_placement_is_a_small_turn_times_factors_and_a_shift(seed):
    flow = placement_flow(SIZE, seed, shift=0.05, scale=0.2, degrees=15).astype(float)
    matrix = np.stack([flow[1, 0, 0] - flow[0, 0, 0], flow[0, 1, 0] - flow[0, 0, 0], flow[0, 0, 1] - flow[0, 0, 0]], -1)
    matrix += np.eye(3)
    factors = np.linalg.norm(matrix, axis=0)
    assert np.all(np.abs(factors - 1) <= 0.2 + 1e-5)
    rotation = matrix / factors
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(3), atol=2e-5)
    assert np.linalg.det(rotation) == pytest.approx(1, abs=1e-4)
    assert np.rad2deg(np.arccos(min(1, (np.trace(rotation) - 1) / 2))) <= 15.1
    # Linear all over, so the mean over the symmetric grid is what happens to the centre: the shift.
    assert np.all(np.abs(flow.mean(axis=(0, 1, 2))) <= 0.05 * np.array(SIZE) + 1e-4)


def test_warp_reads_the_volume_at_p_plus_flow():
    flow = np.zeros((*SIZE, 3), np.float32)
    flow[..., 0], flow[..., 1], flow[..., 2] = 1.25, -0.5, 2.75
    warped = warp(ramp(SIZE), flow)
    assert warped[3, 4, 5] == pytest.approx(1 + 2 * 4.25 + 1.5 * 3.5 + 0.75 * 7.75)
    assert warped[27, 0, 33] == pytest.approx(ramp(SIZE)[27, 0, 33])  # the edge is repeated


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32))
def test_carried_points_lie_where_the_flow_leads_back_to_the_source(seed):
    flow = individual_flow(SIZE, np.random.default_rng(seed))
    points = np.random.default_rng(seed).uniform(0, np.array(SIZE) - 1, (9, 3))
    carried = carry_points(points, flow)
    read = [ndimage.map_coordinates(flow[..., k], carried.T.astype(float), order=1, mode="nearest") for k in range(3)]
    np.testing.assert_allclose(carried + np.stack(read, -1), points, atol=0.005)


def test_points_under_a_flow_too_steep_to_invert_are_refused():
    flow = np.zeros((*SIZE, 3))
    flow[..., 0] = 2 * np.arange(SIZE[0])[:, None, None]
    with pytest.raises(ValueError, match="cannot be inverted"):
        carry_points([[5, 5, 5]], flow)


# phantoms


@pytest.mark.parametrize("size", [(32, 32, 32), (48, 30, 41), (16, 16, 16)])
def test_a_phantom_has_the_promised_arrays(size):
    phantom = make_phantom(size, 4)
    assert phantom.volume.shape == phantom.segmentation.shape == size
    assert phantom.volume.dtype == phantom.segmentation.dtype == np.uint8
    assert set(np.unique(phantom.segmentation)) == {0, 255}
    assert 0.03 < (phantom.segmentation > 0).mean() < 0.25
    assert phantom.volume.std() > 30
    assert phantom.points.shape == (6, 3)
    assert phantom.points.dtype == np.float32


def test_the_same_seed_gives_the_same_phantom_and_others_differ():
    first, again, *others = (make_phantom((32, 28, 30), seed) for seed in (1, 1, 2, [1, 1], [1, 2]))
    for field in ("volume", "segmentation", "points"):
        np.testing.assert_array_equal(getattr(first, field), getattr(again, field))
        for other in others:
            assert not np.array_equal(getattr(first, field), getattr(other, field))


def test_landmarks_lie_on_bright_branches_and_in_dark_cysts_of_the_organ():
    for seed in range(6):
        phantom = make_phantom((64, 56, 60), seed)
        places = tuple(np.rint(phantom.points).astype(int).T)
        assert np.all(phantom.segmentation[places] == 255)
        organ = np.median(phantom.volume[phantom.segmentation > 0])
        assert np.all(phantom.volume[places][:3] > organ + 15)
        assert np.all(phantom.volume[places][3:] < organ - 15)


def test_two_phantoms_overlap_enough_to_be_registered_and_leave_something_to_gain():
    organs = [make_phantom((40, 40, 40), [7, k]).segmentation for k in range(7)]
    scores = [dice(organs[i], organs[j]) for i in range(7) for j in range(i)]
    assert 0.5 < np.mean(scores) < 0.75
    assert min(scores) > 0.2


def test_the_organ_is_whole_and_of_one_piece():
    for seed in range(4):
        assert ndimage.label(make_phantom((48, 48, 48), seed).segmentation)[1] == 1


@pytest.mark.parametrize("size", [(15, 32, 32), (32, 32), (32, 32, 0)])
def test_a_size_that_is_no_phantoms_is_refused(size, tmp_path):
    with pytest.raises(UserError, match="at least 16"):
        make_phantom(size, 0)
    with pytest.raises(UserError, match="at least 16"):
        write_dataset(tmp_path / "p", size, 2, 1, 0)
    assert not list(tmp_path.iterdir())


def test_deform_moves_image_mask_and_landmarks_alike():
    size = (20, 18, 24)
    volume = np.zeros(size, np.uint8)
    volume[8:12, 5:9, 10:16] = 200
    scan = Scan(volume, np.where(volume > 0, 255, 0).astype(np.uint8), np.array([[9, 6, 12]], np.float32), (1, 2, 3))
    flow = np.zeros((*size, 3), np.float32)
    flow[...] = (3, -2, 1)  # this(p) = scan(p + flow), so everything moves by minus that
    moved = deform(scan, flow)
    np.testing.assert_array_equal(moved.volume, np.roll(volume, (-3, 2, -1), (0, 1, 2)))
    np.testing.assert_array_equal(moved.segmentation > 0, moved.volume > 0)
    np.testing.assert_allclose(moved.points, [[6, 8, 11]], atol=1e-3)
    assert moved.spacing == (1, 2, 3)
    assert moved.flow is None
    assert deform(Scan(volume, volume), flow).points is None


def test_a_known_pair_is_exact_for_the_flow_it_keeps():
    scan = make_phantom(SIZE, 3)
    source, moved = known_pair(scan, smooth_flow(SIZE, 5, 3), "set/8")
    assert source is scan
    assert moved.flow_source == "set/8"
    assert moved.flow.dtype == np.float16
    kept = moved.flow.astype(np.float32)
    assert np.abs(kept).max() > 0.5
    reference = ndimage.map_coordinates(
        scan.volume.astype(float), np.indices(SIZE) + np.moveaxis(kept, -1, 0), order=1, mode="nearest"
    )
    assert np.abs(moved.volume - reference).max() <= 0.5 + 1e-3
    assert dice(moved.segmentation, (warp(scan.segmentation, kept) > 128).astype(int)) == 1


# files


def test_a_written_set_holds_what_the_config_says(tmp_path):
    data, config = write_dataset(tmp_path / "toy", (18, 16, 20), n_train=3, n_pairs=2, seed=5)
    content = json.loads(config.read_text())
    assert content["files"] == {"toy": {"type": "HDF5", "path": data.as_posix()}}
    assert content["image_size"] == [18, 16, 20]
    assert content["subsets"] == {
        "train": ["toy/0", "toy/1", "toy/2"],
        "val": [f"toy/{k}" for k in range(3, 7)],
        "known": [f"toy/{k}" for k in range(7, 11)],
    }
    assert content["schemes"] == {"1": {"train": 1.0}, "2": {"val": 1.0}, "known": {"known": 1.0}}
    with h5py.File(data) as file:
        assert set(file) == {str(k) for k in range(11)}
        for k, group in file.items():
            assert group["volume"].shape == group["segmentation"].shape == (18, 16, 20)
            assert group["volume"].dtype == np.uint8
            assert group["point"].shape == (6, 3)
            assert ("flow" in group) == (k in ("8", "10"))
        volumes = [file[k]["volume"][...].tobytes() for k in file]
        assert len(set(volumes)) == len(volumes)
        moved, source = file["10"], file["9"]
        assert moved["flow"].attrs["source"] == "toy/9"
        flow = moved["flow"][...].astype(np.float32)
        assert np.abs(moved["volume"][...] - warp(source["volume"][...], flow)).max() <= 0.5 + 1e-3
        np.testing.assert_allclose(carry_points(source["point"][...], flow), moved["point"][...], atol=1e-3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["toy.h5", "toy.json"]


def test_the_seed_decides_the_whole_set(tmp_path):
    def volumes(name, seed):
        with h5py.File(write_dataset(tmp_path / name, (16, 16, 16), 2, 1, seed)[0]) as file:
            return np.stack([file[str(k)]["volume"][...] for k in range(6)])

    first = volumes("a", 1)
    np.testing.assert_array_equal(first, volumes("b", 1))
    assert not (first == volumes("c", 2)).all(axis=(1, 2, 3)).any()
    with h5py.File(tmp_path / "a.h5") as one, h5py.File(tmp_path / "c.h5") as other:
        assert not np.array_equal(one["5"]["flow"][...], other["5"]["flow"][...])


def test_two_modalities_show_the_same_bodies_in_turn(tmp_path):
    def scans(name, two):
        with h5py.File(write_dataset(tmp_path / name, (24, 20, 22), 2, 1, 3, two_modalities=two)[0]) as file:
            parts = ("volume", "segmentation", "point")
            return [{part: file[str(k)][part][...] for part in parts} for k in range(6)]

    for k, (ct, other) in enumerate(zip(scans("a", False), scans("b", True), strict=True)):
        np.testing.assert_array_equal(ct["segmentation"], other["segmentation"])
        np.testing.assert_array_equal(ct["point"], other["point"])
        if k % 2 == 0:
            np.testing.assert_array_equal(ct["volume"], other["volume"])
        else:
            body = ct["volume"] > 30
            assert abs(np.corrcoef(ct["volume"][body], other["volume"][body])[0, 1]) < 0.7


def test_existing_files_stay_unless_overwriting_is_asked(tmp_path):
    data, _ = write_dataset(tmp_path / "a", (16, 16, 16), 2, 1, 1)
    before = data.read_bytes()
    for gone in (None, data):
        if gone:
            gone.unlink()
        with pytest.raises(UserError, match="--overwrite"):
            write_dataset(tmp_path / "a", (16, 16, 16), 2, 1, 2)
    assert not data.exists()
    data.write_bytes(b"rubbish")
    write_dataset(tmp_path / "a", (16, 16, 16), 2, 1, 1, overwrite=True)
    with h5py.File(data) as file:
        assert len(file) == 6
    assert abs(len(before) - data.stat().st_size) < 1000


def test_a_set_that_fails_half_way_leaves_nothing_and_the_old_one_whole(tmp_path):
    def scans():
        yield Scan(np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8))
        raise RuntimeError("stopped")

    (tmp_path / "a.h5").write_bytes(b"old")
    with pytest.raises(RuntimeError, match="stopped"):
        write_scans(tmp_path / "a", scans(), (4, 4, 4), "toy", {"all": [0]}, {"1": {"all": 1.0}}, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5"]
    assert (tmp_path / "a.h5").read_bytes() == b"old"


def test_spacing_is_written_as_an_attribute(tmp_path):
    empty = np.zeros((4, 5, 6), np.uint8)
    data, _ = write_scans(tmp_path / "a", [Scan(empty, empty, spacing=(1, 0.5, 3))], (4, 5, 6), "toy", {"all": [0]}, {})
    with h5py.File(data) as file:
        np.testing.assert_array_equal(file["0"].attrs["spacing"], [1, 0.5, 3])
        assert set(file["0"]) == {"volume", "segmentation"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((1, 1, 0), "at least 2 scans"), ((2, 0, 0), "1 pair"), ((2, 1, -1), "seed -1")],
)
def test_counts_and_seeds_that_make_no_set_are_refused(arguments, message, tmp_path):
    with pytest.raises(UserError, match=message):
        write_dataset(tmp_path / "a", (16, 16, 16), *arguments)
    assert not list(tmp_path.iterdir())


def test_the_command_writes_a_set_and_says_so(tmp_path, capsys):
    arguments = ["-o", str(tmp_path / "new" / "toy"), "--size", "16", "18", "20", "--train", "2", "--pairs", "1"]
    assert cli.run(phantoms.main, arguments) == 0
    out = capsys.readouterr().out
    assert "2 training scans, 1 validation pairs, 1 known pairs, 16x18x20" in out
    assert out.splitlines()[-1] == f"next: python train.py -d {tmp_path / 'new' / 'toy.json'}"
    assert (tmp_path / "new" / "toy.json").exists()
    assert cli.run(phantoms.main, arguments) == 1
    error = capsys.readouterr().err
    assert "toy.h5 is there already" in error
    assert error.count("\n") == 1
    assert cli.run(phantoms.main, [*arguments, "--overwrite", "--seed", "3"]) == 0


def test_a_place_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.run(phantoms.main, ["-o", str(tmp_path / "file" / "toy"), "--size", "16", "16", "16"]) == 1
    assert f"cannot write {tmp_path / 'file'} (File exists)" in capsys.readouterr().err
