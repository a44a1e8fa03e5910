"""Checksums inside JSON files: an object's last entry, `sum`, is one of all its other bytes. So damage is found.

{"index": 3, ..., "sum": "9b1c2f0d5e6a7788"}
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

_DIGITS = 16
_NONE = "0" * _DIGITS  # what stands in the place of the sum while it is made
SUM = "sum"
_SUM = re.compile(rb'"sum": "([0-9a-f]{16})"\s*\}\s*\Z')


def sealed(content: Mapping[str, Any], of: str = "", indent: int | None = None) -> str:
    """The JSON text of an object, with its checksum as the last entry.

    Args:
        content: the object.
        of: what it belongs to, such as another checksum: its own one is right beside that alone.
        indent: spaces for each level; None for one line.
    """
    text = json.dumps({**content, "sum": _NONE}, indent=indent, allow_nan=False)
    before, _, after = text.rpartition(_NONE)
    return f"{before}{checksum(text.encode(), of)}{after}"


def sum_of(text: bytes) -> str | None:
    """The checksum that stands in the text of a JSON object; None where there is none, as in old files."""
    found = _SUM.search(text)
    return None if found is None else found[1].decode()


def is_whole(text: bytes, of: str = "") -> bool:
    """Whether the text of a JSON object has a checksum, and it is that of the text; `of` as in `sealed`.

    >>> text = sealed({"index": 3}).encode()
    >>> is_whole(text), is_whole(text.replace(b"3", b"2")), is_whole(text, of="another")
    (True, False, False)
    """
    found = _SUM.search(text)
    if found is None:
        return False
    return found[1].decode() == checksum(text[: found.start(1)] + _NONE.encode() + text[found.end(1) :], of)


def is_changed(text: bytes, content: Any) -> bool:
    """Whether a JSON text with a checksum was changed since it was written; False where it has none, as old files.

    Args:
        text: the text.
        content: what it holds.
    """
    return isinstance(content, dict) and SUM in content and not is_whole(text.strip())


def checksum(content: bytes, of: str = "") -> str:
    """Checksum of some bytes, 16 hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=_DIGITS // 2, key=of.encode()).hexdigest()
