"""Show that nothing of a user's work is lost or wrong in silence: kills, power failures, full disks and damaged files.

    python -m tests.campaign [--quick] [--seed N] [NAME ...]

Each try disturbs a command, looks at what it left, gives the command again and compares with a run that nobody
disturbed. At the end a table is printed; the exit status is 1 where anything was lost. What is promised, and the table
of a whole run: docs/reliability.md.
"""

import argparse
import dataclasses
import functools
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import network  # noqa: F401  It sets the variables that TensorFlow reads at its start.
from tests.campaign import commands, crashes, damage, full_disk
from tests.campaign.commands import NAMED, TRAIN, TRAINED, Command, all_commands
from tests.campaign.trying import Try, call

# Commands that replace a result: flags of the older one, and of the one that replaces it.
OLDER = {"register": (("--refine", "3"), ()), "build": (("--size", "6", "6", "6"), ("--overwrite",))}
MEMORY = "/dev/shm"  # a file system in memory
SHOWN = 5  # tries that were lost, of each campaign


@dataclass(frozen=True)
class Sizes:
    """How much is tried: of slow commands, of quick ones, and of damages to each format."""

    slow_reruns: int = 4
    reruns: int = 60
    slow_levels: int = 4
    levels: int = 8
    kills: int = 8
    damages: int = 500


QUICK = Sizes(slow_reruns=1, reruns=5, slow_levels=1, levels=2, kills=1, damages=40)


def campaigns(home: Path, work: Path, seed: int, sizes: Sizes) -> dict[str, Callable[[], Iterator[Try]]]:
    """All campaigns: name -> function that does them."""
    found: dict[str, Callable[[], Iterator[Try]]] = {}

    def add(name: str, function: Callable[..., Iterator[Try]], *arguments: object) -> None:
        found[name] = functools.partial(function, *arguments)

    for name, command in all_commands(home).items():
        reruns, levels = (sizes.slow_reruns, sizes.slow_levels) if command.is_slow else (sizes.reruns, sizes.levels)
        place, chance = work / name, random.Random(f"{seed} {name}")
        add(f"crash {name}", crashes.crashes, command, home, place / "crash", chance, reruns)
        if name in OLDER:
            add(f"crash {name}, an older result there", _over_old, command, home, place / "over", chance, reruns)
        if name in ("train", "eval"):
            add(f"kill {name}", crashes.kills, command, home, place / "kill", chance, sizes.kills)
        add(f"full {name}", full_disk.full_disk, command, home, place / "full", chance, levels)
    for name, form in damage.FORMATS.items():
        add(f"damage {name}", damage.damage, form, home, work / "damage" / name.replace("/", "-"), seed, sizes.damages)
    return found


def _over_old(command: Command, home: Path, work: Path, chance: random.Random, reruns: int) -> Iterator[Try]:
    """The crashes of a command that replaces a result of other flags."""
    older, newer = (dataclasses.replace(command, flags=(*command.flags, *more)) for more in OLDER[command.name])
    yield from crashes.crashes(newer, home, work, chance, reruns, crashes.undisturbed(older, home, work / "old"))


def prepare(home: Path) -> None:
    """Make all that the commands read, and one result of each that others read."""
    commands.make_home(home)
    known = all_commands(home)
    _succeed(known["train"].run((*TRAIN, "--epochs", "1", "--name", NAMED)), home)
    (trained,) = (home / "weights").iterdir()
    trained.rename(home / "weights" / TRAINED)
    evaluation = known["eval"].flags
    for k in (1, 2):
        _succeed(known["eval"].run((*evaluation, "-v", "1", "--shard", f"{k}/2")), home)
        (home / f"evaluate/base-model-2-1.shard-{k}-of-2.records").rename(home / f"r.shard-{k}-of-2.records")
    _succeed(known["merge"].run(), home)
    for path in home.glob("base-model-2-1.*"):
        path.rename(home / "evaluate" / path.name)
    _succeed(known["register"].run(), home)
    (home / "out" / "transform.h5").rename(home / "transform.h5")
    shutil.rmtree(home / "out")
    shutil.rmtree(home / "logs", ignore_errors=True)


def _succeed(command: Callable[[], int], home: Path) -> None:
    ended = call(command, home)
    if ended.status != 0:
        raise RuntimeError(ended.output)


def row(name: str, tries: list[Try]) -> str:
    """The line of a campaign in the table; what nobody can notice has neither survived nor is it counted as lost."""
    lost = sum(one.lost is not None for one in tries)
    what = ", ".join(f"{count} {outcome}" for outcome, count in Counter(one.outcome for one in tries).most_common())
    unnoticed = sum(one.outcome == damage.NO_SUM for one in tries)
    return f"| {name} | {len(tries)} | {len(tries) - lost - unnoticed} | {lost} | {what} |"


def main() -> int:
    """Do the campaigns asked for and print the table; the status is 1 where anything was lost."""
    flags = argparse.ArgumentParser(
        prog="python -m tests.campaign", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("names", nargs="*", metavar="NAME", help="campaigns, by the beginning of their names (all)")
    flags.add_argument("--quick", action="store_true", help="few tries of each")
    flags.add_argument("--seed", type=int, default=0, help="another seed, other moments and damages (0)")
    flags.add_argument("--keep", type=Path, default=None, help="folder that keeps what was made (none)")
    args = flags.parse_args()
    commands.import_all()
    quick_disk = MEMORY if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 2**32 else None
    folder = Path(tempfile.mkdtemp(prefix="campaign-", dir=quick_disk)) if args.keep is None else args.keep.resolve()
    table, lost = [], 0
    try:
        prepare(folder / "home")
        known = campaigns(folder / "home", folder / "work", args.seed, QUICK if args.quick else Sizes())
        chosen = [name for name in known if not args.names or name.startswith(tuple(args.names))]
        if not chosen:
            flags.error(f"no such campaign; known are {', '.join(known)}")
        for name in chosen:
            started, tries = time.monotonic(), []
            for one in known[name]():
                tries.append(one)
                if one.lost is not None and sum(other.lost is not None for other in tries) <= SHOWN:
                    print(f"  LOST: {one.how}: {one.lost}", flush=True)
            table.append(row(name, tries))
            lost += sum(one.lost is not None for one in tries)
            print(f"{table[-1]} {time.monotonic() - started:.0f} s", flush=True)
    finally:
        if args.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    print("\n".join(("", "| campaign | tried | survived | lost | what |", "| --- | --- | --- | --- | --- |", *table)))
    print(f"\nseed {args.seed}: {'nothing was lost' if not lost else f'{lost} tries were lost'}")
    return int(lost > 0)


if __name__ == "__main__":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    sys.exit(main())
