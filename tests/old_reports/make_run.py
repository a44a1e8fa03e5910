"""The data and the run that the files in this folder are of, made anew by rule."""

import json
import os
import pathlib

import h5py
import numpy as np

from network import checkpoints
from network.training import adam
from tests.test_network.golden import rule_network

SIZE = (32, 28, 24)
SCANS = 3  # 6 ordered pairs
LABELS = {"left": 4, "right": 9}
WRITTEN = 1795600000.0  # seconds: when the checkpoint was written


def write(folder):
    """Write scans, config and run into a folder: scan 2 lacks landmarks and spacing, scan 3 the label `right`."""
    folder = pathlib.Path(folder)
    rng = np.random.default_rng(5)
    with h5py.File(folder / "scans.h5", "w") as file:
        for k in range(1, SCANS + 1):
            volume = np.kron(rng.uniform(0, 255, (8, 7, 6)), np.ones((4, 4, 4))).astype(np.uint8)
            group = file.create_group(str(k))
            group["volume"] = volume
            group["segmentation"] = np.select([volume > 180, (volume < 90) & (k != 3)], [4, 9]).astype(np.uint8)
            if k != 2:
                group["point"] = rng.uniform(4, 20, (3, 3)).astype(np.float32)
                group.attrs["spacing"] = (0.8, 1.5, 2.5)
    config = {
        "files": {"s": {"type": "HDF5", "path": "scans.h5"}},
        "image_size": SIZE,
        "subsets": {"all": [f"s/{k}" for k in range(1, SCANS + 1)]},
        "schemes": {"2": {"all": 1.0}},
        "segmentation_class_value": LABELS,
    }
    (folder / "data.json").write_text(json.dumps(config))
    network = rule_network("VTN", 1, image_size=SIZE, channels=4)
    run = folder / "weights" / "small"
    run.mkdir(parents=True)
    checkpoints.save(run, network, adam(network), 7)
    (run / "config.json").write_text(json.dumps(network.config.to_dict()))
    (run / "args.json").write_text(json.dumps({"dataset": "data.json"}))
    os.utime(run / "model-7.index", (WRITTEN, WRITTEN))
