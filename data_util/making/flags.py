"""What the flags of `data_util.build` say: texts -> Recipe, subsets and atlas."""

import argparse
import re
from collections.abc import Sequence

import numpy as np

from data_util.making.alignment import Alignment
from data_util.making.labels import ALL_LABELS
from data_util.making.recipe import Recipe
from data_util.making.sources import Source
from data_util.making.splits import SUBSETS, split
from data_util.scans.view import PRESETS
from errors import UserError


def parse_recipe(args: argparse.Namespace) -> Recipe:
    """The recipe that the flags describe.

    Args:
        args: flags of `data_util.build`.

    Returns:
        The `Recipe`.

    Raises:
        UserError: a value is outside its range, or the flags do not go together.
    """
    if min(args.size) < 2:
        raise UserError(f"--size {' '.join(map(str, args.size))}: a volume needs at least 2 voxels along each axis")
    if args.spacing is not None and not (np.isfinite(args.spacing).all() and min(args.spacing) > 0):
        raise UserError(f"--spacing {' '.join(map(str, args.spacing))}: give three numbers of mm above 0")
    if args.crop == "liver" and args.modality != "ct":
        raise UserError("--crop liver looks for Hounsfield units and --modality is mr; take --crop body, mask or none")
    shown, percentiles = parse_window(args.window) if args.window else (None, None)
    if not args.window and args.modality == "ct":
        shown = PRESETS["liver" if args.crop == "liver" else "body"].window
    elif not args.window:
        percentiles = PRESETS["brain"].percentiles
    spacing = None if args.spacing is None else tuple(args.spacing)
    if args.align_kind and not args.align:
        raise UserError(f"--align_kind {args.align_kind}: name the template that scans are brought to with --align")
    labels = parse_labels(args.labels)
    align = Alignment.to(args.align, args.align_kind or "affine") if args.align else None
    return Recipe(tuple(args.size), spacing, args.crop, shown, percentiles, labels, args.points_space, align)


def joined_window(argv: Sequence[str]) -> list[str]:
    """Flags in which a value of --window that begins with a minus is not taken for a flag of its own.

    >>> joined_window(["scans", "--window", "-600,1500"])
    ['scans', '--window=-600,1500']
    """
    joined: list[str] = []
    for text in argv:
        if joined and joined[-1] == "--window" and re.match(r"-[0-9.]", text):
            joined[-1] = f"--window={text}"
        else:
            joined.append(str(text))
    return joined


def parse_window(text: str) -> tuple[tuple[float, float] | None, tuple[float, float] | None]:
    """The grey values that --window asks for.

    Args:
        text: 'LEVEL,WIDTH' or 'LOW%,HIGH%'.

    Returns:
        (level, width) and the percentiles (low, high); one of the two is None.

    Raises:
        UserError: it is neither.

    Example:
        >>> parse_window("40,400"), parse_window("1%,99%")
        (((40.0, 400.0), None), (None, (1.0, 99.0)))
    """
    first, _, second = text.replace(" ", "").partition(",")
    is_share = first.endswith("%") and second.endswith("%")
    try:
        values = float(first.rstrip("%")), float(second.rstrip("%"))
    except ValueError:
        values = (np.nan, np.nan)
    good = 0 <= values[0] < values[1] <= 100 if is_share else np.isfinite(values).all() and values[1] > 0
    if not good or ("%" in text and not is_share):
        raise UserError(f"--window {text}: give LEVEL,WIDTH as 40,400, or percentiles LOW%,HIGH% as 1%,99%")
    return (None, values) if is_share else (values, None)


def parse_labels(text: str | None) -> dict[str, list[int]] | str | None:
    """The labels that --labels asks for, as `Recipe.labels` has them.

    Args:
        text: 'NAME=VALUE,NAME=VALUE+VALUE'; 'all' and None are kept as they are.

    Returns:
        Values of each name, which become one label.

    Raises:
        UserError: it is none of these, or a name or a value is there twice.

    Example:
        >>> parse_labels("liver=5+6,spleen=1")
        {'liver': [5, 6], 'spleen': [1]}
    """
    if text in (None, ALL_LABELS):
        return text
    labels: dict[str, list[int]] = {}
    used: set[int] = set()
    for entry in text.split(","):
        name, _, values = (part.strip() for part in entry.partition("="))
        parts = [value.strip() for value in values.split("+")]
        if not name or not all(part.isdecimal() and 0 < int(part) < 65536 for part in parts):
            raise UserError(f"--labels {text}: write NAME=VALUE,NAME=VALUE+VALUE with values from 1 to 65535, or 'all'")
        merged = [int(part) for part in parts]
        if name in labels or used & set(merged) or len(set(merged)) < len(merged):
            raise UserError(f"--labels {text}: '{entry.strip()}' repeats a name or a value; each may be there once")
        labels[name] = merged
        used |= set(merged)
    return labels


def plan(sources: list[Source], shares: str, seed: int, pairs: str) -> tuple[dict[str, list[str]], str | None]:
    """The subsets and the atlas that the flags describe.

    Args:
        sources: the scans.
        shares: text of --split, 'TRAIN/VAL/TEST'.
        seed: of the split.
        pairs: text of --pairs: 'all', 'paired' or 'atlas=ID'.

    Returns:
        The ids of each subset, and the atlas' id or None.

    Raises:
        UserError: a flag is malformed, the atlas is not there, or as `split` says.
    """
    try:
        numbers = [float(share) for share in shares.split("/")]
    except ValueError:
        numbers = []
    if len(numbers) != len(SUBSETS) or not all(np.isfinite(n) and n >= 0 for n in numbers):
        raise UserError(f"--split {shares}: give the shares of training/validation/test, as 0.8/0.1/0.1")
    pairing, is_atlas, atlas = pairs.partition("=")
    if not (pairs in ("all", "paired") or (pairing == "atlas" and atlas)):
        raise UserError(f"--pairs {pairs}: give all, paired or atlas=ID")
    if is_atlas and atlas not in [source.id for source in sources]:
        raise UserError(f"--pairs {pairs}: there is no scan '{atlas}'; the first is '{sources[0].id}'")
    return split(sources, numbers, seed, pairing, atlas or None), atlas or None
