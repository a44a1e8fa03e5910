import pytest

import cli
from data_util import download
from published import PAGES


def run(*arguments):
    return cli.run(download.main, list(arguments))


@pytest.mark.parametrize("name", PAGES)
def test_a_published_model_is_told_with_its_page_and_the_place_for_it(name, tmp_path, capsys):
    assert run(name, "-o", str(tmp_path)) == 1
    error = capsys.readouterr().err
    assert PAGES[name] in error
    assert f"{tmp_path}/{name}/model-<step>.index" in error
    assert error.count("\n") == 1


def test_one_that_is_there_is_no_error(tmp_path, capsys):
    (tmp_path / "VTN-3-liver").mkdir()
    assert run("VTN-3-liver", "-o", str(tmp_path)) == 1
    (tmp_path / "VTN-3-liver" / "model-100.index").touch()
    assert run("VTN-3-liver", "-o", str(tmp_path)) == 0
    assert "is there already" in capsys.readouterr().out


def test_a_name_that_nobody_published_is_answered_with_those_that_there_are(capsys):
    assert run("VTN-4-liver") == 1
    assert ", ".join(PAGES) in capsys.readouterr().err
