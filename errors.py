"""The exceptions for what a user can mend and for a command that was stopped, and what their messages are made of."""

import re
from collections.abc import Sequence


class UserError(Exception):
    """A mistake that the user can mend; the message names the cause, the value and the remedy, in one line.

    Libraries raise it where the cause is; `cli.run` prints it and ends the command with status 1.
    """


class Stopped(Exception):
    """A signal ended a command, whose work so far is saved; the message says how to go on. No error."""


def text_of(error: Exception) -> str:
    """What an exception says, without where in its graph TensorFlow met it."""
    return re.sub(r"\{\{.*?\}\}|\[Op:\w+\]", "", str(error)).strip()


def first_line(error: Exception) -> str:
    """What an exception says, in one line; its type where it says nothing."""
    return (text_of(error) or type(error).__name__).splitlines()[0].strip()


def shortened(text: str, most: int = 60) -> str:
    """A text for a message; its beginning where it is long."""
    return text if len(text) <= most else f"{text[:most]}..."


def listed(values: Sequence[object], most: int = 5) -> str:
    """Values for a message: the first of them, and how many more there are."""
    return ", ".join(map(str, values[:most])) + (f" and {len(values) - most} more" if len(values) > most else "")
