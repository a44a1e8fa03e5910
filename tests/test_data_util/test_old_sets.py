"""Data sets that were written before the layout had a home of its own are read as they were then."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_util.config import load_dataset_config
from data_util.store import ScanStore

OLD = Path(__file__).parent / "old"
EXPECTED = json.loads((OLD / "expected.json").read_text())


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
