"""The command line: running a command, the flags that the scripts share, and the texts that flags take."""

import argparse
import ast
import signal
import sys

from errors import UserError


def parser(description):
    """Argument parser; each flag says its default itself."""
    return argparse.ArgumentParser(description=description)


def add_shared_flags(flags):
    """The flags that mean the same in every script."""
    flags.add_argument(
        "-g", "--gpu", default="0", help="GPU ids, such as 0 or 0,1; -1: CPU; cpu:N: CPU as N devices (0)"
    )
    flags.add_argument(
        "--fast_reconstruction",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="warp by compiled kernels that save memory; otherwise by the plain formulation (on)",
    )
    flags.add_argument("--precision", default="float32", help="float32, mixed_bfloat16 or mixed_float16 (float32)")
    flags.add_argument("--net_args", default=None, help='network options, "key=value, key=value"')


def positive(name, value):
    """Value of a flag that must be a whole number from 1.

    Raises:
        UserError: it is less.
    """
    if value < 1:
        raise UserError(f"--{name} is {value}; it must be a whole number from 1")
    return value


def parse_rep(text):
    """The value of -r: a whole number from 1, or "auto".

    Raises:
        UserError: it is neither.
    """
    if text == "auto":
        return text
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"-r {text!r} is neither a whole number from 1 nor auto")
    return int(text)


def is_paired(data_args):
    """Whether a `--data_args` string asks for pairs of neighbouring scans.

    Raises:
        UserError: malformed text, an unknown key, or a value that is not True or False.
    """
    paired = parse_assignments(data_args, ("paired",), "--data_args").get("paired", False)
    if not isinstance(paired, bool):
        raise UserError(f"--data_args: paired is {paired!r}; it must be True or False")
    return paired


def execution(args):
    """The options of `CascadeConfig` that the flags set: how to compute, not what."""
    return {"fast_reconstruction": args.fast_reconstruction, "precision": args.precision}


def run(main, arguments=None, if_out_of_memory="close other programs, or use a machine with more memory"):
    """Run a command's `main(arguments)` and return its exit status: a mistake of the user is one line and status 1.

    Args:
        main: the command, a function of its arguments (None: those of the process) that returns None or a status.
        arguments: list of str, or None.
        if_out_of_memory: the remedy that is printed where memory does not suffice.
    """
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
        return _fail(f"out of memory ({cause}); {if_out_of_memory}")


def _interrupt(*_):
    """A cluster's SIGTERM ends a run like Ctrl-C: what is done is saved."""
    raise KeyboardInterrupt


def _fail(message, status=1):
    print(f"error: {message}", file=sys.stderr)
    return status


def parse_assignments(text, allowed, flag):
    """Values of a string such as "reg_factor=0.5, augmentation='identity'", as a dict.

    Args:
        text: comma-separated `key=value`, values Python literals; None and '' give {}.
        allowed: the keys that may occur.
        flag: name of the command-line flag, for messages.

    Raises:
        UserError: the text is malformed, or a key is not among `allowed`.
    """
    try:
        call = ast.parse(f"dict({text or ''})", mode="eval").body
        if call.args:
            raise ValueError("a value without a key")
        names = [keyword.arg for keyword in call.keywords]
        if len(set(names)) < len(names):
            raise ValueError("a key given twice")
        values = {keyword.arg: _literal(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, AttributeError) as error:
        raise UserError(
            f'{flag} {text!r} cannot be read ({error}); write "key=value, key=value" with numbers, True, False, '
            "None or quoted words as values"
        ) from error
    unknown = sorted(key or "**" for key in values if key not in allowed)
    if unknown:
        raise UserError(f"{flag}: unknown key {unknown[0]!r}; allowed are {', '.join(allowed)}")
    return values


def _literal(node):
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ValueError(f"{ast.unparse(node)} is not a value") from None
