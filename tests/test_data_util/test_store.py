"""What must not be read silently, or be blamed on another cause: values and files that people have met."""

import json
import re
import subprocess
import sys

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import cli
from data_util import check
from data_util.batches import user_errors
from data_util.config import DataFile, load_dataset_config
from data_util.dataset import open_scheme
from data_util.readers import READERS, Reader
from data_util.store import ScanStore
from errors import UserError

SHAPE = (4, 5, 6)
VOLUME = np.random.default_rng(0).integers(0, 256, SHAPE).astype(np.uint8)


def set_of(folder, change=None):
    """A data set of four scans, of which number 3 is changed: its config."""
    with h5py.File(folder / "s.h5", "w") as file:
        for k in range(4):
            group = file.create_group(str(k))
            group["volume"] = np.random.default_rng(k).integers(0, 256, SHAPE).astype(np.uint8)
            group["segmentation"] = np.where(group["volume"][...] > 120, 255, 0).astype(np.uint8)
        if change is not None:
            change(file["3"])
    content = {"files": {"s": {"path": str(folder / "s.h5")}}, "image_size": SHAPE}
    content |= {"subsets": {"a": ["s/0", "s/1"], "b": ["s/2", "s/3"]}, "schemes": {"1": {"a": 1}, "2": {"b": 1}}}
    path = folder / "s.json"
    path.write_text(json.dumps(content))
    return path


def setting(name, value):
    def change(group):
        if name in group:
            del group[name]
        group[name] = value

    return change


def volume_with(value, dtype):
    array = VOLUME.astype(dtype)
    array[1, 2, 3] = value
    return array


def filtered(group):
    """A volume that is said to be compressed by a filter that HDF5 does not have."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk(SHAPE)
    properties.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, (3,))
    del group["volume"]
    h5py.h5d.create(group.id, b"volume", h5py.h5t.STD_U8LE, h5py.h5s.create_simple(SHAPE), properties)


def linked(target):
    def change(group):
        del group["volume"]
        group["volume"] = target

    return change


def flow_of(value):
    def change(group):
        group["flow"] = np.full((*SHAPE, 3), value, np.float16)
        group["flow"].attrs["source"] = "s/2"

    return change


def huge(group):
    del group["volume"], group["segmentation"]
    group.create_dataset("volume", shape=(10**5,) * 3, dtype=np.uint8, chunks=(64, 64, 64))


FAULTS = {
    "NaN": (setting("volume", volume_with(np.nan, np.float32)), "volume has 1 voxels that are NaN or infinite"),
    "infinite": (setting("volume", volume_with(-np.inf, np.float16)), "volume has 1 voxels that are NaN or infinite"),
    "null dataspace": (setting("volume", h5py.Empty("f")), "'volume' has no values at all"),
    "null labels": (setting("segmentation", h5py.Empty("u1")), "'segmentation' has no values at all"),
    "null spacing": (setting("spacing", h5py.Empty("f")), "'spacing' has no values at all"),
    "no voxels": (setting("volume", np.zeros((0, 5, 6), np.uint8)), "volume is 0x5x6; it must have voxels"),
    "one number": (setting("volume", 3.0), "volume is a single number; it must have voxels"),
    "four axes": (setting("volume", np.zeros((*SHAPE, 1))), "volume is 4x5x6x1; it must have voxels along three axes"),
    "complex": (setting("volume", np.zeros(SHAPE, complex)), "'volume' is no array of numbers"),
    "colours": (setting("volume", np.zeros(SHAPE, [("r", "u1"), ("g", "u1")])), "'volume' is no array of numbers"),
    "filter": (filtered, r"is compressed by the filter .*\(number 32015\), which this HDF5 library does not have"),
    "link": (linked(h5py.SoftLink("/gone")), "has a link to something that is not there"),
    "link to a file": (linked(h5py.ExternalLink("gone.h5", "/x")), "has a link to something that is not there"),
    "huge": (huge, "'volume' is 100000x100000x100000 of uint8, more than the memory holds|but image_size"),
    "infinite points": (setting("point", [[np.inf, 1, 1]]), "point has infinite values"),
    "points beyond floats": (setting("point", [[1e300, 1, 1]]), "point has infinite values"),
    "label beyond int32": (setting("segmentation", volume_with(2**31, np.uint32)), "has the value 2147483648; labels"),
    "label of 64 bits": (setting("segmentation", volume_with(2**63 + 5, np.uint64)), f"value {2**63 + 5}; labels"),
    "label of a float": (setting("segmentation", volume_with(1e20, np.float64)), f"has the value {10**20}; labels"),
    "label of a half": (setting("segmentation", volume_with(1.25, np.float16)), "not whole numbers, such as 1.25;"),
    "label NaN": (setting("segmentation", volume_with(np.nan, np.float32)), "not whole numbers, such as nan"),
    "label infinite": (setting("segmentation", volume_with(np.inf, np.float16)), "not whole numbers, such as inf"),
    "blurred label": (setting("segmentation", volume_with(1.0625, np.float32)), "whole numbers, such as 1.0625;"),
    "infinite flow": (flow_of(np.inf), "flow has infinite values"),
}  # fmt: skip


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("fault", FAULTS)
def test_evaluation_refuses_it_in_one_line_that_names_the_file(tmp_path, fault):
    change, message = FAULTS[fault]
    with pytest.raises(UserError, match=message) as error, user_errors():  # noqa: PT012
        scheme = open_scheme(load_dataset_config(set_of(tmp_path, change)), "2")
        list(scheme.evaluation(1))
        scheme._store.read("s/3", flow=True)
    assert str(error.value).startswith(str(tmp_path / "s.h5"))
    assert "\n" not in str(error.value)
    assert "cut off or damaged" not in str(error.value)


@pytest.mark.parametrize("fault", sorted(set(FAULTS) - {"infinite flow"}))
def test_check_names_it_and_ends(tmp_path, capsys, fault):
    change, message = FAULTS[fault]
    assert cli.run(check.main, [str(set_of(tmp_path, change))]) == 1
    out = capsys.readouterr().out
    errors = [line for line in out.splitlines() if line.startswith("error") and " s/3 " in line]
    assert errors
    assert re.search(message, "\n".join(errors)), out


def test_training_refuses_nan_too(tmp_path):
    path = set_of(tmp_path)
    with h5py.File(tmp_path / "s.h5", "a") as file:
        setting("volume", volume_with(np.nan, np.float32))(file["0"])
    with pytest.raises(UserError, match=r"s\.h5, scan '0': volume has 1 voxels"), user_errors():
        list(open_scheme(load_dataset_config(path), "1").training(1, 0, 0, 4))


@settings(max_examples=30, deadline=None)
@given(
    arrays.arrays(np.int32, SHAPE, elements=st.integers(0, 2000)),
    st.floats(-9e-4, 9e-4),
    st.sampled_from((np.float32, np.float64)),
)
def test_labels_that_went_through_a_resampling_are_rounded(tmp_path_factory, labels, blur, kind):
    path = tmp_path_factory.mktemp("labels") / "s.h5"
    with h5py.File(path, "w") as file:
        file["a/volume"], file["a/segmentation"] = VOLUME, (labels + blur).astype(kind)
    found = ScanStore({"s": DataFile(path)}).read("s/a").segmentation
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, labels)


def test_a_file_that_another_program_writes_is_said_to_be_locked(tmp_path):
    path = set_of(tmp_path)
    writer = "import h5py, sys; f = h5py.File(sys.argv[1], 'a'); print('open', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", writer, str(tmp_path / "s.h5")], **pipes) as process:
        try:
            assert process.stdout.readline() == "open\n"
            with pytest.raises(UserError, match=r"s\.h5: is locked, most likely because another program is writing it"):
                open_scheme(load_dataset_config(path), "2")
        finally:
            process.stdin.close()
    assert len(open_scheme(load_dataset_config(path), "2")) == 2


def test_landmarks_that_are_all_missing_are_told_apart_from_none(tmp_path, capsys):
    path = set_of(tmp_path, setting("point", np.full((4, 3), np.nan)))
    store = ScanStore(load_dataset_config(path).files)
    assert (store.describe("s/3").landmarks, store.describe("s/3").lost_landmarks) == (0, 4)
    store.close()
    cli.run(check.main, [str(path)])
    assert "all its 4 landmarks are missing (NaN)" in capsys.readouterr().out
    # So the published files say that a scan has none.
    set_of(tmp_path, setting("point", np.full((4, 3), -1.0)))
    assert ScanStore(load_dataset_config(path).files).describe("s/3").lost_landmarks == 0


class Broken(Reader):
    """A reader that lists a scan which it cannot read."""

    def keys(self):
        return ["1"]

    def members(self, key):
        raise ValueError("not a zip file\nsecond line")


def test_a_reader_of_ones_own_that_fails_is_named_with_the_scan(tmp_path, monkeypatch):
    monkeypatch.setitem(READERS, "mine", Broken)
    (tmp_path / "folder").mkdir()
    store = ScanStore({"m": DataFile(tmp_path / "folder", "mine")})
    assert store.expand(["m/*"]) == ["m/1"]
    with pytest.raises(UserError, match=r"folder, scan '1': the mine reader failed \(ValueError: not a zip file\)$"):
        store.describe("m/1")


# ------------------------------------------------------------------------------------------------- damaged sets


def test_names_in_a_file_that_are_no_text_are_shown_as_escapes(tmp_path, capsys):
    path = set_of(tmp_path)
    with h5py.File(tmp_path / "s.h5", "a") as file:
        h5py.h5g.create(file.id, b"\xff3")
        file[b"\xff3"]["volume"] = VOLUME
    store = ScanStore(load_dataset_config(path).files)
    assert store.ids("s") == ["s/0", "s/1", "s/2", "s/3", "s/\\xff3"]
    with pytest.raises(UserError, match="no key '4'"):
        store.describe("s/4")
    with pytest.raises(UserError, match="no key"):
        store.describe("s/\\xff3")
    assert store.expand(["s/[0-3]"]) == ["s/0", "s/1", "s/2", "s/3"]
    store.close()
    assert cli.run(check.main, [str(path)]) == 0
    assert "s/\\xff3 are in no subset" in capsys.readouterr().out


@pytest.mark.filterwarnings("error::RuntimeWarning")
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_damage_to_a_file_is_a_traceback(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    path = set_of(folder, flow_of(0.5))
    content = bytearray((folder / "s.h5").read_bytes())
    if data.draw(st.booleans(), "cut"):
        first = data.draw(st.integers(0, len(content) - 1))
        del content[first : first + data.draw(st.sampled_from((1, 100, 10**6)))]
    else:
        for _ in range(data.draw(st.sampled_from((1, 3, 30)))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / "s.h5").write_bytes(content)
    assert cli.run(check.main, [str(path)]) in (0, 1)


VALUES = st.sampled_from(
    [None, True, 0, -1, 1.5, float("inf"), float("nan"), "", "x", "a/b", "\0", [], {}, [[]], {"a": None}, 2**70, ["*"]]
)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_no_mistake_in_a_config_is_a_traceback(tmp_path_factory, data):
    path = set_of(tmp_path_factory.mktemp("config"))
    content = json.loads(path.read_text()) | {"atlas": None, "task": "registration", "window": None}
    place = content
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not (isinstance(place[key], (dict, list)) and place[key] and data.draw(st.booleans())):
            break
        place = place[key]
    place[key] = data.draw(VALUES)
    path.write_text(json.dumps(content))
    assert cli.run(check.main, [str(path)]) in (0, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"files": {"\\ud800": 1}}', "is no character"),
        ('{"image_size": 1' + 5000 * "0" + "}", "a number of thousands of digits"),
        (100_000 * "[", "nested too deeply"),
    ],
)
def test_json_that_python_itself_stumbles_over(tmp_path, text, message):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_dataset_config(tmp_path / "s.json")
    str(error.value).encode()
