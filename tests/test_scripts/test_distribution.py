"""train.py and eval.py on several devices and machines give what one device gives; each run is a process of its own."""

import csv
import json
import pathlib
import signal
import time

import numpy as np
import pytest
import tensorflow as tf

import workers
from data_util.phantoms import write_dataset
from errors import UserError
from tests.commands import finish, run_named, start, two_workers

FLAGS = ("--batch", "4", "--val_pairs", "2")
MODELS = {
    "VTN-1": ("-b", "VTN", "-n", "1", "-r", "2"),
    "VoxelMorph-2": ("-b", "VoxelMorph", "-n", "2"),
}
# A model, its channels, and how far the weights may be apart. Few channels where the division of work is tested alone,
# not the convolutions; with many, another order of summation (one device without oneDNN) moves those of VTN by 1.2e-4.
CASES = [("VTN-1", 4, 1e-4), pytest.param(("VoxelMorph-2", 4, 1e-4), marks=pytest.mark.slow)]
CASES += [pytest.param((model, 16, 3e-4), marks=pytest.mark.slow) for model in MODELS]
FIVE_STEPS = ("--round", "5", "--epochs", "1", "--val_steps", "100")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A working folder with data sets p<N>.json of N^3 voxels."""
    home = tmp_path_factory.mktemp("distribution")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        pathlib.Path("datasets").mkdir()
        for size in (16, 64):
            write_dataset(f"datasets/p{size}", (size,) * 3, 4, 3, 0)
    return home


def differences(home, name, reference):
    """Largest relative difference of the logged losses, and that of all weights as one vector.

    The loss of orthogonality alone is a difference of numbers near 10: below 0.1 one would see its rounding alone.
    """
    rows = [[*csv.DictReader((run_named(home, n) / "log.csv").open())] for n in (name, reference)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    losses = max(
        abs(float(a[key]) - float(b[key])) / max(abs(float(b[key])), 0.1 if key == "0_ortho_loss" else 1e-2)
        for a, b in zip(*rows, strict=True)
        for key in a
    )
    readers = [
        tf.train.load_checkpoint(str(next(run_named(home, n).glob("*.index"))).removesuffix(".index"))
        for n in (name, reference)
    ]
    apart = whole = 0.0
    for key in readers[1].get_variable_to_shape_map():
        if key.endswith(("/W", "/b")):
            a, b = (reader.get_tensor(key).astype(np.float64) for reader in readers)
            apart, whole = apart + ((a - b) ** 2).sum(), whole + (b**2).sum()
    return losses, (apart / whole) ** 0.5


@pytest.fixture(scope="module", params=CASES, ids=str)
def one_device(request, home):
    """Flags of a model, the name of its run on one device, and how far the weights of others may be apart."""
    model, channels, apart = request.param
    name = f"{model}-{channels}"
    flags = ("-d", "datasets/p64.json", *FLAGS, *MODELS[model], "--net_args", f"channels={channels}", *FIVE_STEPS)
    finish(start(home, "train.py", "-g", "-1", *flags, "--name", name))
    return flags, name, apart


@pytest.mark.parametrize("devices", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_devices_do_not_change_the_result(one_device, home, devices):
    flags, reference, apart = one_device
    name = f"{reference}-{devices}"
    finish(start(home, "train.py", "-g", f"cpu:{devices}", *flags, "--name", name))
    losses, weights = differences(home, name, reference)
    print(f"{name}: losses {losses:.1e}, weights {weights:.1e}")
    assert losses < 1e-4
    assert weights < apart


def test_machines_do_not_change_the_result_and_one_writes(one_device, home):
    flags, reference, apart = one_device
    name = f"{reference}-machines"
    outputs = finish(*two_workers(home, *flags, "--val_steps", "5", "--name", name))
    losses, weights = differences(home, name, reference)
    print(f"{name}: losses {losses:.1e}, weights {weights:.1e}")
    assert losses < 1e-4
    assert weights < apart
    assert len((run_named(home, name) / "validation.csv").read_text().splitlines()) == 2
    assert "Finished: 5 steps" in outputs[0]
    assert "Finished" not in outputs[1]


@pytest.mark.slow
def test_devices_do_not_change_what_is_learned_of_labels_landmarks_and_both_ways(home):
    options = "channels=4, dice_factor=1, landmark_factor=0.1, similarity='ncc+mi', similarity_on='last'"
    options += ", flow='velocity', bending_factor=1, inverse_factor=0.1, augmentation='bspline+affine+contrast'"
    flags = ("-d", "datasets/p16.json", *FLAGS, *MODELS["VoxelMorph-2"], "--net_args", options, *FIVE_STEPS)
    for devices in (1, 2):
        finish(start(home, "train.py", "-g", f"cpu:{devices}", *flags, "--name", f"options-{devices}"))
    losses, weights = differences(home, "options-2", "options-1")
    print(f"losses {losses:.1e}, weights {weights:.1e}")
    assert losses < 1e-4
    assert weights < 1e-4


SMALL = ("-d", "datasets/p16.json", "-b", "VoxelMorph", "--batch", "4", "--net_args", "channels=2")


def test_two_devices_write_the_same_report(home):
    finish(start(home, "train.py", "-g", "-1", *SMALL, "--round", "2", "--epochs", "1", "--name", "evaluated"))
    checkpoint = str(run_named(home, "evaluated"))
    flags = ("-c", checkpoint, "-v", "2,known", "--paired", "--batch", "2")
    finish(start(home, "eval.py", "-g", "-1", *flags, "--name", "one"))
    finish(start(home, "eval.py", "-g", "cpu:2", *flags, "--name", "two"))
    reports = sorted((home / "evaluate").glob("*-one-*.txt"))
    assert len(reports) == 2
    for report in reports:
        assert report.read_bytes() == pathlib.Path(str(report).replace("-one-", "-two-")).read_bytes()


@pytest.mark.slow
def test_a_killed_worker_stops_the_other_and_the_run_goes_on(home):
    flags = (*SMALL, "--round", "4", "--epochs", "3", "--val_steps", "100")
    finish(*two_workers(home, *flags, "--name", "undisturbed"))
    chief, worker = two_workers(home, *flags, "--name", "disturbed")
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:  # a checkpoint is at step 4, so this is in the middle of the second epoch
        logs = list((home / "weights").glob("*_disturbed/log.csv"))
        if logs and len(logs[0].read_text().splitlines()) > 6:
            break
        time.sleep(0.05)
    worker.send_signal(signal.SIGKILL)
    worker.communicate()
    (output,) = finish(chief, status=1)
    assert "another worker was lost" in output
    assert "Traceback" not in output
    interrupted = run_named(home, "disturbed")
    assert not (interrupted / "model-12.index").exists()
    finish(*two_workers(home, "-c", f"{interrupted}:4", "--val_steps", "100", "--name", "continued"))
    readers = [
        tf.train.load_checkpoint(str(run_named(home, name) / "model-12")) for name in ("undisturbed", "continued")
    ]
    for key in readers[0].get_variable_to_shape_map():
        np.testing.assert_allclose(*(reader.get_tensor(key) for reader in readers), rtol=1e-4, atol=1e-6, err_msg=key)


def test_a_batch_that_does_not_divide(home):
    (output,) = finish(start(home, "train.py", "-g", "cpu:4", "-d", "datasets/p16.json", "--batch", "6"), status=1)
    assert output.strip().splitlines()[-1] == "error: --batch 6 does not divide by 4 devices; use --batch 4 or 8"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "TF_CONFIG '{' cannot be used"),
        ('{"cluster": {"worker": ["a:1", "b:2"]}, "task": {"type": "worker", "index": 2}}', "no task worker 2"),
        ('{"cluster": {"chief": ["a:1"]}, "task": {"type": "worker", "index": -1}}', "no task worker -1"),
        ('{"cluster": {"worker": ["a:1", "b"]}, "task": {"type": "worker", "index": 0}}', "'b' is not host:port"),
        ('{"cluster": {"worker": "a:1"}, "task": {"type": "worker", "index": 0}}', "'a' is not host:port"),
    ],
)
def test_a_wrong_cluster(monkeypatch, text, said):
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(UserError, match=said):
        workers.cluster()


def test_the_chief_counts_among_the_workers(monkeypatch):
    cluster = {"chief": ["a:1"], "worker": ["b:2", "c:3"]}
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": cluster, "task": {"type": "worker", "index": 1}}))
    assert workers.cluster() == (("a:1", "b:2", "c:3"), 2)
    assert workers.cluster().workers == 3
