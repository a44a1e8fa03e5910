"""A Learn2Reg task, from its folder to scores: against closed forms and the evaluation written out voxel by voxel."""

import csv
import itertools
import json
import pathlib
import subprocess
import types

import h5py
import nibabel
import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.distance import cdist

import cli
from data_util import learn2reg
from data_util.challenge import read_grid, read_task
from data_util.config import load_dataset_config
from data_util.output import challenge_fields, challenge_metrics, pair_images
from errors import UserError

SIZE, SPACING = (24, 20, 16), np.array((1.5, 1.0, 2.5))
AFFINE = np.array([[-1.5, 0, 0, 30], [0, 1, 0, -12], [0, 0, 2.5, 7], [0, 0, 0, 1.0]])  # axes run to L, A, S
SHIFT = np.array((2, -1, 1))
SUBJECTS = ("0001", "0002", "0003", "0004")


def save(path, array, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


def body(shift=(0, 0, 0)):
    """Grey values [-900, 400] and labels 1 and 2 of a body that is moved by a shift in voxels."""
    place = np.moveaxis(np.indices(SIZE), 0, -1) - shift
    first = (((place - (9, 10, 8)) / (5, 4, 3)) ** 2).sum(-1) < 1
    second = (np.abs(place - (16, 10, 8)) <= (2, 3, 1)).all(-1)
    grey = -900 + 8 * place[..., 0] + 5 * place[..., 1] + 400.0 * first + 700.0 * second
    return grey.astype(np.float32), (first + 2 * second).astype(np.uint8)


def entry(name, **parts):
    return {"image": f"./imagesTr/{name}.nii.gz"} | {k: f"./{k}sTr/{name}.nii.gz" for k in parts if parts[k]}


def pair(fixed, moving):
    return {"fixed": f"./imagesTr/T_{fixed}_0000.nii.gz", "moving": f"./imagesTr/T_{moving}_0000.nii.gz"}


def describe(folder, **changes):
    """Write the description in the form that is used since 2022; ... takes a key away."""
    content = {
        "name": "T",
        "modality": {"0": "CT"},
        "labels": {"0": {"0": "background", "1": "liver", "2": "spleen"}},
        "tensorImageSize": {"0": "3D"},
        "tensorImageShape": {"0": [*SIZE]},
        "numTraining": 4,
        "training": [entry(f"T_{k}_0000", label=True) for k in SUBJECTS],
        "test": [],
        "training_paired_images": [],
        "registration_val": [pair("0003", "0004")],
        "registration_test": [],
    }
    content = {key: value for key, value in (content | changes).items() if value is not ...}
    (folder / "T_dataset.json").write_text(json.dumps(content))


@pytest.fixture
def task(tmp_path, monkeypatch):
    """A working folder with task/: four scans; 4 is 3 moved by SHIFT, so that the field of the pair 3, 4 is SHIFT."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "task"
    for k, subject in enumerate(SUBJECTS):
        shift = SHIFT if subject == "0004" else (k % 2, 0, 0)
        name, (grey, labels) = f"T_{subject}_0000", body(shift)
        noise = np.random.default_rng(k).normal(0, 60, SIZE)
        save(folder / "imagesTr" / f"{name}.nii.gz", (grey + noise).astype(np.float32))
        save(folder / "labelsTr" / f"{name}.nii.gz", labels)
        save(folder / "masksTr" / f"{name}.nii.gz", (labels > 0).astype(np.uint8))
        (folder / "keypointsTr").mkdir(exist_ok=True)
        points = np.array([(8, 9.5, 7), (12, 7, 9.25), (10, 12, 6)]) + (shift if subject == "0004" else 0)
        np.savetxt(folder / "keypointsTr" / f"{name}.csv", points, delimiter=",", fmt="%.3f")
    describe(folder)
    return folder


def command(*flags):
    return cli.run(learn2reg.main, [str(flag) for flag in flags])


def fails(capsys, *flags):
    """The one line that a command fails with."""
    capsys.readouterr()
    assert command(*flags) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def field(folder="fields", name="disp_0003_0004", value=SHIFT):
    """Write a displacement field by nibabel alone."""
    array = np.broadcast_to(np.asarray(value, np.float32), (*SIZE, 3)) if np.ndim(value) == 1 else value
    save(pathlib.Path(folder) / f"{name}.nii.gz", np.array(array, np.float32))


def scores(capsys, *flags):
    assert command("score", "task", "fields", *flags) == 0
    return json.loads(pathlib.Path("fields_scores.json").read_text())


def smooth_field(seed, size=SIZE, amplitude=4.0):
    noise = np.random.default_rng(seed).normal(size=(*size, 3))
    smooth = ndimage.gaussian_filter(noise, (2, 2, 2, 0))
    return (smooth * amplitude / np.abs(smooth).max()).astype(np.float32)


# ------------------------------------------------------------------------------------------------------ import


def test_import_keeps_every_voxel_and_the_files_axes(task, capsys):
    save(task / "imagesTr" / "T_0004_0000.nii.gz", body(SHIFT)[0])
    assert command("import", "task", "-o", "sets/t", "--window", "-250,1300") == 0
    config = load_dataset_config("sets/t.json")
    assert config.image_size == SIZE
    assert config.view.orientation == "LAS"
    assert config.view.spacing == pytest.approx(SPACING)
    assert config.labels == {"liver": 1, "spleen": 2}
    assert config.schemes == {"1": {"train": 1.0}, "2": {"val": 1.0}}
    assert config.subsets == {"train": ("t/T_0001_0000", "t/T_0002_0000"), "val": ("t/T_0003_0000", "t/T_0004_0000")}
    assert config.pairs == {"val": (("t/T_0003_0000", "t/T_0004_0000"),)}
    grey, labels = body(SHIFT)
    with h5py.File("sets/t.h5") as file:
        scan = file["T_0004_0000"]
        np.testing.assert_array_equal(scan["segmentation"], labels)
        assert np.abs(scan["volume"][...] - np.clip((grey + 900) * 255 / 1300, 0, 255)).max() < 1
        np.testing.assert_allclose(scan["point"][1], (14, 6, 10.25), atol=1e-4)
        assert scan.attrs["spacing"] == pytest.approx(SPACING)
    assert "all pairs" in capsys.readouterr().out


def test_import_and_check_agree(task, capsys):
    from data_util import check

    assert command("import", "task", "-o", "t") == 0
    assert cli.run(check.main, ["t.json"]) == 0, capsys.readouterr()


def test_older_and_newer_descriptions(task):
    older = ["imagesTr/T_0001_0000.nii.gz", "imagesTr/T_0002_0000.nii.gz", "imagesTr/T_0004_0000.nii.gz"]
    changes = {"training": older, "labels": {"0": "background", "1": "liver"}, "tensorImageSize": "4D"}
    describe(task, **changes, registration_val=..., tensorImageShape=..., pairs=[pair("0001", "0004")])
    found = read_task(task)
    assert found.labels == {"liver": 1}
    assert found.pairs["val"] == (("T_0001_0000", "T_0004_0000"),)
    assert found.training == ("T_0002_0000",)
    assert found.cases["T_0002_0000"].label == task / "labelsTr" / "T_0002_0000.nii.gz"
    describe(task, **changes, registration_val=[])
    (task / "pairs_val.csv").write_text("fixed,moving\n4,2\n1,4\n")
    assert read_task(task / "T_dataset.json").pairs["val"] == (
        ("T_0004_0000", "T_0002_0000"),
        ("T_0001_0000", "T_0004_0000"),
    )


def test_landmarks_that_are_named_as_images_are_found(task):
    (task / "keypoints01Tr").mkdir()
    (task / "keypoints01Tr" / "T_0001_0000.csv").write_text("1,2,3\n")
    named = entry("T_0001_0000") | {"keypoints01": "./keypoints01Tr/T_0001_0000.nii.gz"}
    describe(task, training=[named, *(entry(f"T_{k}_0000") for k in SUBJECTS[1:])])
    landmarks = read_task(task).cases["T_0001_0000"].landmarks
    assert landmarks == {"keypoints01": task / "keypoints01Tr" / "T_0001_0000.csv"}


def test_training_pairs_are_listed_and_leave_validation_images_out(task, capsys):
    pairs = [pair("0001", "0002"), pair("0002", "0003"), pair("0002", "0001")]
    describe(task, training_paired_images=pairs, registration_test=[pair("0009", "0003")], test=[entry("T_0009_0000")])
    assert command("import", "task", "-o", "t") == 0
    assert "no scheme 'test'" in capsys.readouterr().err
    config = load_dataset_config("t.json")
    assert config.pairs["train"] == (("t/T_0001_0000", "t/T_0002_0000"), ("t/T_0002_0000", "t/T_0001_0000"))
    assert "test" not in config.schemes


def test_what_cannot_be_imported_is_said_in_one_line(task, capsys):
    assert "no such folder" in fails(capsys, "import", "nothing", "-o", "t")
    pathlib.Path("empty").mkdir()
    assert "empty: has no dataset.json" in fails(capsys, "import", "empty", "-o", "t")
    describe(task, registration_val=[pair("0003", "0777")])
    told = fails(capsys, "import", "task", "-o", "t")
    assert "registration_val, entry 1" in told
    assert "T_0777_0000" in told
    describe(task, registration_val=[{"fixed": 3}])
    assert "registration_val, entry 1" in fails(capsys, "import", "task", "-o", "t")
    describe(task)
    save(task / "imagesTr" / "T_0002_0000.nii.gz", np.arange(60.0).reshape(3, 4, 5))
    (task / "labelsTr" / "T_0002_0000.nii.gz").unlink()
    told = fails(capsys, "import", "task", "-o", "t")
    assert "T_0002_0000" in told
    assert "3x4x5" in told
    assert not pathlib.Path("t.h5").exists()
    (task / "T_dataset.json").write_text("{")
    assert "T_dataset.json: cannot be read as JSON" in fails(capsys, "import", "task", "-o", "t")


# ------------------------------------------------------------------------------------------------------ export


def kept(folder, flow, file_format, spacing=SPACING, orientation="LAS"):
    """Keep a flow of the pair as eval.py --save flow does."""
    grey = np.zeros((*SIZE, 1), np.float32)[..., 0]
    images = {
        "flow": types.SimpleNamespace(array=flow, kind="flow", side="fixed"),
        "moving": types.SimpleNamespace(array=grey, kind="grey", side="moving"),
    }
    ids = [f"t_T_{subject}_0000" for subject in ("0003", "0004")]
    result = types.SimpleNamespace(
        index=0, fixed_id=ids[0], moving_id=ids[1], images=images, fixed_spacing=spacing, moving_spacing=spacing * 2
    )
    pair_images.save_pair(folder, result, list(images), file_format, orientation)


@pytest.mark.parametrize("kind", ["npz", "mm", "voxels"])
def test_flows_of_an_evaluation_become_fields_in_voxels(task, kind):
    assert command("import", "task", "-o", "t") == 0
    flow = smooth_field(0)
    spacing = np.full(3, np.nan) if kind == "voxels" else SPACING
    kept("evaluate/r", flow, "npz" if kind == "npz" else "nii", spacing)
    assert command("export", "task", "-d", "t.json", "--flows", "evaluate/r", "-o", "out") == 0
    image = nibabel.load("out/disp_0003_0004.nii.gz")
    assert image.get_data_dtype() == np.float32
    assert image.shape == (*SIZE, 3)
    np.testing.assert_allclose(image.affine, AFFINE)
    np.testing.assert_allclose(image.get_fdata(), flow, atol=1e-5 if kind == "mm" else 0)
    assert [path.name for path in pathlib.Path("out").iterdir()] == ["disp_0003_0004.nii.gz"]


def test_long_names_where_asked_for_and_where_short_ones_would_be_the_same(task):
    assert read_task(task).field_names(("T_0003_0000", "T_0004_0000")) == ["disp_0003_0004", "disp_0003_0000_0004_0000"]
    followups = [f"T_0001_000{k}" for k in range(3)]
    described = [
        {"fixed": f"imagesTr/{name}.nii.gz", "moving": f"imagesTr/{followups[0]}.nii.gz"} for name in followups
    ]
    describe(task, training=[entry(name) for name in followups], registration_val=described[1:])
    found = read_task(task)
    names = [found.field_names(ids) for ids in found.pairs["val"]]
    assert names == [["disp_0001_0001_0001_0000"], ["disp_0001_0002_0001_0000"]]


def test_a_run_is_evaluated_by_eval_py(task, monkeypatch, capsys):
    given = []

    def evaluation(command, **_):
        given.extend(map(str, command[1:]))
        kept("evaluate/r-2", smooth_field(1), "npz")
        return subprocess.CompletedProcess(command, 0, "Dice 0.5\nReport: evaluate/r-2.txt\nnext: look\n")

    monkeypatch.setattr(subprocess, "run", evaluation)
    assert command("import", "task", "-o", "t") == 0
    assert command("export", "task", "-d", "t.json", "-c", "RUN", "-o", "out", "-g", "-1", "--refine", "5") == 0
    assert pathlib.Path(given[0]).is_file()
    assert " ".join(given[1:]) == ("-c RUN -d t.json -v 2 --save flow --save_format npz --resume -g -1 --refine 5")
    np.testing.assert_array_equal(nibabel.load("out/disp_0003_0004.nii.gz").get_fdata(), smooth_field(1))
    failed = subprocess.CompletedProcess([], 1, "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    assert "eval.py failed" in fails(capsys, "export", "task", "-d", "t.json", "-c", "RUN", "-o", "new")
    assert not pathlib.Path("new").exists()


def test_what_cannot_be_exported_is_said_in_one_line(task, capsys):
    assert command("import", "task", "-o", "t") == 0
    flags = ["export", "task", "-d", "t.json", "--flows", "evaluate/r", "-o", "out"]
    assert "evaluate/r: no such folder" in fails(capsys, *flags)
    pathlib.Path("evaluate/r").mkdir(parents=True)
    assert "no flow of the pair fixed t_T_0003_0000, moving t_T_0004_0000" in fails(capsys, *flags)
    assert "no pairs of the subset 'test'" in fails(capsys, *flags, "--subset", "test")
    kept("evaluate/r", smooth_field(0)[:-1], "npz")
    assert "23x20x16" in fails(capsys, *flags)
    kept("evaluate/r", smooth_field(0), "npz")
    assert command(*flags) == 0
    assert "out/disp_0003_0004.nii.gz is there already" in fails(capsys, *flags)
    assert command(*flags, "--overwrite") == 0
    with h5py.File("t.h5", "r+") as file:  # as data_util.build would have turned it
        file["T_0004_0000"].attrs["direction"] = np.eye(3).ravel()
    assert "T_0004_0000 is not on the grid" in fails(capsys, *flags, "--overwrite")
    with h5py.File("t.h5", "r+") as file:
        del file["T_0004_0000"]
    assert "T_0004_0000 is not in it" in fails(capsys, *flags, "--overwrite")


@pytest.mark.slow  # trains and evaluates: TensorFlow twice
def test_three_commands_with_a_network(task, capsys):
    import train

    assert command("import", "task", "-o", "datasets/t") == 0
    flags = ["-n", "0", "-d", "datasets/t.json", "-g", "-1", "--batch", "2", "--round", "1", "--epochs", "1"]
    assert cli.run(train.main, [*flags, "--val_steps", "1", "--net_args", "channels=2", "--name", "t"]) == 0
    (run,) = pathlib.Path("weights").iterdir()
    flags = ["-d", "datasets/t.json", "-c", run, "-o", "fields", "-g", "-1", "--batch", "1"]
    assert command("export", "task", *flags) == 0
    report = json.loads(next(pathlib.Path("evaluate").glob("*.json")).read_text())["summary"]
    (case,) = scores(capsys)["cases"]
    # Both read an affine flow, the one linearly and the other by splines; labels are voted on by other rules.
    assert case["tre_keypoints"] == pytest.approx(report["landmark_distance_mm"]["mean"], rel=0.01)
    assert case["dice"] == pytest.approx(report["dice"]["mean"], abs=0.05)


# ------------------------------------------------------------------------------------------------------- score


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
