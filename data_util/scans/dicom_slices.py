"""DICOM files and the slices in them: what a slice's tags say of its place and grey values, and the numbers it stores.

A file holds one slice, or many (enhanced DICOM), each with a place and a rescale of its own.
"""

import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.multival import MultiValue
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid

import files
from errors import UserError, first_line

# How messages name what a slice must have.
NAMES = {
    "PixelSpacing": "pixel spacing (0028,0030)",
    "ImagePositionPatient": "position (0020,0032)",
    "ImageOrientationPatient": "orientation (0020,0037)",
    "RescaleSlope": "rescale slope (0028,1053)",
    "RescaleIntercept": "rescale intercept (0028,1052)",
    "SpacingBetweenSlices": "spacing between slices (0018,0088)",
}


@contextmanager
def quiet() -> Iterator[None]:
    """Let pydicom read what is against the standard without a word: what is needed of it is checked here."""
    with warnings.catch_warnings(), pydicom.config.disable_value_validation():
        warnings.simplefilter("ignore")
        yield


@dataclass(frozen=True, eq=False)
class Slice:
    """One slice of a series, without its pixels.

    Attributes:
        file: its file.
        number: number of the frame in the file, from 0.
        position: place of the centre of its first pixel, float64 [3] in mm.
        orientation: unit vectors along a row and down a column, float64 [2, 3].
        spacing: mm from row to row and from column to column.
        size: rows and columns.
        slope, intercept: grey value = slope * stored number + intercept.
        has_slope, has_intercept: whether the file tells them; else they are 1 and 0.
    """

    file: Path
    number: int
    position: np.ndarray
    orientation: np.ndarray
    spacing: tuple[float, float]
    size: tuple[int, int]
    slope: float
    intercept: float
    has_slope: bool
    has_intercept: bool


class DicomFile:
    """A file with its pixels, which are decoded once.

    Attributes:
        path: the file.
        dataset: its tags.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with quiet():
                self.dataset = pydicom.dcmread(path, force=True)
        except Exception as error:  # pydicom raises many kinds
            raise UserError(f"{path}: cannot be read as DICOM ({first_line(error)}); copy it again") from error
        # What pydicom makes of a file that ends within its compressed pixels is a data set without anything.
        if not any(keyword in self.dataset for keyword in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
            raise UserError(f"{path}: has no pixels, so it was cut short; copy it again")

    @cached_property
    def stored(self) -> np.ndarray:
        """The numbers that are stored, [frames, rows, columns]."""
        dataset = self.dataset
        try:
            with quiet():
                pixels = _decompressed(dataset) if _is_compressed(dataset) else dataset.pixel_array
        except UserError:
            raise
        except Exception as error:  # pydicom raises many kinds
            raise UserError(f"{self.path}: its pixels cannot be read ({first_line(error)}); copy it again") from error
        pixels = pixels.reshape(-1, int(dataset.Rows), int(dataset.Columns))
        if not _is_compressed(dataset):
            _check_bits(self.path, dataset, pixels)
        return pixels


def is_dicom(path: str | Path) -> bool:
    """Whether a file is DICOM by its beginning."""
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def image_header(path: Path) -> Dataset | None:
    """The tags of a file without its pixels; None where it is no DICOM image."""
    try:
        with quiet():
            dataset = pydicom.dcmread(path, stop_before_pixels=True, force=not is_dicom(path))
            keywords = set(dataset.dir())
            kind = str(dataset.file_meta.get("MediaStorageSOPClassUID", "")) if is_dicom(path) else ""
    except Exception as error:  # whatever pydicom makes of a file that is something else
        if is_dicom(path) or path.suffix.lower() == ".dcm":
            raise UserError(f"{path}: cannot be read as DICOM ({first_line(error)}); copy it again") from error
        return None
    if not keywords and (is_dicom(path) or path.suffix.lower() == ".dcm"):
        raise UserError(f"{path}: holds nothing that DICOM knows, so it is damaged or cut short; copy it again")
    if not keywords & {"Rows", "Columns"} and UID(kind).name.endswith("Image Storage"):
        raise UserError(f"{path}: is an image whose header ends too early, so it was cut short; copy it again")
    if not keywords & {"Rows", "Columns"} and not ("ImagePositionPatient" in keywords and is_dicom(path)):
        return None
    for keyword in ("Rows", "Columns", "BitsAllocated"):
        if not isinstance(dataset.get(keyword), int) or dataset.get(keyword) < 1:
            raise UserError(f"{path}: has no number of {keyword}, so its pixels cannot be read; export it again")
    return dataset


def frame_count(dataset: Dataset) -> int:
    """How many slices a file holds."""
    try:
        return max(int(dataset.get("NumberOfFrames") or 1), 1)
    except (TypeError, ValueError):
        return 1


def place_count(dataset: Dataset) -> int:
    """How many slices of a volume a file holds: frames without places, as of a film, count as one."""
    is_film = "PerFrameFunctionalGroupsSequence" not in dataset and "SpacingBetweenSlices" not in dataset
    return 1 if is_film else frame_count(dataset)


def text_of(dataset: Dataset, key: str) -> str:
    """A tag, by its keyword or its number as eight digits, as text; '' where it is not there."""
    try:
        with quiet():
            value = dataset[key if key[0].isalpha() else int(key, 16)].value
    except Exception:  # a tag that is not there or whose value is malformed
        return ""
    if value is None:
        return ""
    parts = value if isinstance(value, MultiValue) else [value]
    return "\\".join(str(part) for part in parts).strip("\0 ")


def slices_of(file: Path, dataset: Dataset, where: str) -> list[Slice]:
    """The slices of a file."""
    count = frame_count(dataset)
    drawn = text_of(dataset, "PhotometricInterpretation") or "MONOCHROME2"
    if int(dataset.get("SamplesPerPixel") or 1) != 1 or not drawn.startswith("MONOCHROME"):
        raise UserError(f"{where}: {file.name} has colours ({drawn}); give a scan of grey values")
    used = dataset.get("BitsStored") or dataset.get("BitsAllocated")
    if dataset.get("HighBit") not in (None, used - 1):
        raise UserError(
            f"{where}: {file.name} stores its {used} bits from bit {dataset.HighBit} down; export the series again"
        )

    def of(frame: int, group: str, keyword: str, count: int) -> np.ndarray | None:
        found = (_numbers(place, keyword, count, file, where) for place in _groups(dataset, frame, group))
        return next((values for values in found if values is not None), None)

    groups = dataset.get("PerFrameFunctionalGroupsSequence")
    if groups is not None and len(groups) != count:
        raise UserError(f"{where}: {file.name} tells of {count} frames and describes {len(groups)}; export it again")
    slices = []
    for k in range(count):
        position = of(k, "PlanePositionSequence", "ImagePositionPatient", 3)
        orientation = of(k, "PlaneOrientationSequence", "ImageOrientationPatient", 6)
        spacing = of(k, "PixelMeasuresSequence", "PixelSpacing", 2)
        if spacing is None or position is None or orientation is None:
            places = {"PixelSpacing": spacing, "ImagePositionPatient": position, "ImageOrientationPatient": orientation}
            absent = next(NAMES[keyword] for keyword, values in places.items() if values is None)
            raise UserError(
                f"{where}: {file.name} has no {absent}, so its size or place in mm is unknown; export the series "
                "again, or convert it to NIfTI with its spacing"
            )
        if count > 1 and "PerFrameFunctionalGroupsSequence" not in dataset:
            position = position + k * _frame_step(file, dataset, orientation, where)
        slope = of(k, "PixelValueTransformationSequence", "RescaleSlope", 1)
        if slope is not None and slope[0] == 0:
            raise UserError(f"{where}: the {NAMES['RescaleSlope']} of {file.name} is 0, so it has no grey values")
        intercept = of(k, "PixelValueTransformationSequence", "RescaleIntercept", 1)
        slices.append(
            Slice(
                file,
                k,
                position,
                _unit_vectors(orientation, file, where),
                _positive(spacing, file, where),
                (int(dataset.Rows), int(dataset.Columns)),
                1.0 if slope is None else float(slope[0]),
                0.0 if intercept is None else float(intercept[0]),
                slope is not None,
                intercept is not None,
            )
        )
    return slices


def _numbers(dataset: Dataset, keyword: str, count: int, file: Path, where: str) -> np.ndarray | None:
    """Numbers of a tag, float64 [count]; None where it is not there or empty."""
    if keyword not in dataset:
        return None
    raw = dataset.get_item(keyword).value
    if raw is None or raw in ("", b""):
        return None
    try:
        value = dataset[keyword].value
        values = np.array([float(part) for part in (value if isinstance(value, MultiValue) else [value])])
    except Exception:  # whatever pydicom makes of text that is no number
        values = np.array([np.nan])
    if len(values) != count or not np.isfinite(values).all():
        shown = raw.decode("latin-1").strip("\0 ") if isinstance(raw, bytes) else raw
        raise UserError(
            f"{where}: the {NAMES[keyword]} of {file.name} is {shown!r}, not {count} number{'s' * (count > 1)}; "
            "export the series again"
        )
    return values


def _groups(dataset: Dataset, frame: int, name: str) -> Iterable[Dataset]:
    """Where a tag of a frame may be: its own functional group, the shared one, and the data set itself."""
    for items, k in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        groups = dataset.get(items)
        if groups is not None and k < len(groups) and groups[k].get(name):
            yield groups[k][name].value[0]
    yield dataset


def _frame_step(file: Path, dataset: Dataset, orientation: np.ndarray, where: str) -> np.ndarray:
    """mm from a frame to the next, [3], in a file of several frames that tells one position."""
    apart = _numbers(dataset, "SpacingBetweenSlices", 1, file, where)
    if apart is None or apart[0] == 0:
        raise UserError(f"{where}: the frames of {file.name} have no places of their own; export them as single slices")
    return apart[0] * np.cross(*orientation.reshape(2, 3))


def _unit_vectors(orientation: np.ndarray, file: Path, where: str) -> np.ndarray:
    """The two directions of a slice, [2, 3], if they are of length 1 and at right angles."""
    vectors = orientation.reshape(2, 3)
    if not np.allclose(vectors @ vectors.T, np.eye(2), atol=2e-3):
        shown = "\\".join(f"{part:g}" for part in orientation)
        raise UserError(
            f"{where}: the {NAMES['ImageOrientationPatient']} of {file.name} is {shown}, not two directions at right "
            "angles; export the series again"
        )
    return vectors


def _positive(spacing: np.ndarray, file: Path, where: str) -> tuple[float, float]:
    if not min(spacing) > 0:
        shown = "\\".join(f"{part:g}" for part in spacing)
        raise UserError(
            f"{where}: the {NAMES['PixelSpacing']} of {file.name} is {shown}, not above 0; export the series again"
        )
    return float(spacing[0]), float(spacing[1])


def _is_compressed(dataset: Dataset) -> bool:
    """Whether the pixels are compressed; a file without a header of its own never is, and is given one here."""
    meta = getattr(dataset, "file_meta", None)
    if meta is None or "TransferSyntaxUID" not in meta:
        dataset.file_meta = FileMetaDataset()
        implicit = dataset.original_encoding[0]
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
        return False
    return meta.TransferSyntaxUID.is_encapsulated


def _check_bits(path: Path, dataset: Dataset, pixels: np.ndarray) -> None:
    """Raise where whole numbers use bits that are said to be unused, which pydicom cuts off."""
    if pixels.dtype != np.uint16 or dataset.get("BitsStored") in (None, 16) or "OverlayBitPosition" in dataset:
        return
    raw = np.frombuffer(dataset.PixelData, pixels.dtype, pixels.size)
    if (raw > np.uint16(2 ** int(dataset.BitsStored) - 1)).any():
        raise UserError(f"{path}: has numbers of more bits than the {dataset.BitsStored} it tells; export it again")


def _decompressed(dataset: Dataset) -> np.ndarray:
    """The stored numbers of compressed pixels, by SimpleITK: it has every codec, but makes grey values of its own.

    So it is given nothing but the pixels.
    """
    bare = Dataset()
    bare.file_meta = FileMetaDataset()
    bare.file_meta.TransferSyntaxUID = dataset.file_meta.TransferSyntaxUID
    bare.file_meta.MediaStorageSOPClassUID = bare.SOPClassUID = UID(
        "1.2.840.10008.5.1.4.1.1.7.3"
    )  # multi-frame, 16 bits
    bare.file_meta.MediaStorageSOPInstanceUID = bare.SOPInstanceUID = generate_uid()
    for keyword in ("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"):
        setattr(bare, keyword, dataset[keyword].value)
    bare.SamplesPerPixel, bare.PhotometricInterpretation = 1, "MONOCHROME2"
    bare.NumberOfFrames = frame_count(dataset)
    bare.add(dataset["PixelData"])
    with tempfile.NamedTemporaryFile(suffix=".dcm") as file:
        with files.writing(file.name):
            pydicom.dcmwrite(file.name, bare, enforce_file_format=True)
        return sitk.GetArrayFromImage(sitk.ReadImage(file.name))
