"""Run folders: finding, loading, saving; what does not fit says so."""

import json
import os
import shutil
import subprocess

import keras
import make_checkpoint
import numpy as np
import pytest
import tensorflow as tf

import files
from errors import UserError
from network import checkpoints, load_model, runs
from network.config import CascadeConfig
from network.recursive_cascaded_networks import build_network
from network.training import adam

SMALL = CascadeConfig("VTN", 2, image_size=(16, 16, 16), channels=2)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A VTN-1 checkpoint in the published layout."""
    folder = tmp_path_factory.mktemp("weights") / "VTN-1-rule"
    make_checkpoint.write(str(folder), "VTN", 1)
    return folder


def trained(seed=0):
    """A network and its optimizer, whose state has something in it."""
    keras.utils.set_random_seed(seed)
    network = build_network(SMALL)
    optimizer = adam(network)
    for i, variable in enumerate(optimizer.variables[2:]):
        variable.assign(tf.random.stateless_uniform(variable.shape, (seed, i)))
    optimizer.iterations.assign(77)
    return network, optimizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run folder that no test changes, and the network and the optimizer saved in it."""
    folder = tmp_path_factory.mktemp("saved")
    (folder / "config.json").write_text(json.dumps(SMALL.to_dict()))
    network, optimizer = trained()
    checkpoints.save(folder, network, optimizer, 5)
    return folder, network, optimizer


def test_saving_and_restoring_weights_and_adam(saved):
    folder, network, optimizer = saved
    other, other_optimizer = trained(seed=1)
    checkpoints.restore(other, folder / "model-5", other_optimizer)
    for a, b in zip(network.weights, other.weights, strict=True):
        np.testing.assert_array_equal(a, b)
    kept = [v for v in optimizer.variables if "learning_rate" not in v.path]
    for a, b in zip(kept, [v for v in other_optimizer.variables if "learning_rate" not in v.path], strict=True):
        np.testing.assert_array_equal(a, b, a.path)
    assert int(other_optimizer.iterations) == 77


@pytest.mark.parametrize("steps", [0, 1, 76, 5000, 40_000])
def test_adams_count_survives_the_published_form(steps):
    power = float(np.float32(0.999 ** (steps + 1)))
    assert checkpoints._adam_steps(power) == steps
    assert 1 - 0.999 ** checkpoints._adam_steps(0.0) == 1


def test_the_original_could_read_ours(saved):
    shapes = tf.train.load_checkpoint(str(saved[0] / "model-5")).get_variable_to_shape_map()
    assert "gaffdfrm/deform_stem_1/upsamp1to0/W/Adam_1" in shapes
    assert {"beta1_power", "beta2_power", "is_training"} < set(shapes)


def test_a_published_run_loads_by_its_args(published, monkeypatch):
    import rule

    monkeypatch.chdir(published.parent.parent)
    shutil.copytree(published, "weights/VTN-1-rule", dirs_exist_ok=True)
    for name in ("VTN-1-rule", "weights/VTN-1-rule:99500", str(published), f"{published}:1"):
        assert checkpoints.find_checkpoint(name).resolve().parent.name == "VTN-1-rule"
        assert checkpoints.find_checkpoint(name).name == "model-99500"
    network = load_model("VTN-1-rule", rep=2, net_args="leaky_slope=0.0")
    assert network.config == CascadeConfig("VTN", 1, 2, leaky_slope=0.0)
    name = "gaffdfrm/deform_stem_0/deconv2/W"
    np.testing.assert_array_equal(network.named_weights()[name], rule.weight(name, (4, 4, 4, 32, 131)))


def test_finding_runs_and_steps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "SHIPPED", tmp_path / "none")
    folder = tmp_path / "weights" / "run"
    folder.mkdir(parents=True)
    for step in (10, 200, 3000):
        (folder / f"model-{step}.index").touch()
    assert checkpoints.find_run("run:150") == (folder.relative_to(tmp_path), 150)
    assert checkpoints.find_run(str(folder)) == (folder, None)
    assert checkpoints.find_step(folder) == 3000
    assert [checkpoints.find_step(folder, s) for s in (0, 104, 106, 9999)] == [10, 10, 200, 3000]
    with pytest.raises(UserError, match=r"'nix' does not exist, here or in weights/; runs there: run"):
        checkpoints.find_run("nix")
    for file in ("run/model-200", "run/model-200.index", "weights/run/model-200.data-00000-of-00001"):
        assert checkpoints.find_run(file) == (folder.relative_to(tmp_path), 200)
    with pytest.raises(UserError, match=r"'weights/run/model-20\.index' does not exist"):
        checkpoints.find_run("weights/run/model-20.index")
    with pytest.raises(UserError, match=r"'x' is not a step; write FOLDER, FOLDER:STEP or FOLDER:best"):
        checkpoints.find_run("run:x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoints.find_step(tmp_path / "empty")


def test_old_checkpoints_go_but_one_every_five_hours(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    hours = {1: 0, 2: 1, 3: 4.9, 4: 5, 5: 9, 6: 12, 7: 13, 8: 14, 9: 15, 10: 16, 11: 17}
    for step, hour in hours.items():
        (folder / f"model-{step}.index").touch()
        (folder / f"model-{step}.data-00000-of-00001").touch()
        os.utime(folder / f"model-{step}.index", (hour * 3600, hour * 3600))
    checkpoints._prune(folder)
    assert checkpoints.list_steps(folder) == [1, 4, 6, 7, 8, 9, 10, 11]
    assert not (folder / "model-2.data-00000-of-00001").exists()


def test_a_write_that_fails_leaves_what_was_there(saved, monkeypatch):
    folder, network, optimizer = saved

    def killed(source, target):
        if str(source).endswith(".index"):
            raise KeyboardInterrupt
        os.rename(source, target)

    monkeypatch.setattr(files.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(folder, network, optimizer, 6)
    assert checkpoints.list_steps(folder) == [5]
    checkpoints.restore(network, checkpoints.checkpoint_prefix(folder, 5))


def test_a_full_disk_is_one_line_and_leaves_what_was_there(saved, file_limit, tmp_path):
    folder, network, optimizer = saved
    shutil.copytree(folder, tmp_path / "run")
    before = sorted((tmp_path / "run").iterdir())
    said = r"cannot write .*run/model-9 \(File too large; \d+ MiB left in .*run\); make space"
    with file_limit(1000), pytest.raises(UserError, match=said) as error:
        checkpoints.save(tmp_path / "run", network, optimizer, 9)
    assert "\n" not in str(error.value)
    assert sorted((tmp_path / "run").iterdir()) == before


@pytest.mark.parametrize("published", [(), (".data-00000-of-00001",)])
def test_a_save_that_was_killed_leaves_no_broken_checkpoint(saved, tmp_path, published, capsys):
    """Killed before its first name nothing of it stays; between its two names it is completed."""
    folder, network, optimizer = saved
    shutil.copytree(folder, tmp_path / "run")
    checkpoints.save(tmp_path / "run", network, optimizer, 6)
    dead = subprocess.Popen(["true"])
    dead.wait()
    partial = tmp_path / "run" / f"{files.PARTIAL}{files.machine()}-{dead.pid}-x"
    partial.mkdir()
    for ending in {".data-00000-of-00001", ".index"} - set(published):
        (tmp_path / "run" / f"model-6{ending}").rename(partial / f"model-6{ending}")
    files._cleaned.clear()  # as in the next command
    assert checkpoints.list_steps(tmp_path / "run") == [5]
    found = checkpoints.find_checkpoint(tmp_path / "run")
    assert found.name == ("model-6" if published else "model-5")
    checkpoints.restore(network, found, optimizer)
    assert {path.name.partition(".")[0] for path in (tmp_path / "run").glob("*.data-*")} == {
        "model-5",
        *(["model-6"] if published else []),
    }
    assert not partial.exists()
    assert capsys.readouterr().err == f"removed {partial}: a killed process left it unfinished\n"


def test_a_run_that_was_stopped_before_its_first_checkpoint_says_so(tmp_path):
    (tmp_path / "args.json").write_text('{"checkpoint": null}')
    with pytest.raises(UserError, match=r"holds no checkpoint yet: .*; start that run again"):
        checkpoints.find_checkpoint(tmp_path)
    (tmp_path / "args.json").write_text('{"checkpoint": "Jan01-1200:500"}')
    with pytest.raises(UserError, match=r"no checkpoint yet: .*use the run that it goes on from, -c Jan01-1200:500"):
        checkpoints.find_checkpoint(tmp_path)


WRONG = {
    "other base network": (SMALL.replace(base_network="VoxelMorph"), "lacks the variable|has shape"),
    "more cascades": (SMALL.replace(n_cascades=3), "lacks the variable gaffdfrm/deform_stem_2/.*check -b and -n"),
    "fewer cascades": (SMALL.replace(n_cascades=1), "has no place there .*check -b and -n"),
    "other channels": (SMALL.replace(channels=4), r"has shape .* not .*channels in --net_args"),
    "other size": (
        SMALL.replace(image_size=(16, 70, 16)),
        r"another image size than 16 x 70 x 16.*1\.\.64.*-d DATASET",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_checkpoint_that_does_not_fit_says_why_and_changes_nothing(case, saved):
    config, message = WRONG[case]
    network = build_network(config)
    before = network.get_weights()
    with pytest.raises(UserError, match=message):
        checkpoints.restore(network, saved[0] / "model-5")
    for a, b in zip(before, network.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_another_size_on_the_same_affine_grid_is_welcome(saved):
    folder, network, _ = saved
    other = load_model(folder, image_size=(20, 18, 30))
    assert other.config.image_size == (20, 18, 30)
    np.testing.assert_array_equal(other.weights[0], network.weights[0])


def test_weights_to_train_on_from_may_be_of_any_size(saved, capsys):
    folder, network, _ = saved
    other = build_network(SMALL.replace(image_size=(70, 16, 130)))
    checkpoints.restore(other, folder / "model-5", any_size=True)
    assert "model-5 is of another image size: the last kernels" in capsys.readouterr().err
    assert other.affine.matrix_head.kernel.shape[:3] == (2, 1, 3)
    for name, weight in network.named_weights().items():
        found = other.named_weights()[name].numpy()
        # Divided among six voxels, or the same.
        expected = np.broadcast_to(weight / 6, found.shape) if "/conv7_" in name else weight
        np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=name)


def test_any_size_is_no_excuse_for_other_weights(saved):
    with pytest.raises(UserError, match=r"has shape .* not .*channels in --net_args"):
        checkpoints.restore(build_network(SMALL.replace(channels=4)), saved[0] / "model-5", any_size=True)


@pytest.mark.parametrize("ending", [".index", ".data-00000-of-00001"])
def test_a_damaged_checkpoint(ending, saved, tmp_path):
    folder, network, _ = saved
    shutil.copytree(folder, tmp_path / "run")
    file = tmp_path / "run" / f"model-5{ending}"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"model-5 cannot be read .*copy or download it again") as raised:
        checkpoints.restore(network, tmp_path / "run" / "model-5")
    assert "{{" not in str(raised.value)  # where in its graph TensorFlow met it
    assert "[Op:" not in str(raised.value)


def test_a_run_without_a_description(tmp_path):
    (tmp_path / "model-1.index").touch()
    with pytest.raises(UserError, match=r"neither config.json nor args.json"):
        checkpoints.load_cascade_config(tmp_path)
    (tmp_path / "args.json").write_text("{")
    with pytest.raises(UserError, match=r"args.json, line 1, column 2: not valid JSON"):
        checkpoints.load_cascade_config(tmp_path)
    (tmp_path / "args.json").write_text('{"base_network": "VTN"}')
    with pytest.raises(UserError, match=r"lacks 'n_cascades'"):
        checkpoints.load_cascade_config(tmp_path)


def test_a_fingerprint_knows_the_content(saved, tmp_path):
    folder, network, optimizer = saved
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)  # with times of its own
    ours = checkpoints.fingerprint(folder / "model-5")
    assert checkpoints.fingerprint(tmp_path / "copy" / "model-5") == ours
    weight = network.weights[0]
    before = weight.numpy()
    changed = before.copy()
    changed.flat[7] = np.nextafter(changed.flat[7], np.float32(1))
    weight.assign(changed)
    (tmp_path / "other").mkdir()
    checkpoints.save(tmp_path / "other", network, optimizer, 5)
    weight.assign(before)
    assert checkpoints.fingerprint(tmp_path / "other" / "model-5") != ours
    with pytest.raises(UserError, match="cannot be read"):
        checkpoints.fingerprint(tmp_path / "model-6")


def test_adams_moments_that_keras_keeps_elsewhere_are_an_error_that_says_so(saved, tmp_path):
    _, network, optimizer = saved

    class Renamed:
        variables, iterations = optimizer.variables, optimizer.iterations

    with pytest.raises(RuntimeError, match=r"keeps Adam's moments elsewhere than in Adam\._momentums"):
        checkpoints.save(tmp_path, network, Renamed(), 1)


def test_a_run_made_with_a_plugin_names_it_and_the_flag(tmp_path):
    for kind, others in (("base_network", {}), ("similarity", {"base_network": "VTN"})):
        (tmp_path / "config.json").write_text(json.dumps({**others, kind: "Mine", "plugin": "mine.py", "width": 3}))
        with pytest.raises(UserError, match=f"{kind} is 'Mine', which is not built in.*--plugin mine.py"):
            checkpoints.load_cascade_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"base_network": "Mine"}))
    with pytest.raises(UserError, match=r"'Mine'; it must be one of VTN, VoxelMorph, or one that --plugin registers"):
        checkpoints.load_cascade_config(tmp_path)
    of_sum = {"base_network": "VTN", "similarity": "ncc+0.5*Mine", "plugin": "mine.py"}
    (tmp_path / "config.json").write_text(json.dumps(of_sum))
    with pytest.raises(UserError, match=r"similarity is 'Mine', which is not built in.*--plugin mine\.py"):
        checkpoints.load_cascade_config(tmp_path)
    for values in ({}, {"similarity": "ncc+0.5*mind"}):
        config = {"base_network": "VTN", **values, "plugin": "mine.py", "data": {}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert checkpoints.load_cascade_config(tmp_path) == CascadeConfig("VTN", **values)


OF_BEFORE = (  # config.json as the first versions wrote it
    '{"base_network": "VoxelMorph", "n_cascades": 2, "rep": 1, "image_size": [16, 16, 16], "det_factor": 0.1, '
    '"ortho_factor": 0.1, "reg_factor": 0.5, "similarity": "lncc", "warp_gradient": true, "warp_padding": false, '
    '"channels": 4, "leaky_slope": 0.2, "augmentation": null, "fast_reconstruction": true, "precision": "float32", '
    '"rematerialize": false}'
)


def test_a_config_of_before_is_read_unchanged(tmp_path):
    (tmp_path / "config.json").write_text(OF_BEFORE)
    config = checkpoints.load_cascade_config(tmp_path)
    found = config.to_dict()
    expected = {**json.loads(OF_BEFORE), "window": 9}
    assert {name: found[name] for name in expected} == expected
    # What came since is as it was before it came: off, and the affine cascade's channels the published ones.
    assert all(found[name] in (0.0, None, "displacement", "last", 16) for name in found.keys() - expected.keys())
    assert (config.channels, config.affine_slope, config.options["window"]) == (4, 0.2, 9)


def test_packed_weights_are_those_of_the_run_rounded_to_half_a_float_and_are_all_that_is_there(saved, tmp_path):
    folder, network, _ = saved
    checkpoints.save_weights(folder / "model-5", tmp_path)
    shutil.copy(folder / "config.json", tmp_path)
    reader = tf.train.load_checkpoint(str(tmp_path / "model-5"))
    assert set(reader.get_variable_to_shape_map()) == set(network.named_weights())
    assert set(reader.get_variable_to_dtype_map().values()) == {tf.float16}
    loaded = load_model(tmp_path)
    for name, weight in network.named_weights().items():
        found = loaded.named_weights()[name]
        assert found.dtype == "float32"
        np.testing.assert_array_equal(found, np.asarray(weight).astype(np.float16))
    with pytest.raises(UserError, match="no optimizer state to continue with"):
        checkpoints.restore(network, tmp_path / "model-5", trained()[1])


def test_weights_too_large_for_half_a_float_are_not_packed(tmp_path):
    network, optimizer = trained()
    next(iter(network.named_weights().values())).assign_add(70000.0)
    checkpoints.save(tmp_path, network, optimizer, 1)
    (tmp_path / "packed").mkdir()
    with pytest.raises(UserError, match="too large for float16"):
        checkpoints.save_weights(tmp_path / "model-1", tmp_path / "packed")
    assert not list((tmp_path / "packed").iterdir())


def test_the_affine_cascade_has_channels_of_its_own():
    """16 unless given, whatever those of the other cascades; the option travels with the config."""
    shapes = {}
    for channels in (16, 4):
        config = CascadeConfig.from_dict({**SMALL.to_dict(), "affine_channels": channels}, "file")
        weights = build_network(config).named_weights()
        shapes[channels] = {name: tuple(weight.shape) for name, weight in weights.items()}
    assert shapes[16] == {name: tuple(weight.shape) for name, weight in build_network(SMALL).named_weights().items()}
    assert shapes[4]["gaffdfrm/affine_stem/conv2/W"] == (3, 3, 3, 4, 8)
    differing = {name for name in shapes[4] if shapes[4][name] != shapes[16][name]}
    assert differing == {name for name in shapes[4] if "affine_stem" in name}


def test_the_starter_model_comes_with_the_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = load_model("starter-brain")
    assert (model.config.base_network, model.config.n_cascades) == ("VTN", 3)
    assert runs.load_data(model.checkpoint.parent)["crop"] == "brain"
    assert sum(file.stat().st_size for file in model.checkpoint.parent.iterdir()) < 16e6
    assert all(np.isfinite(weight.numpy()).all() for weight in model.weights)
