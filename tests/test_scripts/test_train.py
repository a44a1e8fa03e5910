"""train.py as a user runs it, on small phantoms."""

import csv
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
import tensorflow as tf

import cli
import train
from data_util.phantoms import write_dataset
from network import checkpoints

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A small data set, p.json and p.h5, that looks for its file from the folder above."""
    home = tmp_path_factory.mktemp("dataset")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        pathlib.Path("datasets").mkdir()
        write_dataset("datasets/p", (16, 16, 16), 4, 1, 0)
    return home / "datasets"


@pytest.fixture
def folder(dataset, tmp_path, monkeypatch):
    """A working folder with the data set as datasets/p.json."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(dataset, "datasets")
    return tmp_path


@pytest.fixture(scope="module")
def started(dataset, tmp_path_factory):
    """The run of an affine network that was stopped after its first step."""
    home = tmp_path_factory.mktemp("started")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        shutil.copytree(dataset, "datasets")
        assert run("-n", "0", "-r", "2", "--lr", "3e-4", "--seed", "5", "--name", "a", "--epochs", "0.3") == 0
        return only_run("_a").resolve()


FLAGS = [
    *("-d", "datasets/p.json", "-g", "-1", "--batch", "2", "--round", "3", "--epochs", "2", "--val_steps", "3"),
    *("--net_args", "channels=2"),
]


def run(*flags):
    return cli.run(train.main, [*FLAGS, *flags])


def only_run(name=""):
    (found,) = pathlib.Path("weights").glob(f"*{name}")
    return found


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def steps_of(run):
    return [int(row["step"]) for row in rows_of(run / "log.csv")]


def weights_of(folder, step):
    reader = tf.train.load_checkpoint(str(folder / f"model-{step}"))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


def test_a_run_and_everything_it_leaves(folder, capsys):
    assert run("-n", "2", "-r", "2", "--name", "a", "--logs", "sub") == 0
    made = only_run("_a")
    assert checkpoints.list_steps(made) == [3, 6]
    assert not list(made.glob(".partial*"))
    rows = rows_of(made / "log.csv")
    assert steps_of(made) == [1, 2, 3, 4, 5, 6]
    assert list(rows[0])[:3] == ["step", "loss", "lr"]
    assert {"0_det_loss", "1_reg_loss", "4_reg_loss", "3_raw_loss", "4_raw_loss"} < set(rows[0])
    assert {row["lr"] for row in rows} == {"0.0001"}
    assert json.loads((made / "args.json").read_text())["n_cascades"] == 2
    config = checkpoints.load_cascade_config(made)
    assert (config.rep, config.channels, config.image_size) == (2, 2, (16, 16, 16))
    validation = rows_of(made / "validation.csv")
    assert [(row["step"], row["pairs"]) for row in validation] == [("3", "2"), ("6", "2")]
    assert 0 < float(validation[0]["dice_score"]) < 1
    tags = set()
    for file in pathlib.Path("logs/sub", made.name).glob("events*"):
        for event in tf.compat.v1.train.summary_iterator(str(file)):
            tags.update(value.tag for value in event.summary.value)
    assert {"loss", "lr", "0_ortho_loss", "val_dice_score", "val_landmark_dist"} <= tags
    out, err = capsys.readouterr()
    assert f"Finished: 6 steps, checkpoint {made}/model-6" in out
    assert "data " in err
    assert "step/s" in err or "s/step" in err


def test_pictures(folder, monkeypatch):
    from network import callbacks

    monkeypatch.setattr(callbacks, "PICTURES_EVERY", 3)
    assert run("-n", "0") == 0
    tags = []
    for file in pathlib.Path("logs").rglob("events*"):
        for event in tf.compat.v1.train.summary_iterator(str(file)):
            tags += [value.tag for value in event.summary.value if "image" in value.metadata.plugin_data.plugin_name]
    assert sorted(tags) == sorted(2 * ["fixed", "moving", "warped", "warped_grid"])


@pytest.mark.slow  # a run that a signal stops is continued below
@pytest.mark.parametrize("stop", [1, 4])
def test_a_run_stopped_and_continued_ends_with_the_same_weights(folder, stop):
    flags = ["-b", "VoxelMorph", "--seed", "3"]
    assert run(*flags, "--name", "whole") == 0
    assert run(*flags, "--name", "start", "--epochs", str(stop / 3)) == 0
    assert run(*flags, "--name", "end", "-c", str(only_run("_start"))) == 0
    whole, end = weights_of(only_run("_whole"), 6), weights_of(only_run("_end"), 6)
    assert set(whole) == set(end)
    for name, value in whole.items():
        np.testing.assert_array_equal(end[name], value, name)
    assert steps_of(only_run("_end")) == list(range(stop + 1, 7))


def test_another_seed_is_another_run(folder, started):
    flags = ["-n", "0", "-r", "2", "--lr", "3e-4", "--epochs", "0.3"]
    assert run(*flags, "--seed", "4") == 0
    assert rows_of(only_run() / "log.csv") != rows_of(started / "log.csv")


def test_clear_steps_starts_anew(folder, started):
    assert run("--name", "b", "-c", str(started), "--clear_steps", "--epochs", "1") == 0
    assert checkpoints.list_steps(only_run("_b")) == [3]
    assert steps_of(only_run("_b")) == [1, 2, 3]


def test_a_coarse_run_is_a_start_for_a_fine_one(folder, started, capsys):
    write_dataset("datasets/fine", (16, 16, 68), 2, 1, 0)
    flags = ["-c", str(started), "-d", "datasets/fine.json", "--epochs", "0.3", "--name", "fine"]
    assert run(*flags) == 1
    assert f"train.py -c {started}/model-1 --clear_steps -d" in capsys.readouterr().err
    assert run(*flags, "--clear_steps") == 0
    assert "is of another image size: the last kernels" in capsys.readouterr().err
    assert json.loads((only_run("_fine") / "config.json").read_text())["image_size"] == [16, 16, 68]


@pytest.fixture
def finetuned(folder, started):
    """A finetuning, of other data, that ended after its first step."""
    config = json.loads(pathlib.Path("datasets/p.json").read_text())
    config["schemes"]["finetune-train-pig"] = config["schemes"]["2"]
    pathlib.Path("datasets/p.json").write_text(json.dumps(config))
    assert run("-c", str(started), "--finetune", "pig", "--epochs", "0.3") == 0
    return only_run("_a_ftpig")


def test_a_finetuning_starts_anew_and_goes_on(finetuned):
    assert steps_of(finetuned) == checkpoints.list_steps(finetuned) == [1]
    assert run("-c", str(finetuned), "--finetune", "pig", "--epochs", "1") == 0
    assert steps_of(only_run("_ftpig_1")) == [2, 3]
    assert checkpoints.list_steps(only_run("_ftpig_1")) == [3]


@pytest.mark.slow
def test_every_continuation_of_a_finetuning_goes_on_with_its_data(finetuned, monkeypatch):
    trained_on, names = [], train.scheme_names
    monkeypatch.setattr(train, "scheme_names", lambda name, data: trained_on.append(name) or names(name, data))
    source = finetuned
    for k, (flags, name) in enumerate([([], "_ftpig_1"), (["--name", "b"], "_ftpig_b"), ([], "_ftpig_2")]):
        assert run("-c", str(source), "--epochs", str((k + 2) / 3), *flags) == 0
        source = only_run(name)
        assert steps_of(source) == [k + 2]
        assert json.loads((source / "args.json").read_text())["finetune"] == "pig"
    assert trained_on == ["pig"] * 3
    assert run("-c", str(source), "--finetune", "", "--epochs", "0.3", "--name", "whole") == 0
    assert steps_of(only_run("_whole")) == [1]
    assert trained_on[-1] == ""


def test_args_hold_the_net_args_in_force_as_text(folder, started):
    assert run("-c", str(started), "--epochs", "0.6", "--name", "b", "--net_args", "reg_factor=0.5") == 0
    texts = [json.loads((made / "args.json").read_text())["net_args"] for made in (started, only_run("_b"))]
    assert texts == ["channels=2", "reg_factor=0.5, channels=2"]
    assert (
        cli.run(
            train.main,
            [
                "-d",
                "datasets/p.json",
                "-g",
                "-1",
                "--batch",
                "2",
                "--epochs",
                "1",
                "--round",
                "1",
                "-n",
                "0",
                "--name",
                "plain",
            ],
        )
        == 0
    )
    assert json.loads((only_run("_plain") / "args.json").read_text())["net_args"] == ""


def test_debug_writes_nothing_and_validates_every_step(folder, capsys):
    before = sorted(pathlib.Path().rglob("*"))
    assert run("--debug", "-n", "0", "--epochs", "1") == 0
    assert sorted(pathlib.Path().rglob("*")) == before
    assert "step 1: validation of 2 pairs: dice_score 0." in capsys.readouterr().out


def test_a_config_without_validation_scheme_says_so(folder, capsys):
    config = json.loads(pathlib.Path("datasets/p.json").read_text())
    del config["schemes"]["2"]
    pathlib.Path("datasets/p.json").write_text(json.dumps(config))
    assert run("-n", "0", "--epochs", "0.3") == 0
    assert "no scheme '2': this run is not validated" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(folder, capsys):
    assert run("-n", "0", "--name", "a", "--lr", "1e30") == 1
    error = capsys.readouterr().err
    line = next(line for line in error.splitlines() if line.startswith("error:"))
    assert "is not finite (loss" in line
    assert "0_raw_loss" in line
    assert "p/" in line
    assert "lower --lr" in line
    for step in checkpoints.list_steps(only_run("_a")):
        assert all(np.isfinite(v).all() for v in weights_of(only_run("_a"), step).values())


def test_a_run_stopped_by_sigterm_and_continued_ends_with_the_same_weights(folder):
    flags = ["-n", "0", "--round", "40", "--epochs", "1", "--val_steps", "1000"]
    assert run(*flags, "--name", "whole") == 0
    command = [sys.executable, str(ROOT / "train.py"), *FLAGS, *flags, "--name", "stopped"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(3000):
        time.sleep(0.02)
        log = next(iter(pathlib.Path().glob("weights/*_stopped/log.csv")), None)
        if log is not None and len(log.read_text().splitlines()) > 5:
            break
    process.send_signal(signal.SIGTERM)
    output, error = process.communicate(timeout=60)
    assert process.returncode == cli.STOPPED == 130
    stopped = log.parent
    (step,) = checkpoints.list_steps(stopped)
    assert step < 40
    command = f"python train.py -c {stopped} -g -1 --val_steps 1000"
    assert f"Stopped at step {step}, which is saved; go on with -c {stopped}: {command}" in output
    assert not any(line.startswith("error:") for line in error.splitlines())
    assert "Traceback" not in error
    assert "Compiling the first step" in output
    assert f"Saving {stopped}/model-{step}" in output
    assert cli.run(train.main, [*command.split()[2:], "--name", "end"]) == 0
    whole, end = weights_of(only_run("_whole"), 40), weights_of(only_run("_end"), 40)
    for name, value in whole.items():
        np.testing.assert_array_equal(end[name], value, name)


def test_a_continued_run_keeps_the_flags_that_are_not_given(folder, started):
    assert cli.run(train.main, ["-c", str(started), "-g", "-1", "--epochs", "1"]) == 0
    before, after = (json.loads((made / "args.json").read_text()) for made in (started, only_run()))
    kept = ("rep", "dataset", "batch", "round", "data_args", "lr", "seed")
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert [row["lr"] for row in rows_of(only_run() / "log.csv")] == ["0.0003"] * 2


def test_labels_are_validated(folder):
    config = json.loads(pathlib.Path("datasets/p.json").read_text())
    config["segmentation_class_value"] = {"liver": 255, "none": 7}
    pathlib.Path("datasets/p.json").write_text(json.dumps(config))
    assert run("-n", "0", "--epochs", "1") == 0
    assert 0 < float(rows_of(only_run() / "validation.csv")[0]["dice_score"]) < 1


def test_a_run_that_gets_no_better_ends_early_and_names_its_best(folder, capsys):
    config = json.loads(pathlib.Path("datasets/p.json").read_text())
    config["segmentation_class_value"] = {"liver": 255, "none": 7}
    pathlib.Path("datasets/p.json").write_text(json.dumps(config))
    flags = ["-n", "0", "--val_steps", "1", "--best", "similarity", "--patience", "2", "--ema", "0.9", "--name", "a"]
    assert run(*flags, "--lr", "1e-30") == 0
    made = only_run("_a")
    assert [row["step"] for row in rows_of(made / "validation.csv")] == ["1", "2", "3"]
    first = rows_of(made / "validation.csv")[0]
    assert list(first)[2:6] == ["dice_score", "jacc_score", "landmark_dist", "similarity"]
    assert first["dice_score"] == first["dice_score_liver"]  # the other label is in no scan
    assert first["dice_score_none"] == first["jacc_score_none"] == ""
    assert checkpoints.list_steps(made) == [1, 3]
    assert checkpoints.find_checkpoint(f"{made}:best") == made / "model-1"
    out = capsys.readouterr().out
    assert f"The run ends: no similarity better than {float(first['similarity']):.4f} of step 1 in 2 validations" in out
    assert f"Finished: 3 steps, checkpoint {made}/model-3" in out
    assert f"Next: python eval.py -c {made}:best" in out
    assert run("-c", str(made)) == 1
    assert "model-3 is over: no similarity better than" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 4])
def test_a_continued_run_goes_on_with_its_best_and_its_averages(folder, stop):
    flags = ["-b", "VoxelMorph", "--seed", "3", "--val_steps", "1", "--best", "dice", "--patience", "9", "--ema", "0.9"]
    flags += ["--clip", "0.5"]
    net_args = ["--net_args", "channels=2, augmentation='bspline+affine+contrast'"]
    assert run(*flags, *net_args, "--name", "whole") == 0
    assert run(*flags, *net_args, "--name", "start", "--epochs", str(stop / 3)) == 0
    assert run("--name", "end", "-c", str(only_run("_start")), "--val_steps", "1") == 0
    whole, end = weights_of(only_run("_whole"), 6), weights_of(only_run("_end"), 6)
    assert {"best/dice", "gaffdfrm/affine_stem/conv1/W/last"} < set(whole)
    assert set(whole) == set(end)
    for name, value in whole.items():
        np.testing.assert_array_equal(end[name], value, name)
    assert np.abs(whole["gaffdfrm/affine_stem/conv1/W/last"] - whole["gaffdfrm/affine_stem/conv1/W"]).max() > 0
    bests = [checkpoints.find_checkpoint(f"{only_run(name)}:best") for name in ("_whole", "_end")]
    assert bests[0].name == bests[1].name
    assert int(bests[0].name.removeprefix("model-")) == whole["best/dice"][1]


@pytest.mark.slow
def test_supervision_is_logged_saved_and_goes_on(folder):
    assert run("-n", "0", "--net_args", "dice_factor=0.5, landmark_factor=0.1", "--epochs", "1") == 0
    first = only_run()
    rows = rows_of(first / "log.csv")
    assert len(rows) == 3
    for row in rows:
        assert (float(row["dice_pairs"]), float(row["landmark_pairs"])) == (2, 2)
        assert 0 < float(row["0_dice_loss"]) < 2
        assert float(row["0_landmark_loss"]) > 0
    assert json.loads((first / "config.json").read_text())["dice_factor"] == 0.5
    first.rename("first")
    assert cli.run(train.main, ["-c", "first", "-g", "-1", "--epochs", "1.3"]) == 0
    assert float(rows_of(only_run() / "log.csv")[0]["dice_pairs"]) == 2


def one_segmentation(_):
    with h5py.File("datasets/p.h5", "a") as file:
        for key in list(file)[1:]:
            del file[key]["segmentation"]


def broken_key(_):
    config = json.loads(pathlib.Path("datasets/p.json").read_text())
    config["subsets"]["train"].append("p/none")
    pathlib.Path("datasets/p.json").write_text(json.dumps(config))


def unknown_config_key(_):
    config = json.loads(pathlib.Path("datasets/p.json").read_text())
    pathlib.Path("datasets/p.json").write_text(json.dumps({**config, "colour": 1}))


def wrong_size(_):
    with h5py.File("datasets/p.h5", "a") as file:
        key = next(iter(file))
        for name in ("volume", "segmentation"):
            del file[key][name]
            file[key][name] = np.zeros((16, 16, 17), np.uint8)


def empty_checkpoint(_):
    pathlib.Path("empty").mkdir()


def other_checkpoint(started):
    shutil.copytree(started, "other")


def unwritable(_):
    pathlib.Path("weights").write_text("not a folder")


def unwritable_logs(_):
    pathlib.Path("weights").mkdir()
    pathlib.Path("logs").write_text("not a folder")


MISTAKES = {
    "missing config": (None, ["-d", "datasets/no.json"], "datasets/no.json"),
    "missing file": (lambda _: os.remove("datasets/p.h5"), [], "p.h5"),
    "missing key": (broken_key, [], "p/none"),
    "unknown key in the config": (unknown_config_key, [], "unknown key 'colour'"),
    "wrong volume size": (wrong_size, [], "16x16x17"),
    "unknown base network": (None, ["-b", "UNet"], "base_network is 'UNet'; it must be one of VTN, VoxelMorph"),
    "unknown net_arg": (None, ["--net_args", "depth=3"], "unknown key 'depth'; allowed are"),
    "unknown data_arg": (None, ["--data_args", "affine=True"], "unknown key 'affine'; allowed are paired"),
    "unknown best": (None, ["--best", "folding"], "--best is 'folding'; it must be one of dice, jaccard"),
    "patience alone": (None, ["--patience", "3"], "--patience is 3; it must be a whole number from 0, and goes with"),
    "ema 1": (None, ["--ema", "1"], "--ema is 1.0; it must be a number from 0 to below 1"),
    "clip below 0": (None, ["--clip", "-1"], "--clip is -1.0; it must be a number from 0"),
    "clip infinite": (None, ["--clip", "inf"], "--clip is inf; it must be a number from 0 to 1e+18"),
    "batch 0": (None, ["--batch", "0"], "--batch is 0"),
    "no such GPU": (None, ["-g", "97"], "GPU 97 is not there"),
    "GPU of no number": (None, ["-g", "first"], "'first' is not a list of GPU ids"),
    "batch over devices": (None, ["-g", "0,1", "--batch", "3"], "use --batch 2 or 4"),
    "no such checkpoint": (None, ["-c", "nothing"], "'nothing' does not exist"),
    "folder without checkpoint": (empty_checkpoint, ["-c", "empty"], "holds no checkpoint"),
    "checkpoint of another architecture": (other_checkpoint, ["-c", "other", "-b", "VoxelMorph"], "leave -b out"),
    "finished run": (other_checkpoint, ["-c", "other", "--epochs", "0.3"], "raise --epochs or use --clear_steps"),
    "finetune without checkpoint": (None, ["--finetune", "x"], "name it with -c"),
    "unknown finetune": (other_checkpoint, ["-c", "other", "--finetune", "x"], "finetune-train-x"),
    "unwritable weights": (unwritable, [], "cannot write weights (File exists)"),
    "endless epochs": (None, ["--epochs", "inf"], "--epochs is inf"),
    "negative seed": (None, ["--seed", "-1"], "--seed is -1"),
    "paired of no truth": (None, ["--data_args", "paired='no'"], "paired is 'no'; it must be True or False"),
    "one GPU twice": (None, ["-g", "0,0", "--batch", "2"], "'0,0' is not a list of GPU ids"),
    "file of a checkpoint that is not there": (other_checkpoint, ["-c", "other/model-2.index"], "does not exist"),
    "name that is a path": (None, ["--name", "../x"], "--name is '../x'; it becomes part of the name of a"),
    "name of two lines": (None, ["--name", "a\nb"], "becomes part of the name of a file or folder"),
    "name without end": (None, ["--name", 300 * "x"], "--name has 300 bytes"),
    "logs elsewhere": (None, ["--logs", "../x"], "it must be a folder in logs/"),
    "no such plugin": (None, ["--plugin", "no.py"], "--plugin no.py: no such Python file"),
    "no labels to learn from": (
        one_segmentation,
        ["--net_args", "dice_factor=1"],
        "dice_factor: no pair to train on has segmentations in both scans; add segmentations",
    ),
    "no labels to choose by": (
        one_segmentation,
        ["--best", "dice"],
        "--best dice: it can be measured on no pair of the validation",
    ),
    "unwritable logs": (unwritable_logs, [], "cannot write logs ("),
    "no epochs": (None, ["--epochs", "0"], "--epochs is 0.0; it must be greater than 0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(mistake, folder, started, capsys):
    make, flags, message = MISTAKES[mistake]
    if make is not None:
        make(started)
    before = sorted(pathlib.Path().rglob("*"))
    assert run("-n", "0", *flags) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert message in line
    assert sorted(pathlib.Path().rglob("*")) == before


def test_help_is_quick_and_names_every_flag_of_the_original():
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--help"], capture_output=True, text=True, check=True
    )
    assert time.perf_counter() - started < 5  # without TensorFlow, whose import alone takes as long on a busy machine
    assert "tensorflow" not in done.stderr
    for flag in (
        *("--base_network", "--n_cascades", "--rep", "--gpu", "--checkpoint", "--dataset", "--batch", "--round"),
        *("--epochs", "--fast_reconstruction", "--debug", "--val_steps", "--net_args", "--data_args", "--lr"),
        *("--clear_steps", "--finetune", "--name", "--logs", "--seed", "--val_pairs"),
    ):
        assert flag in done.stdout
