"""Fixtures of the whole suite. Importing `network` first sets the variables that TensorFlow reads at its start."""

import sys
from pathlib import Path

import network  # noqa: F401

GOLDEN = Path(__file__).parent / "golden"
# The golden folder's scripts import `rule` from beside them.
sys.path.insert(0, str(GOLDEN))
