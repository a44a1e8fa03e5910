"""Scores of fields of a Learn2Reg task: against closed forms and the evaluation written out voxel by voxel."""

import csv
import itertools
import pathlib

import nibabel
import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.distance import cdist

from data_util.challenge import read_grid, read_task
from data_util.output import challenge_fields, challenge_metrics
from errors import UserError
from tests.test_data_util.learn2reg_task import (
    SHIFT,
    SIZE,
    SPACING,
    body,
    command,
    describe,
    fails,
    field,
    pair,
    save,
    scores,
    smooth_field,
)


def test_a_known_translation_scores_perfectly(task, capsys):
    field()
    told = scores(capsys)
    (case,) = told["cases"]
    assert (case["dice"], case["hd95"], case["sdlogj"], case["sdlogj_mask"]) == (1, 0, 0, 0)
    assert case["tre_keypoints"] == pytest.approx(0, abs=1e-6)
    assert case["labels"]["dice"] == {"liver": 1, "spleen": 1}
    out = capsys.readouterr().out
    assert out.splitlines()[1].split() == ["dice", "1.0000", "0.0000", "1.0000", "1"]


@pytest.mark.parametrize("wrong", [-SHIFT, SHIFT[::-1], SHIFT * SPACING])
def test_another_sign_order_or_unit_does_not(task, capsys, wrong):
    field(value=wrong)
    (case,) = scores(capsys)["cases"]
    assert case["dice"] < 0.9
    assert case["tre_keypoints"] == pytest.approx(np.linalg.norm((wrong - SHIFT) * SPACING), abs=1e-5)


def reference(displacement, fixed, moving, mask, points):
    """The challenge's measures, voxel by voxel: warped labels, log determinants, Dice and TRE."""
    warped, logs, inside = np.zeros_like(moving), [], []
    for p in itertools.product(*map(range, SIZE)):
        q = p + displacement[p]
        if (q >= 0).all() and (q <= np.subtract(SIZE, 1)).all():
            warped[p] = moving[tuple(np.floor(q + 0.5).astype(int))]
        if all(2 <= c < n - 2 for c, n in zip(p, SIZE, strict=True)):
            j = np.eye(3)
            for axis in range(3):
                step = np.eye(3, dtype=int)[axis]
                j[:, axis] += (displacement[tuple(p + step)] - displacement[tuple(p - step)]) / 2
            determinant = j[0] @ np.cross(j[1], j[2])
            logs.append(np.log(max(determinant + 3, 1e-9)))
            inside.append(mask[p] == 1)
    logs = np.array(logs)
    dice = [2 * ((fixed == v) & (warped == v)).sum() / ((fixed == v).sum() + (warped == v).sum()) for v in (1, 2)]
    carried = [
        [ndimage.map_coordinates(displacement[..., c], np.reshape(p, (3, 1)))[0] for c in range(3)] for p in points[0]
    ]
    errors = (((points[0] + carried - points[1]) * (3, 2, 1)) ** 2).sum(1) ** 0.5
    return warped, logs.std(), logs[inside].std(), dice, errors.mean()


def test_scores_are_those_of_the_evaluation_written_out(task, capsys):
    save(task / "imagesTr" / "T_0004_0000.nii.gz", body()[0], np.diag((3.0, 2, 1, 1)))  # the moving one's own spacing
    displacement = smooth_field(3, amplitude=9)
    assert challenge_metrics.log_jacobian(displacement).min() < np.log(3)  # folds somewhere
    field(value=displacement)
    (case,) = scores(capsys)["cases"]
    maps = [nibabel.load(task / "labelsTr" / f"T_{k}_0000.nii.gz").get_fdata() for k in ("0003", "0004")]
    points = [np.loadtxt(task / "keypointsTr" / f"T_{k}_0000.csv", delimiter=",") for k in ("0003", "0004")]
    warped, sdlogj, masked, dice, tre = reference(displacement.astype(float), *maps, maps[0] > 0, points)
    assert case["sdlogj"] == pytest.approx(sdlogj, abs=1e-12)
    assert case["sdlogj_mask"] == pytest.approx(masked, abs=1e-12)
    assert sdlogj != pytest.approx(masked, rel=0.05)
    assert list(case["labels"]["dice"].values()) == pytest.approx(dice, abs=1e-12)
    assert case["dice"] == pytest.approx(np.mean(dice), abs=1e-12)
    assert case["tre_keypoints"] == pytest.approx(tre, abs=1e-9)
    hd95 = [brute_hd95(maps[0] == v, warped == v) for v in (1, 2)]
    assert list(case["labels"]["hd95"].values()) == pytest.approx(hd95, abs=1e-12)


# Area of the surface in a cube by the bits of its corners, for one cube of each kind that no turn and no mirror makes
# another of: figures of the package surface-distance 0.1, which the challenge's evaluation calls. Bit 4 i + 2 j + k is
# the corner (1 - i, 1 - j, 1 - k).
AREAS = {
    **{0: 0.0, 1: 0.216506, 3: 0.707107, 6: 0.433013, 7: 1.149519, 15: 1.0, 22: 0.649519, 23: 1.299038, 24: 0.433013},
    **{25: 0.923613, 27: 1.573132, 30: 1.366025, 31: 1.149519, 60: 1.414214, 61: 0.923613, 63: 0.707107},
    **{105: 0.866025, 107: 0.649519, 111: 0.433013, 126: 0.433013, 127: 0.216506, 255: 0.0},
}


def kind_of(cube):
    """The smallest code of a bool [2, 2, 2] in any turn or mirror."""
    turned = (np.transpose(cube, order) for order in itertools.permutations(range(3)))
    flipped = (t[::a, ::b, ::c] for t in turned for a, b, c in itertools.product((1, -1), repeat=3))
    return min(int((f.ravel()[::-1] << np.arange(8)).sum()) for f in flipped)


def test_surface_areas_are_those_of_the_evaluation():
    table = challenge_metrics._area_table()
    for code in range(256):
        cube = np.zeros((2, 2, 2), int)
        for bit, corner in enumerate(challenge_metrics.CORNERS):
            cube[tuple(corner)] = code >> bit & 1
        assert table[code] == pytest.approx(AREAS[kind_of(cube)], abs=1e-6), code


def brute_hd95(first, second):
    """The distance with every pair of cubes looked at."""
    sides = []
    for mask in (first, second):
        padded = np.pad(mask, 1).astype(int)
        places = itertools.product(*(range(n + 1) for n in mask.shape))
        cubes = {p: padded[tuple(slice(c, c + 2) for c in p)] for p in places}
        areas = {p: AREAS[kind_of(cube)] for p, cube in cubes.items() if 0 < cube.sum() < 8}
        sides.append((np.array(list(areas)), np.array(list(areas.values()))))
    distances = cdist(sides[0][0], sides[1][0])
    found = []
    for nearest, (_, areas) in zip((distances.min(1), distances.min(0)), sides, strict=True):
        order = np.argsort(nearest)
        found.append(nearest[order][np.argmax(np.cumsum(areas[order]) >= 0.95 * areas.sum())])
    return max(found)


def test_hd95_of_boxes_that_lie_apart_or_are_missing():
    first, second = np.zeros((2, 12, 12, 12), bool)
    first[2:6, 2:6, 2:6] = True
    assert challenge_metrics.hd95(first, np.roll(first, 3, axis=1)) == 3
    assert challenge_metrics.hd95(first, np.roll(first, 2, axis=0)) == 2
    assert challenge_metrics.hd95(first, second) == np.inf
    assert challenge_metrics.hd95(second, first) == np.inf
    assert np.isnan(challenge_metrics.hd95(second, second))
    edge = np.zeros((4, 4, 4), bool)
    edge[0] = True  # the surface closes at the edge of the volume
    assert challenge_metrics.hd95(edge, np.ones((4, 4, 4), bool)) == 3


def test_means_count_what_was_measured_and_files_hold_every_pair(task, capsys):
    describe(task, registration_val=[pair("0003", "0004"), pair("0001", "0002")])
    labels = task / "labelsTr" / "T_0001_0000.nii.gz"
    grid = nibabel.load(labels).get_fdata()
    save(labels, np.where(grid == 2, 0, grid).astype(np.uint8))  # no spleen
    (task / "masksTr" / "T_0001_0000.nii.gz").unlink()
    (task / "keypointsTr" / "T_0002_0000.csv").unlink()
    field()
    np.savez("fields/disp_0001_0000_0002_0000.npz", np.broadcast_to(np.float32((1, 0, 0)), (*SIZE, 3)))
    told = scores(capsys)
    assert told["summary"]["dice"] == {"mean": 1, "std": 0, "quantile": 1, "count": 2}
    assert told["summary"]["sdlogj_mask"]["count"] == told["summary"]["tre_keypoints"]["count"] == 1
    assert told["labels"]["spleen"]["dice"]["count"] == 1
    assert told["cases"][1]["labels"]["dice"] == {"liver": 1, "spleen": None}
    rows = list(csv.DictReader(pathlib.Path("fields_scores.csv").read_text().splitlines()))
    assert [(row["fixed"], row["label"], row["dice"]) for row in rows] == [
        *(("T_0003_0000", label, "1.0") for label in ("", "liver", "spleen")),
        *zip(["T_0001_0000"] * 3, ["", "liver", "spleen"], ["1.0", "1.0", ""], strict=True),
    ]
    assert rows[3]["tre_keypoints"] == ""


def test_a_label_that_a_field_drives_out_is_infinitely_far(task, capsys):
    field(value=(100.0, 0, 0))
    told = scores(capsys)
    assert told["cases"][0]["labels"]["hd95"] == {"liver": "inf", "spleen": "inf"}
    assert told["summary"]["hd95"]["mean"] == "inf"
    assert told["summary"]["dice"]["mean"] == 0


def test_quantiles_are_on_the_side_that_the_challenge_looks_at():
    from data_util.output.challenge_scores import PairScores, summary

    made = [PairScores("a", "b", {"dice": k / 10, "tre_keypoints": k / 1.0}, {}) for k in range(11)]
    assert summary(made)["dice"]["quantile"] == pytest.approx(0.3)
    assert summary(made)["tre_keypoints"]["quantile"] == pytest.approx(7)


def test_what_cannot_be_scored_is_said_in_one_line(task, capsys):
    flags = ["score", "task", "fields"]
    assert "fields: no such folder" in fails(capsys, *flags)
    field(name="disp_0004_0003")
    told = fails(capsys, *flags)
    assert "disp_0003_0004.nii.gz: no such displacement field" in told
    assert "disp_0003_0000_0004_0000" in told
    field(value=np.zeros((24, 20, 15, 3)))
    told = fails(capsys, *flags)
    assert "24x20x15x3" in told
    assert "24x20x16x3" in told
    field(value=(np.nan, 0, 0))
    assert "NaN" in fails(capsys, *flags)
    pathlib.Path("fields/disp_0003_0004.nii.gz").write_bytes(b"no image")
    assert "cannot be read as a displacement field" in fails(capsys, *flags)
    field()
    (task / "keypointsTr" / "T_0004_0000.csv").write_text("1,2,3\n")
    told = fails(capsys, *flags)
    assert "T_0003_0000.csv has 3 landmarks" in told
    save(task / "labelsTr" / "T_0003_0000.nii.gz", np.ones((4, 4, 4), np.uint8))
    assert "4x4x4" in fails(capsys, *flags)
    (task / "imagesTr" / "T_0003_0000.nii.gz").unlink()
    assert "T_0003_0000.nii.gz: no such image" in fails(capsys, *flags)
    with pytest.raises(SystemExit):
        command("score", "task", "fields", "--nonsense")


def test_a_name_without_numbers_cannot_be_handed_in(task):
    describe(task, training=["imagesTr/a.nii.gz", "imagesTr/b.nii.gz"], registration_val=...)
    found = read_task(task)
    with pytest.raises(UserError, match="four digits of a subject"):
        _ = found.cases["a"].numbers


def test_a_field_keeps_to_its_grid(task, tmp_path):
    grid = read_grid(task / "imagesTr" / "T_0001_0000.nii.gz")
    np.testing.assert_allclose(grid.spacing, SPACING)
    with pytest.raises(UserError, match=r"24x20x15x3"):
        challenge_fields.write_field(np.zeros((24, 20, 15, 3)), grid, tmp_path / "x.nii.gz")
