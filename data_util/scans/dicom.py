"""DICOM series: list those of a folder, and read one with the right grey values at the right places.

A series is read slice by slice, in files of one slice or of many (enhanced DICOM), and put together by the slices'
places, not by their numbers or file names. Grey values are the stored numbers with each slice's own slope and
intercept, also where dark is meant to be drawn bright (MONOCHROME1). What does not make one volume is refused.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from pydicom.dataset import Dataset

from data_util.scans.dicom_slices import DicomFile, Slice, image_header, place_count, slices_of, text_of
from errors import UserError

SERIES_DESCRIPTION, MODALITY = "0008|103e", "0008|0060"
STUDY_UID, FRAME_UID = "0020|000d", "0020|0052"
# What a derived series keeps of its source: name, id, birth date and sex; study, date, time and description; accession
# number, modality, patient position, and the frame of reference of its coordinates.
SOURCE_TAGS = (
    "0010|0010",
    "0010|0020",
    "0010|0030",
    "0010|0040",
    STUDY_UID,
    "0020|0010",
    "0008|0020",
    "0008|0030",
    "0008|1030",
    "0008|0050",
    MODALITY,
    "0018|5100",
    FRAME_UID,
    SERIES_DESCRIPTION,
)
SAME_DIRECTION = 1e-3  # largest difference of parts of unit vectors
SAME_SPACING = 1e-3  # relative
UNEVEN = 0.1  # of the distance between slices
MISSING = 1.5  # distances between slices; a slice is missing where there is a longer one
ROUNDED_PLACE = 0.06  # mm; some scanners write places to a tenth of a millimetre
LEAST_STEP = 0.01  # mm; slices that lie closer are at one place
APPLE_DOUBLE = "._"  # files that a Mac leaves beside each file on a foreign disk begin with it
NOT_SCANS = ("SEG", "RTDOSE")  # modalities whose series are read only where they are named or alone
AIR, MOST_HU = -1000, 32767  # HU


@dataclass(frozen=True)
class Series:
    """A DICOM series in a folder.

    Attributes:
        folder: where it was looked for.
        id: its series instance UID; may be empty.
        description: what its author called it.
        files: paths of its files.
        slices: how many there are in all files.
        modality: such as CT.
    """

    folder: Path
    id: str
    description: str
    files: tuple[Path, ...]
    slices: int
    modality: str

    def __str__(self) -> str:
        return f"{self.id or '(no id)'} {self.description!r} with {self.slices} slices"


def list_series(folder: str | Path) -> list[Series]:
    """List the DICOM series of a folder and the folders in it, that with most slices first.

    Args:
        folder: the folder. Files in it that are not DICOM images are passed over.

    Returns:
        The series.

    Raises:
        UserError: there is none, or a link leads nowhere: a slice may be missing.
    """
    folder = Path(folder)
    headers: dict[str, list[tuple[Path, Dataset]]] = {}
    for path in _files(folder):
        if (header := image_header(path)) is not None:
            headers.setdefault(text_of(header, "SeriesInstanceUID"), []).append((path, header))
    if not headers:
        raise UserError(f"{folder}: no DICOM slices in this folder; give the folder that holds them, or an image file")
    found = [
        Series(
            folder,
            name,
            text_of(members[0][1], "SeriesDescription"),
            tuple(path for path, _ in members),
            sum(place_count(header) for _, header in members),
            text_of(members[0][1], "Modality"),
        )
        for name, members in headers.items()
    ]
    return sorted(found, key=lambda series: (series.modality in NOT_SCANS, -series.slices))


def _files(folder: Path) -> Iterator[Path]:
    """The files in a folder and its subfolders, linked ones too, in order."""
    visited = set()
    for name, subfolders, files in os.walk(folder, followlinks=True):
        place = os.path.realpath(name)
        if place in visited:  # a link that leads back
            subfolders.clear()
            continue
        visited.add(place)
        subfolders.sort()
        for path in (Path(name, file) for file in sorted(files) if not file.startswith(APPLE_DOUBLE)):
            if path.is_symlink() and not path.exists():
                raise UserError(f"{path}: this link leads to nothing, and a slice may be missing; mend or remove it")
            if path.is_file():
                yield path


def find_series(folder: str | Path, wanted: str | None = None) -> Series:
    """The series of a folder with the id `wanted`, or that with most slices, segmentations and doses last.

    Raises:
        UserError: there is no such series; the message lists those that there are.
    """
    found = list_series(folder)
    if wanted is None:
        return found[0]
    for series in found:
        if series.id == wanted:
            return series
    raise UserError(f"{folder}: no series {wanted!r}; there are {'; '.join(map(str, found))}")


def series_of_file(path: str | Path) -> Series:
    """The series that a single DICOM file is, by itself.

    Raises:
        UserError: it holds no image.
    """
    path = Path(path)
    header = image_header(path)
    if header is None:
        raise UserError(f"{path}: is DICOM, but holds no image; give a file or folder with slices")
    name, description = text_of(header, "SeriesInstanceUID"), text_of(header, "SeriesDescription")
    return Series(path, name, description, (path,), place_count(header), text_of(header, "Modality"))


def read_series(series: Series) -> sitk.Image:
    """Read a series.

    Args:
        series: as of `find_series`.

    Returns:
        Image in its unit (CT: HU), with `SOURCE_TAGS` as its metadata: int16 or int32 where all values are whole
        numbers, else float32. Of a tilted gantry, whose slices are shifted against each other, its axes are not at
        right angles.

    Raises:
        UserError: it has one slice only, slices without spacing, orientation or place, of several sizes or directions,
            several at a place, gaps or uneven distances, or a file that cannot be read.
    """
    where = f"{series.folder}: series {series}"
    if series.slices < 2:
        raise UserError(f"{where} is a single slice, not a volume; give the folder with all slices")
    files = {path: DicomFile(path) for path in series.files}
    slices = [part for file in files.values() for part in slices_of(file.path, file.dataset, where)]
    along, down = _check_alike(slices, where)
    normal = np.cross(along, down)
    slices.sort(key=lambda part: float(part.position @ normal))
    slices = _one_per_place(slices, normal, files, where)
    step = _check_even(slices, normal, where)
    volume = _grey_values(slices, files, where)
    spacing = np.mean([part.spacing for part in slices], axis=0)
    columns = np.stack([along * spacing[1], down * spacing[0], step], axis=1)
    lengths = np.linalg.norm(columns, axis=0)
    image = sitk.GetImageFromArray(volume)
    image.SetSpacing(lengths.tolist())
    image.SetOrigin(slices[0].position.tolist())
    image.SetDirection((columns / lengths).ravel().tolist())
    first = files[slices[0].file].dataset
    for tag in SOURCE_TAGS:
        image.SetMetaData(tag, text_of(first, tag.replace("|", "")))
    return image


# ------------------------------------------------------------------------------------------- one volume


def _check_alike(slices: list[Slice], where: str) -> tuple[np.ndarray, np.ndarray]:
    """The directions along a row and down a column that all slices share, to rounding."""
    middle = np.median([part.orientation for part in slices], axis=0)
    usual = np.median([part.spacing for part in slices], axis=0)
    for part in slices:
        same = (
            np.abs(part.orientation - middle).max() <= SAME_DIRECTION
            and np.abs(np.array(part.spacing) / usual - 1).max() <= SAME_SPACING
            and part.size == slices[0].size
        )
        if not same:
            raise UserError(
                f"{where}: has slices of several sizes or directions, such as {part.file.name}; remove scouts and "
                "other series from it"
            )
    for name in ("has_slope", "has_intercept"):
        without = [part for part in slices if not getattr(part, name)]
        if 0 < len(without) < len(slices):
            raise UserError(
                f"{where}: {without[0].file.name} has no {name.removeprefix('has_')} and other slices "
                "have one; export the series again"
            )
    along = middle[0] / np.linalg.norm(middle[0])
    down = middle[1] - (middle[1] @ along) * along
    return along, down / np.linalg.norm(down)


def _one_per_place(slices: list[Slice], normal: np.ndarray, files: dict[Path, DicomFile], where: str) -> list[Slice]:
    """The slices without copies of the very same one."""
    gaps = np.diff([float(part.position @ normal) for part in slices])
    apart = gaps[gaps > LEAST_STEP]
    least = UNEVEN * np.median(apart) if len(apart) else LEAST_STEP
    kept = [slices[0]]
    for gap, part in zip(gaps, slices[1:], strict=True):
        if gap > least:
            kept.append(part)
        elif _content(part, files) != _content(kept[-1], files):
            raise UserError(
                f"{where}: has two slices at one place, {_named(kept[-1])} and {_named(part)}; keep one phase or echo "
                "of the series"
            )
    if len(kept) < 2:
        raise UserError(f"{where}: all its slices lie at one place, so they are no volume; give the folder of a scan")
    return kept


def _named(part: Slice) -> str:
    return part.file.name + (f" (frame {part.number + 1})" if part.number else "")


def _content(part: Slice, files: dict[Path, DicomFile]) -> bytes:
    """A hash of a slice's grey values and place."""
    stored = files[part.file].stored[part.number]
    tags = f"{part.slope} {part.intercept} {np.round(part.position, 3)}"
    return hashlib.blake2b(stored.tobytes() + tags.encode()).digest()


def _check_even(slices: list[Slice], normal: np.ndarray, where: str) -> np.ndarray:
    """mm from a slice to the next, float64 [3], if all slices lie evenly on a straight line."""
    places = np.array([part.position for part in slices])
    gaps = np.diff(places @ normal)
    usual = float(np.median(gaps))
    k = int(np.argmax(np.abs(gaps - usual)))
    if gaps[k] > MISSING * usual:
        raise UserError(
            f"{where}: slices {k + 1} and {k + 2} lie {gaps[k]:.2f} mm apart, others {usual:.2f}; "
            "add the missing slices, or resample the scan evenly"
        )
    step = (places[-1] - places[0]) / (len(places) - 1)
    off = np.linalg.norm(places - places[0] - np.outer(np.arange(len(places)), step), axis=1)
    if off.max() > max(UNEVEN * usual, ROUNDED_PLACE):
        k = int(np.argmax(off))
        raise UserError(
            f"{where}: slice {k + 1} lies {off[k]:.2f} mm from where even slices would put it (they are "
            f"{gaps.min():.3f} to {gaps.max():.3f} mm apart); resample the scan evenly"
        )
    return step


# --------------------------------------------------------------------------------------------- grey values


def _grey_values(slices: list[Slice], files: dict[Path, DicomFile], where: str) -> np.ndarray:
    """The volume [z, y, x] in its unit: int16, int32, or floats where a value is no whole number."""
    volume: np.ndarray = np.empty((len(slices), *slices[0].size), _type_of(slices, files))
    padding: dict[int, np.ndarray] = {}
    for k, part in enumerate(slices):
        dataset, stored = files[part.file].dataset, files[part.file].stored[part.number]
        if "ModalityLUTSequence" in dataset:
            raise UserError(f"{where}: {part.file.name} has a table of grey values; export it with a rescale")
        if (part.slope, part.intercept) == (1, 0):
            volume[k] = stored
        else:
            whole = volume.dtype.kind == "i"
            slope, intercept = (int(part.slope), int(part.intercept)) if whole else (part.slope, part.intercept)
            volume[k] = stored.astype(np.int64 if whole else np.float64) * slope + intercept
        is_padding = _is_padding(stored, dataset)
        if is_padding is not None and is_padding.any():
            padding[k] = is_padding
    is_ct = text_of(files[slices[0].file].dataset, "Modality") == "CT"
    _darken_padding(volume, padding, is_ct)
    if is_ct and volume.max() > MOST_HU:
        raise UserError(
            f"{where}: its grey values go up to {volume.max():g} HU, which no body has: undeclared padding, or a wrong "
            "sign? export it again, or convert it to NIfTI with air there"
        )
    return volume


def _type_of(slices: list[Slice], files: dict[Path, DicomFile]) -> type:
    """The type of the volume: the smaller integer that holds every grey value there may be, if all are whole."""
    ends = []
    is_whole = True
    for part in slices:
        stored = files[part.file].stored
        bits = int(files[part.file].dataset.get("BitsStored") or 8 * stored.dtype.itemsize)
        is_whole &= stored.dtype.kind in "iu" and part.slope.is_integer() and part.intercept.is_integer()
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if stored.dtype.kind == "i" else (0, 2**bits - 1)
        ends += [part.slope * low + part.intercept, part.slope * high + part.intercept]
    for kind in (np.int16, np.int32) if is_whole else ():
        if np.iinfo(kind).min <= min(ends) and max(ends) <= np.iinfo(kind).max:
            return kind
    return np.float32 if max(map(abs, ends)) < 2**24 or not is_whole else np.float64


def _darken_padding(volume: np.ndarray, padding: dict[int, np.ndarray], is_ct: bool) -> None:
    """Make padding, slice -> mask, as dark as air. Where it is darker than all grey values it stays as it is."""
    grey = (part if k not in padding else part[~padding[k]] for k, part in enumerate(volume))
    lowest = min((part.min() for part in grey if part.size), default=None)
    if lowest is not None:
        for k, mask in padding.items():
            volume[k][mask & (volume[k] > lowest)] = min(lowest, AIR) if is_ct else lowest


def _is_padding(stored: np.ndarray, dataset: Dataset) -> np.ndarray | None:
    """Which stored numbers stand for 'no value', by their bits: the padding may be declared with the other sign."""
    if stored.dtype.kind not in "iu" or dataset.get("PixelPaddingValue") is None:
        return None
    span = 1 << int(dataset.BitsAllocated)
    least = -span // 2 if stored.dtype.kind == "i" else 0  # of the numbers that are stored
    try:
        ends = [int(dataset.PixelPaddingValue), int(dataset.get("PixelPaddingRangeLimit", dataset.PixelPaddingValue))]
    except (TypeError, ValueError):
        return None
    first, last = sorted((end - least) % span + least for end in ends)
    return stored == first if first == last else (stored >= first) & (stored <= last)
