"""What the names in a data set may be, of scans, subsets and schemes: they stand in reports and name files."""

import unicodedata

from checked import shown
from errors import UserError

LONGEST = 120
"""Bytes; two ids and a number are the name of a pair's folder, and a file system takes 255."""
CONTROL = ("Cc", "Cs", "Zl", "Zp")  # categories: control characters, halves of a pair, ends of lines and paragraphs


def fault_of(name: str) -> str | None:
    """What is wrong with a name, in words that follow it; None where nothing is.

    >>> fault_of("lits/7"), fault_of("a\\nb")
    (None, 'has a control character; rename it')
    """
    if any(unicodedata.category(character) in CONTROL for character in name):
        return "has a control character; rename it"
    if (length := len(name.encode())) > LONGEST:
        return f"is {length} bytes long, and {LONGEST} are the most; rename it"
    return None


def check_name(name: str, what: str) -> None:
    """Refuse a name with a fault.

    Args:
        name: the name.
        what: what it names and where, for the message.

    Raises:
        UserError: it has one.
    """
    if fault := fault_of(name):
        raise UserError(f"{what} {shown(name)} {fault}")


def plain(name: str) -> str:
    """A name for a message: as it is, or escaped and cut where it has a fault."""
    return shown(name) if fault_of(name) else name
