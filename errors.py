"""The exception for what a user can mend, that for a command that was stopped, and how its messages list values."""

from collections.abc import Sequence


class UserError(Exception):
    """A mistake that the user can mend; the message names the cause, the value and the remedy, in one line.

    Libraries raise it where the cause is; `cli.run` prints it and ends the command with status 1.
    """


class Stopped(Exception):
    """A signal ended a command, whose work so far is saved; the message says how to go on. No error."""


def listed(values: Sequence[object], most: int = 5) -> str:
    """Values for a message: the first of them, and how many more there are."""
    return ", ".join(map(str, values[:most])) + (f" and {len(values) - most} more" if len(values) > most else "")
