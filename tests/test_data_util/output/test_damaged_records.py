"""Records and reports that were damaged on the disk: never another report in silence, never a traceback."""

import dataclasses
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest

import cli
from data_util import report
from data_util.output.records import Records, read_records
from data_util.output.report_files import check_replaceable, is_finished, write_report
from errors import UserError
from tests.test_data_util.test_report import NAN, SETTINGS, Result, stage, written

EIGHT = dataclasses.replace(SETTINGS, pairs=8, batch=1)
PAIRS = [
    Result(k, [stage([0.5 + k / 32, NAN], [k, 1.0])], fixed_id=f"a_{k}", before={"dice": np.array([0.25, 0.5])})
    for k in range(8)
]
ENDINGS = (".txt", ".csv", ".json")


def flip(content, chance):
    place = chance.randrange(len(content))
    return content[:place] + bytes([content[place] ^ (1 << chance.randrange(8))]) + content[place + 1 :]


def other_digit(content, chance):
    place = chance.choice([k for k, byte in enumerate(content) if chr(byte).isdigit()])
    digit = chance.choice([d for d in b"0123456789" if d != content[place]])
    return content[:place] + bytes([digit]) + content[place + 1 :]


def cut(content, chance):
    return content[: chance.randrange(len(content))]


def lose_the_beginning(content, chance):
    return content[chance.randrange(1, len(content)) :]


def blank_a_block(content, chance):
    place = chance.randrange(len(content))
    return content[:place] + bytes(min(64, len(content) - place)) + content[place + 64 :]


def swap_lines(content, chance):
    lines = content.splitlines(keepends=True)
    i, k = chance.sample(range(len(lines)), 2)
    lines[i], lines[k] = lines[k], lines[i]
    return b"".join(lines)


def repeat_a_line(content, chance):
    lines = content.splitlines(keepends=True)
    return b"".join([*lines, chance.choice(lines)])


def drop_a_line(content, chance):
    lines = content.splitlines(keepends=True)
    del lines[chance.randrange(len(lines))]
    return b"".join(lines)


DAMAGES = (flip, other_digit, cut, lose_the_beginning, blank_a_block, swap_lines, repeat_a_line, drop_a_line)


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """Nothing here is about power failures: what is written need not reach the disk at once."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A folder with two shards and the report of both."""
    folder = tmp_path_factory.mktemp("shards")
    paths = [written(folder / f"r.shard-{k + 1}-of-2.records", PAIRS[k::2], EIGHT).path for k in range(2)]
    report.merge(paths)
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_gives_the_same_report_or_one_line_of_error(shards, tmp_path, capsys, damage):
    chance = random.Random(damage.__name__)
    good, bad = (tmp_path / f"r.shard-{k}-of-2.records" for k in (1, 2))
    good.write_bytes((shards / good.name).read_bytes())
    whole = (shards / bad.name).read_bytes()
    seen = set()
    for _ in range(12):
        bad.write_bytes(damage(whole, chance))
        status = cli.run(report.main, ["merge", str(good), str(bad)])
        said = capsys.readouterr().err
        seen.add(status)
        if status == 0:
            for ending in ENDINGS:
                name = f"run-model-5{ending}"
                assert (tmp_path / name).read_bytes() == (shards / name).read_bytes()
        else:
            assert status == 1
            assert said.startswith("error: ")
            assert said.count("\n") == 1
    # All that changes bytes is found; lines of pairs may stand in any order.
    assert seen == ({0, 1} if damage is swap_lines else {1})


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_evaluation_goes_on_to_the_same_report(tmp_path, capsys, damage):
    chance = random.Random(damage.__name__)
    path = written(tmp_path / "r.records", PAIRS, EIGHT).path
    whole = path.read_bytes()
    write_report(tmp_path / "whole", *read_records(path))
    capsys.readouterr()
    for _ in range(12):
        damaged = damage(whole, chance)
        path.write_bytes(damaged)
        with Records(path, EIGHT, resume=True) as records:
            done, said = set(records.done), capsys.readouterr().err
            for pair in PAIRS:
                if pair.index not in done:
                    records.add(pair)
        kept = sum(line in whole.splitlines() for line in set(damaged.split(b"\n")[:-1]))
        assert len(done) >= kept - 1, "more than what was damaged is done again"
        assert said.count("\n") <= 1
        write_report(tmp_path / "again", *read_records(path))
        for ending in ENDINGS:
            assert (tmp_path / f"again{ending}").read_bytes() == (tmp_path / f"whole{ending}").read_bytes()


def lines_of(path):
    return path.read_bytes().splitlines(keepends=True)


def test_a_damaged_line_is_named_with_its_pair_when_an_evaluation_goes_on(tmp_path, capsys):
    path = written(tmp_path / "r.records", PAIRS, EIGHT).path
    lines = lines_of(path)
    lines[3] = lines[3].replace(b"0.5625", b"0.6625")
    path.write_bytes(b"".join(lines))
    with pytest.raises(UserError, match=r"r\.records, line 4: is damaged, or of another evaluation; .*--resume"):
        read_records(path)
    with pytest.raises(UserError, match="holds 7 pairs"):
        Records(path, EIGHT)
    with Records(path, EIGHT, resume=True) as records:
        assert records.done == {0, 1, 3, 4, 5, 6, 7}
    said = capsys.readouterr().err
    assert said == f"{path}: damaged, and left out: line 4 (pair 2); 7 pairs are kept, all others evaluated\n"


def test_a_line_cut_by_a_kill_is_left_out_without_a_word_but_not_merged(tmp_path, capsys):
    path = written(tmp_path / "r.records", PAIRS, EIGHT).path
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"r\.records, line 9: is unfinished; .*--resume"):
        read_records(path)
    with Records(path, EIGHT, resume=True) as records:
        assert records.done == set(range(7))
    assert capsys.readouterr().err == ""


def test_a_line_of_another_evaluation_is_found(tmp_path):
    ours, theirs = (written(tmp_path / f"{k}.records", PAIRS, dataclasses.replace(EIGHT, weights=k)).path for k in "ab")
    lines = lines_of(ours)
    lines[5] = lines_of(theirs)[5]
    ours.write_bytes(b"".join(lines))
    with pytest.raises(UserError, match=r"a\.records, line 6: is damaged, or of another evaluation"):
        read_records(ours)


def test_lost_settings_are_known_again_by_the_same_flags_alone(tmp_path, capsys):
    path = written(tmp_path / "r.records", PAIRS, EIGHT).path
    path.write_bytes(b"{" + path.read_bytes())
    with pytest.raises(UserError, match=r"r\.records: line 1 is damaged, .*delete the file to start anew"):
        Records(path, dataclasses.replace(EIGHT, weights="other"), resume=True)
    with Records(path, EIGHT, resume=True) as records:
        assert records.done == set(range(8))
    assert "line 1;" in capsys.readouterr().err
    assert read_records(path)[0] == dataclasses.replace(EIGHT, network={"rep": 1, "image_size": [8, 8, 8]})


def test_a_pair_twice_with_other_values_is_done_again_or_refused(tmp_path, capsys):
    other = dataclasses.replace(PAIRS[2], seconds=9.0)
    path = written(tmp_path / "r.records", [*PAIRS, other], EIGHT).path
    with pytest.raises(UserError, match=r"pair 2 is on line 4 and line 10; delete one of them"):
        read_records(path)
    with Records(path, EIGHT, resume=True) as records:
        assert records.done == set(range(8)) - {2}
    assert "line 4 (pair 2), line 10 (pair 2)" in capsys.readouterr().err


def test_two_shards_with_other_values_of_a_pair_are_both_named(tmp_path):
    other = dataclasses.replace(PAIRS[2], stages=[stage([0.1, NAN], [2, 1.0])])
    paths = [
        written(tmp_path / f"{name}.records", pairs, EIGHT).path
        for name, pairs in (("a", PAIRS[:4]), ("b", [other, *PAIRS[4:]]))
    ]
    with pytest.raises(UserError, match=r"pair 2 is in .*a\.records and in .*b\.records, with other values"):
        report.merge(paths)


# Old files, whose lines have no checksum: wrong types are found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": -1}, "index is -1; it must be a whole number from 0"),
        ({"index": 8}, "there is no pair 8 among 8"),
        ({"index": True}, "index is true; it must be a whole number"),
        ({"fixed": 3}, "fixed is 3; it must be a text in quotes"),
        ({"seconds": "fast"}, 'seconds is "fast"; it must be a number'),
        ({"stages": []}, r"stages is \[\]; it must be a list that is not empty"),
        ({"stages": [{"dice": [1, "x"]}]}, r"stages\[0\]\.dice"),
        ({"stages": [{"dice": [1]}]}, "dice must be a list of 2, one for each label"),
        ({"stages": [{"jacobian_std": 1e300}]}, r"stages\[0\]\.jacobian_std is 1e\+300"),
        ({"stages": [{"jacobian_std": NAN}]}, r"stages\[0\]\.jacobian_std is NaN"),
        ({"before": [1]}, r"before is \[1\]; it must be an object"),
    ],
)
def test_a_wrong_value_in_an_old_line_is_named(tmp_path, change, message):
    path = tmp_path / "r.records"
    lines = [json.loads(line) for line in lines_of(written(path, PAIRS, EIGHT).path)]
    for line in lines:
        del line["sum"]
    lines[2].update(change)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=rf"r\.records, line 3: {message}"):
        read_records(path)
    with Records(path, EIGHT, resume=True) as records:
        assert records.done == set(range(8)) - {1}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pairs", "8"), ("pairs", -1), ("batch", None), ("paired", 1), ("network", []), ("rep", 1.5), ("labels", [4]),
        ("labels", {"left": "4"}), ("metrics", "overlap"), ("versions", {"python": 3}), ("values", {"dice": 1}),
        ("written", NAN), ("weights", 5),
    ],
)  # fmt: skip
def test_a_wrong_setting_in_an_old_file_is_named(tmp_path, name, value):
    path = tmp_path / "r.records"
    path.write_text(json.dumps({**EIGHT.to_dict(), name: value}) + "\n")
    with pytest.raises(
        UserError, match=rf"r\.records is not a file of evaluation records \(.*line 1: {name}.* must be"
    ):
        read_records(path)


# Reports


@pytest.fixture
def finished(tmp_path):
    settings = dataclasses.replace(EIGHT, per_cascade=True)
    path = written(tmp_path / "r.records", [dataclasses.replace(p, stages=p.stages * 3) for p in PAIRS], settings).path
    write_report(tmp_path / "out", *read_records(path))
    return tmp_path / "out", settings


@pytest.mark.parametrize("ending", [".txt", ".csv", "-cascades.csv", "-cascades.png"])
def test_a_report_that_lacks_a_file_or_has_a_damaged_one_is_not_finished(finished, capsys, ending):
    path, settings = finished
    assert is_finished(path, settings)
    file = Path(f"{path}{ending}")
    content = file.read_bytes()
    file.write_bytes(flip(content, random.Random(0)))
    assert not is_finished(path, settings)
    file.unlink()
    assert not is_finished(path, settings)
    assert capsys.readouterr().err.count(f"missing or changed: out{ending}; evaluated again\n") == 2
    file.write_bytes(content)
    assert is_finished(path, settings)


def test_no_flipped_bit_of_a_report_is_passed_over(finished, capsys):
    path, settings = finished
    content, chance = Path(f"{path}.json").read_bytes(), random.Random(1)
    for _ in range(50):
        Path(f"{path}.json").write_bytes(flip(content[:-1], chance) + b"\n")
        assert not is_finished(path, settings)
    Path(f"{path}.json").write_text("{}")
    capsys.readouterr()
    check_replaceable(path, settings)
    assert (
        capsys.readouterr().err
        == f"{path}.json: settings: is null; it must be an object {{...}}: it is no report, or damaged: replaced\n"
    )


def test_an_old_report_must_have_its_files(finished):
    path, settings = finished
    report_json = json.loads(Path(f"{path}.json").read_text())
    del report_json["sum"], report_json["files"]
    Path(f"{path}.json").write_text(json.dumps(report_json))
    assert is_finished(path, settings)
    Path(f"{path}-cascades.csv").unlink()
    assert not is_finished(path, settings)
