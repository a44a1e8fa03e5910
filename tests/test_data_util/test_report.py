"""Records and reports from pairs made up by hand."""

import csv
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cli
from data_util import report
from data_util.output import tables
from data_util.output.records import Record, Records, read_records, remaining
from data_util.output.report_files import check_replaceable, is_finished, write_report
from data_util.output.settings import Settings, Value
from data_util.report import merge
from errors import UserError

SETTINGS = Settings(
    report="run-model-5",
    checkpoint="run-model-5",
    dataset="a.json",
    scheme="2",
    paired=False,
    pairs=3,
    batch=4,
    network={"rep": 1, "image_size": (8, 8, 8)},
    rep=1,
    refine=0,
    labels={"left": 4, "right": 9},
    metrics=("overlap", "landmarks"),
    per_cascade=False,
    save=(),
    save_format="nii",
    figures=0,
    versions={"python": "3.11.7"},
    weights="abc",
    values={
        "dice": Value(per="label", better="higher"),
        "jaccard": Value(per="label", better="higher"),
        "landmark_distance": Value("voxel", "landmark", "lower"),
        "jacobian_std": Value(),
        "hd95_mm": Value("mm", "label", "lower"),
    },
)
NAN = float("nan")


@dataclasses.dataclass
class Result:
    """What `Records.add` reads of a PairResult."""

    index: int
    stages: list
    fixed_id: str = "a_1"
    moving_id: str = "b_2"
    seconds: float = 0.123456789
    before: dict = dataclasses.field(default_factory=dict)


def stage(dice, landmarks, jacobian=0.5):
    return {
        "dice": np.array(dice, np.float32),
        "jaccard": np.array(dice, np.float32) / 2,
        "landmark_distance": np.array(landmarks, np.float32),
        "jacobian_std": np.float32(jacobian),
        "hd95_mm": np.array([NAN, NAN], np.float32),
    }


RESULTS = [
    Result(0, [stage([0.5, 0.75], [1.5, NAN, 2.5])]),
    Result(1, [stage([NAN, 0.25], [NAN, NAN, NAN], 1.5)], moving_id="c_3"),
    Result(2, [stage([NAN, NAN], [4.0, 5.0, 6.0], 2.5)], fixed_id="c_3"),
]


def written(path, results, settings=SETTINGS, **options):
    with Records(path, settings, **options) as records:
        for result in results:
            records.add(result)
    return records


@pytest.fixture
def records(tmp_path):
    written(tmp_path / "r.records", RESULTS)
    return read_records(tmp_path / "r.records")[1]


# The reports


def test_text_report_has_zeros_where_nothing_was_measured(records):
    lines = tables.text_report(records, SETTINGS).splitlines()
    assert lines[:4] == [
        "a_1 b_2 0.625 0.3125 2.0 0.5",
        "a_1 c_3 0.25 0.125 0.0 1.5",
        "c_3 b_2 0.0 0.0 5.0 2.5",
        "Summary",
    ]
    numbers = {line.split(": ")[0]: line.split(": ")[1] for line in lines[4:]}
    assert list(numbers) == ["Dice score", "Jacc score", "Landmark distance", "Jacobian determinant"]
    # The mean of Dice is over labels and pairs together, its deviation over pairs; a missing landmark counts as 0.
    assert numbers["Dice score"] == f"{np.mean([0.5, 0.75, 0.25], dtype=np.float32)} ({0.1875})"
    mean, deviation = (float(text.strip("()")) for text in numbers["Landmark distance"].split())
    np.testing.assert_allclose([mean, deviation], [7 / 3, np.std([2, 0, 5])], rtol=1e-6)
    mean, deviation = (float(text.strip("()")) for text in numbers["Jacobian determinant"].split())
    np.testing.assert_allclose([mean, deviation], [1.5, np.std([0.5, 1.5, 2.5])], rtol=1e-6)


def test_text_report_without_the_values_it_shows():
    record = Record(0, "a", "b", 1, ({"folding": np.float32(0.25)},), {})
    assert tables.text_report([record], SETTINGS).splitlines()[:3] == [
        "a b 0.0 0.0 0.0 0.0",
        "Summary",
        "Dice score: 0.0 (0.0)",
    ]


def test_csv_report_has_one_row_per_pair_and_per_label_and_is_empty_where_nothing_was_measured(records):
    rows = list(csv.DictReader(tables.csv_report(records, SETTINGS).splitlines()))
    assert [(row["index"], row["label"]) for row in rows] == [
        (str(i), k) for i in range(3) for k in ("", "left", "right")
    ]
    columns = ("fixed", "moving", "dice", "jaccard", "landmark_distance", "jacobian_std", "hd95_mm")
    table = [tuple(row[name] for name in columns) for row in rows]
    assert table == [
        ("a_1", "b_2", "0.625", "0.3125", "2.0", "0.5", ""),
        ("a_1", "b_2", "0.5", "0.25", "", "", ""),
        ("a_1", "b_2", "0.75", "0.375", "", "", ""),
        ("a_1", "c_3", "0.25", "0.125", "", "1.5", ""),
        ("a_1", "c_3", "", "", "", "", ""),
        ("a_1", "c_3", "0.25", "0.125", "", "", ""),
        ("c_3", "b_2", "", "", "5.0", "2.5", ""),
        ("c_3", "b_2", "", "", "", "", ""),
        ("c_3", "b_2", "", "", "", "", ""),
    ]


def test_json_report_counts_what_was_measured(records):
    found = json.loads(json.dumps(tables.json_report(records, SETTINGS)))
    assert found["pairs"] == 3
    assert found["settings"]["network"] == {"rep": 1, "image_size": [8, 8, 8]}
    assert found["summary"]["dice"] == {"mean": 0.4375, "std": 0.1875, "count": 2}
    assert found["summary"]["landmark_distance"] == {"mean": 3.5, "std": 1.5, "count": 2}
    assert found["summary"]["hd95_mm"] == {"mean": None, "std": None, "count": 0}
    assert found["summary"]["seconds"] == {"mean": 0.1235, "std": 0.0, "count": 3}
    assert found["labels"]["left"]["dice"] == {"mean": 0.5, "std": 0.0, "count": 1}
    assert found["labels"]["right"]["jaccard"] == {"mean": 0.25, "std": 0.125, "count": 2}
    assert "jacobian_std" not in found["labels"]["left"]
    assert "cascades" not in found


def test_every_cascade_in_csv_json_and_figure(tmp_path):
    stages = [stage([0.25, 0.5], [2.0]), stage([0.5, NAN], [1.0]), stage([0.75, 0.75], [NAN])]
    settings = dataclasses.replace(SETTINGS, pairs=2, per_cascade=True)
    records = written(tmp_path / "r.records", [Result(1, stages), Result(0, stages)], settings)
    write_report(tmp_path / "out", *read_records(records.path))
    rows = list(csv.DictReader((tmp_path / "out-cascades.csv").read_text().splitlines()))
    assert [row["cascade"] for row in rows] == [str(k) for k in (0, 0, 0, 1, 1, 1, 2, 2, 2)] * 2
    assert [row["index"] for row in rows] == ["0"] * 9 + ["1"] * 9
    assert [row["dice"] for row in rows[::3]] == ["0.375", "0.5", "0.75"] * 2
    assert [row["dice"] for row in rows[3:6]] == ["0.5", "0.5", ""]
    cascades = json.loads((tmp_path / "out.json").read_text())["cascades"]
    assert [part["cascade"] for part in cascades] == [0, 1, 2]
    assert [part["summary"]["dice"]["mean"] for part in cascades] == [0.375, 0.5, 0.75]
    assert [part["summary"]["landmark_distance"]["count"] for part in cascades] == [2, 2, 0]
    assert cascades[1]["labels"]["right"]["dice"]["count"] == 0
    final = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    assert [row["dice"] for row in final] == ["0.75"] * 6
    assert (tmp_path / "out-cascades.png").read_bytes().startswith(b"\x89PNG")
    assert "landmark" not in tables.cascade_curves(read_records(records.path)[1])


def test_no_figure_of_cascades_where_nothing_can_be_drawn(tmp_path):
    settings = dataclasses.replace(SETTINGS, pairs=1, per_cascade=True)
    records = written(tmp_path / "r.records", [Result(0, [{"folding": np.float32(0)}] * 3)], settings)
    write_report(tmp_path / "out", *read_records(records.path))
    assert not (tmp_path / "out-cascades.png").exists()
    assert (tmp_path / "out.json").exists()


def test_the_order_of_the_records_does_not_matter(tmp_path):
    for name, order in (("a", RESULTS), ("b", RESULTS[::-1])):
        write_report(tmp_path / name, *read_records(written(tmp_path / f"{name}.records", order).path))
    for ending in (".txt", ".csv", ".json"):
        assert (tmp_path / f"a{ending}").read_bytes() == (tmp_path / f"b{ending}").read_bytes()


def test_an_incomplete_evaluation_is_no_report(tmp_path):
    records = written(tmp_path / "r.records", RESULTS[:2])
    with pytest.raises(UserError, match="2 records of 3 pairs: pair 2"):
        write_report(tmp_path / "out", *read_records(records.path))
    assert [p.name for p in tmp_path.iterdir()] == ["r.records"]


# Records: go on, refuse, survive


def test_records_go_on(tmp_path):
    whole = written(tmp_path / "whole.records", RESULTS)
    written(tmp_path / "part.records", RESULTS[:2])
    with Records(tmp_path / "part.records", SETTINGS, resume=True) as part:
        assert part.done == {0, 1}
        part.add(RESULTS[2])
    assert part.done == {0, 1, 2}
    assert part.path.read_bytes() == whole.path.read_bytes()


@pytest.mark.parametrize("cut", [1, 7, 60])
def test_a_line_cut_by_a_kill_is_done_again(tmp_path, cut):
    path = written(tmp_path / "r.records", RESULTS).path
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with Records(path, SETTINGS, resume=True) as again:
        assert again.done == {0, 1}
        again.add(RESULTS[2])
    assert path.read_bytes() == whole


def test_resume_without_records_starts_anew(tmp_path):
    with Records(tmp_path / "folder" / "r.records", SETTINGS, resume=True) as records:
        assert records.done == set()
        for result in RESULTS:
            records.add(result)
    assert len(read_records(tmp_path / "folder" / "r.records")[1]) == 3


def test_records_of_a_stopped_run_are_not_thrown_away(tmp_path):
    path = written(tmp_path / "r.records", RESULTS[:2]).path
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"r\.records holds 2 pairs .*--resume"):
        Records(path, SETTINGS)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": 4}, r"pairs 3, not 4"),
        ({"network": {"rep": 2, "image_size": [8, 8, 8]}}, r"network\.rep 1, not 2"),
        ({"labels": None}, r"labels \{.*\}, not None"),
        ({"save": ("flow",)}, r"save \[\], not \['flow'\]"),
    ],
)
def test_records_of_other_settings_are_refused(tmp_path, change, message):
    path = written(tmp_path / "r.records", RESULTS[:2]).path
    before = path.read_bytes()
    with pytest.raises(UserError, match=message):
        Records(path, dataclasses.replace(SETTINGS, **change), resume=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize("done", [0, 1])
def test_an_error_before_the_first_pair_leaves_no_records(tmp_path, done):
    def results():
        yield from RESULTS[:done]
        raise UserError("damaged")

    with pytest.raises(UserError, match="damaged"):
        written(tmp_path / "r.records", results())
    assert (tmp_path / "r.records").exists() == bool(done)


def test_records_without_a_pair_stop_nobody(tmp_path):
    written(tmp_path / "r.records", [])
    written(tmp_path / "r.records", RESULTS, dataclasses.replace(SETTINGS, pairs=5))
    assert read_records(tmp_path / "r.records")[0].pairs == 5


@pytest.mark.parametrize("content", ["no json\n", '{"a": 1', "\x00\x00\n", "[1]\n"])
def test_a_file_of_something_else_is_not_merged_and_holds_nobody_up(tmp_path, content):
    (tmp_path / "r.records").write_text(content)
    with pytest.raises(UserError, match="not a file of evaluation records"):
        read_records(tmp_path / "r.records")
    assert written(tmp_path / "r.records", RESULTS, resume=True).done == {0, 1, 2}
    with pytest.raises(UserError, match="No such file"):
        read_records(tmp_path / "other.records")


def test_an_empty_file_is_the_start_of_one(tmp_path):
    (tmp_path / "r.records").write_text("")
    assert written(tmp_path / "r.records", RESULTS[:1]).done == {0}


def test_what_is_not_finite_is_not_measured(tmp_path):
    values = {"dice": np.array([np.inf, 0.5], np.float32), "jacobian_std": np.float32(-np.inf)}
    (record,) = read_records(written(tmp_path / "r.records", [Result(0, [values])]).path)[1]
    np.testing.assert_array_equal(record.values["dice"], [NAN, 0.5])
    assert np.isnan(record.values["jacobian_std"])


def test_is_finished(tmp_path):
    assert not is_finished(tmp_path / "out", SETTINGS)
    write_report(tmp_path / "out", *read_records(written(tmp_path / "r.records", RESULTS).path))
    assert is_finished(tmp_path / "out", SETTINGS)
    assert not is_finished(tmp_path / "out", dataclasses.replace(SETTINGS, labels=None))
    whole = (tmp_path / "out.json").read_bytes()
    for other in (
        b"[1]",
        b"{",
        b"{}",
        b"[" * 10**6,
        whole.replace(b"0.4375", b"0.4376"),
        whole.replace(b'sum"', b'sun"'),
    ):
        (tmp_path / "out.json").write_bytes(other)
        assert not is_finished(tmp_path / "out", SETTINGS)


# Shards


@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 5), st.sets(st.integers(0, 39)))
def test_shards_share_whole_batches(pairs, batch, parts, done):
    shards = [remaining(pairs, batch, (part, parts)) for part in range(1, parts + 1)]
    assert sorted(index for shard in shards for index in shard) == list(range(pairs))
    whole = [list(range(k, min(k + batch, pairs))) for k in range(0, pairs, batch)]
    for part, shard in enumerate(shards, 1):
        assert [shard[k : k + batch] for k in range(0, len(shard), batch)] == whole[part - 1 :: parts]
        left = remaining(pairs, batch, (part, parts), done)
        groups = [left[k : k + batch] for k in range(0, len(left), batch)]
        assert groups == [group for group in whole[part - 1 :: parts] if not set(group) <= done]


def test_a_report_of_another_evaluation_is_not_replaced(tmp_path, records):
    path = tmp_path / "run-model-5"
    check_replaceable(path, SETTINGS)
    write_report(path, SETTINGS, records)
    check_replaceable(path, dataclasses.replace(SETTINGS, batch=7, versions={"python": "4"}))
    message = r"run-model-5.txt is a report with dataset 'a.json', not 'other.json'; give this one a --name"
    with pytest.raises(UserError, match=message):
        check_replaceable(path, dataclasses.replace(SETTINGS, dataset="other.json"))


def test_merged_shards_are_the_report_of_one_job(tmp_path):
    write_report(tmp_path / "one", *read_records(written(tmp_path / "one.records", RESULTS).path))
    paths = [written(tmp_path / f"x.shard-{k}.records", RESULTS[k::2]).path for k in range(2)]
    command = [sys.executable, "-m", "data_util.report", "merge", *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert (done.returncode, done.stdout) == (0, f"Report: {tmp_path / 'run-model-5'}.txt\n"), done.stderr
    for ending in (".txt", ".csv", ".json"):
        assert (tmp_path / f"run-model-5{ending}").read_bytes() == (tmp_path / f"one{ending}").read_bytes()


def test_merge_refuses_what_is_not_one_whole_evaluation(tmp_path, capsys):
    first, second = (written(tmp_path / f"{k}.records", RESULTS[k::2]).path for k in range(2))
    other = written(tmp_path / "o.records", RESULTS[1:2], dataclasses.replace(SETTINGS, network={"rep": 3})).path
    for paths, message in (
        ([first], "2 records of 3 pairs: pair 1 and 0 more are missing"),
        ([first, second, second], r"pair 1 is in .*1\.records and in .*1\.records; give every shard once"),
        ([first, other], r"network.rep 3, not 1"),
        ([first, tmp_path / "none.records"], "No such file"),
    ):
        with pytest.raises(UserError, match=message):
            merge(paths)
        assert cli.run(report.main, ["merge", *map(str, paths)]) == 1
        assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(SystemExit, match="2"):
        report.main(["merge"])
    assert not list(tmp_path.glob("run-model-5*"))


# Files of before, other processes, and what got worse


OLD = Path(__file__).parents[1] / "old_reports"


@pytest.mark.parametrize("name", ["small-model-7", "small-model-7-repauto-refine3-auto"])
def test_old_shards_merge_into_the_old_report(tmp_path, name):
    for path in OLD.glob(f"{name}.shard-*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    target = merge(sorted(tmp_path.glob("*.records")))
    assert Path(f"{target}.txt").read_bytes() == (OLD / f"{target.name}.txt").read_bytes()
    assert Path(f"{target}.csv").read_bytes() == (OLD / f"{target.name}.csv").read_bytes()
    new, old = (json.loads(path.read_text()) for path in (Path(f"{target}.json"), OLD / f"{target.name}.json"))
    assert {key: new[key] for key in old if key != "settings"} == {key: old[key] for key in old if key != "settings"}
    assert {key: new["settings"][key] for key in old["settings"]} == old["settings"]


def test_two_processes_do_not_write_one_file(tmp_path):
    with Records(tmp_path / "r.records", SETTINGS) as records:
        records.add(RESULTS[0])
        with pytest.raises(UserError, match="is being written by another process; wait until it is done"):
            Records(tmp_path / "r.records", SETTINGS, resume=True)
        records.add(RESULTS[1])
    assert [record.index for record in read_records(tmp_path / "r.records")[1]] == [0, 1]
    with Records(tmp_path / "r.records", SETTINGS, resume=True) as records:
        assert records.done == {0, 1}


def test_weights_are_known_by_their_content_and_patch_versions_do_not_count():
    copied = dataclasses.replace(SETTINGS, written=7.0, versions={"python": "3.11.9"})
    assert SETTINGS.difference(copied) is None
    assert "weights 'abc', not 'def'" in SETTINGS.difference(dataclasses.replace(SETTINGS, weights="def"))
    assert SETTINGS.difference(dataclasses.replace(SETTINGS, versions={"python": "3.12.0"}))


def test_the_score_before_stands_beside_the_one_after_and_what_got_worse_is_said(tmp_path):
    before = {"dice": np.array([0.5, 0.5], np.float32), "landmark_distance": np.array([1.0], np.float32)}
    results = [Result(k, [stage([0.5 + 0.1 * k, 0.3], [2.0 + k])], before=before) for k in range(3)]
    _, records = read_records(written(tmp_path / "r.records", results).path)
    lines = "\n".join(tables.headlines(records, SETTINGS))
    assert "0.5000 before" in lines
    assert "0.4500 after" in lines
    warnings = tables.warnings(records, SETTINGS)
    assert any("dice 0.5000 -> 0.4500" in line for line in warnings)
    assert any("landmark_distance 1.0000 -> 3.0000" in line and "3 of 3 pairs" in line for line in warnings)
    good = [Result(k, [stage([0.9, 0.9], [0.5])], before=before) for k in range(3)]
    _, records = read_records(written(tmp_path / "g.records", good).path)
    assert tables.warnings(records, SETTINGS) == []
