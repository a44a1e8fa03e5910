"""How a folder of scans looks: which file is a scan, which are the labels and the landmarks of it, and what is left.

    SCANS/images/     p1.nii.gz, p2.nrrd, p3.mhd and p3.raw, p4/ (DICOM slices, there or further down, or one file)
    SCANS/labels/     p1.nii.gz, ...   label images, on whatever grid, by place in the patient
    SCANS/points/     p1.csv, ...      landmarks

The name up to its ending is a scan's id. `imagesTr`, `labelsTr` and `landmarksTr`, as of nnU-Net, the Medical Decathlon
and Learn2Reg, mean the same; an image's ending `_0000` is its channel there. A folder without either holds scans and,
where a name says so (`volume-1`, `segmentation-1`), their labels. Hidden files are no part of a folder; every other one
that is not used is named in a remark.
"""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from data_util.scans.images import ENDINGS as IMAGE_ENDINGS
from errors import UserError, listed

POINT_ENDINGS = (".csv", ".tsv", ".txt")
DICOM_ENDINGS = (".dcm", ".dicom", ".ima")
LAYOUTS = (("images", "labels", "points"), ("imagestr", "labelstr", "landmarkstr"))
# Words of a file's name. Of `FAINT_WORDS` a scan's name may consist as well, unless it is another one's with the word.
IMAGE_WORDS = ("volume", "vol", "image", "img", "orig")
LABEL_WORDS = ("seg", "segm", "segmentation", "segmentations", "label", "labels", "mask", "masks")
FAINT_WORDS = ("gt", "lbl", "roi")
LONGEST_HEADER = 65536  # bytes; the voxels may follow in the same file
CHANNEL = re.compile(r"(.+)_([0-9]{4})")
DATA_FILE = re.compile(r"^(?:ElementDataFile\s*=|data ?file:)\s*(\S.*?)\s*$", re.IGNORECASE | re.MULTILINE)


@dataclass
class Listing:
    """What is in a folder of scans.

    Attributes:
        images: id -> file, or folder of DICOM slices.
        labels: id -> label image, of some of the images.
        points: id -> table of landmarks, of some of the images.
        problems: id -> why the scan cannot be made, of some of the images.
        remarks: what the user should know: files that are passed over, and how others were matched.
    """

    images: dict[str, Path] = field(default_factory=dict)
    labels: dict[str, Path] = field(default_factory=dict)
    points: dict[str, Path] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def list_folder(scans: Path) -> Listing:
    """List the scans of a folder.

    Args:
        scans: the folder.

    Returns:
        Its `Listing`.

    Raises:
        UserError: two files would be one scan, or labels or landmarks belong to no image.
    """
    listing = Listing()
    folders = {path.name.lower(): path for path in sorted(scans.iterdir()) if path.is_dir()}
    layout = next((names for names in LAYOUTS if names[0] in folders), None)
    images = scans if layout is None else folders[layout[0]]
    listing.images = _entries(images, IMAGE_ENDINGS, listing, has_folders=True)
    labels: dict[str, Path] = {}
    if layout is not None:
        used = {folders.get(name) for name in layout}
        labels = _entries(folders[layout[1]], IMAGE_ENDINGS, listing) if layout[1] in folders else {}
        points = _entries(folders[layout[2]], POINT_ENDINGS, listing) if layout[2] in folders else {}
        _read_description(scans / "dataset.json", listing)
        _pass_over(scans, [p for p in _visible(scans) if p not in used and p.name != "dataset.json"], listing)
        _drop_channels(listing, labels, images, is_channel=layout[0] == "imagestr")
        listing.points = _match(points, listing.images, images)
    among_images = {name: listing.images.pop(name) for name in _label_names(listing.images, labels)}
    listing.labels = _match_labels(labels, among_images, listing, images)
    _find_files_of_folders(listing)
    return listing


def data_files(path: Path) -> list[Path]:
    """The files that hold the voxels of an image whose own file is a header: those of .mhd, .nhdr and .hdr.

    Args:
        path: an image file.

    Returns:
        The files that are there; none for an image that is one file.
    """
    ending = path.suffix.lower()
    if ending == ".hdr":
        stem = path.name[: -len(ending)]
        names = [f"{stem}.img", f"{stem}.img.gz", f"{stem}.IMG"]
    elif ending in (".mhd", ".nhdr"):
        try:
            with path.open("rb") as file:
                names = DATA_FILE.findall(file.read(LONGEST_HEADER).decode("latin-1"))
        except OSError:
            names = []
    else:
        return []
    return [path.parent / name for name in names if (path.parent / name).is_file()]


def _visible(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]


def _entries(folder: Path, endings: Iterable[str], listing: Listing, has_folders: bool = False) -> dict[str, Path]:
    """Files with one of the endings, and folders where wanted, id -> path; the others are remarked on."""
    entries: dict[str, Path] = {}
    others = []
    for path in _visible(folder):
        ending = next((e for e in sorted(endings, key=len, reverse=True) if path.name.lower().endswith(e)), None)
        is_folder = path.is_dir() or (ending is None and not path.suffix and _leads_nowhere(path))
        if not (has_folders if is_folder else ending):
            others.append(path)
            continue
        name = path.name if is_folder else path.name[: -len(ending or "")]
        if name in entries:
            raise UserError(f"{path} and {entries[name]}: both would get the id '{name}'; rename one")
        entries[name] = path
    data = {file for path in entries.values() for file in data_files(path)}
    _pass_over(folder, [path for path in others if path not in data], listing, endings)
    return {name: path for name, path in entries.items() if path not in {file.parent for file in data}}


def _pass_over(folder: Path, paths: list[Path], listing: Listing, endings: Iterable[str] = ()) -> None:
    """Remark on what in a folder is not used."""
    if not paths:
        return
    names = [path.name + "/" * path.is_dir() for path in paths]
    what = f"{len(names)} file{'s' * (len(names) > 1)} or folder{'s' * (len(names) > 1)} passed over"
    known = f"; the endings known here are {', '.join(endings)}" if endings else ""
    if any(path.is_file() and _is_dicom(path) for path in paths):
        known = "; DICOM slices belong into a folder of their own for each scan"
    listing.remarks.append(f"{folder}: {what}: {listed(names)}{known}")


def _leads_nowhere(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


# ------------------------------------------------------------------------------------------------------- names


def _key(name: str) -> str:
    """What is left of an id without the words that say whether it is an image or its labels."""
    words = "|".join((*IMAGE_WORDS, *LABEL_WORDS, *FAINT_WORDS))
    rest = re.sub(rf"(?<![a-z])({words})(?![a-z])", "", name.lower())
    return re.sub(r"[-_. ]+", "-", rest).strip("-")


def _words(name: str) -> set[str]:
    return set(re.findall("[a-z]+", name.lower()))


def _label_names(images: dict[str, Path], labels: dict[str, Path]) -> list[str]:
    """The ids among the images that are labels, by their names; not those that have labels of their own."""
    candidates = [name for name in images if name not in labels]
    certain = [name for name in candidates if _words(name) & set(LABEL_WORDS)]
    keys = {_key(name) for name in images if not _words(name) & {*LABEL_WORDS, *FAINT_WORDS}}
    faint = [n for n in candidates if n not in certain and _words(n) & set(FAINT_WORDS) and _key(n) in keys]
    return certain + faint


def _match(files: dict[str, Path], images: dict[str, Path], folder: Path) -> dict[str, Path]:
    """The files of images, by the images' ids; a file's own may have the channel 0000."""
    matched: dict[str, Path] = {}
    for name, path in files.items():
        image = name if name in images else name.removesuffix("_0000")
        if image not in images:
            raise UserError(f"{path}: there is no image '{name}' in {folder}; name it as its image is named")
        if image in matched:
            raise UserError(f"{path} and {matched[image]}: both belong to '{image}'; keep one")
        matched[image] = path
    return matched


def _match_labels(
    labels: dict[str, Path], among_images: dict[str, Path], listing: Listing, folder: Path
) -> dict[str, Path]:
    """The label images by their images' ids, where need be by what their names have in common."""
    ids: dict[str, list[str]] = {}
    for name in listing.images:
        ids.setdefault(_key(name), []).append(name)
    alike: dict[str, Path] = {}
    exact = {n: p for n, p in labels.items() if n in listing.images or n.removesuffix("_0000") in listing.images}
    matched = _match(exact, listing.images, folder)
    for name, path in ((n, p) for n, p in (labels | among_images).items() if n not in exact):
        candidates = ids.get(_key(name), [])
        if len(candidates) != 1:
            looks = "looks like labels, not like a scan, and " if name in among_images else ""
            found = f"{' and '.join(candidates)} could be its image" if candidates else f"there is no image '{name}'"
            raise UserError(
                f"{path}: {looks}{found} in {folder}; name labels as their image is named and put them into labels/ "
                "beside images/, or list the files in a CSV"
            )
        (image,) = candidates
        if image in matched:
            raise UserError(f"{path} and {matched[image]}: both would be the labels of '{image}'; keep one")
        matched[image] = alike[image] = path
    if alike:
        image, path = next(iter(alike.items()))
        count = f"{len(alike)} label image{'s' * (len(alike) > 1)}"
        listing.remarks.append(f"{folder}: {count} found by name, such as {path.name} for {listing.images[image].name}")
    return matched


# ------------------------------------------------------------------------------------- nnU-Net, Learn2Reg, Decathlon


def _drop_channels(listing: Listing, labels: dict[str, Path], folder: Path, is_channel: bool) -> None:
    """Name images without the channel that their names end in, and remark on channels other than 0000.

    Where `is_channel` is False, the four digits at the end of a name are a channel only if the labels lack them.
    """
    parts = {name: match.groups() for name in listing.images if (match := CHANNEL.fullmatch(name))}
    stems = {stem for stem, _ in parts.values()}
    has_first = all(f"{stem}_0000" in listing.images for stem in stems)
    numbered = any(name in labels and channel != "0000" for name, (_, channel) in parts.items())
    if not stems or len(parts) < len(listing.images) or not has_first or numbered:
        return
    if not is_channel and not any(stem in labels for stem in stems):
        return
    others = [listing.images[name] for name, (_, channel) in parts.items() if channel != "0000"]
    listing.images = {stem: listing.images[f"{stem}_0000"] for stem in sorted(stems)}
    if others:
        names = listed([path.name for path in others])
        listing.remarks.append(f"{folder}: of each scan only channel 0000 is taken; passed over are {names}")


def _read_description(path: Path, listing: Listing) -> None:
    """Remark on the labels that nnU-Net's description of a data set names."""
    try:
        labels = json.loads(path.read_text(encoding="utf-8-sig"))["labels"]
        pairs = [(a, b) if isinstance(b, int) else (b, int(a)) for a, b in labels.items()]
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        listing.remarks.append(f"{path}: passed over, as no table of labels can be read from it")
        return
    named = ",".join(f"{str(name).replace(' ', '_')}={value}" for name, value in pairs if value > 0)
    if named:
        listing.remarks.append(f"{path}: names the labels; to keep them all by these names give --labels {named}")


# ----------------------------------------------------------------------------------------------- links and folders


def _find_files_of_folders(listing: Listing) -> None:
    """Find what each scan that is a folder consists of, and the scans that cannot be read, each with its reason."""
    single = []
    for name, path in listing.images.items():
        files = [path, *(files[name] for files in (listing.labels, listing.points) if name in files)]
        lost = next((file for file in files if _leads_nowhere(file)), None)
        try:
            if lost:
                target = os.readlink(lost)
                raise UserError(f"{lost}: is a link to {target}, which is not there; mend or remove the link")
            listing.images[name], label = scan_in(path, listing.remarks)
        except UserError as error:
            listing.problems[name] = str(error)
            continue
        if label is not None:
            listing.labels.setdefault(name, label)
        if path.is_dir() and listing.images[name].is_file():
            image = listing.images[name].relative_to(path.parent)
            single.append(f"{image}" + (f" with {label.name}" if label else ""))
    if single:
        listing.remarks.append(f"folders that hold one image file each, taken as scans: {listed(single, 2)}")


def scan_in(path: Path, remarks: list[str]) -> tuple[Path, Path | None]:
    """Find what a scan consists of that is given as a folder.

    Args:
        path: the folder; a file is kept as it is.
        remarks: gets a remark where slices are passed over.

    Returns:
        The folder that holds the DICOM slices, the given one or the only one further down; or else the only image
        file there. And the label image beside that file, or None.

    Raises:
        UserError: it could be several scans.
    """
    if not path.is_dir():
        return path, None
    series, files = _folders_of_slices(path)
    inner = listed([str(folder.relative_to(path)) for folder in series if folder != path])
    if path in series:
        if len(series) > 1:
            remarks.append(f"{path}: slices further down are passed over: {inner}")
        return path, None
    if len(series) > 1:
        raise UserError(
            f"{path}: has DICOM slices in {len(series)} folders, {inner}; which is the scan is not known: keep one, or "
            "name it in a CSV"
        )
    if series or not files:
        return (series or [path])[0], None  # where no file looks like DICOM, reading it says what is the matter
    labels = [file for file in files if _words(file.name) & {*LABEL_WORDS, *FAINT_WORDS}]
    images = [file for file in files if file not in labels]
    if len(images) != 1 or len(labels) > 1:
        names = listed([str(file.relative_to(path)) for file in files])
        raise UserError(
            f"{path}: holds {names}; which is the scan is not known: put one file per scan into {path.parent}, or name "
            "them in a CSV"
        )
    return images[0], labels[0] if labels else None


def _folders_of_slices(top: Path) -> tuple[list[Path], list[Path]]:
    """The folders with DICOM slices in and below a folder, and the other image files there."""
    series, images, visited = [], [], set()
    for root, folders, files in os.walk(top, followlinks=True):
        visited.add(os.path.realpath(root))
        folders[:] = sorted(n for n in folders if os.path.realpath(Path(root, n)) not in visited and n[0] != ".")
        shown = [Path(root, name) for name in sorted(files) if name[0] != "."]
        images += [path for path in shown if path.name.lower().endswith(IMAGE_ENDINGS)]
        if any(map(_is_dicom, shown)):
            series.append(Path(root))
    return series, images


def _is_dicom(path: Path) -> bool:
    """Whether a file is a DICOM slice, by its ending or its first bytes."""
    if path.name.upper() == "DICOMDIR":
        return False
    if path.suffix.lower() in DICOM_ENDINGS:
        return True
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False
