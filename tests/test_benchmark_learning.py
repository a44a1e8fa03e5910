"""benchmarks.learning: what its table says, and that what is finished is not done again."""

import json

import pytest

from benchmarks import learning
from errors import UserError


def test_named():
    assert learning.named('a b=--net_args "reg_factor=2, channels=4" --lr 1') == (
        "a b",
        ["--net_args", "reg_factor=2, channels=4", "--lr", "1"],
    )
    for text in ("plain", "=--lr 1", "--lr=1"):
        with pytest.raises(UserError, match="write NAME=FLAGS"):
            learning.named(text)


def test_table():
    rows = {
        "plain": [
            {"dice": 0.5, "folding": 0.01, "dice_before": 0.4, "flow_error": None},
            {"dice": 0.7, "folding": 0.02},
        ],
        "one": [{"dice": 0.8125, "folding": None}],
    }
    assert learning.table(rows).splitlines() == [
        "| variant | Dice | folded, % |",
        "| --- | --- | --- |",
        "| before | 0.400 |  |",
        "| plain | 0.600 ± 0.141 | 1.500 ± 0.707 |",
        "| one | 0.812 |  |",
    ]


def test_each_seed_is_trained_and_evaluated_once(tmp_path, monkeypatch, capsys):
    calls = []

    def run(folder, script, *flags):
        calls.append((script, flags))
        if script == "train.py":
            (folder / "weights" / f"Jan01_{flags[-1]}").mkdir(parents=True)
        else:
            name = flags[1].removeprefix("weights/")
            (folder / "evaluate").mkdir(exist_ok=True)
            seed = [flags for script, flags in calls if script == "train.py"][-1]
            dice = 0.5 + int(seed[seed.index("--seed") + 1]) / 10 + ("--lr" in seed[-4:]) / 100
            summary = {"summary": {"dice": {"mean": dice}}}
            (folder / "evaluate" / f"{name}-model-30-2.json").write_text(json.dumps(summary))

    monkeypatch.setattr(learning, "run", run)
    (tmp_path / "set.json").write_text("{}")
    flags = ["-o", str(tmp_path), "-d", str(tmp_path / "set.json"), "--steps", "30", "--common", "-b VTN"]
    learning.main([*flags, "--seeds", "1,2", "plain=", "fast=--lr 1"])
    assert capsys.readouterr().out.splitlines()[-2:] == ["| plain | 0.650 ± 0.071 |", "| fast | 0.660 ± 0.071 |"]
    assert len(calls) == 8
    assert {"--round", "--epochs", "-b", "--seed"} <= set(calls[0][1])
    learning.main([*flags, "--seeds", "2,1,0", "fast=--lr 1"])
    assert capsys.readouterr().out.splitlines()[-1] == "| fast | 0.610 ± 0.100 |"
    assert len(calls) == 10


def test_mistakes_are_told_in_a_line(tmp_path):
    with pytest.raises(UserError, match="--seeds is 'a'"):
        learning.main(["-o", str(tmp_path), "-d", "set.json", "--seeds", "a", "plain="])
    with pytest.raises(UserError, match=r"set\.json: there is no such file"):
        learning.main(["-o", str(tmp_path), "-d", str(tmp_path / "set.json"), "plain="])
    with pytest.raises(UserError, match=r"eval\.py ended with status 1"):
        learning.run(tmp_path, "eval.py", "--unknown")
