"""Data sets that were written before the layout had a home of its own are read as they were then."""

import hashlib
import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from data_util import phantoms
from data_util.config import load_dataset_config
from data_util.dataset import open_scheme
from data_util.store import ScanStore

OLD = Path(__file__).parent / "old"
EXPECTED = json.loads((OLD / "expected.json").read_text())
ORDERS = json.loads((OLD / "orders.json").read_text())


def digest(array, kind):
    return None if array is None else hashlib.sha256(np.ascontiguousarray(array, kind).tobytes()).hexdigest()


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_an_old_set_is_read_unchanged(tmp_path, monkeypatch, name):
    for path in OLD.glob(f"{name}.*"):
        shutil.copy(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    config = load_dataset_config(f"{name}.json")
    store = ScanStore(config.files)
    for scan_id, expected in EXPECTED[name].items():
        scan = store.read(scan_id, flow=True)
        assert {
            "volume": digest(scan.volume, scan.volume.dtype),
            "segmentation": digest(scan.segmentation, np.int32),
            "points": digest(scan.points, np.float32),
            "spacing": None if scan.spacing is None else scan.spacing.tolist(),
            "flow": digest(scan.flow, np.float32),
            "flow_source": scan.flow_source,
        } == expected, scan_id


@pytest.mark.parametrize(("name", "scheme"), [(name, scheme) for name in sorted(ORDERS) for scheme in ORDERS[name]])
def test_runs_and_validations_of_then_go_on_with_the_same_pairs(monkeypatch, name, scheme):
    monkeypatch.chdir(OLD)
    expected, opened = ORDERS[name][scheme], open_scheme(load_dataset_config(f"{name}.json"), scheme)
    assert [list(pair) for pair in opened] == expected["pairs"]
    assert opened.sample(2, 7) == expected["sample"]
    drawn = [[list(pair) for pair in opened.training_pair_ids(3, 11, step)] for step in (0, 1, 1000)]
    assert drawn == expected["training"]


def test_the_same_seed_still_gives_the_same_phantoms(tmp_path):
    phantoms.write_dataset(tmp_path / "phantom", (16, 18, 17), 2, 1, 3)
    with h5py.File(OLD / "phantom.h5") as old, h5py.File(tmp_path / "phantom.h5") as new:
        assert set(new) == set(old)
        for key, group in old.items():
            assert set(new[key]) == set(group)
            for member, data in group.items():
                assert new[key][member].dtype == data.dtype
                found = np.abs(new[key][member][...].astype(float) - data[...])
                # Another processor may compute a last digit otherwise, which seldom changes what is rounded.
                assert (found > 0.002).mean() <= 0.001, (key, member)
        assert new["5/flow"].attrs["source"] == old["5/flow"].attrs["source"]
