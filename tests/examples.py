"""The examples of docs/extending.md."""

import pathlib
import re

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "extending.md"


def example(heading):
    """The plugin of a section."""
    section = re.split(r"^## ", PAGE.read_text(), flags=re.M)
    (text,) = [part for part in section if part.startswith(heading)]
    (code,) = re.findall(r"```python\n(# mine\.py\n.*?)```", text, flags=re.S)
    return code
