"""JSON that the program reads back, checked: what is not as it should be is one line with file, name, value and remedy.

A frozen dataclass says by its annotations what a JSON object may hold, `build` makes one out of the object. Names that
the dataclass lacks are passed over, so that files of later versions are read.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import types
import typing
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

from errors import UserError

Made = TypeVar("Made")
_LONGEST = 60  # characters of a value in a message
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text in quotes",
    types.NoneType: "null",
    Mapping: "an object {...}",
    tuple: "a list [...]",
}


@dataclasses.dataclass(frozen=True)
class Limit:
    """What a value must fulfil beside its type, as in `Annotated[int, Limit(...)]`.

    Attributes:
        allows: function of a value.
        words: what is allowed, in words that continue "it must be".
    """

    allows: Callable[[Any], bool]
    words: str


MOST = 2**31 - 1  # the largest count; more of anything is a mistake
COUNT = Limit(lambda value: 1 <= value <= MOST, f"a whole number from 1 to {MOST}")
INDEX = Limit(lambda value: value >= 0, "a whole number from 0")
POSITIVE = Limit(lambda value: value > 0, "a number greater than 0")


class _Wrong(Exception):
    """A value is not what its annotation says: its name, the value, and what it must be."""


def parse_json(content: bytes, where: str, remedy: str) -> Any:
    """The value of a JSON text.

    Args:
        content: the text in UTF-8, with or without a byte order mark.
        where: what it is of, such as a file, for messages.
        remedy: what to do where it is not JSON.

    Raises:
        UserError: it is not JSON in UTF-8, or nothing that can be used as such.
    """
    text = ""
    try:
        text = content.decode("utf-8-sig")
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # half of a pair of \u escapes is no text
        return value
    except UnicodeEncodeError as error:
        reason = f": has the escape {error.object[error.start]!r}, which is no character"
    except UnicodeDecodeError as error:
        reason = f": is not UTF-8 text ({error.reason})"
    except json.JSONDecodeError as error:
        before, after = text[: error.pos].rstrip(), text[error.pos :].lstrip()
        trailing = (before.endswith(",") and after[:1] in "}]") or re.match(r",\s*[}\]]", after)
        hint = "; no comma may stand before a closing bracket" if trailing else ""
        reason = f", line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}{hint})"
    except ValueError:
        reason = ": has a number of thousands of digits"
    except RecursionError:
        reason = ": is nested too deeply"
    raise UserError(f"{where}{reason}; {remedy}")


def read_json(path: str | os.PathLike, remedy: str) -> Any:
    """The value in a JSON file.

    Raises:
        UserError: as `parse_json`; or the file cannot be opened.
    """
    try:
        content = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    return parse_json(content, str(path), remedy)


def build(cls: type[Made], values: Any, where: str, remedy: str) -> Made:
    """A frozen dataclass out of a JSON object; its lists as tuples, its objects as dataclasses where so annotated.

    Args:
        cls: the dataclass.
        values: what the JSON holds.
        where, remedy: as in `parse_json`.

    Raises:
        UserError: it is no object, lacks a field without a default, or one is not what its annotation says.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Flags:
    ...     batch: typing.Annotated[int, COUNT] = 4
    >>> build(Flags, {"batch": 2}, "args.json", "mend it")
    Flags(batch=2)
    """
    try:
        return _build(cls, values, "")
    except _Wrong as wrong:
        name, value, words = wrong.args
        what = f"{name} is {shown(value)}" if name else f"is {shown(value)}"
        raise UserError(f"{where}: {what}; it must be {words}: {remedy}") from None
    except KeyError as missing:
        raise UserError(f"{where}: {missing.args[0]} is missing; {remedy}") from None


def shown(value: Any) -> str:
    """A JSON value for a message; its beginning where it is long."""
    text = json.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def is_finite(value: Any) -> bool:
    """Whether a value is a finite int or float (not a bool) that a float can hold."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False


@functools.cache
def _annotations(cls: Hashable) -> dict[str, Any]:
    return typing.get_type_hints(typing.cast(Any, cls), include_extras=True)


def _build(cls: type[Made], values: Any, name: str) -> Made:
    if not isinstance(values, dict):
        raise _Wrong(name, values, _WORDS[Mapping])
    kinds, found = _annotations(typing.cast(Hashable, cls)), {}
    for field in dataclasses.fields(typing.cast(Any, cls)):
        of_field = f"{name}.{field.name}" if name else field.name
        if field.name in values:
            found[field.name] = _checked(values[field.name], kinds[field.name], of_field)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise KeyError(of_field)
    return cls(**found)


def _checked(value: Any, kind: Any, name: str) -> Any:
    """A value as its annotation has it; raises `_Wrong`."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is typing.Annotated:
        try:
            found = _checked(value, parts[0], name)
        except _Wrong as wrong:
            within = wrong.args[0] != name  # what it holds
            raise wrong if within else _Wrong(name, value, parts[1].words) from None
        if not parts[1].allows(found):
            raise _Wrong(name, value, parts[1].words)
        return found
    if origin in (typing.Union, types.UnionType):
        for part in parts:
            try:
                return _checked(value, part, name)
            except _Wrong:
                continue
    elif dataclasses.is_dataclass(kind):
        return _build(typing.cast(Any, kind), value, name)
    elif origin is tuple and isinstance(value, list) and (parts[-1] is ... or len(parts) == len(value)):
        each = parts[:1] * len(value) if parts[-1] is ... else parts
        return tuple(_checked(v, part, f"{name}[{k}]") for k, (v, part) in enumerate(zip(value, each, strict=True)))
    elif origin is Mapping and isinstance(value, dict):
        return {key: _checked(v, parts[1], f"{name}.{key}") for key, v in value.items()}
    elif _is_plain(value, kind):
        return value
    raise _Wrong(name, value, _words(kind))


def _is_plain(value: Any, kind: Any) -> bool:
    """Whether a value is of a plain type; a float may be written as an int, true and false are no numbers."""
    if kind is float:
        return is_finite(value)
    return kind in (bool, int, str, types.NoneType) and type(value) is kind


def _words(kind: Any) -> str:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return parts[1].words
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_words, parts))
    if origin is tuple:
        of = parts[:1] if parts[-1] is ... else parts
        return f"a list of {_words(of[0])}" if len(of) == 1 else f"a list of {len(of)}"
    return _WORDS.get(origin or kind, _WORDS[Mapping])
