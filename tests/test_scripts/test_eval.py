"""eval.py from its command line: golden reports, one report whatever the way to it, and clear mistakes."""

import csv
import json
import random
import signal
import subprocess
import sys
import time

import h5py
import make_checkpoint
import make_dataset
import numpy as np
import pytest
import SimpleITK as sitk

import cli
import eval as evaluate_script
from data_util import report as merge
from data_util.scans import affine_search
from network import checkpoints
from network.registry import METRICS
from network.training import adam
from tests.conftest import GOLDEN
from tests.test_network.golden import rule_network

SIZE = (32, 28, 24)
SCANS = 5  # 20 ordered pairs
SPACING = (0.8, 1.5, 2.5)
SCRIPT = GOLDEN.parents[1] / "eval.py"


def run(*arguments):
    """Exit status of eval.py, run in this process and in the current folder."""
    return cli.run(evaluate_script.main, [str(a) for a in ("-g", "-1", *arguments)])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a trained run and its data: scan 4 lacks landmarks and spacing, scan 5 a segmentation."""
    home = tmp_path_factory.mktemp("eval")
    rng = np.random.default_rng(0)
    with h5py.File(home / "scans.h5", "w") as file:
        for k in range(1, SCANS + 1):
            coarse = rng.uniform(0, 255, (8, 7, 6))
            volume = np.kron(coarse, np.ones((4, 4, 4))).astype(np.uint8)
            group = file.create_group(str(k))
            group["volume"] = volume
            if k != 5:
                group["segmentation"] = np.where(volume > 150, 255, 0).astype(np.uint8)
            if k != 4:
                group["point"] = rng.uniform(4, 20, (3, 3)).astype(np.float32)
                group.attrs["spacing"] = SPACING
    ids = [f"s/{k}" for k in range(1, SCANS + 1)]
    config = {
        "files": {"s": {"type": "HDF5", "path": str(home / "scans.h5")}},
        "image_size": SIZE,
        "image_type": "liver",
        "subsets": {"all": ids, "four": ids[:4], "one": ids[:1], "two": ids[:2]},
        "schemes": {"2": {"all": 1.0}, "four": {"four": 1.0}, "lonely": {"one": 1.0}, "two": {"two": 1.0}},
    }
    (home / "data.json").write_text(json.dumps(config))
    network = rule_network("VTN", 1, image_size=SIZE, channels=4)
    folder = home / "weights" / "small"
    folder.mkdir(parents=True)
    checkpoints.save(folder, network, adam(network), 7)
    (folder / "config.json").write_text(json.dumps(network.config.to_dict()))
    (folder / "args.json").write_text(json.dumps({"dataset": str(home / "data.json")}))
    return home


@pytest.fixture
def work(home, tmp_path, monkeypatch):
    """An empty current folder where `-c small` finds the run."""
    (tmp_path / "weights").symlink_to(home / "weights")
    monkeypatch.chdir(tmp_path)
    return tmp_path


COMMAND = ("-c", "small", "--metrics", "overlap,landmarks,folding,similarity,surface")


@pytest.fixture(scope="module")
def undisturbed(home, tmp_path_factory):
    """Text, CSV and JSON of the whole evaluation in one go."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "weights").symlink_to(home / "weights")
        assert run(*COMMAND) == 0
    return {path.suffix: path.read_bytes() for path in (folder / "evaluate").iterdir()}


@pytest.fixture(scope="module")
def plain(undisturbed):
    """Rows of the pairs of scheme 'two' in the CSV of the whole evaluation."""
    rows = csv.DictReader(undisturbed[".csv"].decode().splitlines())
    return [row for row in rows if {row["fixed"], row["moving"]} == {"s_1", "s_2"}]


def assert_same_report(folder, undisturbed, name="small-model-7"):
    assert sorted(p.name for p in folder.glob(f"{name}*") if p.suffix != ".records") == [
        f"{name}{ending}" for ending in (".csv", ".json", ".txt")
    ]
    for ending in (".txt", ".csv"):
        assert (folder / f"{name}{ending}").read_bytes() == undisturbed[ending]


def numbers(text):
    """Words of a report's lines and its numbers: ([[word, ..], ..], [number, ..])."""
    words, found = [], []
    for line in text.splitlines():
        words.append([])
        for word in line.replace("(", " ").replace(")", " ").split():
            try:
                found.append(float(word))
            except ValueError:
                words[-1].append(word)
    return words, np.array(found)


def assert_close_reports(text, expected, rtol=1e-3):
    (words, got), (expected_words, wanted) = numbers(text), numbers(expected)
    assert words == expected_words
    np.testing.assert_allclose(got, wanted, rtol=rtol, atol=1e-9)


# The original's reports


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    make_dataset.write(str(folder))
    make_checkpoint.write(str(folder / "rule-VTN-1"), "VTN", 1, dataset=str(folder / "liver.json"), slots=False)
    return folder


def check_golden(golden, name, *arguments):
    assert run("-c", golden / "rule-VTN-1", "--metrics", "overlap,landmarks,jacobian", *arguments) == 0
    report = f"rule-VTN-1-model-99500{name}.txt"
    with open(f"evaluate/{report}") as file:
        assert_close_reports(file.read(), (GOLDEN / "eval" / report).read_text())


def test_golden_report_of_neighbouring_scans(golden, work):
    check_golden(golden, "-pairs", "-v", "pairs", "--paired", "--batch", "2")


@pytest.mark.slow
def test_golden_report(golden, work):
    check_golden(golden, "")


@pytest.mark.slow
def test_golden_report_of_repeated_cascades(golden, work):
    check_golden(golden, "-rep2", "-r", "2")


@pytest.mark.slow
def test_golden_report_of_an_atlas(golden, work):
    check_golden(golden, "-brain", "-d", golden / "brain.json", "--name", "brain")


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3, 5])
def test_golden_report_whatever_the_batch(golden, work, batch):
    check_golden(golden, "", "--batch", batch)


# One report, whatever the way to it


def test_what_is_measured_and_what_is_not(undisturbed):
    rows = list(csv.DictReader(undisturbed[".csv"].decode().splitlines()))
    assert [(row["fixed"], row["moving"]) for row in rows[:5]] == [
        *(("s_1", f"s_{k}") for k in (2, 3, 4, 5)),
        ("s_2", "s_1"),
    ]
    for row in rows:
        scans = {row["fixed"], row["moving"]}
        for names, missing in (
            (("dice", "jaccard", "hd95", "surface_distance"), "s_5" in scans),
            (("hd95_mm", "surface_distance_mm"), "s_5" in scans or row["fixed"] == "s_4"),
            (("landmark_distance", "landmark_distance_mm"), "s_4" in scans),
            (("folding",), False),
        ):
            assert [row[name] == "" for name in names] == [missing] * len(names), row
    summary = json.loads(undisturbed[".json"])["summary"]
    assert {name: summary[name]["count"] for name in ("dice", "hd95_mm", "landmark_distance_mm", "folding")} == {
        "dice": 12,
        "hd95_mm": 9,
        "landmark_distance_mm": 12,
        "folding": 20,
    }
    assert numbers(undisturbed[".txt"].decode())[0][:1] == [["s_1", "s_2"]]


@pytest.mark.parametrize("batch", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_the_batch_does_not_matter_and_an_older_report_is_replaced(work, undisturbed, batch):
    (work / "evaluate").mkdir()
    for ending in (".txt", ".csv", ".json"):
        (work / "evaluate" / f"small-model-7{ending}").write_text("old")
    assert run(*COMMAND, "--batch", batch) == 0
    assert (work / "evaluate" / "small-model-7.csv").read_text().count("\n") == 21
    assert json.loads((work / "evaluate" / "small-model-7.json").read_text())["settings"]["batch"] == batch
    assert_close_reports((work / "evaluate" / "small-model-7.txt").read_text(), undisturbed[".txt"].decode())


def test_killed_and_resumed(work, undisturbed, capsys):
    pairs = random.randrange(1, 14)
    print(f"killed after {pairs} pairs")
    records = work / "evaluate" / "small-model-7.records"
    with subprocess.Popen([sys.executable, SCRIPT, "-g", "-1", *COMMAND], cwd=work) as process:
        while process.poll() is None and (not records.exists() or records.read_bytes().count(b"\n") <= pairs):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    done = records.read_bytes()
    assert pairs < done.count(b"\n") <= 20
    assert not (work / "evaluate" / "small-model-7.txt").exists()
    capsys.readouterr()

    assert run(*COMMAND) == 1
    assert "--resume" in capsys.readouterr().err
    assert run(*COMMAND, "--resume", "--batch", 2) == 1
    assert capsys.readouterr().err.endswith(
        "batch 4, not 2; give the same flags to go on, or delete the file to start anew\n"
    )
    assert records.read_bytes() == done

    assert run(*COMMAND, "--resume") == 0
    assert_same_report(work / "evaluate", undisturbed)
    assert not records.exists()
    written = (work / "evaluate" / "small-model-7.json").stat().st_mtime_ns
    assert run(*COMMAND, "--resume") == 0
    assert "was finished before" in capsys.readouterr().out
    assert (work / "evaluate" / "small-model-7.json").stat().st_mtime_ns == written


def test_two_shards_merged(work, undisturbed):
    for shard in ("2/2", "1/2"):
        assert run(*COMMAND, "--shard", shard) == 0
    parts = sorted((work / "evaluate").iterdir())
    assert [p.name for p in parts] == [f"small-model-7.shard-{k}-of-2.records" for k in (1, 2)]
    command = [sys.executable, "-m", "data_util.report", "merge", *map(str, parts)]
    subprocess.run(command, check=True, cwd=SCRIPT.parent)
    assert_same_report(work / "evaluate", undisturbed)


def test_everything_kept_of_every_cascade(work):
    flags = ("--per_cascade", "--save", "flow,seg,moving", "--figures", 2, "--metrics", "overlap,similarity,folding")
    assert run("-c", "small:9", "-v", "four", "--paired", "--name", "all", *flags) == 0
    folder = work / "evaluate"
    name = "small-model-7-all-four"
    pairs = ["0_s_1_s_2", "1_s_2_s_1", "2_s_3_s_4", "3_s_4_s_3"]
    assert {p.name for p in folder.iterdir()} == {
        name,
        *(f"{name}{e}" for e in (".txt", ".csv", ".json", "-cascades.csv", "-cascades.png")),
    }
    assert sorted(p.name for p in (folder / name).iterdir()) == sorted([*pairs, f"{pairs[0]}.png", f"{pairs[2]}.png"])
    images = ["fixed_seg", "flow_voxels", "moving", "moving_seg", "warped_seg"]
    assert sorted(p.name for p in (folder / name / pairs[3]).iterdir()) == [f"{image}.nii.gz" for image in images]
    flow = sitk.ReadImage(str(folder / name / pairs[0] / "flow.nii.gz"))
    assert (flow.GetSize(), flow.GetNumberOfComponentsPerPixel()) == (SIZE, 3)
    np.testing.assert_allclose(flow.GetSpacing(), SPACING, rtol=1e-6)
    segs = [
        sitk.GetArrayFromImage(sitk.ReadImage(str(folder / name / pairs[0] / f"{side}_seg.nii.gz"))) == 1
        for side in ("fixed", "moving", "warped")
    ]
    cascades = list(csv.DictReader((folder / f"{name}-cascades.csv").read_text().splitlines()))
    final = list(csv.DictReader((folder / f"{name}.csv").read_text().splitlines()))
    assert [row["cascade"] for row in cascades] == ["0", "1", "2"] * 4
    before = {"dice_before": "dice", "jaccard_before": "jaccard"}  # what the table of cascades has as its cascade 0
    assert [{name: row[value] for name, value in before.items()} for row in cascades[::3]] == [
        {name: row.pop(name) for name in before} for row in final
    ]
    assert [{k: v for k, v in row.items() if k != "cascade"} for row in cascades[2::3]] == final
    for row, seg in ((cascades[0], segs[1]), (cascades[2], segs[2])):
        dice = 2 * (segs[0] & seg).sum() / (segs[0].sum() + seg.sum())
        np.testing.assert_allclose(float(row["dice"]), dice, rtol=1e-6)
    found = json.loads((folder / f"{name}.json").read_text())
    assert [part["summary"]["dice"]["count"] for part in found["cascades"]] == [4] * 3
    assert found["settings"]["metrics"] == ["overlap", "folding", "similarity"]
    assert set(found["settings"]["versions"]) == {"python", "tensorflow", "keras", "numpy"}


def rows_of_two(work, name):
    """Rows of the pairs of scheme 'two' in the CSV of a report, and its JSON."""
    path = work / "evaluate" / f"small-model-7-{name}-two"
    rows = list(csv.DictReader(path.with_suffix(".csv").read_text().splitlines()))
    return rows, json.loads(path.with_suffix(".json").read_text())


def test_refinement_reports_before_and_after(work, plain):
    assert run(*COMMAND, "-v", "two", "--batch", "2", "--refine", "6") == 0
    refined, found = rows_of_two(work, "refine6")
    for before, after in zip(plain, refined, strict=True):
        for name in ("similarity", "dice", "hd95_mm"):
            np.testing.assert_allclose(float(after[f"unrefined_{name}"]), float(before[name]), rtol=1e-3, atol=1e-4)
        assert float(after["similarity"]) > float(before["similarity"]) + 0.01
        assert float(after["similarity_before"]) == pytest.approx(float(before["similarity_before"]), abs=1e-6)
    assert found["settings"]["refine"] == 6
    assert found["summary"]["unrefined_similarity"]["count"] == 2


def test_a_refined_result_is_one_more_cascade(work):
    flags = ("--metrics", "similarity", "--refine", "2", "--per_cascade")
    assert run("-c", "small", "-v", "two", "--batch", "2", *flags) == 0
    _, found = rows_of_two(work, "refine2")
    means = [part["summary"]["similarity"]["mean"] for part in found["cascades"]]
    assert len(means) == 4
    assert means[3] > means[2] == pytest.approx(found["summary"]["unrefined_similarity"]["mean"])


@pytest.fixture(scope="module")
def shifted(home):
    """A data set of two scans of which the second is the first, 6 voxels along x and -3 along z."""
    x, y, z = np.indices(SIZE) - np.array([15, 14, 12])[:, None, None, None]
    organ = 220.0 * (x**2 / 64 + y**2 / 49 + z**2 / 25 < 1) * (1 - 0.6 * (abs(x - 3) + abs(y - 2) + abs(z) < 4))
    with h5py.File(home / "shifted.h5", "w") as file:
        for key, shift in (("1", (0, 0)), ("2", (6, -3))):
            group = file.create_group(key)
            group["volume"] = np.roll(organ, shift, (0, 2)).astype(np.uint8)
            group["segmentation"] = np.where(group["volume"][...] > 0, 255, 0).astype(np.uint8)
            group["point"] = np.array([[15, 14, 12], [18, 16, 12]], np.float32) + (shift[0], 0, shift[1])
            group.attrs["spacing"] = (2.0, 2.0, 2.0)
    config = {
        "files": {"s": {"type": "HDF5", "path": str(home / "shifted.h5")}},
        "image_size": SIZE,
        "subsets": {"all": ["s/1", "s/2"]},
        "schemes": {"2": {"all": 1.0}},
    }
    (home / "shifted.json").write_text(json.dumps(config))
    return home / "shifted.json"


def shift_of(fixed, moving, kind):
    """The map between two scans of `shifted`, from their centres of mass: what is to be found, in no time."""
    centre, target = affine_search._centre_of_mass(fixed), affine_search._centre_of_mass(moving)
    assert kind == "rigid"
    return sitk.AffineTransform(np.eye(3).ravel().tolist(), np.subtract(target, centre).tolist())


def test_an_affine_map_before_the_network(work, shifted, monkeypatch):
    monkeypatch.setattr(affine_search, "find_affine", shift_of)
    flags = ("-c", "small", "-d", shifted, "--metrics", "overlap,landmarks", "--per_cascade", "--affine", "rigid")
    folder = work / "evaluate"
    name = "small-model-7-affinerigid"
    for shard in ("2/2", "1/2"):
        assert run(*flags, "--batch", "1", "--shard", shard) == 0
    merge.main(["merge", *map(str, sorted(folder.glob(f"{name}*.records")))])
    found = json.loads((folder / f"{name}.json").read_text())
    assert found["settings"]["affine"] == "rigid"
    assert found["summary"]["affine_found"] == {**found["summary"]["affine_found"], "mean": 1, "count": 2}
    before, moved = (part["summary"] for part in found["cascades"][:2])
    assert before["landmark_distance"]["mean"] == pytest.approx(np.hypot(6, 3), rel=1e-4)
    assert before["dice"]["mean"] < 0.4
    assert moved["landmark_distance"]["mean"] == pytest.approx(0, abs=1e-4)
    assert moved["dice"]["mean"] > 0.99


def test_adaptive_repeats_are_at_least_as_similar_and_reported(work, plain):
    assert run("-c", "small", "-v", "two", "--batch", "2", "--metrics", "similarity", "-r", "auto") == 0
    rows, auto = rows_of_two(work, "repauto")
    assert auto["settings"]["rep"] == "auto"
    assert auto["summary"]["rep"]["count"] == 2
    for once, repeated in zip(plain, rows, strict=True):
        assert float(repeated["rep"]) >= 1
        assert float(repeated["similarity"]) >= float(once["similarity"]) - 1e-5


# The command line


def test_help_is_quick_and_names_every_metric():
    started = time.perf_counter()
    done = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True)
    assert time.perf_counter() - started < 1
    assert all(name in done.stdout for name in METRICS)
    assert "surface (all but surface)" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch", "0"), "--batch is 0"),
        (("--figures", "-1"), "--figures is -1"),
        (("--refine", "-1"), "--refine is -1"),
        (("--affine", "elastic"), "--affine 'elastic' is no kind of map; known are none, rigid"),
        (("-r", "often"), "-r 'often' is neither a whole number from 1 nor auto"),
        (("-r", "0"), "-r '0' is neither"),
        (("-r", "auto", "--per_cascade"), "leave out --per_cascade"),
        (("-r", "auto", "-g", "0,1"), "work on one device"),
        (("--shard", "3/2"), "--shard '3/2' is not i/n"),
        (("--shard", "0/2"), "--shard '0/2' is not i/n"),
        (("--shard", "2"), "--shard '2' is not i/n"),
        (("--metrics", "overlap,dice"), "--metrics: unknown name 'dice'; known are overlap, landmarks,"),
        (("--metrics", ""), "--metrics: unknown name ''"),
        (("--save", "flow,label"), "--save: unknown name 'label'; known are flow, warped, seg,"),
        (("-v", "nothing"), "no scheme 'nothing'; known are 2, four, lonely"),
        (("-v", "lonely"), "subset 'one' of scheme 'lonely' has no pair"),
        (("-v", "2", "--paired"), "subset 'all'"),
        (("-d", "missing.json"), "missing.json"),
        (("-c", "other"), "other"),
        (("-v", "../two"), "-v is '../two'; it becomes part of the name of a file or folder: leave out /"),
        (("--name", "a\tb"), "--name is 'a\\tb'; it becomes part of the name"),
        (("--name", "n" * 151), "--name has 151 bytes"),
        (
            ("--name", "n" * 150, "-v", "v" * 150),
            "the report's name has 315 bytes, of 224 at most; give a shorter --name",
        ),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(work, capsys, arguments, message):
    assert run("-c", "small", *arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (work / "evaluate").exists()


def test_ctrl_c_keeps_what_is_finished_and_ends_as_a_stopped_command(work, capsys, monkeypatch):
    def evaluate(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate_script, "evaluate_scheme", evaluate)
    assert run("-c", "small", "-v", "two") == cli.STOPPED
    output = capsys.readouterr()
    assert output.out.endswith("Stopped; the finished pairs are kept: go on with the same flags and --resume\n")
    assert "error" not in output.err


def test_damage_that_shows_only_when_read(home, work, capsys):
    (work / "scans.h5").write_bytes((home / "scans.h5").read_bytes())
    with h5py.File(work / "scans.h5", "r+") as file:
        del file["1/point"]
        file["1/point"] = np.zeros((2, 3), np.float32)
    config = json.loads((home / "data.json").read_text())
    config["files"]["s"]["path"] = str(work / "scans.h5")
    (work / "data.json").write_text(json.dumps(config))
    assert run("-c", "small", "-d", "data.json") == 1
    assert "2 and 3 landmarks" in capsys.readouterr().err
    assert list((work / "evaluate").iterdir()) == []


@pytest.mark.parametrize("kept", [0.02, 0.6])
def test_a_file_that_is_cut_off(home, work, capsys, kept):
    whole = (home / "scans.h5").read_bytes()
    (work / "scans.h5").write_bytes(whole[: int(kept * len(whole))])
    config = json.loads((home / "data.json").read_text())
    config["files"]["s"]["path"] = str(work / "scans.h5")
    (work / "data.json").write_text(json.dumps(config))
    assert run("-c", "small", "-d", "data.json") == 1
    error = capsys.readouterr().err
    assert "scans.h5: cannot be read as HDF5" in error
    assert error.count("\n") == 1
    assert not (work / "evaluate").exists()
