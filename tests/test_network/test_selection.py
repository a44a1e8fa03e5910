"""The best checkpoint by validation, and the averages of the weights."""

import json
import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from errors import UserError
from network import checkpoints, runs, training
from network.averaging import averaged_weights, averages
from network.callbacks import KeepBest
from network.config import CascadeConfig
from network.selection import Selection, chosen_value

CONFIG = CascadeConfig(n_cascades=0, image_size=(16, 16, 16), augmentation="identity")


def considered(selection, values):
    return [selection.consider(100 * k, value) for k, value in enumerate(values, start=1)]


@pytest.mark.parametrize(
    ("metric", "values"), [("dice", [0.5, 0.4, 0.6, 0.6]), ("landmark_distance", [0.5, 0.6, 0.4, 0.4])]
)
def test_the_best_is_the_first_of_the_best(metric, values):
    selection = Selection(metric)
    assert considered(selection, values) == [True, False, True, False]
    assert (selection.value, selection.step, selection.waited) == (values[2], 300, 1)


def test_patience_counts_validations_in_a_row_as_keras_does():
    values = [0.5, 0.4, 0.45, 0.6, 0.59, 0.6, 0.1, 0.9]
    selection, keras_says = Selection("dice", patience=3), keras.callbacks.EarlyStopping("dice", patience=3, mode="max")
    keras_says.set_model(keras.Sequential())
    keras_says.on_train_begin()
    for k, value in enumerate(values):
        selection.consider(k, value)
        keras_says.on_epoch_end(k, {"dice": value})
        assert selection.is_over == bool(keras_says.stopped_epoch)
        if selection.is_over:
            break
    assert k == 6
    assert selection.why_over() == "no dice better than 0.6000 of step 3 in 3 validations"
    endless = Selection("dice")
    considered(endless, values)
    assert not endless.is_over


def test_what_cannot_choose_is_refused():
    with pytest.raises(UserError, match="--best is 'folding'; it must be one of dice, jaccard, landmark_distance"):
        chosen_value("folding")
    with pytest.raises(UserError, match="--best dice: it can be measured on no pair"):
        Selection("dice").consider(1, None)


class Tiny:
    """In place of a network: two weights."""

    config = CONFIG

    def __init__(self):
        self.trainable_variables = [keras.Variable(np.arange(3.0) + k, dtype="float32") for k in range(2)]

    def named_weights(self):
        return {f"gaffdfrm/affine_stem/conv1/{k}": v for k, v in zip("Wb", self.trainable_variables, strict=True)}


def stepped(gradients):
    """A network after some steps, with the optimizer that keeps averages."""
    network = Tiny()
    optimizer = keras.optimizers.SGD(1.0, use_ema=True, ema_momentum=0.75)
    optimizer.build(network.trainable_variables)
    for gradient in gradients:
        optimizer.apply([tf.fill(3, gradient), tf.zeros(3)])
    return network, network.trainable_variables[0], optimizer


def test_averages_follow_the_weights_and_take_their_place_for_a_while():
    network, weight, optimizer = stepped([1.0, 2.0, -4.0])
    last = weight.numpy()
    steps = [np.arange(3.0) - 1, np.arange(3.0) - 3, np.arange(3.0) + 1]
    expected = 0.75 * (0.75 * steps[0] + 0.25 * steps[1]) + 0.25 * steps[2]  # it starts as the first step's weight
    seen = []

    def fail():
        with averaged_weights(network, optimizer):
            seen.append(weight.numpy())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    np.testing.assert_allclose(seen[0], expected, atol=1e-5)
    np.testing.assert_array_equal(weight.numpy(), last)


def test_averages_are_what_is_saved_and_a_run_goes_on_with_both(tmp_path):
    network, weight, optimizer = stepped([1.0, 2.0])
    average = averages(network, optimizer)[0][1].numpy()
    adam = training.adam(network, ema=0.75)
    adam._model_variables_moving_average[0].assign(average)
    adam.iterations.assign(2)
    checkpoints.save(tmp_path, network, adam, 2)
    for ema, weights, kept in ((0.0, average, None), (0.5, weight.numpy(), average)):
        other = Tiny()
        going_on = training.adam(other, ema)
        checkpoints.restore(other, tmp_path / "model-2", going_on)
        np.testing.assert_array_equal(other.trainable_variables[0].numpy(), weights)
        for _, found in averages(other, going_on)[:1]:
            np.testing.assert_array_equal(found.numpy(), kept)
    evaluated = Tiny()
    checkpoints.restore(evaluated, tmp_path / "model-2")
    np.testing.assert_array_equal(evaluated.trainable_variables[0].numpy(), average)


def test_a_run_without_averages_goes_on_with_some(tmp_path):
    network, weight, _ = stepped([1.0])
    checkpoints.save(tmp_path, network, training.adam(network), 2)
    other = Tiny()
    optimizer = training.adam(other, 0.9)
    checkpoints.restore(other, tmp_path / "model-2", optimizer)
    for found in averages(other, optimizer)[0]:
        np.testing.assert_array_equal(found.numpy(), weight.numpy())


class Saver:
    """In place of `SaveCheckpoints`: empty files of checkpoints."""

    def __init__(self, folder):
        self.folder, self.step = folder, 0
        folder.mkdir(exist_ok=True)

    def save(self):
        (self.folder / f"model-{self.step}.index").touch()


def keep(saver, selection, values):
    keeper = KeepBest(selection, saver)
    for step, value in values.items():
        saver.step = step
        keeper.consider(step, value)


def test_the_best_is_found_by_its_name(tmp_path):
    saver = Saver(tmp_path / "run")
    with pytest.raises(UserError, match="trained without --best; leave :best out"):
        runs.find_run(f"{saver.folder}:best")
    keep(saver, Selection("dice"), {10: 0.5, 20: 0.7, 30: 0.6})
    assert runs.list_steps(saver.folder) == [10, 20]
    assert runs.find_checkpoint(f"{saver.folder}:best") == saver.folder / "model-20"
    assert runs.find_run("run:best", tmp_path) == (saver.folder, 20)
    (saver.folder / "model-20.index").unlink()
    with pytest.raises(UserError, match=r"names .*model-20, which is not there"):
        runs.find_run(f"{saver.folder}:best")
    file = saver.folder / runs.BEST_FILE
    file.write_text(file.read_text().replace("0.7", "0.8"))
    with pytest.raises(UserError, match="was changed since it was written"):
        runs.load_best(saver.folder)


def test_a_run_that_goes_on_keeps_the_best_of_before_until_it_is_better(tmp_path):
    first = Saver(tmp_path / "a")
    selection = Selection("dice", patience=5)
    keep(first, selection, {10: 0.5, 20: 0.7, 30: 0.6})
    source = first.folder
    for name in ("b", "c"):
        going_on = Selection("dice", patience=5)
        assert going_on.go_on(source / "model-30", selection.state()["best/dice"])
        assert (going_on.value, going_on.step, going_on.waited) == (0.7, 20, 1)
        saver = Saver(tmp_path / name)
        keep(saver, going_on, {})
        assert runs.find_run(f"{saver.folder}:best") == (first.folder, 20)
        source = saver.folder
    (first.folder / "model-20.index").unlink()
    anew = Selection("dice", patience=5)
    assert not anew.go_on(source / "model-30", selection.state()["best/dice"])
    assert (np.isnan(anew.value), anew.step, anew.waited) == (True, 0, 0)
    keep(saver, going_on, {40: 0.8})
    assert runs.find_run(f"{saver.folder}:best") == (saver.folder, 40)
    assert json.loads((saver.folder / runs.BEST_FILE).read_text())["run"] == "."


def test_the_best_outlives_the_newest_and_what_chose_it_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "_KEEP_NEWEST", 1)
    network = Tiny()
    optimizer = training.adam(network)
    selection = Selection("similarity")
    for step, value in ((1, 0.5), (2, 0.9), (3, 0.1), (4, 0.2)):
        better = selection.consider(step, value)
        checkpoints.save(tmp_path, network, optimizer, step, selection.state())
        if better:
            selection.write(tmp_path)
    assert runs.list_steps(tmp_path) == [1, 2, 4]  # the first of a series of five hours, the best, the newest
    np.testing.assert_array_equal(checkpoints.read_validations(tmp_path / "model-4", "similarity"), [0.9, 2, 2])
    assert checkpoints.read_validations(tmp_path / "model-4", "dice") is None
    checkpoints.restore(network, tmp_path / "model-2", optimizer)
    assert math.isnan(Selection("dice").value)
