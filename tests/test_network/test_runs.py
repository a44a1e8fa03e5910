"""The JSON files of a run: whatever stands in them, what is wrong is one line."""

import argparse
import dataclasses
import json
import pathlib
import random

import pytest

import cli
import train
from errors import UserError
from network import runs
from network.config import CascadeConfig
from published import PAGES

PUBLISHED = {"base_network": "VTN", "n_cascades": 10, "rep": 1, "gpu": "0", "batch": 4, "net_args": None, "lr": 1e-4}


def published(folder, **changes):
    (folder / "args.json").write_text(json.dumps({**PUBLISHED, **changes}))
    return folder


def own(folder, **changes):
    values = {**CascadeConfig("VTN", 2).to_dict(), "data": {"orientation": "RPI"}}
    (folder / "config.json").write_text(json.dumps({**values, **changes}))
    return folder


def test_the_files_of_a_run_are_read(tmp_path):
    args = runs.load_args(published(tmp_path, dataset="datasets/brain.json", epochs=5))
    assert (args.batch, args.epochs, args.dataset, args.round, args.seed) == (4, 5, "datasets/brain.json", 20000, 0)
    assert runs.load_cascade_config(tmp_path) == CascadeConfig("VTN", 10)
    own(tmp_path)
    assert runs.load_cascade_config(tmp_path) == CascadeConfig("VTN", 2)
    assert runs.load_data(tmp_path) == {"orientation": "RPI"}
    assert runs.load_data(own(tmp_path, data=None)) is None


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("batch", "1", 'is "1"; it must be a whole number from 1'),
        ("batch", 0, "is 0; it must be a whole number from 1"),
        ("batch", 1.5, "is 1.5; it must be a whole number from 1"),
        ("round", 10**400, "it must be a whole number from 1"),
        ("lr", None, "is null; it must be a number greater than 0"),
        ("lr", float("nan"), "is NaN; it must be a number greater than 0"),
        ("lr", -1e-4, "is -0.0001; it must be a number greater than 0"),
        ("epochs", [5], r"is \[5\]; it must be a number greater than 0"),
        ("rep", True, "is true; it must be a whole number from 1"),
        ("seed", -1, "is -1; it must be a whole number from 0"),
        ("dataset", 7, "is 7; it must be a text in quotes or null"),
        ("data_args", {}, r"is \{\}; it must be a text in quotes or null"),
        ("precision", 16, "is 16; it must be a text in quotes"),
        ("finetune", ["lits"], r"is \[\"lits\"\]; it must be a text in quotes or null"),
        ("base_network", 1, "is 1; it must be a text in quotes or null"),
        ("n_cascades", "10", 'is "10"; it must be a whole number or null'),
        ("net_args", 5, "is 5; it must be a text in quotes or null"),
    ],
)  # fmt: skip
def test_a_wrong_flag_in_args_json_is_named(tmp_path, name, value, what):
    published(tmp_path, **{name: value})
    for read in (runs.load_args, runs.load_cascade_config):
        with pytest.raises(UserError, match=rf"args\.json: {name} .*{what}") as error:
            read(tmp_path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_cascades": 1_000_000}, "n_cascades is 1000000; it must be a whole number from 0 to 100"),
        ({"n_cascades": 10**400}, "it must be a whole number from 0 to 100"),
        ({"n_cascades": None}, "lacks 'n_cascades'"),
        ({"base_network": "UNet"}, "base_network is 'UNet'; it must be one of VTN, VoxelMorph"),
        ({"net_args": "reg_factor=-1"}, "reg_factor is -1; it must be a number from 0"),
        ({"net_args": "-" * 200_000 + "1"}, "cannot be read"),
        ({"net_args": "colour=1"}, "unknown key 'colour'"),
    ],
)
def test_what_the_network_cannot_be_is_named_with_args_json(tmp_path, changes, message):
    with pytest.raises(UserError, match=rf"args\.json:? .*{message}") as error:
        runs.load_cascade_config(published(tmp_path, **changes))
    assert len(str(error.value)) < 700


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_cascades": 1_000_000}, "n_cascades is 1000000; it must be a whole number from 0 to 100"),
        ({"n_cascades": "2"}, "n_cascades is '2'; it must be a whole number"),
        ({"rep": 10**9}, "rep is 1000000000; it must be a whole number from 1 to 100"),
        ({"base_network": ["VTN"]}, r"base_network is \['VTN'\]; it must be one of"),
        ({"similarity": None}, "similarity is None; it must be one of"),
        ({"image_size": [10**9] * 3}, r"image_size is \[1000000000, .*; it must be three whole numbers from 2 to 4096"),
        ({"image_size": "128"}, "image_size is '128'; it must be three whole numbers"),
        ({"det_factor": "0.1"}, "det_factor is '0.1'; it must be a number from 0"),
        ({"det_factor": float("nan")}, "det_factor is nan; it must be a number from 0"),
        ({"reg_factor": 10**400}, "it must be a number from 0"),
        ({"channels": 10**30}, "channels is 1000.*; it must be a whole number from 1 to 1024"),
        ({"warp_gradient": 1}, "warp_gradient is 1; it must be one of True, False"),
        ({"self": 1}, "unknown option 'self'"),
        ({"plugin": 1}, 'plugin is 1; it must be a text in quotes or null'),
        ({"data": [1]}, r"data is \[1\]; it must be an object"),
    ],
)  # fmt: skip
def test_a_wrong_value_in_config_json_is_named(tmp_path, changes, message):
    with pytest.raises(UserError, match=rf"config\.json: {message}|config\.json: .*{message}") as error:
        runs.load_cascade_config(own(tmp_path, **changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("file", "digit"), [("args.json", "lr"), ("config.json", "reg_factor")])
def test_another_digit_in_a_file_of_a_run_is_refused_unless_its_user_takes_the_checksum_away(tmp_path, file, digit):
    config = {**CascadeConfig("VTN").to_dict(), "reg_factor": 0.25}
    content = {"args.json": {"lr": 0.25, "dataset": "d"}, "config.json": config}
    run = runs.new_run(tmp_path / "weights", "a", "", content, tmp_path / "logs")
    assert (runs.load_args(run).lr, runs.load_cascade_config(run).reg_factor) == (0.25, 0.25)
    read = {"args.json": runs.load_args, "config.json": runs.load_cascade_config}[file]
    changed = (run / file).read_text().replace("0.25", "0.75")
    (run / file).write_text(changed)
    with pytest.raises(
        UserError, match=rf"{file}: was changed since it was written; .* delete its 'sum'; else mend it"
    ):
        read(run)
    (run / file).write_text(json.dumps({name: value for name, value in json.loads(changed).items() if name != "sum"}))
    assert getattr(read(run), digit) == 0.75


@pytest.mark.parametrize("content", ["", "null", "[]", "3", '{"n_cascades": 1', "[" * 100_000, "\x00"])
def test_a_file_that_is_no_json_object_is_named(tmp_path, content):
    for name, read in (("args.json", runs.load_args), ("config.json", runs.load_cascade_config)):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=rf"{name}[:,] .*restore the file from its source"):
            read(tmp_path)
    with pytest.raises(UserError, match=r"config\.json"):
        runs.load_data(tmp_path)


ODD = (
    None, True, 0, -1, 1.5, 10**30, 10**400, float("nan"), float("inf"), "", "1", "x", [], [1, 2, 3], [["a"] * 99], {},
    {"a": 1}, "\ud800", "-" * 3000 + "1", "a=1", json.loads("[" * 800 + "]" * 800),
)  # fmt: skip


def test_whatever_stands_in_the_files_is_read_or_one_short_line(tmp_path):
    chance, said = random.Random(0), []
    for _ in range(250):
        own(tmp_path, **{chance.choice([*CascadeConfig().to_dict(), "data", "plugin", "self"]): chance.choice(ODD)})
        published(tmp_path, **{field.name: chance.choice(ODD) for field in dataclasses.fields(runs.RunArgs)[::3]})
        if chance.random() < 0.3:
            content = bytearray((tmp_path / "config.json").read_bytes())
            content[chance.randrange(len(content))] = chance.randrange(256)
            (tmp_path / "config.json").write_bytes(content)
        for read in (runs.load_cascade_config, runs.load_data, runs.load_args):
            try:
                read(tmp_path)
            except UserError as error:
                said.append(str(error))
    assert 250 < len(said) < 750
    assert [text for text in said if "\n" in text or len(text) > 500] == []


def test_a_run_with_a_wrong_flag_is_not_continued(tmp_path, monkeypatch):
    (tmp_path / "model-7.index").touch()
    published(tmp_path, batch="1")
    args = train.build_parser().parse_args(["-c", str(tmp_path)])
    with pytest.raises(UserError, match=r'args\.json: batch is "1"; it must be a whole number from 1'):
        train.inherit(args)
    published(tmp_path, batch=3, data_args=None)
    train.inherit(args)
    assert (args.batch, args.lr, args.seed, args.dataset) == (3, 1e-4, 0, "datasets/liver.json")
    assert not cli.is_paired(args.data_args)


@pytest.mark.parametrize(
    "nested", ["-" * 200_000 + "1", "(" * 300 + ")" * 300, "[" * 5000 + "]" * 5000, "-" * 3000 + "1"]
)
@pytest.mark.parametrize("flag", ["--net_args", "--data_args"])
def test_values_nested_too_deeply_are_one_short_line(nested, flag):
    with pytest.raises(UserError, match=rf"{flag} 'paired=.* cannot be read \(") as error:
        cli.parse_assignments(f"paired={nested}", ("paired",), flag)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("text", ["²", "0", "-1", "1.5", "9" * 5000, ""])
def test_a_number_of_repeats_that_is_none(text):
    with pytest.raises(UserError, match="-r "):
        cli.parse_rep(text)


def test_more_steps_than_can_be_counted_are_refused():
    args = train.build_parser().parse_args(["--epochs", "1e300"])
    train.inherit(args)
    with pytest.raises(
        UserError, match=r"--epochs 1e[+]300 of --round 20000 steps are 2e[+]304 steps; at most 2147483647"
    ):
        train.check(args)
    with pytest.raises(UserError, match=r"--round is 1000.*; it must be a whole number up to 2147483647"):
        train.check(argparse.Namespace(**{**vars(args), "round": 10**400}))


def test_a_model_that_comes_with_the_program_is_found_from_any_folder_and_one_of_ones_own_goes_first(
    tmp_path, monkeypatch
):
    shipped, work = tmp_path / "program" / "weights", tmp_path / "work"
    for folder in (shipped / "starter", work / "weights" / "starter"):
        folder.mkdir(parents=True)
    published(shipped / "starter")
    (work / "weights" / "starter").rmdir()
    monkeypatch.setattr(runs, "SHIPPED", shipped)
    monkeypatch.chdir(work)
    assert runs.find_run("starter") == (shipped / "starter", None)
    assert runs.find_run("starter:7") == (shipped / "starter", 7)
    (work / "weights" / "starter").mkdir()
    assert runs.find_run("starter") == (pathlib.Path("weights/starter"), None)
    with pytest.raises(UserError, match="runs there: starter"):
        runs.find_run("another")


@pytest.mark.parametrize("text", ["VTN-10-liver", "weights/VTN-10-liver", "VTN-10-liver:100000"])
def test_a_published_model_that_is_not_there_is_named_with_its_page_and_its_place(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        runs.find_run(text)
    assert PAGES["VTN-10-liver"] in str(error.value)
    assert "unzip it into weights/, so that weights/VTN-10-liver/model-<step>.index" in str(error.value)


def test_the_pages_are_those_of_the_table_in_weights():
    table = (pathlib.Path(runs.__file__).parents[1] / "weights" / "README.md").read_text()
    assert all(f"[{name}]({page})" in table for name, page in PAGES.items())
