"""How a command ends by what a user got wrong."""

import errno
import os
import signal

import pytest
import tensorflow as tf

import cli
from errors import Stopped, UserError


@pytest.mark.parametrize(
    "error",
    [MemoryError("no room for 9 GiB"), tf.errors.ResourceExhaustedError(None, None, "no room for 9 GiB\nat ...")],
)
def test_out_of_memory_is_one_line_that_says_what_helps(error, capsys):
    def main(arguments):
        raise error

    assert cli.run(main, if_out_of_memory="use a smaller --batch") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory (no room for 9 GiB); use a smaller --batch")


def test_other_faults_are_not_hidden():
    def main(arguments):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.run(main)


def test_a_command_that_was_stopped_with_its_work_saved_is_no_error(capsys):
    def main(arguments):
        raise Stopped("Stopped at step 5, which is saved")

    assert cli.run(main) == cli.STOPPED
    assert capsys.readouterr() == ("Stopped at step 5, which is saved\n", "")


@pytest.fixture
def signals():
    """Signals whose handlers are the test's own."""
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = {n: signal.signal(n, signal.SIG_DFL) for n in numbers}
    yield numbers
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_command_like_ctrl_c(number, signals, capsys):
    assert cli.run(lambda _: os.kill(os.getpid(), number)) == cli.STOPPED
    assert capsys.readouterr().err == "error: stopped\n"


def test_what_was_started_with_nohup_does_not_hear_the_terminal_close(signals):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert cli.run(lambda _: os.kill(os.getpid(), signal.SIGHUP)) == 0


BROKEN = {
    "raises": ("x = 1\ny = x / 0\n", "line 2: ZeroDivisionError: division by zero"),
    "is no Python": ("x = 1\n\ndef f(:\n", "line 3: SyntaxError"),
    "imports what is not there": ("import nothing_of_this_name\n", "line 1: ModuleNotFoundError"),
    "registers a name twice": (
        "from network.registry import SIMILARITIES\nSIMILARITIES['ncc'] = SIMILARITIES['mi']\n",
        "similarity 'ncc' is registered already",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_plugin_that_fails_is_one_line(case, tmp_path):
    text, message = BROKEN[case]
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=r"--plugin .*mine\.py: ") as error:
        cli.load_plugin(str(tmp_path / "mine.py"))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["nothing.py", "folder.py", "text.txt"])
def test_a_plugin_that_is_no_python_file(name, tmp_path):
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "text.txt").touch()
    with pytest.raises(UserError, match="no such Python file"):
        cli.load_plugin(str(tmp_path / name))


def test_a_plugin_is_imported_once(tmp_path):
    (tmp_path / "once.py").write_text(f"open({str(tmp_path / 'log')!r}, 'a').write('.')")
    assert cli.load_plugin(None) is None
    assert [cli.load_plugin(str(tmp_path / "once.py")) for _ in range(2)] == ["once.py"] * 2
    assert (tmp_path / "log").read_text() == "."


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "cannot write a file (No space left on device); make space"),
        (
            OSError("Can't write data (errno = 28, error message = 'No space left on device')"),
            "cannot write a file (No",
        ),
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), "cannot write /a/b (No space left on device; "),
        (
            tf.errors.ResourceExhaustedError(None, None, "/x; No space left on device\n\tmore"),
            "cannot write a file (No",
        ),
        (OSError("odd"), "odd"),
        (OSError(errno.EACCES, "Permission denied", "/a/b"), "/a/b: Permission denied"),
    ],
)
def test_what_the_system_refuses_is_one_line(error, said, capsys):
    def main(_):
        raise error

    assert cli.run(main) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}")
