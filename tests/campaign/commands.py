"""The commands of the campaigns, small enough to be run hundreds of times, and what their results hold."""

import importlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pydicom
import SimpleITK as sitk

import cli
from data_util.making.anatomy import make_phantom
from data_util.phantoms import write_dataset
from files import PARTIAL
from network import runs

TRAINED = "base"  # the run that is evaluated
NAMED = "work"  # the run that is trained in a try
LAST_STEP = 4
TRAIN = (
    *("-d", "datasets/p.json", "-b", "VoxelMorph", "-n", "1", "--batch", "1", "--round", "2", "--net_args"),
    *("channels=2", "-g", "-1", "--val_steps", "2", "--val_pairs", "1"),
)
# Files that grow line by line, and what a build is going on from.
LOGS = re.compile(r"(^|/)(log\.csv|validation\.csv|events\.[^/]*|[^/]*\.records|\.lock)$|\.parts/|^logs/")
# What differs from one run to the next, however equal they are.
VOLATILE = {"seconds", "sum", "files", "written", "time"}


@dataclass(frozen=True)
class Command:
    """A command with its flags, in a working folder of its own.

    Attributes:
        name: what the table calls it.
        module: the module whose `main` it is.
        flags: its arguments.
        inputs: names in the home folder that it reads, linked into its working folder.
        again: function of the working folder giving the arguments of the run after a kill; None for the same.
        folders: folders that appear whole or not at all.
        is_slow: whether it computes with TensorFlow.
    """

    name: str
    module: str
    flags: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    again: Callable[[Path], tuple[str, ...]] | None = None
    folders: tuple[str, ...] = ()
    is_slow: bool = False

    def run(self, flags: tuple[str, ...] | None = None) -> Callable[[], int]:
        """The command as a function that returns its exit status."""
        main = importlib.import_module(self.module).main
        return lambda: cli.run(main, list(self.flags if flags is None else flags))

    def run_again(self, place: Path) -> Callable[[], int]:
        """The command as it is given after a kill, for what lies in its working folder."""
        return self.run(None if self.again is None else self.again(place))

    def prepare(self, home: Path, place: Path, old: Path | None = None) -> Path:
        """Make its working folder, with what `old` holds; return it."""
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(old, place, symlinks=True) if old else place.mkdir(parents=True)
        for name in self.inputs:
            target = place / name
            if not target.is_symlink():
                target.symlink_to((home / name).resolve())
        return place


def to_go_on(place: Path) -> tuple[str, ...]:
    """Arguments of train.py for a run that was killed: -c where it has a checkpoint, else the same command."""
    begun = [run for run in (place / "weights").glob(f"*_{NAMED}*") if run.is_dir()]
    with redirect_stderr(io.StringIO()):
        for run in begun:
            runs.remove_leftovers(run)  # as -c does
    saved = [run for run in begun if runs.list_steps(run)]
    source = max(saved, key=lambda run: runs.list_steps(run)[-1], default=None)
    common = ("--epochs", "2", "--name", NAMED)
    if source is None:
        return (*TRAIN, *common)
    return ("-c", f"weights/{source.name}", "-g", "-1", "--val_steps", "2", "--val_pairs", "1", *common)


REGISTRATION = ("--preprocess", "none", "-g", "-1", "--overwrite")
EVALUATION = ("-c", TRAINED, "-g", "-1", "--batch", "2", "--metrics", "overlap", "--save", "flow,warped")


def all_commands(home: Path) -> dict[str, Command]:
    """The commands that are disturbed, by name; `home` is the folder of what they read."""
    scans = {"inputs": ("fixed.nii.gz", "moving.nii.gz"), "folders": ("out",), "is_slow": True}
    shards = tuple(f"r.shard-{k}-of-2.records" for k in (1, 2))
    size = ("--size", "16", "16", "16")
    register = ("fixed.nii.gz", "moving.nii.gz", "-o", "out", "--refine", "2", "--affine", "none", *size)
    demo = ("-c", TRAINED, "-f", "fixed.nii.gz", "-m", "moving.nii.gz", "-o", "out")
    # A build knows its scans by their paths, whatever the working folder is.
    build = (str(home / "scans"), "-o", "sets/mine", "--size", "8", "8", "8", "--split", "1/0/0")
    train = (*TRAIN, "--epochs", "2", "--name", NAMED)
    resume = (*EVALUATION, "--resume")
    found = [
        Command("train", "train", train, ("datasets",), to_go_on, is_slow=True),
        Command("eval", "eval", EVALUATION, ("datasets", "weights"), lambda place: resume, is_slow=True),
        Command("merge", "data_util.report", ("merge", *shards), shards),
        Command("build", "data_util.build", build),
        Command("register", "register", (*register, *REGISTRATION), **scans),
        Command("demo", "demo", (*demo, *REGISTRATION), **{**scans, "inputs": (*scans["inputs"], "weights")}),
    ]
    return {command.name: command for command in found}


def make_home(home: Path) -> None:
    """Make what the commands read: phantoms, scans to register and to build of, records of two shards."""
    (home / "datasets").mkdir(parents=True)
    here = Path.cwd()
    os.chdir(home)
    try:
        write_dataset("datasets/p", (16, 16, 16), 3, 1, 0)
    finally:
        os.chdir(here)
    for k, name in enumerate(("fixed", "moving")):
        image = sitk.GetImageFromArray(make_phantom((24, 24, 24), [7, k]).volume)
        image.SetSpacing((8.0, 8.0, 8.0))
        for ending in (".nii.gz", ".nii"):
            sitk.WriteImage(image, str(home / f"{name}{ending}"))
    (home / "scans" / "images").mkdir(parents=True)
    for k in range(2):
        array = np.random.default_rng(k).integers(-100, 200, (6, 7, 8)).astype(np.int16)
        sitk.WriteImage(sitk.GetImageFromArray(array), str(home / f"scans/images/p{k}.nii"))


def content(folder: Path) -> dict[str, bytes]:
    """All files of a folder that have their final names: path -> bytes; the name of a run is `NAMED`."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and not path.is_symlink() and PARTIAL not in name:
            found[re.sub(rf"weights/[^/]*_{NAMED}/", f"weights/{NAMED}/", name)] = path.read_bytes()
    return found


def finals(found: Mapping[str, bytes]) -> dict[str, bytes]:
    """Those files of `content` that appear whole or not at all."""
    return {name: data for name, data in found.items() if not LOGS.search(name)}


def difference(folder: Path, whole: Path) -> str | None:
    """What of the results in a working folder is not as in that of an undisturbed run; None where all is."""
    ours, theirs = (_results(place) for place in (folder, whole))
    if set(ours) != set(theirs):
        return f"files {sorted(set(ours) ^ set(theirs))} are missing or too many"
    return next((f"{name} is another" for name in theirs if ours[name] != theirs[name]), None)


def _results(folder: Path) -> dict[str, Any]:
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and not path.is_symlink() and not LOGS.search(name):
            run = re.match(rf"weights/[^/]*_{NAMED}/(.*)", name)
            if run is None:
                found[name] = _essence(path)
            elif run[1].startswith(f"model-{LAST_STEP}."):  # whatever run it is in that went on
                found[run[1]] = _essence(path)
            elif PARTIAL in name:
                found[name] = None
    return found


def _essence(path: Path) -> Any:
    """What a file tells, without the times that it took."""
    if path.suffix == ".json":
        return _without_times(json.loads(path.read_text()))
    if path.suffix == ".h5":
        return _arrays(path)
    if path.suffix == ".dcm":  # whose ids and times are new in each
        image = pydicom.dcmread(path)
        return image.PixelData, image.InstanceNumber, list(image.ImagePositionPatient)
    return path.stat().st_size > 0 if path.suffix == ".html" else path.read_bytes()


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_times(inner) for name, inner in value.items() if name not in VOLATILE}
    return [_without_times(inner) for inner in value] if isinstance(value, list) else value


def _arrays(path: Path) -> dict[str, Any]:
    found = {}

    def visit(name: str, item: Any) -> None:
        data = None
        if isinstance(item, h5py.Dataset):  # of texts, the bytes would be their places in memory
            values = item[...].tolist() if item.dtype == object else item[...].tobytes()
            data = item.dtype.str, item.shape, values
        found[name] = data, {key: np.asarray(value).tolist() for key, value in item.attrs.items()}

    with h5py.File(path) as file:
        file.visititems(visit)
    return found


def import_all() -> None:
    """Import all that commands import when they run, so that forked processes need not; TensorFlow starts in these.

    The affine cascade gets few channels: its checkpoints have 1 MB rather than 170.
    """
    import start

    start.tensorflow()
    for name in (
        *("train", "eval", "demo", "register", "registration", "network.training", "network.evaluation"),
        *("network.callbacks", "network.curves", "data_util.dataset", "data_util.output.figures"),
        *("data_util.output.records", "data_util.output.registration_files", "data_util.build", "data_util.report"),
        *("data_util.output.report_files", "data_util.output.registration_figures", "scipy.ndimage"),
    ):
        importlib.import_module(name)
    from network.blocks import Encoder

    Encoder.LAYERS = {name: (1, stride) for name, (_, stride) in Encoder.LAYERS.items()}
