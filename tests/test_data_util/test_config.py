import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_util.config import DataFile, load_dataset_config, write_dataset_config
from data_util.scans.view import View
from errors import UserError


def minimal(**changes):
    config = {
        "files": {"yanx": {"type": "HDF5", "path": "datasets/sliver_val.h5"}},
        "subsets": {"train": ["yanx/1", "yanx/2"], "val": ["yanx/*"]},
        "schemes": {"1": {"train": 1.0}, "mixed": {"train": 0.75, "val": 0.25}},
    }
    return {k: v for k, v in (config | changes).items() if v is not ...}


def write(folder, config):
    path = folder / "liver.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return path


def test_defaults(tmp_path):
    config = load_dataset_config(str(write(tmp_path, minimal())))
    assert config.path == tmp_path / "liver.json"
    assert config.image_size == (128, 128, 128)
    assert (config.image_type, config.atlas, config.labels, config.task) == (None, None, None, ("registration",))
    assert config.subsets == {"train": ("yanx/1", "yanx/2"), "val": ("yanx/*",)}
    assert config.schemes == {"1": {"train": 1.0}, "mixed": {"train": 0.75, "val": 0.25}}


def test_every_key_of_the_original_configs(tmp_path):
    config = load_dataset_config(
        write(
            tmp_path,
            minimal(
                files={
                    "/": {"type": "HDF5", "path": "datasets/msd_dataset.h5"},
                    "lpba": {"path": "datasets/lpba_val.h5", "type": "HDF5"},
                },
                image_size=[96, 80, 112],
                image_type="brain",
                atlas="lpba/S01",
                segmentation_class_value={"21": 21, "putamen": 163},
                task=["segmentation", "registration"],
                subsets={"s": ["liver/12", "lpba/S02"]},
                schemes={"2": {"s": 1}},
            ),
        )
    )
    assert list(config.files) == ["/", "lpba"]
    assert config.image_size == (96, 80, 112)
    assert (config.image_type, config.atlas) == ("brain", "lpba/S01")
    assert config.labels == {"21": 21, "putamen": 163}
    assert config.task == ("segmentation", "registration")
    assert config.schemes == {"2": {"s": 1.0}}


def test_pairs_are_kept_in_their_order(tmp_path):
    pairs = {"val": [["yanx/3", "yanx/1"], ["yanx/1", "yanx/2"]]}
    config = load_dataset_config(write(tmp_path, minimal(pairs=pairs)))
    assert config.pairs == {"val": (("yanx/3", "yanx/1"), ("yanx/1", "yanx/2"))}


def test_hdf5_paths_are_looked_for_in_three_places_in_order(tmp_path, monkeypatch):
    work, parent = tmp_path / "work", tmp_path / "project"
    folder = parent / "datasets"
    for place in (work, folder):
        place.mkdir(parents=True)
    monkeypatch.chdir(work)
    path = write(folder, minimal(files={"a": {"type": "HDF5", "path": "a.h5"}}))

    def found():
        return load_dataset_config(path).files["a"].path

    assert found() == work / "a.h5"  # nowhere: the first place
    for place in (parent, folder, work):
        (place / "a.h5").touch()
        assert found() == place / "a.h5"
    path = write(folder, minimal(files={"a": {"type": "HDF5", "path": str(parent / "a.h5")}}))
    assert found() == parent / "a.h5"


def test_a_config_named_relatively_finds_files_beside_it(tmp_path, monkeypatch):
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "a.h5").touch()
    write(tmp_path / "datasets", minimal(files={"a": {"type": "HDF5", "path": "datasets/a.h5"}}))
    monkeypatch.chdir(tmp_path / "datasets")
    assert load_dataset_config("liver.json").files["a"].path == tmp_path / "datasets" / "a.h5"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"subset": {}}, ["unknown key 'subset'", "subsets", "segmentation_class_value", "task"]),
        ({"files": ...}, ["'files' is missing"]),
        ({"subsets": ...}, ["'subsets' is missing"]),
        ({"schemes": ...}, ["'schemes' is missing"]),
        ({"files": []}, ["'files'", "object", "[]"]),
        ({"files": {}}, ["'files' is empty"]),
        ({"files": {"a": "a.h5"}}, ["files.a", "object", "a.h5"]),
        ({"files": {"a": {"type": "HDF5"}}}, ["files.a", "path"]),
        ({"files": {"a": {"type": "NIfTI", "path": "a"}}}, ["files.a.type", "NIfTI", "HDF5"]),
        ({"files": {"a": {"type": "HDF5", "path": 3}}}, ["files.a.path", "string", "3"]),
        ({"files": {"a": {"type": "HDF5", "path": "a", "mode": "r"}}}, ["unknown key 'mode'", "files.a", "type, path"]),
        ({"files": {"a/b": {"type": "HDF5", "path": "a"}}}, ["a/b", "'/'"]),
        ({"image_size": [128, 128]}, ["image_size", "three", "[128, 128]"]),
        ({"image_size": [128, 128, 0]}, ["image_size", "positive"]),
        ({"image_size": [128, 128, 64.0]}, ["image_size", "64.0"]),
        ({"image_size": [128, 128, True]}, ["image_size", "true"]),
        ({"image_size": 128}, ["image_size", "128"]),
        ({"image_type": 1}, ["image_type", "string"]),
        ({"atlas": ["lpba/S01"]}, ["atlas", "string"]),
        ({"pairs": []}, ["'pairs'", "object"]),
        ({"pairs": {"test": []}}, ["'pairs'", "'test'", "train, val"]),
        ({"pairs": {"val": "yanx/1"}}, ["pairs.val", "list"]),
        ({"pairs": {"val": [["a", "b"], ["yanx/1"]]}}, ["pairs.val, entry 2", '["yanx/1"]', "[fixed id, moving id]"]),
        ({"pairs": {"val": []}, "atlas": "yanx/1"}, ["'pairs'", "'atlas'", "leave one"]),
        ({"subsets": {"train": "yanx/1", "val": []}}, ["subsets.train", "list", "yanx/1"]),
        ({"subsets": {"train": [1], "val": []}}, ["subsets.train", "string", "1"]),
        ({"schemes": {"1": {"test": 1.0}}}, ["scheme '1'", "'test'", "train, val"]),
        ({"schemes": {"1": {}}}, ["scheme '1'", "empty"]),
        ({"schemes": {"1": ["train"]}}, ["schemes.1", "object"]),
        ({"schemes": {"1": {"train": "all"}}}, ["schemes.1.train", "number", "all"]),
        ({"schemes": {"1": {"train": True}}}, ["schemes.1.train", "number", "true"]),
        ({"schemes": {"1": {"train": 1.5, "val": -0.5}}}, ["schemes.1.val", "-0.5", "positive"]),
        ({"schemes": {"1": {"train": float("nan")}}}, ["schemes.1.train", "number", "NaN"]),
        ({"schemes": {"1": {"train": 0.75, "val": 0.24}}}, ["scheme '1'", "0.99", "1"]),
        ({"segmentation_class_value": [21]}, ["segmentation_class_value", "object"]),
        ({"segmentation_class_value": {}}, ["segmentation_class_value", "empty"]),
        ({"segmentation_class_value": {"21": "21"}}, ["segmentation_class_value.21", "whole number"]),
        ({"task": "segmentation"}, ["task", "segmentation", "registration"]),
        ({"task": ["registration", 3]}, ["task", "3"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path, changes, words):
    path = write(tmp_path, minimal(**changes))
    with pytest.raises(UserError) as error:
        load_dataset_config(path)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in [str(path), *words]), message


def places(value, path=()):
    """Paths of all values within a JSON value, itself included."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield from places(one, (*path, key))


WRONG = [None, True, "", "1", [], {}, 0, -1, 1.5, 10**400, -(10**400), 1e308, float("inf"), float("nan")]
WRONG += ["-" * 200_000, "a\nb", "\0", [[[]]], [None], {"x": None}, {"": 1}, {"-" * 200_000: 1.0}, {"a\nb": 1.0}]


def test_any_value_in_any_place_is_taken_or_refused_in_one_short_line(tmp_path):
    whole = minimal(
        image_size=[8, 8, 8],
        image_type="x",
        segmentation_class_value={"organ": 3},
        task=["registration"],
        orientation="LPS",
        crop="none",
        window=[40, 400],
        spacing=[1, 1, 1],
        pairs={"train": [["yanx/1", "yanx/2"]]},
    )
    refused = []
    for place in places(whole):
        for value in WRONG:
            config = inner = {"": json.loads(json.dumps(whole))}
            for key in ("", *place)[:-1]:
                inner = inner[key]
            inner[("", *place)[-1]] = value
            path = write(tmp_path, json.dumps(config[""]))
            try:
                load_dataset_config(path)
            except UserError as error:
                refused.append(str(error))
    assert [message for message in refused if not message.isprintable()] == []
    assert [message[:300] for message in refused if len(message) > 450 + len(str(path))] == []
    assert len(refused) > 500


def test_fractions_may_miss_one_by_a_rounding(tmp_path):
    thirds = {"1": {"train": 0.3333333, "val": 0.6666666}}
    assert load_dataset_config(write(tmp_path, minimal(schemes=thirds))).schemes == thirds


def test_a_byte_order_mark_is_no_mistake_and_a_comma_too_many_is_named(tmp_path):
    text = json.dumps(minimal())
    (tmp_path / "liver.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load_dataset_config(tmp_path / "liver.json").image_size == (128, 128, 128)
    for broken in (text[:-1] + ",}", text.replace("]", ",]", 1)):
        (tmp_path / "liver.json").write_text(broken)
        with pytest.raises(UserError, match="no comma may stand before a closing bracket"):
            load_dataset_config(tmp_path / "liver.json")


@pytest.mark.parametrize("value", [0, -1, 2**31])
def test_a_label_that_cannot_be_scored_is_refused(tmp_path, value):
    path = write(tmp_path, minimal(segmentation_class_value={"liver": 1, "other": value}))
    with pytest.raises(UserError, match=f"segmentation_class_value.other is {value}; .*" + "background" * (value == 0)):
        load_dataset_config(path)


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "mine.json"
    view = View("RPI", "brain", percentiles=(1, 99))
    labels = {"a": 3, "b": 9}
    write_dataset_config(
        path, tmp_path / "mine.h5", (4, 5, 6), "mr", {"t": ["1", "x/2"]}, {"1": {"t": 1.0}},
        segmentation_class_value=labels, **view.to_dict(),
    )  # fmt: skip
    config = load_dataset_config(path)
    assert (config.image_size, config.image_type, config.labels, config.view) == ((4, 5, 6), "mr", labels, view)
    assert config.subsets == {"t": ("mine/1", "mine/x/2")}
    assert config.files == {"mine": DataFile(tmp_path / "mine.h5", "HDF5")}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.json"]


def test_a_config_that_was_changed_since_it_was_written_is_read_and_that_is_said(tmp_path, capsys):
    path = tmp_path / "mine.json"
    write_dataset_config(path, tmp_path / "mine.h5", (4, 5, 6), "mr", {"t": ["1", "2"]}, {"1": {"t": 1.0}})
    load_dataset_config(path)
    assert capsys.readouterr().err == ""
    path.write_text(path.read_text().replace("mine/2", "mine/3"))
    assert load_dataset_config(path).subsets == {"t": ("mine/1", "mine/3")}
    said = f"{path}: was changed since it was written; where you did that, delete its 'sum'\n"
    assert capsys.readouterr().err == said
    content = json.loads(path.read_text())
    del content["sum"]
    path.write_text(json.dumps(content))
    load_dataset_config(path)
    assert capsys.readouterr().err == ""


def test_missing_unreadable_and_invalid_files(tmp_path):
    with pytest.raises(UserError, match=r"none\.json: no such dataset config"):
        load_dataset_config(tmp_path / "none.json")
    with pytest.raises(UserError, match="cannot be read"):
        load_dataset_config(tmp_path)
    with pytest.raises(UserError, match=r"liver\.json, line 3, column 1: not valid JSON"):
        load_dataset_config(write(tmp_path, '{\n"files": {},\n}'))
    with pytest.raises(UserError, match="the config must be an object"):
        load_dataset_config(write(tmp_path, "[]"))
    (tmp_path / "liver.json").write_bytes(b'{"files": "\xff"}')
    with pytest.raises(UserError, match="UTF-8"):
        load_dataset_config(tmp_path / "liver.json")


def test_config_needs_neither_tensorflow_nor_h5py():
    code = (
        "import sys, data_util.config, data_util.pairs; sys.exit(any(m in sys.modules for m in ('tensorflow', 'h5py')))"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
