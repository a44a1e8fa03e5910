"""The published data sets' protocols, on files with their keys and tiny volumes."""

import json
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from data_util.config import DataFile, load_dataset_config
from data_util.dataset import open_scheme

DATASETS = Path(__file__).parents[2] / "datasets"
SIZE = (2, 3, 4)

PIGS = [f"2017_{k:02}" for k in (2, 3, 4, 7, 8, 10, 11, 12, 13)] + [
    f"2018_{k:02}" for k in (1, 8, 9, 11, 12, 13, 14, 15)
]
LIVER_KEYS = {
    "msd_dataset.h5": [f"hepaticvessel/{k}" for k in range(1, 444)]
    + [f"pancreas/{k}" for k in range(1, 421)]
    + [f"liver/{k}" for k in range(202)],  # 0 to 130 are LiTS, and must not be trained on
    "youyi_liver.h5": [f"{13162744 + 977 * k}_{250 + k}" for k in range(90)]
    + ["00490534_from_12680to_13004", "13472546_180(1)"],
    "sliver_val.h5": [str(k) for k in range(1, 21)],
    "lits_val.h5": [str(k) for k in range(131)],
    "lspig_val.h5": [f"{pig}_{when}" for pig in PIGS for when in ("pregas", "aftergas")],
}
BRAIN_KEYS = {
    "adni.h5": [str(k) for k in range(1, 68) if k != 6],
    "abide.h5": [f"NYU_1-{29000 + k}" for k in range(315)],
    "abidef.h5": [f"CMU-{50000 + k}" for k in range(972)],
    "adhd.h5": [f"Pittsburgh-{25000 + k}" for k in range(949)],
    "lpba_val.h5": [f"S{k:02}" for k in range(1, 41)],
}


def published(folder, keys, name):
    """Files with those keys in a folder `datasets`, and our config of that name for their tiny volumes."""
    config = load_dataset_config(DATASETS / name)
    assert config.image_size == (128, 128, 128)
    assert {file.path.name for file in config.files.values()} == set(keys)
    assert {file.path.parent.name for file in config.files.values()} == {"datasets"}
    for file, scans in keys.items():
        with h5py.File(folder / file, "w") as f:
            for scan in scans:
                f.create_group(scan)["volume"] = np.zeros(SIZE, np.uint8)
    return replace(
        config, image_size=SIZE, files={key: DataFile(folder / file.path.name) for key, file in config.files.items()}
    )


@pytest.fixture(scope="module")
def liver(tmp_path_factory):
    return published(tmp_path_factory.mktemp("datasets"), LIVER_KEYS, "liver.json")


@pytest.fixture(scope="module")
def brain(tmp_path_factory):
    return published(tmp_path_factory.mktemp("datasets"), BRAIN_KEYS, "brain.json")


def test_liver_training(liver):
    (subset,) = open_scheme(liver, "1").subsets
    assert len(subset.ids) == 1025
    assert len(subset.pairs) == 1025 * 1024
    of = [i.split("/")[0] for i in subset.ids]
    counts = {"youyi": 92, "hepaticvessel": 443, "pancreas": 420, "liver": 70}
    assert {name: of.count(name) for name in counts} == counts
    validation = open_scheme(liver, "lits").subsets[0].ids
    assert not set(subset.ids) & set(validation)


def test_sliver(liver):
    for name in ("2", "sliver"):
        scheme = open_scheme(liver, name)
        assert scheme.subsets[0].ids == tuple(f"yanx/{k}" for k in range(1, 21))
        assert len(scheme) == 380
        assert scheme[0] == ("yanx/1", "yanx/2")


def test_lits(liver):
    scheme = open_scheme(liver, "lits")
    assert scheme.subsets[0].ids == tuple(f"lits/{k}" for k in range(131))
    assert len(scheme) == 17030


def test_lspig_pairs_each_pig_with_itself(liver):
    scheme = open_scheme(liver, "lspig", paired=True)
    assert len(scheme.subsets[0].ids) == len(scheme) == 34
    expected = []
    for pig in PIGS:
        after, before = f"pigs/{pig}_aftergas", f"pigs/{pig}_pregas"
        expected += [(after, before), (before, after)]
    assert list(scheme) == expected


def test_lpba_to_its_atlas(brain):
    scheme = open_scheme(brain, "2")
    assert list(scheme) == [("lpba/S01", f"lpba/S{k:02}") for k in range(2, 41)]
    assert len(scheme.labels) == 56
    ranges = [(21, 34), (41, 50), (61, 68), (81, 92), (101, 102), (121, 122), (161, 166), (181, 182)]
    assert list(scheme.labels.values()) == [v for low, high in ranges for v in range(low, high + 1)]
    assert all(name == str(value) for name, value in scheme.labels.items())


def test_brain_training_to_the_atlas(brain):
    scheme = open_scheme(brain, "1")
    assert len(scheme.subsets[0].ids) == len(scheme) == 2302
    of = [i.split("/")[0] for i in scheme.subsets[0].ids]
    counts = {"adni": 66, "abide": 315, "abidef": 972, "adhd": 949}
    assert {name: of.count(name) for name in counts} == counts
    assert {fixed for fixed, _ in scheme} == {"lpba/S01"}


def test_a_config_that_lists_ids_in_any_order_and_leaves_scan_14_out(liver, tmp_path):
    """The form of the original's configs: every id written, SLIVER without scan 14."""
    order = (10, 11, 17, 4, 5, 13, 12, 19, 6, 2, 15, 16, 7, 18, 20, 1, 9, 3, 8)
    path = tmp_path / "liver.json"
    path.write_text(
        json.dumps(
            {
                "files": {
                    "/": {"type": "HDF5", "path": "datasets/not_downloaded.h5"},
                    "yanx": {"type": "HDF5", "path": str(liver.files["yanx"].path)},
                },
                "image_size": list(SIZE),
                "image_type": "liver",
                "schemes": {"1": {"combine-train": 1.0}, "2": {"sliver-val": 1.0}},
                "subsets": {"combine-train": ["liver/132"], "sliver-val": [f"yanx/{k}" for k in order]},
            },
            indent=2,
        )
    )
    scheme = open_scheme(load_dataset_config(path), "2")
    assert len(scheme) == 342
    assert scheme[0] == ("yanx/10", "yanx/11")
