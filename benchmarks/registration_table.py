"""The records of benchmarks.registration as Markdown."""

import statistics
from collections.abc import Callable, Iterable
from typing import Any

FOUND = 10.0  # mm
QUIET = 0.1  # cores that other processes kept busy meanwhile, at most, for a wall time to be told
HEAD = """# Two scans registered without a network

{count} registrations, each in a process of its own on two cores, from the two scans as files: `here` is
`register(fixed, moving)` with nothing else said, which compares by `lncc`, or by `mi` where one scan is a CT; SyN and
SyNQuick are antspyx {ants} (`SyN`, `antsRegistrationSyNQuick[s]`, with its own affine start); the last is SimpleITK's
affine map by Mattes' mutual information and diffeomorphic demons.

- **Dice**: the mean over the labels, on the fixed scan's voxels, of the moving scan's labels read once by nearest
  voxel.
- **mm**: the mean error over what the fixed scan shows, in mm of the moving scan. For the MNI template and Colin, both
  of which lie in the MNI space, it is the distance from the map that leaves them there, from which two heads differ by
  a few mm; for two people scanned elsewhere nobody knows it.
- **found**: that is less than {found:g} mm.
- **folded**: the share of voxels of 2 mm where the map turns space over.
- **s**: wall and CPU time of the registration alone, without the start of Python and its imports; for `here` its
  stages. Wall times, and those of the stages, are told only where other processes kept no more than {quiet:g} cores
  busy meanwhile (**others**; empty where that was not measured); CPU times grow a little on a busy machine, too.

`starter` is the model `weights/starter-brain` after an affine map, `starter, N steps` with so many steps of refinement,
`starter, repeated` with each cascade applied twice; these, and `here, 60 steps` in place of as many as help, are run
where `--only` asks for them. That model was trained on the MNI brain, but not on Colin.

Regions are 24 parts of the cortex on both sides that AAL (drawn on Colin) and Harvard-Oxford (MNI152 space) both have;
the two draw them by other rules, so that a perfect registration stays well below 1. Tissues of Colin are three means
of grey values (k-means), those of MNI its maps. A turn is about the scan's middle, a shift goes to the left, front and
head. What is "at 3 mm" was smoothed and resampled to that first (`--spacing 3`); its labels were not.

    python -m benchmarks.registration --nilearn DATA --mricron TEMPLATES --ants PYTHON --report docs/registration.md
"""

Record = dict[str, Any]


def report(records: list[Record]) -> str:
    """A summary by pair and method, then one row for each start and method."""
    versions = {r["version"] for r in records if r["method"].startswith("SyN") and "version" in r}
    head = HEAD.format(count=len(records), ants=", ".join(sorted(versions)) or "(not run)", found=FOUND, quiet=QUIET)
    parts = [head, "## Summary\n", summary(records)]
    for pair in dict.fromkeys(record["pair"] for record in records):
        parts += [f"## {pair}\n", rows([record for record in records if record["pair"] == pair])]
    return "\n".join(parts)


def table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A table of Markdown."""
    titles = list(head)
    return "\n".join(f"| {' | '.join(line)} |" for line in (titles, ["---"] * len(titles), *lines)) + "\n"


def summary(records: list[Record]) -> str:
    """Medians over the starts that all methods of a pair have on record, so that they are of the same starts."""
    lines = []
    for pair in dict.fromkeys(record["pair"] for record in records):
        of_pair = [record for record in records if record["pair"] == pair]
        methods = dict.fromkeys(record["method"] for record in of_pair)
        common = set.intersection(*({r["start"] for r in of_pair if r["method"] == method} for method in methods))
        same = [record for record in of_pair if record["start"] in common]
        for method in methods:
            lines.append(_summary_line(pair, method, same))
    return table(["pair", "method", "starts", "found", "Dice", "mm", "folded", "s", "CPU s", "SyN's s", "CPU"], lines)


def _summary_line(pair: str, method: str, same: list[Record]) -> list[str]:
    mine = [record for record in same if record["method"] == method]
    good = [record for record in mine if "failed" not in record]
    known = [record for record in mine if "failed" in record or record["after"]["mm"] is not None]
    hits = sum(is_found(record) is True for record in known)
    share = f"{hits} of {len(known)}" if any("after" in record for record in known) else ""
    sets = dict.fromkeys(name for record in good for name in record["after"] if name != "mm")
    dice = ", ".join(f"{name} {median(good, lambda r, name=name: r['after'][name]):.3f}" for name in sets)
    errors = [record for record in good if record["after"]["mm"] is not None]
    return [
        *(pair, method, str(len(mine)), share, dice),
        f"{median(errors, lambda r: r['after']['mm']):.2f}" if errors else "",
        f"{100 * median(good, lambda r: r['folding']):.3f} %" if good else "",
        *_times(good, [record for record in same if record["method"] == "SyN" and "failed" not in record]),
    ]


def _times(mine: list[Record], others: list[Record]) -> list[str]:
    """Median wall and CPU time, and their shares of those of other records; empty where they tell nothing."""
    found, shares = [], []
    for of in ("wall", "cpu"):
        own, their = ([r["seconds"][of] for r in records if of == "cpu" or _is_quiet(r)] for records in (mine, others))
        found.append(f"{statistics.median(own):.0f}" if own else "")
        shares.append(f"{statistics.median(own) / statistics.median(their):.2f}x" if own and their else "")
    return [*found, *shares]


def _is_quiet(record: Record) -> bool:
    return record["others"] is not None and record["others"] <= QUIET


def median(records: list[Record], value: Callable[[Record], float]) -> float:
    """Median of a number over records."""
    return statistics.median(value(record) for record in records)


def is_found(record: Record) -> bool | None:
    """Whether a start was found, or None where nobody knows."""
    if "failed" in record:
        return False
    return None if record["after"]["mm"] is None else record["after"]["mm"] < FOUND


def rows(records: list[Record]) -> str:
    """One row for each start and method of a pair."""
    sets = list(dict.fromkeys(name for record in records for name in record["before"] if name != "mm"))
    head = [
        "start",
        "method",
        *(f"Dice, {name}" for name in sets),
        "mm",
        "found",
        "folded",
        "s",
        "CPU s",
        "others",
        "stages, s",
    ]
    return table(head, (_row(record, sets) for record in records))


def _row(record: Record, sets: list[str]) -> list[str]:
    others = "" if record["others"] is None else f"{record['others']:.1f}"
    first, before = [record["start"], record["method"]], record["before"]
    if "failed" in record:
        return [
            *first,
            *[""] * len(sets),
            "",
            "no",
            "",
            "",
            "",
            others,
            f"failed: {record['failed']}",
        ]
    after = record["after"]
    error = "" if after["mm"] is None else f"{before['mm']:.1f} -> {after['mm']:.2f}"
    stages = ", ".join(f"{name} {value:.1f}" for name, value in record.get("stages", {}).items() if value >= 0.05)
    wall = f"{record['seconds']['wall']:.1f}"
    return [
        *first,
        *(f"{before[name]:.3f} -> {after[name]:.3f}" for name in sets),
        *(error, {True: "yes", False: "no", None: ""}[is_found(record)], f"{100 * record['folding']:.3f} %"),
        *(wall if _is_quiet(record) else "", f"{record['seconds']['cpu']:.1f}", others),
        stages if _is_quiet(record) else "",
    ]
