"""DICOM series: list those of a folder, read one with the right geometry, and write one with its source's patient.

A series is read by its slices' positions, not by their numbers or file names. A scan taken with a tilted gantry, whose
slices are shifted against each other, is resampled on an upright grid.
"""

import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from data_util.scans.frame import Frame
from errors import UserError

SERIES_DESCRIPTION, MODALITY, PIXEL_SPACING = "0008|103e", "0008|0060", "0028|0030"
POSITION, ORIENTATION = "0020|0032", "0020|0037"
STUDY_UID, SERIES_UID, INSTANCE_UID, FRAME_UID = "0020|000d", "0020|000e", "0008|0018", "0020|0052"
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
LEAST_SHIFT = 0.01  # mm between slices, sideways; less is rounding
UNEVEN = 0.1  # of the distance between slices
STORED_RANGE = (-(2**15), 2**15 - 1)


@dataclass(frozen=True)
class Series:
    """A DICOM series in a folder: its id (may be empty), description, and files, ordered by position."""

    folder: Path
    id: str
    description: str
    files: tuple

    def __str__(self):
        return f"{self.id or '(no id)'} {self.description!r} with {len(self.files)} slices"


def list_series(folder):
    """List the DICOM series of a folder, the largest first. Raises UserError where there is none.

    An empty id asks GDCM for its first series, and sorts first: so it is that very series where there is one.
    """
    reader = sitk.ImageSeriesReader
    warns = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # of finding none, which the error below says better
    ids = reader.GetGDCMSeriesIDs(str(folder))
    sitk.ProcessObject.SetGlobalWarningDisplay(warns)
    if not ids:
        raise UserError(f"{folder}: no DICOM slices in this folder; give the folder that holds them, or an image file")
    found = []
    for name in ids:
        files = reader.GetGDCMSeriesFileNames(str(folder), name)
        description = _tag(_header(files[0]), SERIES_DESCRIPTION)
        found.append(Series(Path(folder), name.strip("\0 "), description, tuple(files)))
    return sorted(found, key=lambda series: -len(series.files))


def find_series(folder, wanted=None):
    """Series of a folder with the id `wanted`, or its largest. Raises UserError for an unknown id, listing the ids."""
    found = list_series(folder)
    if wanted is None:
        return found[0]
    for series in found:
        if series.id == wanted:
            return series
    raise UserError(f"{folder}: no series {wanted!r}; there are {'; '.join(map(str, found))}")


def read_series(series):
    """Read a series as a SimpleITK image in its unit (CT: HU), with SOURCE_TAGS as its metadata.

    Raises UserError where it has one slice only, slices without spacing or position, of several sizes or directions,
    twice at a place or with gaps, or cannot be read.
    """
    if len(series.files) == 1:
        image = read_file(series.files[0])
        if image.GetDimension() != 3 or image.GetSize()[2] < 2:
            raise UserError(
                f"{series.folder}: series {series} is a single slice, not a volume; give the folder with all slices"
            )
    else:
        step = _check_slices(series)
        image = read_file(series.files)
        rows = np.reshape(image.GetDirection(), (3, 3))
        upright = float(step @ rows[:, 2])
        image.SetSpacing((*image.GetSpacing()[:2], upright))
        shift = step - upright * rows[:, 2]
        if np.linalg.norm(shift) > LEAST_SHIFT:
            image = _upright(image, shift)
    header = _header(series.files[0])
    for tag in SOURCE_TAGS:
        image.SetMetaData(tag, _tag(header, tag))
    return image


def source_tags(image):
    """What a derived series keeps of its source, tag -> value: the SOURCE_TAGS that an image of `read_series` carries.

    Ids that it lacks are made up: of one study and one frame of reference for all series that get these tags.
    """
    made_up = {STUDY_UID: new_uid(), FRAME_UID: new_uid(), MODALITY: "OT"}
    return {**made_up, **{tag: value for tag in SOURCE_TAGS if (value := _tag(image, tag))}}


def read_file(names):
    """Read an image from one file, or a volume from slices, with SimpleITK. Raises UserError where it cannot."""
    several = isinstance(names, tuple)
    try:
        return sitk.ReadImage(list(names) if several else str(names))
    except RuntimeError as error:
        where = Path(names[0]).parent if several else names
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"{where}: cannot be read as an image; give DICOM, NIfTI, NRRD or MHA ({reason})") from error


def _header(file):
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(file))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise UserError(f"{file}: cannot be read as a DICOM slice; copy it again") from error
    return reader


def _tag(header, tag):
    """A tag's text without padding; empty where the slice lacks it."""
    return header.GetMetaData(tag).strip("\0 ") if header.HasMetaDataKey(tag) else ""


def _check_slices(series):
    """Return the mm from a slice to the next, float64 [3], where all slices of a series make one volume."""
    where = f"{series.folder}: series {series}"
    headers = [_header(file) for file in series.files]
    for tag, name in ((PIXEL_SPACING, "pixel spacing"), (POSITION, "position"), (ORIENTATION, "orientation")):
        lacking = [file for file, header in zip(series.files, headers, strict=True) if not _tag(header, tag)]
        if lacking:
            raise UserError(
                f"{where}: {Path(lacking[0]).name} has no {name} ({tag.replace('|', ',')}), so its size in mm is "
                "unknown; export the series again, or convert it to NIfTI with its spacing"
            )
    looks = {
        (_numbers(h, ORIENTATION).round(3).tobytes(), _numbers(h, PIXEL_SPACING).round(4).tobytes(), h.GetSize())
        for h in headers
    }
    if len(looks) > 1:
        raise UserError(f"{where}: has slices of several sizes or directions; remove scouts and other series from it")
    places = np.array([_numbers(header, POSITION) for header in headers])
    along, down = _numbers(headers[0], ORIENTATION).reshape(2, 3)
    gaps = np.diff(places @ np.cross(along, down))
    usual = np.median(gaps)
    if np.abs(gaps).min() < UNEVEN * max(abs(usual), LEAST_SHIFT):
        raise UserError(f"{where}: has two slices at one place; keep one phase or echo of the series")
    if np.abs(gaps - usual).max() > UNEVEN * abs(usual):
        k = int(np.argmax(np.abs(gaps - usual)))
        raise UserError(
            f"{where}: slices {k + 1} and {k + 2} lie {abs(gaps[k]):.2f} mm apart, others {abs(usual):.2f}; "
            "add the missing slices, or resample the scan evenly"
        )
    return (places[-1] - places[0]) / (len(places) - 1)


def _numbers(header, tag):
    return np.array([float(part) for part in _tag(header, tag).split("\\")])


def _upright(image, shift):
    """Resample a volume whose slices each lie shifted by `shift` mm against the one before, on a grid that holds all.

    ITK reads it as if it were upright. What lies outside gets the lowest grey value.
    """
    frame = Frame.of(image)
    matrix = frame.matrix
    voxels = np.linalg.solve(matrix, shift) * (frame.size[2] - 1)  # from the first slice to the last
    low, high = np.floor(np.minimum(voxels, 0) + 1e-6), np.ceil(np.maximum(voxels, 0) - 1e-6)
    low[2] = high[2] = 0
    grid = frame.box(low, np.array(frame.size) + high, np.array(frame.size) + (high - low).astype(int))
    # A place x lies in slice k = (row 3 of matrix^-1) (x - origin), and ITK has that slice at x - k shift.
    shear = np.outer(shift, np.linalg.inv(matrix)[2])
    transform = sitk.AffineTransform(3)
    transform.SetMatrix((np.eye(3) - shear).ravel())
    transform.SetTranslation(shear @ frame.origin)
    lowest = float(sitk.GetArrayViewFromImage(image).min())
    return grid.resample(image, outside=lowest, transform=transform)


def write_series(image, folder, tags, name):
    """Write a volume as a DICOM series of its own, a file a slice, into a folder that it makes.

    Args:
        image: SimpleITK image in a unit of whole numbers, such as HU, which are stored; other grey values, which do not
            span 255 or do not fit 16 bits, are stored as 0..4095 of their range, and the description says so.
        folder: where the files 0000.dcm, 0001.dcm, ... go.
        tags: of the source, as of `source_tags`.
        name: of what the series shows, added to its source's description.

    Raises UserError where it cannot be written.
    """
    grey = sitk.Cast(image, sitk.sitkFloat32)
    values = sitk.GetArrayViewFromImage(grey)
    low, high = float(values.min()), float(values.max())
    if high - low < 255 or low < STORED_RANGE[0] or high > STORED_RANGE[1]:
        scale = 4095 / ((high - low) or 1)
        grey = (grey - low) * scale
        name = f"{name}, {low:g}..{high:g} as 0..4095"
    stored = sitk.Cast(sitk.Round(grey), sitk.sitkInt16)
    rows = np.reshape(image.GetDirection(), (3, 3))
    now = time.localtime()
    common = {
        **tags,
        SERIES_UID: new_uid(),
        SERIES_DESCRIPTION: f"{tags.get(SERIES_DESCRIPTION, '')[: 60 - len(name)]} {name}".strip(),
        "0008|0008": "DERIVED\\SECONDARY",
        "0008|0021": time.strftime("%Y%m%d", now),
        "0008|0031": time.strftime("%H%M%S", now),
        ORIENTATION: _text((*rows[:, 0], *rows[:, 1])),
        "0018|0050": _text(image.GetSpacing()[2:]),
        "0018|0088": _text(image.GetSpacing()[2:]),
        "0028|1052": "0",
        "0028|1053": "1",
    }
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    try:
        Path(folder).mkdir(parents=True)
        for k in range(stored.GetSize()[2]):
            piece = stored[:, :, k]
            own = {
                INSTANCE_UID: new_uid(),
                POSITION: _text(stored.TransformIndexToPhysicalPoint((0, 0, k))),
                "0020|0013": str(k + 1),
            }
            for tag, value in {**common, **own}.items():
                piece.SetMetaData(tag, value)
            writer.SetFileName(str(Path(folder) / f"{k:04d}.dcm"))
            writer.Execute(piece)
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"{folder}: cannot be written as DICOM; check the folder ({reason})") from error


def new_uid():
    """Return a DICOM id that nobody has."""
    return f"2.25.{uuid.uuid4().int}"


def _text(numbers):
    """Numbers as DICOM writes them, in at most 16 characters each."""
    return "\\".join(f"{number:.9g}" for number in numbers)
