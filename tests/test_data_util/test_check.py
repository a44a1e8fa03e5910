import json
import pathlib

import h5py
import numpy as np
import pytest

import cli
from data_util import check
from data_util.phantoms import write_dataset
from errors import UserError

SIZE = (20, 16, 18)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with sets/p: scans 0..3 in scheme 1, 4..5 in scheme 2, 6..7 in scheme known; no fault."""
    monkeypatch.chdir(tmp_path)
    write_dataset("sets/p", SIZE, 4, 1, 0)
    return tmp_path


def change(key, member, function):
    """Write a member of a scan anew."""
    with h5py.File("sets/p.h5", "r+") as file:
        array = function(file[key][member][...])
        del file[key][member]
        file[key][member] = array


def change_config(**keys):
    path = pathlib.Path("sets/p.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def look(*flags, config="sets/p.json"):
    return cli.run(check.main, [config, *flags])


def lines(capsys, *flags, status=1, config="sets/p.json"):
    """What the command says, as lines, and its status is this."""
    capsys.readouterr()
    assert look(*flags, config=config) == status
    return capsys.readouterr().out.splitlines()


def one(found, level, *parts):
    """The only line of a level, which has these parts."""
    told = [line for line in found if line.startswith(("error", "warning"))]
    assert len(told) == 1, told
    assert told[0].startswith(level)
    for part in parts:
        assert part in told[0]


def test_listed_pairs_are_counted_and_their_scans_looked_for(folder, capsys):
    change_config(pairs={"val": [["p/5", "p/4"]]})
    assert lines(capsys, status=0)[2].split() == ["2", "val", "2", "1", "-"]
    change_config(pairs={"val": [["p/5", "p/9"]]})
    one(lines(capsys), "error", "scheme 2", "p/9", "not in the subset")
    subsets = json.loads(pathlib.Path("sets/p.json").read_text())["subsets"]
    change_config(pairs={"val": [["p/5", "p/99"], ["p/5", "p/4"]]}, subsets={**subsets, "val": ["p/4", "p/5", "p/99"]})
    lines(capsys, "--fix", status=0)
    assert json.loads(pathlib.Path("sets/p_fixed.json").read_text())["pairs"] == {"val": [["p/5", "p/4"]]}
    change_config(pairs={"val": []}, subsets=subsets)
    one(lines(capsys), "error", "scheme 2", "list of pairs of subset val is empty")


def test_a_good_set_is_counted_and_has_no_fault(folder, capsys):
    assert lines(capsys, status=0) == [
        "scheme  subset  scans  pairs  paired",
        "1       train   4      12     4",
        "2       val     2      2      2",
        "known   known   2      2      2",
        "",
        "sets/p.json: 8 scans, 0 errors, 0 warnings",
        "next: python train.py -d sets/p.json",
    ]
    assert sorted(p.name for p in pathlib.Path("sets").iterdir()) == ["p.h5", "p.json"]


def set_voxel(value, dtype=None):
    def function(array):
        array = array.astype(dtype or array.dtype)
        array[3, 4, 5] = value
        return array

    return function


@pytest.mark.parametrize(
    ("member", "function", "level", "parts"),
    [
        ("volume", lambda a: a[:, :-1], "error", ["segmentation is (20, 16, 18); it must be as its volume"]),
        ("volume", set_voxel(np.nan, np.float32), "error", ["volume has 1 voxels that are NaN or infinite"]),
        ("volume", set_voxel(-np.inf, np.float32), "error", ["volume has 1 voxels that are NaN or infinite"]),
        ("volume", lambda a: a * 0 + 7, "error", ["volume is 7 everywhere"]),
        ("volume", set_voxel(-1000, np.int16), "error", ["volume goes from -1000 to", "0..255"]),
        ("volume", set_voxel(256, np.int16), "error", ["to 256", "0..255"]),
        ("volume", lambda a: a / np.float32(a.max()), "error", ["volume goes from 0", "to 1, all but black", "--fix"]),
        ("volume", lambda a: a.astype(np.float64), "warning", ["volume is float64", "--fix"]),
        ("volume", lambda a: a.astype("S4"), "error", ["'volume' is no array of numbers"]),
        ("segmentation", lambda a: a // 255, "error", ["mask has the values 0, 1, not 0 and 255", "Dice", "--fix"]),
        ("segmentation", set_voxel(3), "error", ["mask has the values 0, 3, 255", "segmentation_class_value"]),
        ("segmentation", lambda a: a * 0, "error", ["segmentation is 0 everywhere"]),
        ("segmentation", lambda a: a / 2, "error", ["segmentation has values that are not whole numbers"]),
        ("point", lambda p: p + [0, 0, 30], "error", ["6 of 6 landmarks lie outside the volume"]),
        ("point", lambda p: p[:4], "error", ["landmarks differ in number: 4 in p/4, 6 in p/5"]),
        ("point", lambda p: p[:0], "warning", ["no landmarks in p/4; their pairs are not scored"]),
    ],
)
def test_a_fault_of_a_scan_is_named_and_nothing_else(folder, capsys, member, function, level, parts):
    change("4", member, function)
    found = lines(capsys, status=int(level == "error"))
    if "differ" in parts[0] or "no landmarks" in parts[0]:
        one(found, level, *parts)
    else:
        one(found, level, "p/4", *parts)


def test_a_volume_of_another_size_is_named(folder, capsys):
    for member in ("volume", "segmentation"):
        change("4", member, lambda a: a[:, :-1])
    with h5py.File("sets/p.h5", "r+") as file:
        file["4/point"][:, 1] /= 2
    one(lines(capsys), "error", "p/4", "volume is 20x15x18, but image_size is 20x16x18")


def test_labels_missing_from_scans_are_named(folder, capsys):
    with h5py.File("sets/p.h5", "r+") as file:
        del file["5/segmentation"]
    one(lines(capsys, status=0), "warning", "subset val", "no segmentation in p/5")
    change_config(segmentation_class_value={"organ": 255, "cyst": 7})
    change("0", "segmentation", set_voxel(7))
    change("1", "segmentation", set_voxel(9))
    found = [line for line in lines(capsys, status=0) if line.startswith("warning")]
    assert any("label cyst" in line and "no voxel of its value 7 in p/1, p/2, p/3" in line for line in found)
    assert any("values that it does not name: 9" in line for line in found)
    assert len(found) == 3


def test_ids_of_the_config_and_of_the_file_are_compared(folder, capsys):
    change_config(subsets={"train": [f"p/{k}" for k in (0, 1, 2, 3, 33)], "val": ["p/4", "p/5"], "known": ["p/[67]"]})
    one(lines(capsys), "error", "subset train", "scan 'p/33': no key '33'", "--fix")
    change_config(subsets={"train": ["p/0", "p/1"], "val": ["p/4", "p/5"], "known": ["p/[67]"]})
    one(lines(capsys, status=0), "warning", "file", "sets/p.h5", "p/2, p/3 are in no subset")
    change_config(subsets={"train": ["p/[0-3]"], "val": ["p/4", "p/5"], "known": ["p/[67]"], "x": ["p/0"]})
    one(lines(capsys, status=0), "warning", "subset x", "is in no scheme")
    change_config(subsets={"train": ["p/[0-3]", "p/z*"], "val": ["p/4", "p/5"], "known": ["p/[67]"]})
    one(lines(capsys), "error", "'p/z*' matches no scan")
    change_config(subsets={"train": ["p/[0-3]"], "val": ["q/4"], "known": ["p/[67]"]})
    found = lines(capsys)
    assert any("scan 'q/4': its part before '/' must be one of" in line for line in found)
    assert any("subset val has 0 scans and so no pair" in line for line in found)


def test_scans_that_are_trained_on_and_evaluated_are_named_and_copies_too(folder, capsys):
    change_config(subsets={"train": ["p/[0-4]"], "val": ["p/4", "p/5"], "known": ["p/[67]"]})
    one(lines(capsys), "error", "scheme 2", "shares p/4 with scheme 1")
    change_config(subsets={"train": ["p/[0-3]"], "val": ["p/4", "p/5"], "known": ["p/[67]"]})
    with h5py.File("sets/p.h5", "r+") as file:
        file["5/volume"][...] = file["0/volume"][...]
    one(lines(capsys), "error", "p/0, p/5", "the very same volume, and are both trained on and evaluated")
    rng = np.random.default_rng(0)
    with h5py.File("sets/p.h5", "r+") as file:  # a near copy: paler and noisy
        noisy = 0.9 * file["0/volume"][...] + rng.normal(5, 1, file["0/volume"].shape)
        file["5/volume"][...] = np.clip(np.rint(noisy), 0, 255)
    one(lines(capsys), "error", "p/0, p/5", "nearly the same volume, and are both trained on and evaluated")
    change_config(subsets={"train": ["p/[0-35]"], "val": ["p/4", "p/6"], "known": ["p/7", "p/6"]})
    one(lines(capsys, status=0), "warning", "p/0, p/5", "nearly the same volume; keep one of them")


def test_odd_numbers_are_named_for_paired_sets_alone(folder, capsys):
    change_config(subsets={"train": ["p/[0-2]"], "val": ["p/4", "p/5", "p/3"], "known": ["p/[67]"]})
    assert lines(capsys, "-v", "2", status=0)[1] == "2       val     3      6      odd"
    one(lines(capsys, "-v", "2", "--paired"), "error", "scheme 2", "subset val has 3 scans, an odd number")
    change_config(subsets={"train": ["p/[0-2]"], "val": ["p/4"], "known": ["p/[67]"]})
    one(lines(capsys, "-v", "2"), "error", "subset val has 1 scans and so no pair")


def test_landmarks_are_compared_in_the_pairs_that_there_are(folder, capsys):
    for key in ("0", "1"):
        change(key, "point", lambda p: p[:5])
    one(lines(capsys), "error", "scheme 1", "landmarks differ in number: 5 in p/0, p/1, 6 in p/2, p/3")
    lines(capsys, "--paired", status=0)


def test_an_atlas_may_be_in_training_and_validation(folder, capsys):
    change_config(atlas="p/0", subsets={"train": ["p/[0-3]"], "val": ["p/0", "p/4", "p/5"], "known": ["p/6", "p/7"]})
    found = lines(capsys, status=0)
    assert found[1:4] == [
        "1       train   4      3      -",
        "2       val     3      2      -",
        "known   known   2      2      -",
    ]
    assert sum("does not go with --paired" in line for line in lines(capsys, "--paired")) == 1
    change_config(atlas="p/99")
    assert any("scan 'p/99': no key '99'" in line for line in lines(capsys))


def test_faults_of_many_scans_are_one_line_and_flow_sources_must_be_there(folder, capsys):
    for k in range(8):
        change(f"{k}", "segmentation", lambda a: a // 255)
    one(lines(capsys), "error", "p/0, p/1, p/2 and 5 more", "mask has the values 0, 1")
    for k in range(8):
        change(f"{k}", "segmentation", lambda a: a * 255)
    with h5py.File("sets/p.h5", "r+") as file:
        file["7/flow"].attrs["source"] = "p/66"
    one(lines(capsys), "error", "p/7", "scan 'p/66': no key '66'")


def test_a_missing_or_damaged_file_is_one_line_and_a_scheme_can_be_looked_at_alone(folder, capsys):
    files = {"p": {"path": "sets/p.h5"}, "gone": {"path": "sets/gone.h5"}, "bad": {"path": "sets/bad.h5"}}
    pathlib.Path("sets/bad.h5").write_bytes(b"\x89HDF\r\n\x1a\n and then nothing")
    change_config(
        files=files, subsets={"train": ["gone/1", "gone/2", "bad/*"], "val": ["p/[4-5]"], "known": ["p/[67]"]}
    )
    found = lines(capsys)
    assert sum("gone.h5: no such HDF5 file" in line for line in found) == 1
    assert sum("bad.h5: cannot be read as HDF5" in line for line in found) == 1
    assert not any("--fix" in line for line in found)
    assert lines(capsys, "-v", "2, known", status=0)[-2] == "sets/p.json: 4 scans, 0 errors, 0 warnings"
    assert look("-v", "9") == 1
    assert "no scheme '9'; known are 1, 2, known" in capsys.readouterr().err


def test_what_build_doubted_is_told(folder, capsys):
    with h5py.File("sets/p.h5", "r+") as file:
        file["2"].attrs["doubts"] = "the liver found has 9000 ml, where 300 to 4000 are usual"
    one(lines(capsys, status=0), "warning", "p/2", "look at this scan: the liver found has 9000 ml")


def test_fix_writes_a_mended_copy_and_leaves_the_rest_as_it_is(folder, capsys):
    with h5py.File("sets/p.h5") as file:
        good = {key: (group["volume"][...], group["segmentation"][...]) for key, group in file.items()}
    change("0", "segmentation", lambda a: a // 255)
    change("1", "volume", lambda a: (a / 255).astype(np.float32))
    change("2", "volume", lambda a: a.astype(np.int32))
    change_config(subsets={"train": [f"p/{k}" for k in (0, 1, 2, 3, 33)], "val": ["p/4", "p/5"], "known": ["p/[67]"]})
    before = [pathlib.Path(f"sets/p.{ending}").read_bytes() for ending in ("h5", "json")]
    found = lines(capsys, "--fix", status=0)
    assert "mended: sets/p_fixed.h5, sets/p_fixed.json" in "\n".join(found).replace(f"{folder}/", "")
    assert found[-2] == "sets/p_fixed.json: 8 scans, 0 errors, 0 warnings"
    assert [pathlib.Path(f"sets/p.{ending}").read_bytes() for ending in ("h5", "json")] == before
    with h5py.File("sets/p_fixed.h5") as file:
        assert set(file) == set(good)
        for key, (volume, segmentation) in good.items():
            assert file[key]["volume"].dtype == np.uint8
            np.testing.assert_array_equal(file[key]["volume"], volume)
            np.testing.assert_array_equal(file[key]["segmentation"], segmentation)
        assert file["7/flow"].attrs["source"] == "p/6"
    assert look("--fix") == 1
    assert "p_fixed.h5 is there already" in capsys.readouterr().err
    assert look(config="sets/p_fixed.json") == 0


def test_fix_mends_nothing_that_could_be_meant_otherwise(folder, capsys):
    change("4", "point", lambda p: p + 30)
    change("5", "segmentation", set_voxel(3))
    change("0", "volume", set_voxel(-1000, np.int16))
    found = lines(capsys, "--fix")
    assert found[-2].startswith("--fix: nothing here can be mended")
    assert sorted(p.name for p in pathlib.Path("sets").iterdir()) == ["p.h5", "p.json"]


def test_the_contact_sheet_is_drawn_with_what_can_be_read(folder, capsys):
    change("4", "volume", lambda a: a[:, :-1])
    assert look("--figure", "sheet.png") == 1
    assert pathlib.Path("sheet.png").read_bytes()[1:4] == b"PNG"
    assert look("--figure", "nowhere/sheet.png") == 1
    assert "cannot write nowhere/sheet.png (No such file" in capsys.readouterr().err
    change_config(files={"p": {"path": "sets/gone.h5"}})
    assert look("--figure", "sheet2.png") == 1
    assert "there is no scan that can be drawn" in capsys.readouterr().err


def test_a_config_that_is_none_is_told(folder, capsys):
    change_config(colour="red")
    assert look() == 1
    assert "unknown key 'colour'" in capsys.readouterr().err
    with pytest.raises(UserError, match="no such dataset config"):
        check.main(["sets/nothing.json"])


def test_a_near_copy_of_a_scan_with_a_known_flow_is_one_and_its_source_is_none(folder, capsys):
    with h5py.File("sets/p.h5", "r+") as file:  # hardly deformed, as a small known flow does it
        file["7/volume"][...] = np.clip(file["6/volume"][...], 1, 254)
    lines(capsys, status=0)
    with h5py.File("sets/p.h5", "r+") as file:
        file["0/volume"][...] = np.clip(file["7/volume"][...], 2, 253)
    found = [line for line in lines(capsys) if line.startswith("error")]
    assert any("p/0, p/7" in line and "nearly the same volume, and are both trained on" in line for line in found)


def test_equal_faults_that_end_the_look_at_a_scan_are_one_line(folder, capsys):
    for key in ("4", "5"):
        change(key, "volume", set_voxel(np.nan, np.float32))
    one(lines(capsys), "error", "p/4, p/5", "  volume has 1 voxels that are NaN or infinite")


def test_the_next_step_is_told(folder, capsys):
    assert lines(capsys, status=0)[-1] == "next: python train.py -d sets/p.json"
    assert lines(capsys, "--paired", status=0)[-1] == 'next: python train.py -d sets/p.json --data_args "paired=True"'
    found = lines(capsys, "-v", "known", "--paired", status=0)
    assert found[-1] == "next: python eval.py -c RUN -d sets/p.json -v known --paired"
    change("0", "segmentation", lambda a: a // 255)
    assert lines(capsys)[-1] == "next: python -m data_util.check sets/p.json --fix"
    assert lines(capsys, "--fix", status=0)[-1] == "next: python train.py -d sets/p_fixed.json"
    change("0", "segmentation", lambda a: a * 0)
    assert lines(capsys)[-1] == "next: mend the errors above and look again with the same command"
