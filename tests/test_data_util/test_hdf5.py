import threading
from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import pytest

from data_util.config import DataFile
from data_util.store import ScanStore, report_id
from errors import UserError

SHAPE = (4, 5, 6)


def volume(seed, shape=SHAPE):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def make(path, scans):
    """Write {key: {member: array}}."""
    with h5py.File(path, "w") as f:
        for key, members in scans.items():
            for name, value in members.items():
                f.create_dataset(f"{key}/{name}", data=value, compression="gzip" if np.ndim(value) else None)
    return path


@pytest.fixture
def store(tmp_path):
    lits = {str(k): {"volume": volume(k)} for k in (1, 2, 10, 11, 3)}
    msd = {f"{task}/{k}": {"volume": volume(100 + k)} for task in ("liver", "pancreas") for k in (2, 12)}
    return ScanStore({"/": make(tmp_path / "msd.h5", msd), "lits": make(tmp_path / "lits.h5", lits)})


def one_scan(tmp_path, **members):
    path = make(tmp_path / "one.h5", {"a": {"volume": volume(1)} | members})
    return path, ScanStore({"f": path})


def test_ids_of_named_files_and_of_the_root_file(store, tmp_path):
    np.testing.assert_array_equal(store.read("lits/10").volume, volume(10))
    np.testing.assert_array_equal(store.read("liver/12").volume, volume(112))
    assert store.locate("lits/10") == (DataFile(tmp_path / "lits.h5"), "10")
    assert store.locate("liver/12") == (DataFile(tmp_path / "msd.h5"), "liver/12")


def test_a_file_of_that_name_goes_before_the_root_file(tmp_path):
    root = make(tmp_path / "root.h5", {"lits/1": {"volume": volume(1)}})
    lits = make(tmp_path / "lits.h5", {"1": {"volume": volume(2)}})
    scan = ScanStore({"/": root, "lits": lits}).read("lits/1")
    np.testing.assert_array_equal(scan.volume, volume(2))


def test_expand_keeps_order_sorts_globs_naturally_and_drops_repeats(store):
    assert store.expand(["lits/*"]) == ["lits/1", "lits/2", "lits/3", "lits/10", "lits/11"]
    assert store.expand(["lits/11", "lits/1*", "lits/11"]) == ["lits/11", "lits/1", "lits/10"]
    assert store.expand(["pancreas/*", "liver/2"]) == ["pancreas/2", "pancreas/12", "liver/2"]
    assert store.expand(["*/1[0-9]"]) == ["liver/12", "pancreas/12"]
    assert store.expand(["lits/1?"]) == ["lits/10", "lits/11"]
    assert store.expand([]) == []


def test_a_star_stays_within_a_level_and_ignores_datasets(tmp_path):
    path = make(tmp_path / "a.h5", {"x/1": {"volume": volume(1)}, "2": {"volume": volume(2)}})
    with h5py.File(path, "a") as f:
        f["notes"] = "made by hand"
    store = ScanStore({"a": path})
    assert store.expand(["a/*"]) == ["a/2", "a/x"]
    assert store.expand(["a/*/*"]) == ["a/x/1"]


def test_natural_order_is_total_over_mixed_names(tmp_path):
    names = ["S10", "S2", "2017_02_pregas", "2017_02_aftergas", "10", "9", "010", "b1c2", "b1c10", "b"]
    store = ScanStore({"f": make(tmp_path / "f.h5", {n: {"volume": volume(0)} for n in names})})
    expected = ["9", "010", "10", "2017_02_aftergas", "2017_02_pregas", "S2", "S10", "b", "b1c2", "b1c10"]
    assert [i.removeprefix("f/") for i in store.expand(["f/*"])] == expected


def test_everything_a_scan_can_hold(tmp_path):
    points = np.array([[1, 2, 3], [-1, -1, -1], [0.5, np.nan, 1], [-0.5, 4, 5]])
    segmentation = volume(2) // 100
    flow = np.random.default_rng(0).normal(size=(*SHAPE, 3))
    path, store = one_scan(
        tmp_path, segmentation=segmentation, point=points, spacing=[0.5, 1, 3], flow=flow, extra=np.arange(3)
    )
    with h5py.File(path, "a") as f:
        f["a/flow"].attrs["source"] = "f/b"
        f["a/id"] = "a name"
        f["a"].create_group("unknown")
    about = store.describe("f/a")
    assert (about.shape, about.dtype, about.landmarks) == (SHAPE, np.uint8, 4)
    assert (about.has_segmentation, about.has_spacing, about.flow_source) == (True, True, "f/b")

    scan = store.read("f/a", flow=True)
    assert (scan.id, scan.volume.dtype, scan.segmentation.dtype) == ("f/a", np.uint8, np.int32)
    np.testing.assert_array_equal(scan.volume, volume(1))
    np.testing.assert_array_equal(scan.segmentation, segmentation)
    assert (scan.points.dtype, scan.spacing.dtype, scan.flow.dtype) == (np.float32, np.float64, np.float32)
    expected = np.array([[1, 2, 3], [np.nan] * 3, [np.nan] * 3, [-0.5, 4, 5]], np.float32)
    np.testing.assert_array_equal(scan.points, expected)
    np.testing.assert_array_equal(scan.spacing, [0.5, 1, 3])
    np.testing.assert_array_equal(scan.flow, flow.astype(np.float32))
    assert scan.flow_source == "f/b"

    less = store.read("f/a", segmentation=False)
    assert less.segmentation is None
    assert less.flow is None
    assert less.flow_source == "f/b"


def test_what_a_scan_lacks_is_none(store):
    about = store.describe("lits/1")
    assert (about.landmarks, about.has_segmentation, about.has_spacing, about.flow_source) == (0, False, False, None)
    scan = store.read("lits/1", flow=True)
    assert [scan.segmentation, scan.points, scan.spacing, scan.flow, scan.flow_source] == [None] * 5


@pytest.mark.parametrize("points", [np.full((6, 3), -1.0), np.full((2, 3), np.nan), np.zeros((0, 3))])
def test_landmarks_all_missing_are_no_landmarks(tmp_path, points):
    _, store = one_scan(tmp_path, point=points)
    assert store.describe("f/a").landmarks == 0
    assert store.read("f/a").points is None


def test_spacing_as_an_attribute(tmp_path):
    path, store = one_scan(tmp_path)
    with h5py.File(path, "a") as f:
        f["a"].attrs["spacing"] = [1, 2, 3]
    assert store.describe("f/a").has_spacing
    np.testing.assert_array_equal(store.read("f/a").spacing, [1.0, 2.0, 3.0])


def test_labels_stored_as_floats_must_be_whole(tmp_path):
    labels = np.zeros(SHAPE, np.float32)
    labels[1, 2, 3] = 163
    _, store = one_scan(tmp_path, segmentation=labels)
    assert store.read("f/a").segmentation[1, 2, 3] == 163
    for wrong in (0.5, np.nan):
        store.close()
        labels[0, 0, 0] = wrong
        _, store = one_scan(tmp_path, segmentation=labels)
        with pytest.raises(UserError, match=r"one\.h5, scan 'a': segmentation .*whole"):
            store.read("f/a")


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"segmentation": np.zeros((5, 4, 6), np.uint8)}, ["segmentation", "(5, 4, 6)", "(4, 5, 6)"]),
        ({"flow": np.zeros(SHAPE)}, ["flow", "3 channels"]),
        ({"flow": np.zeros((*SHAPE, 3))}, ["flow", "source"]),
        ({"point": np.zeros((6, 2))}, ["point", "(6, 2)", "3"]),
        ({"point": np.zeros(3)}, ["point", "(3,)"]),
        ({"spacing": [1.0, 2.0]}, ["spacing", "[1.0, 2.0]", "mm"]),
        ({"spacing": [1.0, 0.0, 2.0]}, ["spacing", "positive"]),
        ({"spacing": [1.0, np.nan, 2.0]}, ["spacing", "positive"]),
        ({"segmentation": "none"}, ["segmentation", "numbers"]),
    ],
)
def test_members_that_do_not_fit(tmp_path, members, words):
    path, store = one_scan(tmp_path, **members)
    for look in (store.describe, store.read):
        with pytest.raises(UserError) as error:
            look("f/a")
        assert all(word in str(error.value) for word in [str(path), "'a'", *words]), error.value


def test_a_group_without_volume_and_a_scan_that_is_a_dataset(tmp_path):
    path = make(tmp_path / "f.h5", {"a": {"image": volume(1)}})
    store = ScanStore({"f": path})
    with pytest.raises(UserError, match=r"f\.h5, scan 'a': no dataset 'volume' \(it has image\)"):
        store.describe("f/a")
    with pytest.raises(UserError, match=r"f\.h5, scan 'a/image': is a dataset"):
        store.read("f/a/image")


def test_missing_keys_name_file_and_nearest(store, tmp_path):
    with pytest.raises(UserError) as error:
        store.expand(["lits/1", "lits/12"])
    message = str(error.value)
    assert all(word in message for word in ["lits/12", str(tmp_path / "lits.h5"), "nearest", "10", "11"]), message
    with pytest.raises(UserError, match=r"liver/13.*msd\.h5.*nearest there are liver/12, liver/2"):
        store.read("liver/13")
    with pytest.raises(UserError, match=r"no key 'spleen/1' in .*msd\.h5.*liver"):
        store.describe("spleen/1")
    with pytest.raises(UserError, match=r"'lits/7\*' matches no scan in .*lits\.h5"):
        store.expand(["lits/7*"])
    with pytest.raises(UserError, match="'lits' has no key"):
        store.expand(["lits"])


def test_unknown_file_key_lists_the_known(tmp_path):
    store = ScanStore({"lits": tmp_path / "a.h5", "yanx": tmp_path / "b.h5"})
    for call in (lambda: store.expand(["pigs/*"]), lambda: store.read("pigs/1"), lambda: store.locate("x")):
        with pytest.raises(UserError, match=r"files \(lits, yanx\)"):
            call()


def test_files_are_opened_only_when_needed(tmp_path):
    store = ScanStore({"a": make(tmp_path / "a.h5", {"1": {"volume": volume(1)}}), "b": tmp_path / "none.h5"})
    np.testing.assert_array_equal(store.read("a/1").volume, volume(1))
    for call in (lambda: store.expand(["b/*"]), lambda: store.expand(["b/1"]), lambda: store.read("b/1")):
        with pytest.raises(UserError, match=r"none\.h5: no such HDF5 file; "):
            call()


def test_a_file_that_is_no_hdf5_or_cut_off(tmp_path):
    path = make(tmp_path / "f.h5", {str(k): {"volume": volume(k, (20, 20, 20))} for k in range(5)})
    content = path.read_bytes()
    for wrong in (b"", b"not HDF5", content[: len(content) // 2], content[:-1]):
        path.write_bytes(wrong)
        with pytest.raises(UserError, match=r"f\.h5: cannot be read as HDF5, perhaps cut off or damaged; get .* again"):
            ScanStore({"f": path}).expand(["f/*"])


def test_damage_within_a_volume(tmp_path):
    path, store = one_scan(tmp_path)
    with h5py.File(path) as f:
        place = f["a/volume"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[place.byte_offset : place.byte_offset + place.size] = bytes(place.size)
    path.write_bytes(content)
    assert store.describe("f/a").shape == SHAPE
    with pytest.raises(UserError, match=r"one\.h5: cannot be read as HDF5"):
        store.read("f/a")


def test_cache_keeps_the_most_recently_used_within_its_limit(tmp_path):
    path = make(tmp_path / "f.h5", {str(k): {"volume": volume(k)} for k in range(3)})
    store = ScanStore({"f": path}, cache_bytes=2 * np.prod(SHAPE))
    first, second = store.read("f/0").volume, store.read("f/1").volume
    assert store.read("f/0").volume is first
    store.read("f/2")  # drops 1, which was used longest ago
    assert store.read("f/0").volume is first
    again = store.read("f/1").volume
    assert again is not second
    np.testing.assert_array_equal(again, second)
    assert ScanStore({"f": path}, cache_bytes=10).read("f/0").volume.shape == SHAPE  # larger than the limit
    with pytest.raises(ValueError, match="read-only"):
        again[0, 0, 0] = 1


def test_close_forgets(tmp_path):
    path, store = one_scan(tmp_path)
    store.read("f/a")
    store.close()
    make(path, {"a": {"volume": volume(7, (2, 3, 4))}})
    np.testing.assert_array_equal(store.read("f/a").volume, volume(7, (2, 3, 4)))


def test_many_threads_read_right_and_decode_once(tmp_path):
    scans = {
        str(k): {"volume": volume(k, (16, 16, 16)), "segmentation": volume(50 + k, (16, 16, 16))} for k in range(8)
    }
    store = ScanStore({"f": make(tmp_path / "f.h5", scans)})
    start = threading.Barrier(8)

    def work(thread):
        start.wait()
        return [store.read(f"f/{(k + thread) % 8}") for k in range(40)]

    with ThreadPoolExecutor(8) as pool:
        read = [scan for scans in pool.map(work, range(8)) for scan in scans]
    for scan in read:
        np.testing.assert_array_equal(scan.volume, volume(int(scan.id[2:]), (16, 16, 16)))
        np.testing.assert_array_equal(scan.segmentation, volume(50 + int(scan.id[2:]), (16, 16, 16)))
    assert len({id(scan.volume) for scan in read}) == 8


def test_report_id():
    assert report_id("pigs/2017_02_pregas") == "pigs_2017_02_pregas"
    assert report_id("a/b/c") == "a_b_c"
