"""The layout of a task of the Learn2Reg challenge: its images, labels, landmarks, masks and pairs.

A task is a folder with a description, `dataset.json` or `NAME_dataset.json`, and what this names by relative paths:

    imagesTr/OASIS_0438_0000.nii.gz     an image: name, number of the subject, number of the modality
    labelsTr/OASIS_0438_0000.nii.gz     labels of the same name, on the image's grid
    masksTr/OASIS_0438_0000.nii.gz      a mask likewise, 1 where the Jacobian is looked at
    keypointsTr/OASIS_0438_0000.csv     landmarks (also landmarksTr, keypoints01Tr ..): rows x,y,z in voxels, no header;
                                        those of two images of a pair correspond row by row

Of the description these keys are read; others are passed over:

    name                    the task's name
    modality                {"0": "CT", ..}: number of the modality -> name
    labels                  {"1": "liver", ..}, or such a table for each modality: {"0": {"1": "liver", ..}, ..}
    training, test          [{"image": PATH, "label": PATH, "keypoints": PATH, "mask": PATH}, ..], or [PATH, ..]; an
                            image whose labels, mask or landmarks are not named has those of its name, if they are there
    training_paired_images  [{"fixed": PATH, "moving": PATH}, ..], the pairs to train on; empty: every two images
    registration_val        such pairs for validation; `pairs` and the file `pairs_val.csv` (columns fixed and moving,
                            numbers of subjects) are older ways to give them
    registration_test       such pairs of the test; also `test_paired_images`

The tasks of 2021 lack most keys but `training` and `test`, and write `tensorImageSize` as "4D", those since 2022 as
{"0": "3D"} with `tensorImageShape` beside it. The shape is taken from the images themselves.
"""

import csv
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from data_util.scans.nibabel_formats import DAMAGE
from errors import UserError, listed

SUBSETS = ("train", "val", "test")
PAIR_KEYS = {
    "train": ("training_paired_images",),
    "val": ("registration_val", "pairs"),
    "test": ("registration_test", "test_paired_images"),
}
PAIRS_FILE = "pairs_val.csv"
LANDMARK_WORDS = ("keypoints", "landmarks")
ENDING = ".nii.gz"
NUMBERS = re.compile(r"(\d{4})(?:_(\d{4}))?$")  # of the subject and of the modality, at the end of a name
Pair = tuple[str, str]


@dataclass(frozen=True)
class Case:
    """An image of a task and what belongs to it.

    Attributes:
        id: name of the image file without its ending.
        image: the image file.
        label: label image, or None.
        mask: mask, or None.
        landmarks: kind, such as "keypoints" or "keypoints01" -> table of landmarks.
    """

    id: str
    image: Path
    label: Path | None = None
    mask: Path | None = None
    landmarks: dict[str, Path] = field(default_factory=dict)

    @property
    def numbers(self) -> tuple[str, str | None]:
        """The four digits of the subject, and those of the modality or None.

        Raises:
            UserError: the name does not end in them.
        """
        found = NUMBERS.search(self.id)
        if found is None:
            raise UserError(
                f"{self.image}: its name does not end in the four digits of a subject, as OASIS_0438_0000.nii.gz does; "
                "name it as the challenge does"
            )
        return found[1], found[2]


@dataclass(frozen=True)
class Task:
    """A task of the challenge.

    Attributes:
        path: its description.
        name: its name.
        cases: id -> image, of all that the description names.
        training: ids of the images to train on.
        pairs: subset, one of `SUBSETS` -> its pairs, (fixed id, moving id).
        labels: name -> value, without the background; empty where the description does not tell.
        modalities: names of the modalities.
    """

    path: Path
    name: str
    cases: dict[str, Case]
    training: tuple[str, ...]
    pairs: dict[str, tuple[Pair, ...]]
    labels: dict[str, int]
    modalities: tuple[str, ...]

    def pairs_of(self, subset: str) -> tuple[Pair, ...]:
        """The pairs of a subset.

        Raises:
            UserError: there are none.
        """
        if not self.pairs[subset]:
            have = listed([name for name in SUBSETS if self.pairs[name]]) or "none"
            keys = " or ".join(PAIR_KEYS[subset])
            raise UserError(
                f"{self.path}: has no pairs of the subset '{subset}' (key {keys}); subsets with pairs: {have}"
            )
        return self.pairs[subset]

    def field_names(self, pair: Pair) -> list[str]:
        """How the file of a pair's displacement field may be called, without its ending; the short name first.

        `disp_0438_0439` is the name of the challenge's first years and `disp_0438_0000_0439_0000` that since 2023. A
        short name is left out where two pairs of a subset would share it.

        Raises:
            UserError: an image's name has no number.
        """
        (fixed, channel), (moving, other) = (self.cases[scan].numbers for scan in pair)
        short = f"disp_{fixed}_{moving}"
        subset = next(pairs for pairs in self.pairs.values() if pair in pairs)
        alike = [p for p in dict.fromkeys(subset) if [self.cases[scan].numbers[0] for scan in p] == [fixed, moving]]
        names = [short] if len(alike) == 1 else []
        return names if channel is None or other is None else [*names, f"disp_{fixed}_{channel}_{moving}_{other}"]


@dataclass(frozen=True, eq=False)
class Grid:
    """The grid of an image as its header says.

    Attributes:
        shape: voxels along the axes i, j, k of the file.
        spacing: float64 [3], mm per voxel along them.
        affine: float64 [4, 4], NIfTI's map from voxels to mm.
    """

    shape: tuple[int, ...]
    spacing: np.ndarray
    affine: np.ndarray


def read_grid(path: Path) -> Grid:
    """Read the grid of an image.

    Raises:
        UserError: it is not there, or no NIfTI image.
    """
    try:
        image: Any = nibabel.load(path)
        zooms = np.array(image.header.get_zooms()[:3], np.float64)
        return Grid(tuple(image.shape), zooms, np.asarray(image.affine, np.float64))
    except FileNotFoundError:
        raise UserError(f"{path}: no such image; get the task's files again, or mend its dataset.json") from None
    except DAMAGE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: cannot be read as a NIfTI image ({reason}); copy it again") from error


def read_task(path: str | Path) -> Task:
    """Read the description of a task.

    Args:
        path: the task's folder, or the description itself.

    Returns:
        The task; its image files are not looked at.

    Raises:
        UserError: there is no description, or it is not as the text above says; a pair names an image that is neither
            listed nor there.
    """
    path = _description(Path(path))
    raw = _read_json(path)
    cases: dict[str, Case] = {}
    listed_ids = {key: _add_cases(cases, raw.get(key, []), path, key) for key in ("training", "test")}
    pairs = {subset: _read_pairs(cases, raw, path, subset) for subset in SUBSETS}
    if not pairs["val"]:
        pairs["val"] = _pairs_of_table(cases, path.parent / PAIRS_FILE)
    later = {scan for subset in ("val", "test") for pair in pairs[subset] for scan in pair}
    modality = raw.get("modality")
    return Task(
        path=path,
        name=str(raw.get("name") or path.parent.resolve().name),
        cases=cases,
        training=tuple(scan for scan in listed_ids["training"] if scan not in later),
        pairs=pairs,
        labels=_labels(raw.get("labels"), path),
        modalities=tuple(map(str, modality.values())) if isinstance(modality, dict) else (),
    )


def _description(path: Path) -> Path:
    if path.is_file():
        return path
    found = sorted(path.glob("*dataset.json")) if path.is_dir() else []
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{path}: has {listed([file.name for file in found])}; give the path of one of them")
    what = "has no dataset.json or NAME_dataset.json" if path.is_dir() else "no such folder or file"
    raise UserError(f"{path}: {what}; give the folder of a Learn2Reg task")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); get the task's description again") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("training", []), list):
        raise UserError(f"{path}: is no description of a Learn2Reg task, an object with a list 'training'")
    return raw


def _add_cases(cases: dict[str, Case], entries: Any, path: Path, key: str) -> list[str]:
    """Add the images of a list to the cases; return their ids."""
    if not isinstance(entries, list):
        raise UserError(f"{path}: '{key}' must be a list of images, not {json.dumps(entries)[:60]}")
    return list(
        dict.fromkeys(_add_case(cases, entry, path, f"{key}, entry {k + 1}") for k, entry in enumerate(entries))
    )


def _add_case(cases: dict[str, Case], entry: Any, path: Path, where: str) -> str:
    """Add an image to the cases, with what belongs to it; return its id."""
    parts = {"image": entry} if isinstance(entry, str) else entry
    if not isinstance(parts, dict) or not isinstance(parts.get("image"), str):
        raise UserError(f"{path}: {where} is {json.dumps(entry)[:60]}; write {{'image': PATH}}")
    image = path.parent / parts["image"]
    if not image.name.endswith(ENDING):
        raise UserError(f"{path}: {where} names {parts['image']!r}; the challenge's images end in {ENDING}")
    scan_id = image.name.removesuffix(ENDING)
    if scan_id in cases and cases[scan_id].image != image:
        raise UserError(f"{path}: {cases[scan_id].image} and {image} have the same name; rename one")
    if scan_id in cases:
        return scan_id
    found = {
        name: path.parent / value
        for name, value in parts.items()
        if isinstance(value, str) and name.startswith(("label", "mask", *LANDMARK_WORDS)) and name != "labels"
    }
    landmarks = {name: _table_of(file) for name, file in found.items() if name.startswith(LANDMARK_WORDS)}
    beside = {word: _table_of(_sibling(image, word)) for word in LANDMARK_WORDS if word not in landmarks}
    cases[scan_id] = Case(
        id=scan_id,
        image=image,
        label=_existing(found.get("label"), _sibling(image, "labels")),
        mask=_existing(found.get("mask"), _sibling(image, "masks")),
        landmarks={
            name: file
            for name, file in (landmarks or beside).items()
            if file.is_file()  # some descriptions name files that are not given out
        },
    )
    return scan_id


def _sibling(image: Path, folder: str) -> Path:
    """The file of an image's name in another folder: imagesTr -> labelsTr."""
    return image.parent.parent / image.parent.name.replace("images", folder) / image.name


def _table_of(path: Path) -> Path:
    """A table's path; some descriptions give it the ending of an image."""
    return path.with_name(path.name.removesuffix(ENDING) + ".csv") if path.name.endswith(ENDING) else path


def _existing(*paths: Path | None) -> Path | None:
    return next((path for path in paths if path is not None and path.is_file()), None)


def _read_pairs(cases: dict[str, Case], raw: dict[str, Any], path: Path, subset: str) -> tuple[Pair, ...]:
    """The pairs of a subset, of the first of its keys that has any."""
    key = next((key for key in PAIR_KEYS[subset] if raw.get(key)), None)
    if key is None:
        return ()
    if not isinstance(raw[key], list):
        raise UserError(f"{path}: '{key}' must be a list of pairs, not {json.dumps(raw[key])[:60]}")
    pairs = []
    for k, entry in enumerate(raw[key]):
        where = f"{key}, entry {k + 1}"
        sides = [entry.get(side) for side in ("fixed", "moving")] if isinstance(entry, dict) else []
        names = [side for side in sides if isinstance(side, str)]
        if len(names) < 2:
            raise UserError(f"{path}: {where} is {json.dumps(entry)[:60]}; write {{'fixed': PATH, 'moving': PATH}}")
        fixed, moving = (_known_case(cases, side, path, where) for side in names)
        pairs.append((fixed, moving))
    return tuple(dict.fromkeys(pairs))


def _known_case(cases: dict[str, Case], image: str, path: Path, where: str) -> str:
    """The id of an image that a pair names; one that no list names is added where its file is there."""
    scan_id = Path(image).name.removesuffix(ENDING)
    if scan_id not in cases:
        if not (path.parent / image).is_file():
            raise UserError(f"{path}: {where} names {image!r}, which is neither listed nor there; mend the pair")
        _add_case(cases, image, path, where)
    return scan_id


def _pairs_of_table(cases: dict[str, Case], path: Path) -> tuple[Pair, ...]:
    """The pairs of a table of subjects' numbers, as tasks of 2021 have it; none where it is not there."""
    if not path.is_file():
        return ()
    subjects: dict[int, list[str]] = {}
    for case in sorted(cases.values(), key=lambda case: case.id):
        if found := NUMBERS.search(case.id):
            subjects.setdefault(int(found[1]), []).append(case.id)
    pairs = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file):
            sides = [str(row.get(side) or "").strip() for side in ("fixed", "moving")]
            lost = [side for side in sides if not side.isdecimal() or int(side) not in subjects]
            if lost:
                raise UserError(f"{path}: a pair names the subject {lost[0]!r}, of which there is no image")
            fixed, moving = (subjects[int(side)] for side in sides)
            pairs.append((fixed[0], moving[-1 if fixed is moving else 0]))  # of one subject: its two images
    return tuple(dict.fromkeys(pairs))


def _labels(raw: Any, path: Path) -> dict[str, int]:
    """Name -> value of the labels, those of all modalities together, without the background."""
    if not isinstance(raw, dict):
        return {}
    tables = [table for table in raw.values() if isinstance(table, dict)] or [raw]
    labels: dict[str, int] = {}
    for value, name in (entry for table in tables for entry in table.items()):
        if not str(value).isdecimal() or not isinstance(name, str):
            raise UserError(f'{path}: \'labels\' has {json.dumps({value: name})}; write {{"1": "liver"}}')
        unique = name if labels.get(name, int(value)) == int(value) else f"{name} {value}"
        labels |= {unique: int(value)} if int(value) else {}
    return labels
