"""What several tests of the data set's commands work on."""

import pytest

from tests.test_data_util.learn2reg_task import write_task


@pytest.fixture
def task(tmp_path, monkeypatch):
    """The folder task/ of a Learn2Reg task (`write_task`), in a working folder of its own."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "task"
    write_task(folder)
    return folder
