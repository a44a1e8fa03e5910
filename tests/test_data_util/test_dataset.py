import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import tensorflow as tf

from data_util.batches import user_errors
from data_util.config import DatasetConfig
from data_util.dataset import open_scheme
from data_util.store import ScanStore
from errors import UserError

SIZE = (3, 4, 5)


def volume(seed):
    return np.random.default_rng(seed).integers(0, 256, SIZE).astype(np.uint8)


def points(seed, n):
    return np.random.default_rng(1000 + seed).uniform(0, 3, (n, 3)).astype(np.float32)


@pytest.fixture
def config(tmp_path):
    """Scans f/0 .. f/5: 0 has all but a flow, 1 labels and landmarks of which one is missing, 2 a flow from 0."""
    with h5py.File(tmp_path / "scans.h5", "w") as f:
        for k in range(6):
            f.create_dataset(f"{k}/volume", data=volume(k), compression="gzip")
        f["0/segmentation"] = volume(50) // 100
        f["0/point"] = points(0, 4)
        f["0"].attrs["spacing"] = [0.5, 1, 3]
        f["1/segmentation"] = (volume(51) // 100).astype(np.float32)
        with_missing = points(1, 4)
        with_missing[2] = -1
        f["1/point"] = with_missing
        f["2/flow"] = flow()
        f["2/flow"].attrs["source"] = "f/0"
    return DatasetConfig(
        path=Path("some.json"),
        files={"f": tmp_path / "scans.h5"},
        image_size=SIZE,
        image_type=None,
        subsets={
            "all": ("f/*",),
            "three": ("f/0", "f/2", "f/1"),
            "four": ("f/3", "f/5", "f/4", "f/0"),
            "one": ("f/5",),
            "none": (),
        },
        schemes={
            "all": {"all": 1.0},
            "three": {"three": 1.0},
            "four": {"four": 1.0},
            "mixed": {"three": 0.25, "four": 0.75},
            "one": {"one": 1.0},
            "none": {"none": 1.0},
        },
        atlas=None,
        labels={"liver": 1},
        task=("registration",),
    )


def flow():
    return np.random.default_rng(9).normal(size=(*SIZE, 3)).astype(np.float32)


def numpy_batches(dataset):
    with user_errors():
        return [{k: v.numpy() for k, v in batch.items()} for batch in dataset]


def damage(config, key):
    """Zero the compressed bytes of a scan's volume, which nothing notices before they are decoded."""
    path = config.files["f"]
    with h5py.File(path) as f:
        place = f[f"{key}/volume"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[place.byte_offset : place.byte_offset + place.size] = bytes(place.size)
    path.write_bytes(content)


def test_pairs_of_a_scheme_in_order_of_its_subsets(config):
    scheme = open_scheme(config, "mixed")
    three = [(a, b) for a in ("f/0", "f/2", "f/1") for b in ("f/0", "f/2", "f/1") if a != b]
    four = [(a, b) for a in ("f/3", "f/5", "f/4", "f/0") for b in ("f/3", "f/5", "f/4", "f/0") if a != b]
    assert len(scheme) == 6 + 12
    assert list(scheme) == three + four
    assert scheme[-1] == ("f/0", "f/4")
    with pytest.raises(IndexError):
        scheme[18]
    assert (scheme.image_size, scheme.labels) == (SIZE, {"liver": 1})
    assert [(s.name, s.fraction, s.ids) for s in scheme.subsets] == [
        ("three", 0.25, ("f/0", "f/2", "f/1")),
        ("four", 0.75, ("f/3", "f/5", "f/4", "f/0")),
    ]


def test_paired(config):
    expected = [("f/3", "f/5"), ("f/5", "f/3"), ("f/4", "f/0"), ("f/0", "f/4")]
    assert list(open_scheme(config, "four", paired=True)) == expected
    with pytest.raises(UserError, match=r"some\.json: subset 'three': paired needs an even number.*3"):
        open_scheme(config, "three", paired=True)


def test_atlas_is_fixed_in_every_pair_and_never_paired_with_itself(config):
    outside = open_scheme(replace(config, atlas="f/4"), "three")
    assert list(outside) == [("f/4", "f/0"), ("f/4", "f/2"), ("f/4", "f/1")]
    assert outside.subsets[0].ids == ("f/0", "f/2", "f/1")
    assert list(open_scheme(replace(config, atlas="f/2"), "three")) == [("f/2", "f/0"), ("f/2", "f/1")]
    with pytest.raises(UserError, match="atlas"):
        open_scheme(replace(config, atlas="f/4"), "four", paired=True)


def test_listed_pairs_are_these_alone_and_in_their_order(config):
    pairs = (("f/1", "f/0"), ("f/2", "f/1"), ("f/1", "f/2"))
    assert list(open_scheme(replace(config, pairs={"three": pairs}), "three")) == list(pairs)
    mixed = open_scheme(replace(config, pairs={"three": pairs}), "mixed")
    assert len(mixed) == 3 + 4 * 3
    assert mixed[2] == ("f/1", "f/2")
    drawn = {pair for step in range(40) for pair in mixed.training_pair_ids(1, 0, step)}
    assert drawn & {("f/0", "f/1"), ("f/0", "f/2"), ("f/2", "f/0")} == set()  # pairs of 'three' that are not listed
    assert set(pairs) <= drawn
    with pytest.raises(UserError, match=r"some\.json: subset 'three': .*'f/5', which is not in the subset"):
        open_scheme(replace(config, pairs={"three": (("f/0", "f/5"),)}), "three")
    with pytest.raises(UserError, match=r"subset 'three': .*listed.*leave paired out"):
        open_scheme(replace(config, pairs={"three": pairs}), "three", paired=True)
    with pytest.raises(UserError, match=r"subset 'three' of scheme 'three' has no pair"):
        open_scheme(replace(config, pairs={"three": ()}), "three")


def test_errors_up_front(config):
    with pytest.raises(UserError, match=r"some\.json: no scheme '2'; known are all, three, four, mixed, one, none"):
        open_scheme(config, "2")
    for name in ("one", "none"):
        with pytest.raises(UserError, match=rf"subset '{name}' of scheme '{name}' has no pair"):
            open_scheme(config, name)
    with pytest.raises(UserError, match=r"subset 'one' .* has no pair"):
        open_scheme(replace(config, atlas="f/5"), "one")
    with pytest.raises(UserError, match="f/9"):
        open_scheme(replace(config, atlas="f/9"), "three")
    with pytest.raises(UserError, match="f/7"):
        open_scheme(replace(config, subsets=config.subsets | {"three": ("f/0", "f/7")}), "three")


def test_a_wrong_volume_size_is_named_before_anything_is_read(config):
    with h5py.File(config.files["f"], "a") as f:
        f["6/volume"] = np.zeros((3, 4, 6), np.uint8)
    with pytest.raises(UserError) as error:
        open_scheme(config, "all")
    words = [str(config.files["f"]), "'6'", "3x4x6", "some.json", "3x4x5", "resample"]
    assert all(word in str(error.value) for word in words), error.value
    assert len(open_scheme(config, "four")) == 12  # which does not use it
    with pytest.raises(UserError, match="3x4x6"):
        open_scheme(replace(config, atlas="f/6"), "four")


def test_sample_is_sorted_distinct_and_seeded(config):
    scheme = open_scheme(config, "all")
    assert scheme.sample(30, 0) == scheme.sample(99, 1) == list(range(30))
    sample = scheme.sample(12, 7)
    assert sample == sorted(set(sample)) == scheme.sample(12, 7)
    assert len(sample) == 12
    assert set(sample) <= set(range(30))
    assert sample != scheme.sample(12, 8)


def test_training_batches_hold_the_pairs_that_are_named(config):
    scheme = open_scheme(config, "mixed")
    dataset = scheme.training(4, seed=5, start_step=0, stop_step=12)
    assert int(dataset.cardinality()) == 12
    for step, batch in enumerate(numpy_batches(dataset)):
        assert set(batch) == {"fixed", "moving", "seed"}
        ids = scheme.training_pair_ids(4, 5, step)
        assert len(ids) == 4
        assert Counter("f/1" in pair or "f/2" in pair for pair in ids)[True] <= 1  # one of four from subset "three"
        for side, column in (("fixed", 0), ("moving", 1)):
            assert batch[side].dtype == np.float32
            expected = np.stack([volume(int(pair[column][2:])) for pair in ids])[..., None] / 255
            np.testing.assert_allclose(batch[side], expected, rtol=1e-6)


def test_batches_keep_their_order_when_a_reader_is_slow(config, monkeypatch):
    read = ScanStore.read

    def slow_for_some(self, scan_id, segmentation=True, flow=False, mask=False):
        time.sleep(0.05 if scan_id == "f/0" else 0)
        return read(self, scan_id, segmentation, flow, mask)

    monkeypatch.setattr(ScanStore, "read", slow_for_some)
    scheme = open_scheme(config, "all")
    assert [k for b in numpy_batches(scheme.evaluation(5)) for k in b["index"]] == list(range(30))
    assert [n for b in numpy_batches(scheme.training(4, 0, 2, 5)) for n in b["seed"][:, 1]] == list(range(8, 20))


def test_training_continued_is_training_undisturbed(config):
    whole = numpy_batches(open_scheme(config, "mixed").training(3, 1, 0, 9))
    parts = [
        batch
        for start, stop in ((0, 4), (4, 5), (5, 9))
        for batch in numpy_batches(open_scheme(config, "mixed").training(3, 1, start, stop))
    ]
    for expected, batch in zip(whole, parts, strict=True):
        for key in expected:
            np.testing.assert_array_equal(batch[key], expected[key])
    other = numpy_batches(open_scheme(config, "mixed").training(3, 2, 0, 9))
    assert any(not np.array_equal(a["fixed"], b["fixed"]) for a, b in zip(whole, other, strict=True))


def test_every_draw_has_a_seed_of_its_own(config):
    scheme = open_scheme(config, "four")
    seeds = [tuple(s) for run in (0, 1) for b in numpy_batches(scheme.training(4, run, 0, 25)) for s in b["seed"]]
    assert len(set(seeds)) == 200
    far = numpy_batches(scheme.training(1, 2**40 + 3, 2**33, 2**33 + 1))[0]["seed"]
    assert far.dtype == np.int32
    assert (far >= 0).all()


def test_training_sees_each_pair_once_a_round(config):
    scheme = open_scheme(config, "four")
    ids = [pair for step in range(6) for pair in scheme.training_pair_ids(4, 3, step)]
    assert sorted(ids[:12]) == sorted(ids[12:]) == sorted(scheme)


def test_evaluation_batches(config):
    scheme = open_scheme(config, "three")  # pairs: 02 01, 20 21, 10 12
    assert scheme.has_flow
    dataset = scheme.evaluation(4, indices=[2, 1, 4, 5, 0])
    assert int(dataset.cardinality()) == 2
    first, last = numpy_batches(dataset)

    assert first["ids"].tolist() == [[b"f_2", b"f_0"], [b"f_0", b"f_1"], [b"f_1", b"f_0"], [b"f_1", b"f_2"]]
    assert first["index"].tolist() == [2, 1, 4, 5]
    assert first["valid"].all()
    for side, scans in (("fixed", [2, 0, 1, 1]), ("moving", [0, 1, 0, 2])):
        expected = np.stack([volume(k) for k in scans])[..., None] / 255
        np.testing.assert_allclose(first[side], expected, rtol=1e-6)
        segmentations = {0: volume(50) // 100, 1: volume(51) // 100, 2: np.full(SIZE, -1)}
        np.testing.assert_array_equal(first[f"{side}_seg"], np.stack([segmentations[k] for k in scans])[..., None])
        landmarks = {0: points(0, 4), 1: points(1, 4), 2: np.full((4, 3), np.nan)}
        landmarks[1][2] = np.nan
        np.testing.assert_array_equal(first[f"{side}_points"], np.stack([landmarks[k] for k in scans]))
        spacings = {0: [0.5, 1, 3], 1: [np.nan] * 3, 2: [np.nan] * 3}
        np.testing.assert_array_equal(first[f"{side}_spacing"], np.array([spacings[k] for k in scans], np.float32))
    np.testing.assert_array_equal(first["true_flow"][0], flow())  # f/2 was made from f/0
    assert np.isnan(first["true_flow"][1:]).all()

    assert last["valid"].tolist() == [True, False, False, False]
    assert last["index"].tolist() == [0, -1, -1, -1]
    assert last["ids"].tolist() == [[b"f_0", b"f_2"]] + [[b"", b""]] * 3
    assert np.isnan(last["true_flow"]).all()  # the other way round it is not this flow
    for side in ("fixed", "moving"):
        assert (last[side][1:] == 0).all()
        assert (last[f"{side}_seg"][1:] == -1).all()
        assert np.isnan(last[f"{side}_points"][1:]).all()
        assert np.isnan(last[f"{side}_spacing"][1:]).all()


def test_evaluation_of_all_pairs_whatever_the_batch(config):
    scheme = open_scheme(config, "mixed")
    for batch in (1, 4, 18, 20):
        batches = numpy_batches(scheme.evaluation(batch))
        assert all(len(b["valid"]) == batch for b in batches)
        assert [k for b in batches for k in b["index"][b["valid"]]] == list(range(18))
    assert numpy_batches(scheme.evaluation(4, indices=[])) == []
    with pytest.raises(IndexError):
        scheme.evaluation(4, indices=[18])


def test_types_and_shapes_are_static_and_known(config):
    scheme = open_scheme(config, "three")
    spec = scheme.evaluation(2).element_spec
    volumes = ((2, *SIZE, 1), tf.float32)
    assert {k: (tuple(s.shape), s.dtype) for k, s in spec.items()} == {
        "fixed": volumes,
        "moving": volumes,
        "fixed_seg": ((2, *SIZE, 1), tf.int32),
        "moving_seg": ((2, *SIZE, 1), tf.int32),
        "fixed_points": ((2, 4, 3), tf.float32),
        "moving_points": ((2, 4, 3), tf.float32),
        "fixed_spacing": ((2, 3), tf.float32),
        "moving_spacing": ((2, 3), tf.float32),
        "true_flow": ((2, *SIZE, 3), tf.float32),
        "valid": ((2,), tf.bool),
        "ids": ((2, 2), tf.string),
        "index": ((2,), tf.int64),
    }
    spec = scheme.training(2, 0, 0, 1).element_spec
    assert {k: (tuple(s.shape), s.dtype) for k, s in spec.items()} == {
        "fixed": volumes,
        "moving": volumes,
        "seed": ((2, 2), tf.int32),
    }
    traces = []

    @tf.function
    def step(batch):
        traces.append(1)
        return tf.reduce_sum(batch["fixed"])

    for batch in scheme.evaluation(4):
        step(batch)
    assert len(traces) == 1


def test_no_landmarks_and_no_flow_anywhere(config):
    scheme = open_scheme(replace(config, subsets=config.subsets | {"four": ("f/3", "f/4")}), "four")
    assert not scheme.has_flow
    (batch,) = numpy_batches(scheme.evaluation(2))
    assert batch["fixed_points"].shape == (2, 0, 3)
    assert "true_flow" not in batch


def test_a_flow_counts_only_where_its_source_is_a_partner(config):
    assert not open_scheme(replace(config, subsets=config.subsets | {"four": ("f/2", "f/3")}), "four").has_flow


def test_a_flow_is_true_for_the_pair_with_its_source_alone(config):
    (batch,) = numpy_batches(open_scheme(config, "three").evaluation(6))
    known = [not np.isnan(f).any() for f in batch["true_flow"]]
    assert [ids.tolist() for ids, k in zip(batch["ids"], known, strict=True) if k] == [[b"f_2", b"f_0"]]


def test_unequal_numbers_of_landmarks(config):
    with h5py.File(config.files["f"], "a") as f:
        f["4/point"] = points(4, 2)
    scheme = open_scheme(config, "four")  # f/4 with 2 landmarks, f/0 with 4, f/3 and f/5 without
    with pytest.raises(UserError) as error:
        scheme.evaluation(1)
    assert all(word in str(error.value) for word in ["f/4", "f/0", "2 and 4"]), error.value
    (batch,) = numpy_batches(scheme.evaluation(1, indices=[7]))  # f/4, f/5: only one has any
    assert batch["ids"].tolist() == [[b"f_4", b"f_5"]]
    assert batch["fixed_points"].shape == (1, 4, 3)
    np.testing.assert_array_equal(batch["fixed_points"][0, :2], points(4, 2))
    assert np.isnan(batch["fixed_points"][0, 2:]).all()


def test_volumes_of_any_number_type_are_divided_by_255(config):
    kinds = (np.uint8, np.int16, np.uint16, np.float32, np.float64, np.int64)
    with h5py.File(config.files["f"], "a") as f:
        for k, kind in enumerate(kinds):
            del f[f"{k}/volume"]
            f[f"{k}/volume"] = volume(k).astype(kind)
    for batch in numpy_batches(open_scheme(config, "all").evaluation(5)):
        for pair, image in zip(batch["ids"], batch["moving"], strict=True):
            expected = volume(int(pair[1].decode()[2:])).astype(np.float32) / 255
            np.testing.assert_allclose(image[..., 0], expected, rtol=1e-6)


def test_a_reader_s_error_arrives_as_it_was_raised(config):
    damage(config, 4)
    scheme = open_scheme(config, "all")
    for dataset in (scheme.training(2, 0, 0, 20), scheme.evaluation(2)):
        with pytest.raises(UserError) as error:
            numpy_batches(dataset)
        message = str(error.value)
        assert message.startswith(f"{config.files['f']}: cannot be read as HDF5"), message
        assert "\n" not in message
        assert "Traceback" not in message

    @tf.function
    def loop():
        total = 0.0
        for batch in scheme.evaluation(2):
            total += tf.reduce_sum(batch["fixed"])
        return total

    with pytest.raises(UserError, match=r"scans\.h5: cannot be read"), user_errors():
        loop()


def test_other_errors_stay_what_they_are():
    with pytest.raises(tf.errors.InvalidArgumentError), user_errors():
        tf.debugging.check_numerics(tf.constant(np.nan), "loss")
    with pytest.raises(KeyError), user_errors():
        raise KeyError("fixed")


def test_training_reads_no_segmentation_and_schemes_can_share_a_store(config, monkeypatch):
    read = ScanStore.read
    asked = []

    def spy(self, scan_id, segmentation=True, flow=False, mask=False):
        asked.append((segmentation, flow))
        return read(self, scan_id, segmentation, flow, mask)

    monkeypatch.setattr(ScanStore, "read", spy)
    store = ScanStore(config.files)
    numpy_batches(open_scheme(config, "four", store=store).training(2, 0, 0, 3))
    assert set(asked) == {(False, False)}
    volume_of_0 = store.read("f/0").volume
    numpy_batches(open_scheme(config, "three", store=store).evaluation(2))
    assert store.read("f/0").volume is volume_of_0


@pytest.mark.slow
def test_an_affine_map_of_each_pair(config, tmp_path):
    x, y, z = np.indices((36, 32, 28)) - np.array([18, 15, 14])[:, None, None, None]
    organ = 200.0 * (x**2 / 81 + y**2 / 49 + z**2 / 9 < 1) * (1 - 0.5 * (abs(x - 4) + abs(y) + abs(z + 2) < 5))
    moved = np.roll(organ, (5, -4, 3), (0, 1, 2))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name, array in (("1", organ), ("2", moved), ("3", np.full_like(organ, 7))):
            file[f"{name}/volume"] = array.astype(np.uint8)
            if name != "3":
                file[name].attrs["spacing"] = (4.0, 4.0, 5.0)
    subsets = {"all": ("a/1", "a/2", "a/3")}
    config = replace(config, files={"a": tmp_path / "a.h5"}, image_size=organ.shape, subsets=subsets)
    config = replace(config, schemes={"all": {"all": 1.0}})
    scheme = open_scheme(config, "all")
    assert not scheme.has_spacings
    (plain,) = numpy_batches(scheme.evaluation(3, [0, 1]))
    (batch,) = numpy_batches(scheme.evaluation(3, [0, 1], "rigid"))
    assert set(batch) - set(plain) == {"affine_matrix", "affine_shift", "affine_found"}
    for name, value in plain.items():
        np.testing.assert_array_equal(batch[name], value)  # the scans are as they are stored
    assert batch["affine_found"].tolist() == [1, 0, 0]  # scan 3 shows nothing; the last one fills up
    np.testing.assert_allclose(batch["affine_matrix"][0], np.zeros((3, 3)), atol=0.06)
    np.testing.assert_allclose(batch["affine_shift"][0], [5, -4, 3], atol=0.5)  # voxels
    np.testing.assert_array_equal(batch["affine_matrix"][1:], 0)
    np.testing.assert_array_equal(batch["affine_shift"][1:], 0)


def test_training_reads_labels_and_landmarks_only_where_asked(config):
    scheme = open_scheme(config, "three")  # scans 0, 2 and 1, of which 2 has neither
    (plain,) = numpy_batches(scheme.training(6, 0, 0, 1))
    (asked,) = numpy_batches(scheme.training(6, 0, 0, 1, members=("seg", "points")))
    assert set(plain) == {"fixed", "moving", "seed"}
    assert set(asked) == set(plain) | {"fixed_seg", "moving_seg", "fixed_points", "moving_points"}
    for name in plain:
        np.testing.assert_array_equal(plain[name], asked[name])
    store = ScanStore(config.files)
    pairs = scheme.training_pair_ids(6, 0, 0)
    assert {scan for pair in pairs for scan in pair} == {"f/0", "f/1", "f/2"}
    for n, pair in enumerate(pairs):
        for side, scan_id in zip(("fixed", "moving"), pair, strict=True):
            scan = store.read(scan_id)
            labels = np.full(SIZE, -1) if scan.segmentation is None else scan.segmentation
            landmarks = np.full((4, 3), np.nan) if scan.points is None else scan.points
            np.testing.assert_array_equal(asked[f"{side}_seg"][n, ..., 0], labels)
            np.testing.assert_array_equal(asked[f"{side}_points"][n], landmarks)


def test_what_no_pair_has_cannot_be_asked_for(config):
    open_scheme(config, "three").check_members(("seg", "points"), ("dice_factor", "landmark_factor"))
    scheme = open_scheme(config, "four")  # of its scans 0 alone has labels and landmarks
    with pytest.raises(UserError, match=r"dice_factor: no pair .* has segmentations in both scans; .*dice_factor=0"):
        scheme.check_members(("seg",), ("dice_factor",))
    with pytest.raises(UserError, match="landmark_factor: no pair to train on has landmarks"):
        scheme.check_members(("points",), ("landmark_factor",))
    scheme.check_members((), ())


def test_training_reads_masks_only_where_asked(config):
    mask = np.random.default_rng(7).integers(0, 3, SIZE)
    with h5py.File(config.files["f"], "a") as f:
        f["0/mask"] = mask
    scheme = open_scheme(config, "three")
    scheme.check_members(("mask",), ("similarity_mask",))  # one scan of a pair is enough
    (batch,) = numpy_batches(scheme.training(6, 0, 0, 1, members=("mask",)))
    assert set(batch) == {"fixed", "moving", "seed", "fixed_mask", "moving_mask"}
    for n, ids in enumerate(scheme.training_pair_ids(6, 0, 0)):
        for side, scan_id in zip(("fixed", "moving"), ids, strict=True):
            expected = mask > 0 if scan_id == "f/0" else np.ones(SIZE)
            np.testing.assert_array_equal(batch[f"{side}_mask"][n, ..., 0], expected)
            assert batch[f"{side}_mask"].dtype == np.float32


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones((3, 4, 6)), r"scan '0': mask is \(3, 4, 6\); it must be as its volume, \(3, 4, 5\)"),
        (np.full(SIZE, np.nan), "scan '0': mask has NaN; write it again with 0 and 1"),
    ],
)
def test_wrong_masks_are_told_where_they_are_asked_for(config, mask, message):
    with pytest.raises(UserError, match=r"similarity_mask: no pair .* has masks; add masks .*similarity_mask=None"):
        open_scheme(config, "three").check_members(("mask",), ("similarity_mask",))
    with h5py.File(config.files["f"], "a") as f:
        f["0/mask"] = mask
    scheme = open_scheme(config, "three")
    numpy_batches(scheme.training(6, 0, 0, 1))
    with pytest.raises(UserError, match=message), user_errors():
        numpy_batches(scheme.training(6, 0, 0, 1, members=("mask",)))


def test_no_tuner_holds_a_dataset_up_when_it_ends(config):
    """TensorFlow's slept up to 20 s there."""
    scheme = open_scheme(config, "mixed")
    for dataset in (scheme.training(2, 0, 0, 3), scheme.evaluation(1)):
        assert dataset.options().autotune.enabled is False
