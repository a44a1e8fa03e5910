"""JSON that is read back: every wrong value is one line with its file, its name, itself and what it should be."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Annotated, Any

import pytest

from checked import COUNT, POSITIVE, build, parse_json, read_json
from errors import UserError


@dataclasses.dataclass(frozen=True)
class Inner:
    unit: str
    better: str | None = None


@dataclasses.dataclass(frozen=True)
class Outer:
    count: Annotated[int, COUNT]
    rate: Annotated[float, POSITIVE] = 1.0
    flag: bool = False
    size: tuple[int, int, int] = (1, 2, 3)
    names: tuple[str, ...] = ()
    rep: int | str = 1
    limited: Annotated[int, COUNT] | None = None
    labels: Mapping[str, int] | None = None
    inner: Mapping[str, Inner] = dataclasses.field(default_factory=dict)
    anything: Any = None


def test_what_is_right_comes_out_as_annotated():
    values = {
        "count": 3, "rate": 2, "flag": True, "size": [4, 5, 6], "names": ["a"], "rep": "auto", "limited": 2,
        "labels": {"x": 1}, "inner": {"dice": {"unit": "mm"}}, "anything": [None], "of a later version": 1,
    }  # fmt: skip
    made = build(Outer, values, "x.json", "mend it")
    assert made == Outer(3, 2, True, (4, 5, 6), ("a",), "auto", 2, {"x": 1}, {"dice": Inner("mm")}, [None])
    assert build(Outer, {"count": 1, "limited": None, "labels": None}, "x.json", "mend it") == Outer(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": "3"}, 'count is "3"; it must be a whole number'),
        ({"count": 3.0}, "count is 3.0; it must be a whole number"),
        ({"count": True}, "count is true; it must be a whole number"),
        ({"count": 0}, "count is 0; it must be a whole number from 1 to 2147483647"),
        ({"count": 10**400}, "count is 1000"),
        ({"count": None}, "count is null; it must be a whole number"),
        ({"rate": float("nan")}, "rate is NaN; it must be a number"),
        ({"rate": float("inf")}, "rate is Infinity; it must be a number"),
        ({"rate": 10**400}, "it must be a number"),
        ({"rate": -1}, "rate is -1; it must be a number greater than 0"),
        ({"rate": False}, "rate is false; it must be a number"),
        ({"rate": [0.1]}, "rate is [0.1]; it must be a number"),
        ({"flag": 1}, "flag is 1; it must be true or false"),
        ({"size": [1, 2]}, "size is [1, 2]; it must be a list of 3"),
        ({"size": [1, 2, "3"]}, 'size[2] is "3"; it must be a whole number'),
        ({"names": "abc"}, 'names is "abc"; it must be a list of a text in quotes'),
        ({"names": [1]}, "names[0] is 1"),
        ({"rep": 1.5}, "rep is 1.5; it must be a whole number or a text in quotes"),
        ({"limited": 0}, "limited is 0; it must be a whole number from 1"),
        ({"labels": {"x": "1"}}, 'labels is {"x": "1"}; it must be an object {...} or null'),
        ({"inner": {"dice": 5}}, "inner.dice is 5; it must be an object {...}"),
        ({"inner": {"dice": {}}}, "inner.dice.unit is missing"),
        ({"inner": {"dice": {"unit": 5}}}, "inner.dice.unit is 5; it must be a text in quotes"),
    ],
)
def test_what_is_wrong_is_named(change, message):
    with pytest.raises(UserError) as error:
        build(Outer, {"count": 1, **change}, "x.json", "mend it")
    text = str(error.value)
    assert text.startswith("x.json: ")
    assert text.endswith("mend it")
    assert message in text
    assert "\n" not in text
    assert len(text) < 250


@pytest.mark.parametrize("values", [None, 3, [], "text"])
def test_what_is_no_object_is_named(values):
    with pytest.raises(UserError, match=r"x\.json: is .*; it must be an object \{\.\.\.\}: mend it"):
        build(Outer, values, "x.json", "mend it")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"line 1, column 1: not valid JSON"),
        (b'{"a": 1,}', "no comma may stand before a closing bracket"),
        (b'{"a": 1', "line 1, column 8: not valid JSON"),
        (b"\xff\xfe", "not UTF-8 text"),
        (b'"\\ud800"', r"has the escape .*ud800.*, which is no character"),
        (b"[" * 200_000, "nested too deeply"),
        (b"[" * 200_000 + b"]" * 200_000, "nested too deeply"),
        (b"9" * 5000, "thousands of digits"),
    ],
)
def test_what_is_not_json_is_one_line(tmp_path, content, message):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"x\.json.*{message}.*; mend it$"):
        read_json(tmp_path / "x.json", "mend it")


def test_json_with_and_without_a_byte_order_mark_is_read(tmp_path):
    assert parse_json(b'\xef\xbb\xbf{"a": 1}', "x", "mend it") == {"a": 1}
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\); mend it"):
        read_json(tmp_path, "mend it")
    (tmp_path / "x.json").write_text(json.dumps({"ü": [1.5]}, ensure_ascii=False), encoding="utf-8")
    assert read_json(tmp_path / "x.json", "mend it") == {"ü": [1.5]}
