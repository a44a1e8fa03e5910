"""What a user can get wrong, and how a command ends by it."""

import signal
import sys


class UserError(Exception):
    """A mistake that the user can mend; the message names the cause, the value and the remedy, in one line.

    Libraries raise it where the cause is; `run` prints it and ends the command with status 1.
    """


def listed(values, most=5):
    """Values for a message: the first of them, and how many more there are."""
    return ", ".join(map(str, values[:most])) + (f" and {len(values) - most} more" if len(values) > most else "")


def run(main, arguments=None):
    """Run a command's `main(arguments)` and give its exit status: a mistake of the user is one line and status 1."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return main(arguments) or 0
    except UserError as error:
        return _fail(error)
    except KeyboardInterrupt:
        return _fail("stopped", status=130)
    except OSError as error:
        if error.filename is None:
            raise
        return _fail(f"{error.filename}: {error.strerror}")
    except Exception as error:
        # TensorFlow's, by name: it is not imported here.
        if not isinstance(error, MemoryError) and type(error).__name__ != "ResourceExhaustedError":
            raise
        cause = (str(error) or "no more memory").splitlines()[0]
        return _fail(
            f"out of memory ({cause}); use a smaller --batch, or --precision mixed_bfloat16, "
            "or in training --rematerialize or more devices"
        )


def _interrupt(*_):
    """A cluster's SIGTERM ends a run like Ctrl-C: what is done is saved."""
    raise KeyboardInterrupt


def _fail(message, status=1):
    print(f"error: {message}", file=sys.stderr)
    return status
