"""Fixtures of the tests of commands."""

import pytest


@pytest.fixture
def work(home, tmp_path, monkeypatch):
    """A current folder in which the names of `home` can be used."""
    for path in home.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path
