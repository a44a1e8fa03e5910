import json

import pytest

import cli
import pack
from network import checkpoints, runs
from tests.test_network.test_checkpoints import SMALL, trained


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of two checkpoints in weights/, which is where the test is."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "weights" / "mine"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(SMALL.to_dict()))
    (folder / "args.json").write_text('{"seed": 3}')
    for step in (5, 9):
        checkpoints.save(folder, *trained(step), step)
    return folder


def test_a_run_is_packed_with_what_it_says_of_itself_and_is_a_run_to_load(run, tmp_path, capsys):
    assert cli.run(pack.main, ["-c", "mine:5", "-o", "weights/small"]) == 0
    packed = tmp_path / "weights" / "small"
    assert {path.name.split(".")[0] for path in packed.iterdir()} == {"model-5", "args", "config"}
    assert (packed / "config.json").read_text() == (run / "config.json").read_text()
    size = sum(path.stat().st_size for path in packed.glob("model*"))
    assert size < 0.2 * sum(path.stat().st_size for path in run.glob("model-5*"))
    assert "model-5, 30.1 MB" in capsys.readouterr().out
    assert runs.find_checkpoint("small").name == "model-5"
    checkpoints.load_model("weights/small")


def test_what_is_there_is_replaced_only_where_that_is_asked_for_and_never_the_run_itself(run, capsys):
    assert cli.run(pack.main, ["-c", "mine:5", "-o", "weights/small"]) == 0
    assert cli.run(pack.main, ["-c", "mine", "-o", "weights/small"]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert cli.run(pack.main, ["-c", "mine", "-o", "weights/small", "--overwrite"]) == 0
    assert runs.list_steps("weights/small") == [9]
    assert cli.run(pack.main, ["-c", "mine", "-o", "weights/mine", "--overwrite"]) == 1
    assert "is the run itself" in capsys.readouterr().err
    assert runs.list_steps("weights/mine") == [5, 9]


def test_a_folder_of_anything_else_is_never_replaced(run, capsys):
    (run.parent / "other").mkdir()
    (run.parent / "other" / "log.csv").write_text("step")
    for output, told in (("weights", "mine, other"), ("weights/other", "log.csv"), ("weights/other/log.csv", "a file")):
        assert cli.run(pack.main, ["-c", "mine", "-o", output, "--overwrite"]) == 1
        assert told in capsys.readouterr().err
    assert runs.list_steps(run) == [5, 9]
    assert (run.parent / "other" / "log.csv").read_text() == "step"
