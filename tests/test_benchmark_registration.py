"""benchmarks.registration: its pairs and starts are what their truth says, its Dice is Dice, and it goes on."""

import json
import time

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter, map_coordinates

from benchmarks import registration, registration_pairs, registration_table
from data_util.scans.frame import Frame
from errors import UserError

FRAME = Frame((24, 20, 22), (4.0, 5.0, 4.5), (-40.0, 10.0, 5.0), (1, 0, 0, 0, 1, 0, 0, 0, 1))
STARTS = registration_pairs.starts()


@pytest.fixture(scope="module")
def scan():
    grey = np.zeros(FRAME.size, np.float32)
    grey[6:-6, 5:-5, 6:-6] = 50 + 150 * np.random.default_rng(0).random((12, 10, 10))
    return FRAME.put(gaussian_filter(grey, 1))


def read_at(image, points):
    grey = np.swapaxes(sitk.GetArrayFromImage(image), 0, 2)
    return map_coordinates(grey, Frame.of(image).to_voxel(points).T, order=1)


@pytest.mark.parametrize(
    ("name", "place", "led"),  # places from the middle, in mm
    [
        ("as it is", (10, 20, 30), (10, 20, 30)),
        ("turned 30 about z", (10, 0, 5), (10 * np.sqrt(0.75), 5, 5)),
        ("turned 45 about x", (7, 10, 0), (7, 10 * np.sqrt(0.5), 10 * np.sqrt(0.5))),
        ("shifted 20 mm", (1, 2, 3), (1 + 40 / 3, 2 - 40 / 3, 3 + 20 / 3)),
        ("scaled 1.25", (4, 8, -12), (5, 10, -15)),
    ],
)
def test_a_start_leads_places_as_its_name_says(scan, name, place, led):
    middle = FRAME.to_physical(np.subtract(FRAME.size, 1) / 2)
    found = STARTS[name](scan).TransformPoint((middle + place).tolist())
    np.testing.assert_allclose(found - middle, led, atol=1e-9)


@pytest.mark.parametrize("name", STARTS)
def test_a_moved_scan_shows_at_its_places_what_the_scan_showed(scan, name):
    start = STARTS[name](scan)
    points = FRAME.to_physical(np.random.default_rng(1).integers(6, 14, (200, 3)))
    led = [start.TransformPoint(point) for point in points.tolist()]
    moved = registration_pairs.moved(scan, start)
    assert np.corrcoef(read_at(scan, points), read_at(moved, np.array(led)))[0, 1] > 0.95  # read twice
    assert sitk.GetArrayViewFromImage(moved).sum() > 0


def test_a_deformed_pair_is_what_its_truth_says(scan):
    labels = FRAME.put((np.swapaxes(sitk.GetArrayFromImage(scan), 0, 2) > 60).astype(np.uint8))
    pair = registration_pairs.deformed(scan, {"bright": labels}, 3)
    points = registration.places(pair.fixed)[::5]
    true = np.array([pair.truth.TransformPoint(point) for point in points.tolist()])
    assert 0.5 < np.linalg.norm(true - points, axis=1).mean() < 15
    read = sitk.Resample(scan, pair.fixed, pair.truth, sitk.sitkLinear, 0.0)
    assert np.corrcoef(read_at(pair.fixed, points), read_at(read, points))[0, 1] > 0.9  # other grey values, noise
    start = STARTS["all at once"](scan)
    perfect = sitk.CompositeTransform([start, pair.truth])
    values = registration.judged(pair, start, perfect, points)
    assert values["mm"] == pytest.approx(0, abs=1e-9)
    assert values["bright"] == 1
    before = registration.judged(pair, start, sitk.Transform(), points)
    assert before["mm"] > 10
    assert before["bright"] < 0.8


def test_parts_of_two_atlases_get_the_same_numbers():
    oxford = FRAME.put(np.full(FRAME.size, 20, np.uint8))  # supramarginal gyrus, posterior
    aal = FRAME.put(np.full(FRAME.size, 63, np.uint8))  # SupraMarginal_L
    numbers = list(zip(*registration_pairs.CORTEX.values(), strict=True))
    one, other = (
        registration_pairs.by_side(registration_pairs._renumbered(image, groups))
        for image, groups in ((oxford, numbers[1]), (aal, numbers[0]))
    )
    assert registration.mean_dice(one, other) == 1
    assert np.unique(sitk.GetArrayViewFromImage(one)).tolist() == [17, 117]
    assert one.GetPixel(0, 0, 0) == 117  # x = -40 mm of LPS is on the right


def test_a_coarser_scan_lies_where_it_lay(scan):
    coarse = registration.coarser(scan, 6.0)
    assert all(4.5 < mm <= 6.0 for mm in coarse.GetSpacing())
    points = FRAME.to_physical([[8, 8, 8], [12, 9, 11], [4, 9, 4]])
    smooth = sitk.SmoothingRecursiveGaussian(scan, 2.0)
    np.testing.assert_allclose(read_at(coarse, points), read_at(smooth, points), atol=12)  # of 200
    assert registration.coarser(scan, None) is scan


def test_mean_dice():
    one = sitk.GetImageFromArray(np.array([[[0, 1, 1, 2, 2, 2, 0]]], np.uint8))
    other = sitk.GetImageFromArray(np.array([[[3, 1, 2, 2, 2, 1, 0]]], np.uint8))
    assert registration.mean_dice(one, one) == 1
    assert registration.mean_dice(one, other) == pytest.approx((2 / 4 + 4 / 6) / 2)


def test_share_folded(scan):
    x = np.moveaxis(np.mgrid[: FRAME.size[0], : FRAME.size[1], : FRAME.size[2]], 0, -1) * FRAME.spacing
    field = np.zeros((*FRAME.size, 3))
    field[..., 0] = np.where(x[..., 0] > 46, -2 * (x[..., 0] - 46), 0)  # mirrors what lies behind the middle
    share = registration.share_folded(FRAME.put(field), scan)
    assert 0.3 < share < 0.7
    assert registration.share_folded(FRAME.put(0 * field), scan) == 0


def record(method, start="as it is", **values):
    whole = {"pair": "given", "start": start, "method": method, "before": {"labels": 0.25, "mm": 40.0}, "others": 0.04}
    return {**whole, "after": {"labels": 0.75, "mm": 2.5}, "folding": 0, "seconds": {"wall": 5, "cpu": 8}, **values}


def test_the_table_tells_medians_of_starts_that_all_methods_have():
    records = [record("here"), record("here", "scaled 0.8", after={"labels": 0.5, "mm": 30.0})]
    records += [record("here", "shifted 20 mm", after={"labels": 0.1, "mm": 90.0})]  # SyN has no such start
    records += [record("SyN", seconds={"wall": 20, "cpu": 20}), record("SyN", "scaled 0.8", failed="it says nothing")]
    told = registration_table.report(records)
    assert "| given | here | 2 | 1 of 2 | labels 0.625 | 16.25 | 0.000 % | 5 | 8 | 0.25x | 0.40x |" in told
    assert "| scaled 0.8 | here | 0.250 -> 0.500 | 40.0 -> 30.00 | no | 0.000 % | 5.0 | 8.0 | 0.0 |  |" in told
    assert "failed: it says nothing" in told
    busy = [record("here", others=1.5, stages={"affine": 4.0}), record("SyN", seconds={"wall": 20, "cpu": 20})]
    told = registration_table.report(busy)
    assert "| given | here | 1 | 1 of 1 | labels 0.750 | 2.50 | 0.000 % |  | 8 |  | 0.40x |" in told
    assert "affine" not in told.split("## given")[1]
    unmeasured = registration_table.report([record("here", others=None, stages={"affine": 4.0})])
    assert "| as it is | here | 0.250 -> 0.750 | 40.0 -> 2.50 | yes | 0.000 % |  | 8.0 |  |  |" in unmeasured


def test_busy_seconds_are_those_of_all_cores():
    before, begin = registration.busy_seconds(), time.process_time()
    while time.process_time() < begin + 0.2:
        pass
    assert registration.busy_seconds() - before >= 0.15  # in ticks of 0.01


def test_what_is_on_record_is_not_done_again(tmp_path, capsys):
    records = tmp_path / "records.jsonl"
    failed, line = (
        json.dumps(record(method, **found)) for method, found in (("here, ncc", {"failed": "x"}), ("here", {}))
    )
    records.write_text(f"{failed}\n{line}\n{line[:40]}")  # the last was cut short
    registration.main(["--list", "--only", "given/as it is/*", "--records", str(records)])
    assert capsys.readouterr().out.splitlines() == ["given/as it is/here, ncc", "given/as it is/ITK affine and demons"]
    assert records.read_text() == f"{failed}\n{line}\n"


def test_what_is_not_given_is_left_out_and_said(tmp_path, capsys):
    registration.main(["--only", "given/as it is/here", "--records", str(tmp_path / "records.jsonl")])
    assert "given: left out (give --fixed and --moving, or --fixed alone" in capsys.readouterr().out
    with pytest.raises(UserError, match="--list names them"):
        registration.main(["--only", "nothing/*"])
