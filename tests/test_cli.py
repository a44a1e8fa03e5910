"""How a command ends by what a user got wrong."""

import pytest
import tensorflow as tf

import cli


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
