"""The examples of docs/extending.md, as plugins of runs."""

import csv
import json
import pathlib

import h5py
import keras
import numpy as np
import pytest
import SimpleITK as sitk
import tensorflow as tf

import cli
import eval as eval_script
import train
from data_util.phantoms import write_dataset
from errors import UserError
from network import checkpoints, training
from network.config import CascadeConfig
from network.recursive_cascaded_networks import build_network
from network.registry import BASE_NETWORKS, METRICS, SIMILARITIES, Extension
from tests.examples import example
from tests.test_network.golden import rule_network
from tests.test_network.test_training import batch_of, trainer_of


@pytest.fixture(scope="module")
def plugins(tmp_path_factory):
    """Files of the examples, which are imported, and whose rows go at the end."""
    folder = tmp_path_factory.mktemp("plugins")
    files = {}
    for name, heading in (("network", "A base network"), ("similarity", "A similarity")):
        files[name] = folder / f"mine_{name}.py"
        files[name].write_text(example(heading))
        cli.load_plugin(str(files[name]))
    yield files
    del BASE_NETWORKS["Small"], SIMILARITIES["huber"]


def steps(trainer, batch, n):
    trainer.make_train_function()
    return [float(trainer.train_function(iter([batch]))["loss"]) for _ in range(n)]


def variables(network):
    return {name: variable.numpy() for name, variable in network.named_weights().items()}


SIZE = (16, 12, 20)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"rep": 3},
        {"rep": 2, "rematerialize": True},
        pytest.param({"precision": "mixed_float16"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_network_with_batch_normalisation_goes_on_with_the_same_bits(plugins, options, tmp_path):
    config = CascadeConfig("Small", 2, image_size=SIZE, width=4, **options)
    batch, whole = batch_of(SIZE, 2), trainer_of(config)
    before = variables(whole.network)
    statistics = [name for name in before if "/norm/" in name]
    assert {name.rsplit("/", 1)[1] for name in statistics} == {"gamma", "beta", "moving_mean", "moving_variance"}
    steps(whole, batch, 3)
    checkpoints.save(tmp_path, whole.network, whole.optimizer, 3)
    losses = steps(whole, batch, 3)
    after = variables(whole.network)
    assert all((before[name] != after[name]).any() for name in statistics)

    keras.layers.Conv3D(1, 1), keras.layers.BatchNormalization()  # Keras's own names of layers count on
    again = trainer_of(config)
    checkpoints.restore(again.network, tmp_path / "model-3", again.optimizer)
    assert steps(again, batch, 3) == losses
    for name, value in variables(again.network).items():
        np.testing.assert_array_equal(value, after[name], name)


def test_evaluation_uses_the_statistics_and_changes_nothing(plugins):
    trainer, batch = trainer_of(CascadeConfig("Small", 1, 2, image_size=SIZE)), batch_of(SIZE, 2)
    network, before = trainer.network, variables(trainer.network)
    trained, evaluated = (network((batch["fixed"], batch["moving"]), training=t).flow for t in (True, False))
    assert np.abs(trained - evaluated).max() > 0
    moved = variables(network)
    assert any((moved[name] != before[name]).any() for name in before)
    network((batch["fixed"], batch["moving"]))
    for name, value in variables(network).items():
        np.testing.assert_array_equal(value, moved[name], name)


@pytest.mark.parametrize("rematerialize", [False, True])
def test_the_statistics_move_once_with_each_use_of_a_cascade(plugins, rematerialize):
    keras.utils.set_random_seed(0)
    network = build_network(CascadeConfig("Small", 1, 2, image_size=SIZE, rematerialize=rematerialize))
    norm, batch = network.cascades[0].norm, batch_of(SIZE, 2)
    images = batch["fixed"], batch["moving"]
    with tf.GradientTape() as tape:
        output = network(images, training=True)
        loss = tf.reduce_sum(tf.square(output.flow))
    tape.gradient(loss, network.trainable_variables)
    means = []
    for stage in output.stages[:2]:
        features = network.cascades[0].features(tf.concat([images[0], stage.warped], -1))
        means.append(tf.reduce_mean(features, [0, 1, 2, 3]))
    expected = 0.99 * 0.01 * means[0] + 0.01 * means[1]
    np.testing.assert_allclose(norm.moving_mean, expected, rtol=1e-3, atol=1e-7)


def test_the_similarity_and_its_option_enter_the_loss(plugins):
    config = CascadeConfig(n_cascades=0, image_size=SIZE).with_net_args("similarity='huber', delta=0.05")
    assert CascadeConfig.from_dict(json.loads(json.dumps(config.to_dict())), "here") == config
    batch = batch_of(SIZE, 2)
    found = {}
    for delta in (0.05, 0.5):
        trainer = trainer_of(config.replace(delta=delta, augmentation="identity"))
        warped = trainer.network((batch["fixed"], batch["moving"])).warped.numpy()
        d = np.abs(batch["fixed"].numpy() - warped).astype(np.float64)
        expected = np.where(d < delta, d**2 / 2, delta * (d - delta / 2)).mean((1, 2, 3, 4)).sum()
        found[delta] = float(trainer.train_step(batch)["0_raw_loss"])
        assert found[delta] == pytest.approx(expected, rel=1e-4)
    assert found[0.05] != found[0.5]


def test_a_run_with_a_plugin_is_trained_evaluated_and_asks_for_it(plugins, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_dataset("p", (16, 16, 16), 4, 1, 0)
    flags = ["-d", "p.json", "-g", "-1", "--batch", "2", "--plugin", str(plugins["network"])]
    few = ["--round", "2", "--epochs", "1", "--net_args", "width=4"]
    assert cli.run(train.main, [*flags, "-b", "Small", *few]) == 0, capsys.readouterr().err
    (run,) = pathlib.Path("weights").iterdir()
    assert json.loads((run / "config.json").read_text())["width"] == 4
    assert cli.run(eval_script.main, ["-c", str(run), *flags]) == 0, capsys.readouterr().err
    row = BASE_NETWORKS.pop("Small")
    try:
        assert cli.run(eval_script.main, ["-c", str(run), "-g", "-1"]) == 1
    finally:
        BASE_NETWORKS["Small"] = row
    assert "give it again, as --plugin mine_network.py" in capsys.readouterr().err


def test_a_metric_of_ones_own_is_in_every_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("mine_metric.py").write_text(example("A metric"))
    size = (16, 18, 20)
    write_dataset("p", size, 2, 2, 0)
    with h5py.File("p.h5", "a") as file:
        for group in file.values():
            group.attrs["spacing"] = (1.0, 2.0, 0.5)
    network = rule_network("VTN", 1, image_size=size, channels=4)
    run = pathlib.Path("weights/run")
    run.mkdir(parents=True)
    checkpoints.save(run, network, training.adam(network), 1)
    (run / "config.json").write_text(json.dumps(network.config.to_dict()))
    flags = ["-c", "run", "-d", "p.json", "-g", "-1", "--plugin", "mine_metric.py", "--save", "flow,seg"]
    try:
        assert cli.run(eval_script.main, [*flags, "--metrics", "length,centres", "--per_cascade"]) == 0
    finally:
        for name in ("length", "centres"):
            METRICS.pop(name, None)
    (table,) = pathlib.Path("evaluate").glob("*[!s].csv")
    (row, *_) = csv.DictReader(table.read_text().splitlines())
    (folder,) = (path for path in pathlib.Path("evaluate").rglob(f"*{row['fixed']}_{row['moving']}*") if path.is_dir())
    images = {name: sitk.ReadImage(str(folder / f"{name}.nii.gz")) for name in ("flow", "fixed_seg", "warped_seg")}
    flow = sitk.GetArrayFromImage(images["flow"]) / images["flow"].GetSpacing()
    assert float(row["flow_length"]) == pytest.approx(np.linalg.norm(flow, axis=-1).mean(), rel=1e-3)
    centres = []
    for name in ("fixed_seg", "warped_seg"):
        shape = sitk.LabelShapeStatisticsImageFilter()
        shape.Execute(sitk.Cast(images[name] != 0, sitk.sitkUInt8))
        centres.append(shape.GetCentroid(1))
    assert float(row["centre_distance_mm"]) == pytest.approx(np.linalg.norm(np.subtract(*centres)), rel=1e-3)
    summary = table.with_suffix(".json").read_text()
    assert '"flow_length"' in summary
    assert '"centre_distance_mm"' in summary
    assert "centre_distance_mm" in next(pathlib.Path("evaluate").glob("*-cascades.csv")).read_text()


class Hidden(keras.layers.Layer):
    """A network that holds a layer where no attribute leads to it."""

    def __init__(self, flow_multiplier=1.0, **kwargs):
        super().__init__(**kwargs)
        self.flow = keras.layers.Conv3D(3, 1)
        hidden = keras.layers.Conv3D(3, 1)
        self._layers.append(hidden)
        self.apply = lambda net: hidden(net)

    def build(self, input_shape):
        self.apply(self.flow(tf.zeros((1, 2, 2, 2, 2))))

    def call(self, inputs):
        return self.apply(self.flow(tf.concat(inputs, -1)))


def test_a_variable_without_a_name_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setitem(BASE_NETWORKS, "Hidden", Extension(Hidden))
    network = build_network(CascadeConfig("Hidden", 1, image_size=(8, 8, 8)))
    with pytest.raises(ValueError, match=r"Hidden: the variable .* cannot be named, so it could not be saved"):
        checkpoints.save(tmp_path, network, training.adam(network), 1)
    assert not list(tmp_path.iterdir())


def test_an_unknown_base_network_lists_the_known_ones():
    with pytest.raises(UserError, match=r"must be one of VTN, VoxelMorph, .*or one that --plugin registers"):
        CascadeConfig("UNet")


def test_a_reader_of_ones_own(tmp_path):
    from data_util.config import load_dataset_config
    from data_util.dataset import open_scheme
    from data_util.readers import READERS

    (tmp_path / "mine_reader.py").write_text(example("A reader of files"))
    cli.load_plugin(str(tmp_path / "mine_reader.py"))
    try:
        (tmp_path / "scans").mkdir()
        rng = np.random.default_rng(0)
        volumes = rng.integers(0, 256, (3, *SIZE)).astype(np.uint8)
        for k, volume in enumerate(volumes):
            np.savez(tmp_path / "scans" / f"p{k}.npz", volume=volume, segmentation=np.where(volume > 99, 255, 0))
        content = {"files": {"mine": {"type": "npz", "path": str(tmp_path / "scans")}}, "image_size": SIZE}
        content |= {"subsets": {"all": ["mine/*"]}, "schemes": {"1": {"all": 1}, "2": {"all": 1}}}
        (tmp_path / "mine.json").write_text(json.dumps(content))
        scheme = open_scheme(load_dataset_config(tmp_path / "mine.json"), "2")
        assert len(scheme) == 6
        (batch,) = scheme.evaluation(1, [1])  # p0 and p2
        np.testing.assert_allclose(batch["moving"][0, ..., 0], volumes[2] / np.float32(255))
        assert set(np.unique(batch["fixed_seg"])) == {0, 255}
    finally:
        del READERS["npz"]
