"""Damage in every file that a command reads: the same result or a refusal in one line, never another in silence.

A try changes some bytes of one file and reads it as the commands do. Tries of a format are done in one process, which
says how each ended; where it dies or is silent too long, that try is lost, and another process goes on.
"""

import dataclasses
import functools
import io
import os
import random
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from errors import UserError
from tests.campaign.commands import TRAINED
from tests.campaign.trying import AT_A_TIME, POLL, Try, side_by_side

SECONDS = 60  # after which a reader hangs
BLOCK = 64
AGAIN, SAID = "done again", "said to be changed"


def flip(content: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(content))
    return content[:place] + bytes([content[place] ^ (1 << chance.randrange(8))]) + content[place + 1 :]


def other_digit(content: bytes, chance: random.Random) -> bytes:
    places = [k for k, byte in enumerate(content) if byte in b"0123456789"]
    if not places:
        return flip(content, chance)
    place = chance.choice(places)
    digit = chance.choice([digit for digit in b"0123456789" if digit != content[place]])
    return content[:place] + bytes([digit]) + content[place + 1 :]


def cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content))]


def lose_the_beginning(content: bytes, chance: random.Random) -> bytes:
    return content[chance.randrange(1, len(content)) :]


def blank_a_block(content: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(content))
    return content[:place] + bytes(min(BLOCK, len(content) - place)) + content[place + BLOCK :]


def noise_in_a_block(content: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(content))
    return content[:place] + chance.randbytes(min(BLOCK, len(content) - place)) + content[place + BLOCK :]


def block_twice(content: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(content))
    return content[: place + BLOCK] + content[place:]


def block_of_elsewhere(content: bytes, chance: random.Random) -> bytes:
    source, place = (chance.randrange(len(content)) for _ in range(2))
    block = content[source : source + BLOCK][: len(content) - place]
    return content[:place] + block + content[place + len(block) :]


DAMAGES = (
    *(flip, flip, flip, other_digit, cut, lose_the_beginning),
    *(blank_a_block, noise_in_a_block, block_twice, block_of_elsewhere),
)


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        name: what the table calls it.
        files: the files that are damaged, in the folder of the tries.
        reader: function of that folder giving a function of nothing that reads it as the commands do: what comes of
            it, or a UserError.
        places: function of a file giving the ranges of bytes that may be damaged; None for all.
        unsure: what is said where the format has no checksum, so that another value cannot be found; None where each
            is lost.
        damages: kinds of damage.
    """

    name: str
    files: tuple[str, ...]
    reader: Callable[[Path], Callable[[], Any]]
    places: Callable[[Path], list[range]] | None = None
    unsure: str | None = None
    damages: tuple[Callable[[bytes, random.Random], bytes], ...] = DAMAGES


def damage(form: Format, home: Path, work: Path, seed: int, tries: int) -> Iterator[Try]:
    """Damage files of a format so many times, read them, and compare with what the whole ones give."""
    shares = [range(k, tries, AT_A_TIME) for k in range(AT_A_TIME)]
    yield from side_by_side(
        functools.partial(_share, form, home, work / str(k), seed, share) for k, share in enumerate(shares)
    )


def _share(form: Format, home: Path, folder: Path, seed: int, numbers: range) -> list[Try]:
    """The tries of these numbers, in processes of which each goes on where the one before died."""
    folder.mkdir(parents=True)
    for path in home.iterdir():
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, folder / path.name)
    done: list[Try] = []
    while len(done) < len(numbers):
        left = list(numbers)[len(done) :]
        ended, told = _in_a_process(form, folder, seed, left)
        done += told
        if len(told) < len(left):
            if not told and len(done) == 0 and ended.startswith("failed"):
                return [Try("all", "failed", ended)]
            done.append(Try(f"try {left[len(told)]}", "died", f"{form.name}, try {left[len(told)]}: {ended}"))
    return done


def _in_a_process(form: Format, folder: Path, seed: int, numbers: list[int]) -> tuple[str, list[Try]]:
    """How the process ended, and the tries that it did."""
    with tempfile.TemporaryFile() as told:
        child = os.fork()
        if child == 0:
            _do(form, folder, seed, numbers, told.fileno())
        ended = _wait(child, told.fileno())
        told.seek(0)
        lines = [line.decode().split("\t", 2) for line in told.read().splitlines()]
        return ended, [Try(how, outcome, lost or None) for how, outcome, lost in lines]


def _wait(child: int, told: int) -> str:
    size, changed = 0, time.monotonic()
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return f"ended by {signal.Signals(-code).name}" if code < 0 else f"failed with status {code}"
        if (now := os.fstat(told).st_size) != size:
            size, changed = now, time.monotonic()
        if time.monotonic() - changed > SECONDS:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "hangs"
        time.sleep(POLL)


def _do(form: Format, folder: Path, seed: int, numbers: list[int], told: int) -> None:
    """The process of some tries, which does not return."""
    try:
        os.fsync = lambda file: None  # nothing here is about power failures
        os.chdir(folder)
        with open(os.devnull, "w") as nowhere:
            for number in (1, 2):
                os.dup2(nowhere.fileno(), number)
        read = form.reader(folder)
        expected = read()
        assert _same(read(), expected)
        wholes = {name: (folder / name).read_bytes() for name in form.files}
        for number in numbers:
            done = _try(form, folder, wholes, random.Random(f"{seed} {form.name} {number}"), read, expected)
            line = "\t".join((f"{form.name}, try {number}", done.outcome, " ".join((done.lost or "").split())))
            os.write(told, f"{line}\n".encode())
        os._exit(0)
    except BaseException:
        os.write(told, f"{form.name}\tfailed\t{' '.join(traceback.format_exc().split())[-900:]}\n".encode())
        os._exit(1)


def _try(
    form: Format,
    folder: Path,
    wholes: dict[str, bytes],
    chance: random.Random,
    read: Callable[[], Any],
    expected: Any,
) -> Try:
    name = chance.choice(form.files)
    whole, kind = wholes[name], chance.choice(form.damages)
    if form.places is None:
        damaged = kind(whole, chance)
    else:
        part = chance.choice(form.places(folder / name))
        damaged = whole[: part.start] + kind(whole[part.start : part.stop], chance) + whole[part.stop :]
    if damaged == whole:
        return Try(name, "not changed")
    (folder / name).write_bytes(damaged)
    try:
        found = read()
    except UserError as error:
        return Try(name, "refused", None if str(error).count("\n") == 0 else f"{name}: more than a line: {error}")
    except BaseException:
        return Try(name, "traceback", f"{name}, {kind.__name__}: {traceback.format_exc()[-500:]}")
    finally:
        (folder / name).write_bytes(whole)
    if isinstance(found, str) and found in (AGAIN, SAID):
        return Try(name, found)
    if _same(found, expected):
        return Try(name, "the same")
    if form.unsure is not None:
        return Try(name, form.unsure)
    return Try(name, "another", f"{name}, {kind.__name__}: another result, in silence: {_told(found, expected)}")


def _told(found: Any, expected: Any) -> str:
    ours, theirs = repr(found), repr(expected)
    place = next((k for k, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), 0)
    return f"{ours[max(place - 60, 0) : place + 30]} rather than {theirs[max(place - 60, 0) : place + 30]}"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b


# ------------------------------------------------------------------------------------------------- what is read


def _checkpoint(folder: Path) -> Callable[[], Any]:
    from network import checkpoints, training

    run = folder / "weights" / TRAINED
    network = checkpoints.open_model(checkpoints.find_checkpoint(run), checkpoints.load_cascade_config(run))
    optimizer = training.adam(network)

    def read() -> list[np.ndarray]:
        prefix = checkpoints.find_checkpoint(run)
        checkpoints.fingerprint(prefix)
        checkpoints.restore(network, prefix, optimizer)
        return [np.array(value) for value in (*network.weights, *optimizer.variables)]

    return read


def _flags_of_a_run(folder: Path) -> Callable[[], Any]:
    from network import runs

    run = folder / "weights" / TRAINED
    return lambda: (runs.load_args(run), runs.load_cascade_config(run), runs.load_data(run))


def _data_set(folder: Path) -> Callable[[], Any]:
    from data_util.config import load_dataset_config
    from data_util.dataset import open_scheme
    from data_util.store import ScanStore

    def read() -> Any:
        with redirect_stderr(io.StringIO()) as said:
            config = load_dataset_config("datasets/p.json")
        if "was changed since it was written" in said.getvalue():
            return SAID
        store = ScanStore(config.files)
        scans = [dataclasses.astuple(store.read(scan, flow=True)) for scan in store.expand(["p/*"])]
        schemes = [open_scheme(config, name, False, store) for name in config.schemes]
        return [repr(config), [list(scheme) for scheme in schemes], scans]

    return read


def data_places(path: Path) -> list[range]:
    """Where the values of an HDF5 file's arrays are."""
    found = []

    def visit(_: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            for k in range(item.id.get_num_chunks() if item.chunks else 0):
                chunk = item.id.get_chunk_info(k)
                found.append(range(chunk.byte_offset, chunk.byte_offset + chunk.size))

    with h5py.File(path) as file:
        file.visititems(visit)
    return sorted(found, key=lambda part: part.start)


def other_places(path: Path) -> list[range]:
    """Where all else of an HDF5 file is."""
    ends = [0, *(place for part in data_places(path) for place in (part.start, part.stop)), path.stat().st_size]
    return [range(*ends[k : k + 2]) for k in range(0, len(ends), 2) if ends[k] < ends[k + 1]]


SHARDS = tuple(f"r.shard-{k}-of-2.records" for k in (1, 2))


def _merged(folder: Path) -> Callable[[], Any]:
    from data_util import report

    def read() -> list[bytes]:
        for path in folder.glob("base-*"):
            path.unlink()
        path = report.merge(SHARDS)
        return [Path(f"{path}{ending}").read_bytes() for ending in (".txt", ".csv", ".json")]

    return read


def _resumed(folder: Path) -> Callable[[], Any]:
    from data_util.output.records import Records, read_records

    settings, records = read_records(SHARDS[0])
    known = {record.index: record.to_dict() for record in records}

    def read() -> Any:
        with Records(Path(SHARDS[0]), settings, resume=True) as resumed:
            done = set(resumed.done)
        kept = {record.index: record.to_dict() for record in read_records(SHARDS[0])[1]}
        assert set(kept) == done
        return (
            known if all(known.get(index) == record for index, record in kept.items()) else kept
        )  # what was damaged is done again

    return read


def _finished(folder: Path) -> Callable[[], Any]:
    from data_util.output.records import read_records
    from data_util.output.report_files import check_replaceable, is_finished

    settings, _ = read_records(SHARDS[0])
    path = Path("evaluate") / settings.report

    def read() -> Any:
        if not is_finished(path, settings):
            check_replaceable(path, settings)
            return AGAIN
        return [Path(f"{path}{ending}").read_bytes() for ending in (".txt", ".csv", ".json")]

    return read


def _image(name: str) -> Callable[[Path], Callable[[], Any]]:
    def reader(folder: Path) -> Callable[[], Any]:
        from data_util.scans.images import read_image, to_array

        def read() -> Any:
            image = read_image(name)
            return [image.GetSpacing(), image.GetOrigin(), image.GetDirection(), to_array(image)]

        return read

    return reader


def _transform(folder: Path) -> Callable[[], Any]:
    from data_util.scans.transform_chain import parts
    from data_util.scans.transform_files import read_transform

    def read() -> Any:
        layers = parts(read_transform("transform.h5"))
        return [
            (part.GetName(), np.array(part.GetParameters()), np.array(part.GetFixedParameters())) for part in layers
        ]

    return read


RUN = f"weights/{TRAINED}"
REPORT = "evaluate/base-model-2-1"
NO_SUM = "another value; the format has no checksum"
FORMATS = {
    form.name: form
    for form in (
        Format("checkpoint .data", (f"{RUN}/model-2.data-00000-of-00001",), _checkpoint),
        Format("checkpoint .index", (f"{RUN}/model-2.index",), _checkpoint),
        Format("args.json and config.json of a run", (f"{RUN}/args.json", f"{RUN}/config.json"), _flags_of_a_run),
        Format("HDF5, values", ("datasets/p.h5",), _data_set, data_places),
        Format("HDF5, all else", ("datasets/p.h5",), _data_set, other_places),
        Format("JSON of a data set", ("datasets/p.json",), _data_set),
        Format("records, merged", SHARDS, _merged),
        Format("records, --resume", SHARDS[:1], _resumed),
        Format("report, --resume", tuple(f"{REPORT}{ending}" for ending in (".txt", ".csv", ".json")), _finished),
        Format("NIfTI .nii.gz", ("fixed.nii.gz",), _image("fixed.nii.gz")),
        Format("NIfTI .nii", ("fixed.nii",), _image("fixed.nii"), unsure=NO_SUM),
        Format("transform.h5", ("transform.h5",), _transform),
    )
}
