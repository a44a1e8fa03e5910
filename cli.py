"""The command line: running a command, the flags that the scripts share, and the texts that flags take."""

import argparse
import ast
import importlib.machinery
import pathlib
import re
import signal
import sys
import traceback
import types
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import files
import start
from errors import Stopped, UserError, first_line, shortened

VERSION = "1.0"
AUTO = "auto"  # of repeats, steps of refinement and devices: as it suits
STOPPED = 130
"""Exit status of a command that a signal ended (Ctrl-C, SIGTERM or SIGHUP); 0 is a success, 1 an error."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the flags in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Raise a UserError."""
        raise UserError(f"{message}; {self.prog} --help lists the flags")


def parser(description: str, examples: str | None = None) -> argparse.ArgumentParser:
    """Argument parser with --version; each flag says its default itself.

    Args:
        description: what the command does.
        examples: lines that --help ends with.
    """
    flags = _Parser(
        allow_abbrev=False,  # a mistyped flag is an error, not another flag
        description=description,
        epilog=None if examples is None else f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags.add_argument("--version", action="version", version=f"recursive cascaded networks {VERSION}")
    return flags


def add_trust_flag(flags: argparse.ArgumentParser) -> None:
    """The flag of the commands that read a data set."""
    flags.add_argument(
        "--trust",
        action="store_true",
        help="the data set's HDF5 files may have images read from files outside their folders (off)",
    )


def add_shared_flags(flags: argparse.ArgumentParser) -> None:
    """The flags that mean the same in every script."""
    flags.add_argument(
        "-g",
        "--gpu",
        default="auto",
        help="GPU ids, such as 0 or 0,1; -1: CPU; cpu:N: CPU as N devices; auto: GPUs if there are any (auto)",
    )
    flags.add_argument(
        "--fast_reconstruction",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="warp by compiled kernels that save memory; otherwise by the plain formulation (on)",
    )
    flags.add_argument("--precision", default="float32", help="float32, mixed_bfloat16 or mixed_float16 (float32)")
    flags.add_argument("--net_args", default=None, help='network options, "key=value, key=value"')
    flags.add_argument(
        "--plugin",
        default=None,
        metavar="FILE.py",
        help="Python file of yours that registers base networks, similarities, metrics or readers (none)",
    )
    flags.add_argument("--verbose", action="store_true", help="show TensorFlow's own messages")


_plugins: set[pathlib.Path] = set()


def parse(flags: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags of a command that has the shared ones; with --verbose TensorFlow prints its messages from now on."""
    args = flags.parse_args(arguments)
    if args.verbose:
        start.show_messages()
    return args


def load_plugin(path: str | None) -> str | None:
    """Import the file of `--plugin`, which adds rows to the tables of `network.registry` and others; once per process.

    Args:
        path: a Python file, or None for no plugin.

    Returns:
        The file's name, as a run records it, or None.

    Raises:
        UserError: there is no such file, or it fails.
    """
    if path is None:
        return None
    file = pathlib.Path(path).resolve()
    if not file.is_file() or file.suffix != ".py":
        raise UserError(f"--plugin {path}: no such Python file; give the path of a file that ends in .py")
    if file not in _plugins:
        start.tensorflow()
        sys.path.append(str(file.parent))  # where its own imports are looked for, after all others
        name = f"plugin_{file.stem}"
        loader = importlib.machinery.SourceFileLoader(name, str(file))
        module = types.ModuleType(name)
        module.__file__, sys.modules[name] = str(file), module
        try:
            loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise UserError(
                f"--plugin {path}: {_where(error, file)}{type(error).__name__}: {first_line(error)}"
            ) from error
        _plugins.add(file)
    return file.name


def _where(error: Exception, file: pathlib.Path) -> str:
    """The line of a file that led to an exception, for a message."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return f"line {error.lineno}: "
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return f"line {lines[-1]}: " if lines else ""


def positive(name: str, value: int) -> int:
    """Value of a flag that must be a whole number from 1.

    Raises:
        UserError: it is less, or more than anything can be counted to.
    """
    if value < 1:
        raise UserError(f"--{name} is {value}; it must be a whole number from 1")
    if value >= 2**31:
        raise UserError(f"--{name} is {value}; it must be a whole number up to {2**31 - 1}")
    return value


def part_of_name(flag: str, text: str | None) -> str:
    """Value of a flag that becomes part of the name of a file or folder; '' where it is not given.

    Raises:
        UserError: it cannot be part of a name.
    """
    text = text or ""
    if "/" in text or "\\" in text or not text.isprintable():
        raise UserError(
            f"{flag} is {text!r}; it becomes part of the name of a file or folder: leave out /, \\ and control signs"
        )
    if len(text.encode()) > 150:
        raise UserError(f"{flag} has {len(text.encode())} bytes; it becomes part of a name: at most 150")
    return text


def parse_rep(text: str) -> int | str:
    """The value of -r: a whole number from 1, or "auto".

    Raises:
        UserError: it is neither.
    """
    if text == AUTO:
        return text
    if not re.fullmatch("0*[1-9][0-9]{0,8}", text):
        raise UserError(f"-r {text!r} is neither a whole number from 1 nor auto")
    return int(text)


def is_paired(data_args: str | None) -> bool:
    """Whether a `--data_args` string asks for pairs of neighbouring scans.

    Raises:
        UserError: malformed text, an unknown key, or a value that is not True or False.
    """
    paired = parse_assignments(data_args, ("paired",), "--data_args").get("paired", False)
    if not isinstance(paired, bool):
        raise UserError(f"--data_args: paired is {paired!r}; it must be True or False")
    return paired


def execution(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `CascadeConfig` that the flags set: how to compute, not what."""
    return {"fast_reconstruction": args.fast_reconstruction, "precision": args.precision}


def in_red(text: str) -> str:
    """A text as it is printed: in red where standard output is a terminal."""
    return f"\033[31m{text}\033[0m" if sys.stdout.isatty() else text


def run(
    main: Callable[[list[str] | None], int | None],
    arguments: list[str] | None = None,
    if_out_of_memory: str = "close other programs, or use a machine with more memory",
) -> int:
    """Run a command and return its exit status: 0; 1 for an error, in one line; `STOPPED` where a signal ended it.

    Args:
        main: the command, a function of its arguments (None: those of the process) that returns None or a status.
        arguments: list of str, or None.
        if_out_of_memory: the remedy that is printed where memory does not suffice.

    Returns:
        The exit status. A command that was stopped with its work saved (`errors.Stopped`) says so without "error:".
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, _interrupt)
    try:
        return main(arguments) or 0
    except Stopped as stopped:
        print(stopped)
        return STOPPED
    except UserError as error:
        return _fail(error)
    except KeyboardInterrupt:
        return _fail("stopped", status=STOPPED)
    except Exception as error:
        if files.is_full(error):
            return _fail(files.cannot_write(getattr(error, "filename", None), error))
        if isinstance(error, OSError):
            return _fail(": ".join(str(part) for part in (error.filename, error.strerror or error) if part))
        # TensorFlow's, by name: it is not imported here.
        if not isinstance(error, MemoryError) and type(error).__name__ != "ResourceExhaustedError":
            raise
        return _fail(f"out of memory ({first_line(error)}); {if_out_of_memory}")


def _interrupt(*_: Any) -> None:
    """A cluster's SIGTERM and a closed terminal's SIGHUP end a run like Ctrl-C: what is done is saved."""
    raise KeyboardInterrupt


def _fail(message: object, status: int = 1) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status


def parse_assignments(
    text: str | None, allowed: Sequence[str] | Callable[[dict[str, Any]], Sequence[str]], flag: str
) -> dict[str, Any]:
    """Values of a string such as "reg_factor=0.5, augmentation='identity'", as a dict.

    Args:
        text: comma-separated `key=value`, values Python literals; None and '' give {}.
        allowed: the keys that may occur, or a function of the values giving them.
        flag: name of the command-line flag, for messages.

    Raises:
        UserError: the text is malformed, or a key is not among `allowed`.

    >>> parse_assignments("paired=True", ["paired"], "--data_args")
    {'paired': True}
    """
    try:
        call = ast.parse(f"dict({text or ''})", mode="eval").body
        if not isinstance(call, ast.Call):
            raise ValueError("it is not a list of key=value")
        if call.args:
            raise ValueError("a value without a key")
        names = [keyword.arg or "**" for keyword in call.keywords]
        if len(set(names)) < len(names):
            raise ValueError("a key given twice")
        values = {name: _literal(keyword.value) for name, keyword in zip(names, call.keywords, strict=True)}
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        deep = isinstance(error, (MemoryError, RecursionError))
        reason = "it is nested too deeply" if deep else first_line(error)
        given = repr(shortened(text or "", 200))
        raise UserError(
            f'{flag} {given} cannot be read ({reason}); write "key=value, key=value" with numbers, True, False, '
            "None or quoted words as values"
        ) from error
    keys = allowed(values) if callable(allowed) else allowed
    unknown = sorted(key for key in values if key not in keys)
    if unknown:
        raise UserError(f"{flag}: unknown key {unknown[0]!r}; allowed are {', '.join(keys)}")
    return values


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ValueError(f"{ast.unparse(node)} is not a value") from None
