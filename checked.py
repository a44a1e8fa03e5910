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
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from errors import UserError, shortened

Made = TypeVar("Made")
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
NOT_NEGATIVE = Limit(lambda value: math.isfinite(value) and value >= 0, "a number from 0")
SHARE = Limit(lambda value: 0 <= value < 1, "a number from 0 to below 1")


class _Wrong(Exception):
    """A value is not what its annotation says.

    Args:
        value: the value, or `_MISSING`.
        kind: the annotation, or the `Limit`.
        name: of the value within what is read, '' where it is all of that.
    """

    def __init__(self, value: Any, kind: Any, name: str = "") -> None:
        super().__init__(value, kind, name)
        self.value, self.kind, self.name = value, kind, name

    def within(self, name: str) -> "_Wrong":
        """The same, of what holds the value under a name such as '.labels' or '[2]'."""
        return _Wrong(self.value, self.kind, name + self.name)


_MISSING = object()


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
        return _reader(typing.cast(typing.Hashable, cls))(values)
    except _Wrong as wrong:
        name = wrong.name.removeprefix(".")
        if wrong.value is _MISSING:
            raise UserError(f"{where}: {name} is missing; {remedy}") from None
        what = f"{name} is {shown(wrong.value)}" if name else f"is {shown(wrong.value)}"
        raise UserError(f"{where}: {what}; it must be {_words(wrong.kind)}: {remedy}") from None


def shown(value: Any) -> str:
    """A JSON value for a message; its beginning where it is long."""
    return shortened(json.dumps(value))


def is_finite(value: Any) -> bool:
    """Whether a value is a finite int or float (not a bool) that a float can hold."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False


Reader = Callable[[Any], Any]


@functools.cache
def _reader(kind: Any) -> Reader:
    """The function that gives a JSON value as its annotation has it, or raises `_Wrong`."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return lambda value: value
    if origin is typing.Annotated:
        return _limited(_reader(parts[0]), parts[1])
    if origin in (typing.Union, types.UnionType):
        return _one_of([_reader(part) for part in parts], kind)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind)
    if origin is tuple:
        return _list(kind, parts)
    if origin is Mapping:
        return _mapping(kind, _reader(parts[1]))

    def plain(value: Any) -> Any:
        if is_finite(value) if kind is float else type(value) is kind:
            return value
        raise _Wrong(value, kind)

    return plain


def _limited(reader: Reader, limit: Limit) -> Reader:
    def read(value: Any) -> Any:
        try:
            found = reader(value)
        except _Wrong as wrong:
            raise wrong if wrong.name else _Wrong(value, limit) from None
        if not limit.allows(found):
            raise _Wrong(value, limit)
        return found

    return read


def _one_of(readers: Sequence[Reader], kind: Any) -> Reader:
    def read(value: Any) -> Any:
        for reader in readers:
            try:
                return reader(value)
            except _Wrong:
                continue
        raise _Wrong(value, kind)

    return read


def _dataclass(cls: Any) -> Reader:
    hints = typing.get_type_hints(cls, include_extras=True)
    readers = {field.name: _reader(hints[field.name]) for field in dataclasses.fields(cls)}
    needed = [
        field.name
        for field in dataclasses.fields(cls)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]

    def read(value: Any) -> Any:
        if not isinstance(value, dict):
            raise _Wrong(value, cls)
        for name in needed:
            if name not in value:
                raise _Wrong(_MISSING, cls, f".{name}")
        return cls(**_each({name: value[name] for name in readers if name in value}, readers.__getitem__))

    return read


def _mapping(kind: Any, reader: Reader) -> Reader:
    def read(value: Any) -> Any:
        if not isinstance(value, dict):
            raise _Wrong(value, kind)
        return _each(value, lambda name: reader)

    return read


def _each(values: Mapping[str, Any], reader: Callable[[str], Reader]) -> dict[str, Any]:
    """Every value of an object, as the reader of its name gives it."""
    found = {}
    for name, value in values.items():
        try:
            found[name] = reader(name)(value)
        except _Wrong as wrong:
            raise wrong.within(f".{name}") from None
    return found


def _list(kind: Any, parts: tuple[Any, ...]) -> Reader:
    endless = parts[-1] is ...
    readers = [_reader(part) for part in parts if part is not ...]

    def read(value: Any) -> Any:
        if not isinstance(value, list) or not (endless or len(value) == len(parts)):
            raise _Wrong(value, kind)
        found = []
        for k, (reader, each) in enumerate(zip(readers * len(value) if endless else readers, value, strict=True)):
            try:
                found.append(reader(each))
            except _Wrong as wrong:
                raise wrong.within(f"[{k}]") from None
        return tuple(found)

    return read


def _words(kind: Any) -> str:
    if isinstance(kind, Limit):
        return kind.words
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return parts[1].words
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_words, parts))
    if origin is tuple:
        of = parts[:1] if parts[-1] is ... else parts
        return f"a list of {_words(of[0])}" if len(of) == 1 else f"a list of {len(of)}"
    return _WORDS.get(origin or kind, _WORDS[Mapping])
