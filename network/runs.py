"""Run folders: which run and step a `-c` argument means, and what the run says of itself. Imports no TensorFlow.

A run is a folder with `model-<step>.index` and `model-<step>.data-*` in TensorFlow's format, and `config.json`
(`CascadeConfig`) or, in a published folder, the original's `args.json`.
"""

import contextlib
import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Annotated, Any

import files
from checked import COUNT, INDEX, NOT_NEGATIVE, POSITIVE, SHARE, build, read_json
from checksums import SUM, is_changed, sealed
from errors import UserError
from published import PAGES, where_to_get

from .config import CascadeConfig
from .registry import BASE_NETWORKS, SIMILARITIES, names_in_sum

CONFIG_FILE = "config.json"
ARGS_FILE = "args.json"
BEST_FILE = "best.json"
SHIPPED = pathlib.Path(__file__).resolve().parents[1] / "weights"  # models that come with the program
BEST = "best"  # in place of a step
BEST_PREFIX = "best/"  # of what a checkpoint keeps of the validations before it
# What config.json holds beside the options of `CascadeConfig`: the data that the run was trained on, its plugin, and a
# checksum, as args.json does; without one, as in files of users and of older versions, each is read as it is.
RUN_KEYS = ("data", "plugin", SUM)
_REMEDY = "mend it, or restore the file from its source"
_INDEX = re.compile(r"model-(\d+)\.index$")
_FILE = re.compile(r"model-(\d+)(\.index|\.data-\d+-of-\d+)?")


@dataclasses.dataclass(frozen=True)
class RunArgs:
    """What is read of a run's args.json: flags of train.py, of this one or the original's.

    A flag that the file does not have is the original's default; `dataset` and what the network is are None.
    """

    base_network: str | None = None
    n_cascades: int | None = None
    net_args: str | None = None
    rep: Annotated[int, COUNT] = 1
    dataset: str | None = None
    batch: Annotated[int, COUNT] = 4
    round: Annotated[int, COUNT] = 20000
    epochs: Annotated[float, POSITIVE] = 5.0
    data_args: str | None = ""
    lr: Annotated[float, POSITIVE] = 1e-4
    precision: str = "float32"
    seed: Annotated[int, INDEX] = 0
    finetune: str | None = None
    checkpoint: str | None = None
    best: str | None = None
    patience: Annotated[int, INDEX] = 0
    ema: Annotated[float, SHARE] = 0.0
    clip: Annotated[float, NOT_NEGATIVE] = 0.0


@dataclasses.dataclass(frozen=True)
class Best:
    """What a run's best.json says: which checkpoint is its best by validation.

    Attributes:
        step: of the checkpoint.
        metric, value: what was measured.
        run: the folder with the checkpoint, seen from the run's own: '.', or that of a run which this one goes on
            from and has not bettered.
    """

    step: Annotated[int, INDEX]
    metric: str
    value: float
    run: str = "."


@dataclasses.dataclass(frozen=True)
class _Beside:
    """What config.json holds beside the options of the network: `RUN_KEYS`."""

    data: Mapping[str, Any] | None = None
    plugin: str | None = None


def find_run(text: str | pathlib.Path, root: str | pathlib.Path = "weights") -> tuple[pathlib.Path, int | None]:
    """Folder and step that a `-c` argument means.

    Args:
        text: 'FOLDER', 'FOLDER:STEP', 'FOLDER:best', the name of a run in `root` or of a model that comes with the
            program, with or without these, or a file of a checkpoint: 'FOLDER/model-STEP', with '.index' or
            '.data-...' behind it or not.
        root: folder of runs.

    Returns:
        (pathlib.Path, step or None).

    Raises:
        UserError: there is no such folder, STEP is not a number, or the run has no best checkpoint.
    """
    text = str(text)
    name, colon, number = text.rpartition(":")
    step = None if not colon or pathlib.Path(text).is_dir() else number
    if step is None:
        name = text
    elif step != BEST and not re.fullmatch("[0-9]{1,18}", step):
        raise UserError(f"checkpoint {text!r}: {step!r} is not a step; write FOLDER, FOLDER:STEP or FOLDER:{BEST}")
    folder = _existing(name, root)
    if folder is not None and step == BEST:
        return _find_best(folder)
    if folder is not None:
        return folder, None if step is None else int(step)
    file = _FILE.fullmatch(pathlib.Path(name).name)
    if file and step is None:
        folder = _existing(str(pathlib.Path(name).parent), root)
        if folder is not None and int(file[1]) in list_steps(folder):
            return folder, int(file[1])
    if (published := pathlib.Path(name).name) in PAGES:
        raise UserError(f"the published model {name!r} is not here: {where_to_get(published, str(root))}")
    known = sorted({p.name for there in (pathlib.Path(root), SHIPPED) for p in there.glob("[!.]*") if p.is_dir()})
    hint = f"; runs there: {', '.join(known)}" if known else ""
    raise UserError(
        f"checkpoint folder {name!r} does not exist, here or in {root}/{hint}; for published ones see weights/README.md"
    )


def _existing(name: str, root: str | pathlib.Path) -> pathlib.Path | None:
    folders = (pathlib.Path(name), pathlib.Path(root) / name, SHIPPED / name)
    return next((folder for folder in folders if folder.is_dir()), None)


def _find_best(folder: pathlib.Path) -> tuple[pathlib.Path, int]:
    """Folder and step of a run's best checkpoint."""
    best = load_best(folder)
    if best is None:
        raise UserError(f"{folder} has no best checkpoint, as it was trained without --best; leave :{BEST} out")
    where = best_folder(folder, best)
    if not where.is_dir() or best.step not in list_steps(where):
        raise UserError(f"{folder / BEST_FILE} names {where}/model-{best.step}, which is not there; leave :{BEST} out")
    return where, best.step


def load_best(folder: str | pathlib.Path) -> Best | None:
    """What the `best.json` of a run says; None where there is none.

    Raises:
        UserError: the file is not JSON, or a value is not of its kind.
    """
    path = pathlib.Path(folder) / BEST_FILE
    return build(Best, _read_json(path), str(path), _REMEDY) if path.is_file() else None


def best_folder(folder: str | pathlib.Path, best: Best) -> pathlib.Path:
    """The folder with the best checkpoint of the run in `folder`."""
    return pathlib.Path(os.path.normpath(pathlib.Path(folder) / best.run))


def save_best(folder: str | pathlib.Path, best: Best) -> None:
    """Write the `best.json` of a run, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    files.write_text(pathlib.Path(folder) / BEST_FILE, sealed(dataclasses.asdict(best), indent=2))


def list_steps(folder: str | pathlib.Path) -> list[int]:
    """Steps of the checkpoints in a run folder, ascending."""
    return sorted(int(m.group(1)) for m in map(_INDEX.match, os.listdir(folder)) if m)


def find_step(folder: str | pathlib.Path, step: int | None = None) -> int:
    """The newest step in a run folder, or the one nearest to `step` (the earlier of two equally near).

    Raises:
        UserError: the folder holds no checkpoint.
    """
    steps = list_steps(folder)
    if not steps:
        raise UserError(f"{folder} holds no checkpoint {_why_none(pathlib.Path(folder))}")
    return steps[-1] if step is None else min(steps, key=lambda s: abs(s - step))


def _why_none(folder: pathlib.Path) -> str:
    """Why a run has no checkpoint, and what to do."""
    if not (folder / ARGS_FILE).is_file():
        return "(no file model-<step>.index); unzip or train a model there"
    source = load_args(folder).checkpoint
    instead = f"use the run that it goes on from, -c {source}" if source else "start that run again"
    return f"yet: the run was stopped before its first one, or has only just started; {instead}"


def remove_leftovers(folder: pathlib.Path) -> None:
    """Remove what a killed save left in a run's folder, and say so.

    A save gives the .data file its name first: an index that is left without it is given its own name now, which
    makes a whole checkpoint of both.
    """
    for partial in files.leftovers(folder):
        for index in partial.glob("model-*.index"):
            if not any(partial.glob(f"{index.stem}.data-*")) and any(folder.glob(f"{index.stem}.data-*")):
                with contextlib.suppress(OSError):  # a folder that may only be read
                    files.publish(index, folder / index.name)
    files.remove_leftovers(folder)


def load_args(folder: str | pathlib.Path) -> RunArgs:
    """The flags in the `args.json` of a run; the defaults where there is none.

    Raises:
        UserError: the file is not JSON, or a value is not of its kind.
    """
    path = pathlib.Path(folder) / ARGS_FILE
    return build(RunArgs, _read_json(path), str(path), _REMEDY) if path.is_file() else RunArgs()


def load_cascade_config(folder: str | pathlib.Path) -> CascadeConfig:
    """`CascadeConfig` of a run folder: its config.json, or a published run's args.json (then at 128^3).

    Raises:
        UserError: neither file is there, or one is not valid.
    """
    folder = pathlib.Path(folder)
    source = folder / CONFIG_FILE
    if source.is_file():
        values, _ = _read_config(source)
        options = {name: value for name, value in values.items() if name not in RUN_KEYS}
        _check_registered(values, source)
        return CascadeConfig.from_dict(options, source)
    source = folder / ARGS_FILE
    if not source.is_file():
        raise UserError(f"{folder} has neither {CONFIG_FILE} nor {ARGS_FILE}, so its architecture is unknown")
    args = load_args(folder)
    network = {name: getattr(args, name) for name in ("base_network", "n_cascades")}
    missing = [name for name, value in network.items() if value is None]
    if missing:
        raise UserError(f"{source} lacks {missing[0]!r}, so the architecture is unknown")
    config = CascadeConfig.from_dict(network, source)
    try:
        return config.with_net_args(args.net_args)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def load_data(folder: str | pathlib.Path) -> dict[str, Any] | None:
    """What a run's config.json says of the volumes that the network was trained on: a dict, or None.

    Raises:
        UserError: the file is not JSON, or not of that kind.
    """
    source = pathlib.Path(folder) / CONFIG_FILE
    data = _read_config(source)[1].data if source.is_file() else None
    return None if data is None else dict(data)


def _check_registered(values: dict[str, Any], source: pathlib.Path) -> None:
    """Raise a UserError that names the run's plugin, where a name of its config is not in the tables.

    A plugin is never loaded because a checkpoint asks for it: it is a program, and a checkpoint may come from anybody.
    """
    plugin = values.get("plugin")
    for table in (BASE_NETWORKS, SIMILARITIES):
        value = values.get(table.kind)
        if plugin is None or not isinstance(value, str):
            continue
        for name in [value] if table is BASE_NETWORKS else names_in_sum(value):
            if name not in table:
                raise UserError(
                    f"{source}: {table.kind} is {name!r}, which is not built in: the run was made with a plugin; "
                    f"give it again, as --plugin {plugin}"
                )


def find_checkpoint(text: str | pathlib.Path, root: str | pathlib.Path = "weights") -> pathlib.Path:
    """Path without endings, FOLDER/model-<step>, of the checkpoint that a `-c` argument means.

    What a killed save left in its folder is removed.

    Raises:
        UserError: as `find_run` and `find_step`.
    """
    folder, step = find_run(text, root)
    remove_leftovers(folder)
    return checkpoint_prefix(folder, find_step(folder, step))


def checkpoint_prefix(folder: str | pathlib.Path, step: int) -> pathlib.Path:
    """Path of a checkpoint without its endings: FOLDER/model-<step>."""
    return pathlib.Path(folder) / f"model-{step}"


def _read_config(path: pathlib.Path) -> tuple[dict[str, Any], _Beside]:
    """What a config.json holds, and the part of it that is not the network's."""
    values = _read_json(path)
    return values, build(_Beside, values, str(path), _REMEDY)


def _read_json(path: pathlib.Path) -> Any:
    """The content of a run's JSON file; raises UserError where it cannot be read, or its checksum is another."""
    content = read_json(path, _REMEDY)
    if is_changed(path.read_bytes(), content):
        raise UserError(
            f"{path}: was changed since it was written; where you did that, delete its {SUM!r}; else {_REMEDY}"
        )
    return content


def new_run(
    folder: pathlib.Path, stem: str, suffix: str, content: Mapping[str, Mapping[str, Any]], logs: pathlib.Path
) -> pathlib.Path:
    """Make folder/<stem><suffix>, or <stem>_1<suffix>, <stem>_2<suffix>, ... where that is there already.

    It appears with its files.

    Args:
        folder: folder of runs, made where it is not there.
        stem, suffix: the two parts of its name.
        content: the JSON files to write into it: name -> content.
        logs: folder that the run's curves will be written to, made where it is not there.

    Returns:
        The new folder.

    Raises:
        UserError: a folder or file cannot be written; no folder of a run is left behind then.
    """
    with files.writing(folder):
        folder.mkdir(exist_ok=True)
        with files.partial_folder(folder) as partial:
            new = partial / "run"
            new.mkdir()
            for name, values in content.items():
                (new / name).write_text(sealed(values, indent=2), encoding="utf-8")
            with files.writing(logs):
                logs.mkdir(parents=True, exist_ok=True)
            run = _new_folder(folder, stem, suffix)
            try:
                files.publish(new, run)
            except BaseException:
                run.rmdir()
                raise
    return run


def _new_folder(folder: pathlib.Path, stem: str, suffix: str) -> pathlib.Path:
    """A folder that was not there: two runs that start at once never share one."""
    attempt = 0
    while True:
        run = folder / f"{stem}{f'_{attempt}' if attempt else ''}{suffix}"
        try:
            run.mkdir()
            return run
        except FileExistsError:
            attempt += 1
