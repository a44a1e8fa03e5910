"""Write a volume as a DICOM series that belongs to the patient and study of its source."""

import time
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from pydicom.datadict import dictionary_VR
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, generate_uid

import files
from data_util.scans.dicom import FRAME_UID, MODALITY, SERIES_DESCRIPTION, SOURCE_TAGS, STUDY_UID
from errors import UserError

# Modality -> kind of object (SOP class); all others are written as secondary captures.
CLASSES = {
    "CT": "1.2.840.10008.5.1.4.1.1.2",
    "MR": "1.2.840.10008.5.1.4.1.1.4",
    "PT": "1.2.840.10008.5.1.4.1.1.128",
}
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
# What every object has, though it may be empty: patient's name, id, birth date and sex; study's date, time and id;
# accession number.
REQUIRED = ("0010|0010", "0010|0020", "0010|0030", "0010|0040", "0008|0020", "0008|0030", "0020|0010", "0008|0050")
LEAST, MOST = -(2**15), 2**15 - 1  # of what is stored
LONGEST_DESCRIPTION = 64  # characters


def new_uid() -> str:
    """A DICOM id that nobody has."""
    return str(generate_uid(prefix=None))


def source_tags(image: sitk.Image) -> dict[str, str]:
    """What a derived series keeps of its source.

    Args:
        image: as of `read_series`, or any other.

    Returns:
        Tag -> value: the `SOURCE_TAGS` that the image carries. Ids that it lacks are made up: of one study and one
        frame of reference for all series that get these tags.
    """
    made_up = {STUDY_UID: new_uid(), FRAME_UID: new_uid(), MODALITY: "OT"}
    kept = {tag: image.GetMetaData(tag).strip("\0 ") for tag in SOURCE_TAGS if image.HasMetaDataKey(tag)}
    return {**made_up, **{tag: value for tag, value in kept.items() if value}}


def write_series(image: sitk.Image, folder: str | Path, tags: dict[str, str], name: str) -> None:
    """Write a volume as a DICOM series of its own, one file per slice, into a folder that appears when it is whole.

    Whole numbers that fit 16 bits, such as HU, are stored as they are; other grey values are stored with a rescale that
    gives them back to 1 / 65535 of their range. Text is written in UTF-8.

    Args:
        image: the volume.
        folder: where the files 0000.dcm, 0001.dcm, ... go.
        tags: of the source, as of `source_tags`.
        name: of what the series shows, added to its source's description.

    Raises:
        UserError: it cannot be written.
    """
    grey = sitk.GetArrayFromImage(image).astype(np.float64)
    stored, slope, intercept = _stored(grey)
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder}: cannot be written as DICOM, it is there already; name a new folder")
    with files.writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with files.partial_folder(folder.parent) as partial:
            new = partial / folder.name
            new.mkdir()
            try:
                series = _series(image, tags, name, slope, intercept)
                for k, pixels in enumerate(stored):
                    _write_slice(new / f"{k:04d}.dcm", series, image, k, pixels)
            except (ValueError, TypeError) as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise UserError(f"{folder}: cannot be written as DICOM ({reason}); use NIfTI") from error
            files.publish(new, folder)


def _stored(grey: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Grey values as int16, and the slope and intercept that give them back."""
    low, high = float(grey.min()), float(grey.max())
    # Fractions of a scan in HU come from interpolation, and are rounded.
    if high - low >= 255 and low >= LEAST and high <= MOST:
        return np.rint(grey).astype(np.int16), 1.0, 0.0
    if (grey == np.rint(grey)).all() and low >= LEAST and high <= MOST:
        return grey.astype(np.int16), 1.0, 0.0
    # As they are written, in 16 characters.
    slope = float(_text((high - low) / (MOST - LEAST))) if high > low else 1.0
    intercept = float(_text(low - LEAST * slope))
    return np.clip(np.rint((grey - intercept) / slope), LEAST, MOST).astype(np.int16), slope, intercept


def _series(image: sitk.Image, tags: dict[str, str], name: str, slope: float, intercept: float) -> Dataset:
    """The tags that all slices share."""
    series = Dataset()
    series.SpecificCharacterSet = "ISO_IR 192"
    for tag, value in {**dict.fromkeys(REQUIRED, ""), **tags}.items():
        series.add_new(int(tag.replace("|", ""), 16), _kind_of(tag), value)
    now = time.localtime()
    direction = np.reshape(image.GetDirection(), (3, 3))
    series.SOPClassUID = CLASSES.get(tags[MODALITY], SECONDARY_CAPTURE)
    series.SeriesInstanceUID = new_uid()
    description = tags.get(SERIES_DESCRIPTION, "")[: LONGEST_DESCRIPTION - 1 - len(name)]
    series.SeriesDescription = f"{description} {name}".strip()
    series.ImageType = ["DERIVED", "SECONDARY"]
    series.SeriesDate, series.SeriesTime = time.strftime("%Y%m%d", now), time.strftime("%H%M%S", now)
    series.ImageOrientationPatient = [_text(part) for part in (*direction[:, 0], *direction[:, 1])]
    columns, rows, apart = image.GetSpacing()
    series.PixelSpacing = [_text(rows), _text(columns)]
    if series.SOPClassUID == SECONDARY_CAPTURE:
        series.ImagerPixelSpacing = series.PixelSpacing  # where some readers look for it in this kind of object
    series.SliceThickness = series.SpacingBetweenSlices = _text(apart)
    series.RescaleSlope, series.RescaleIntercept = _text(slope), _text(intercept)
    if tags[MODALITY] == "CT":
        series.RescaleType = "HU"
    series.SamplesPerPixel, series.PhotometricInterpretation = 1, "MONOCHROME2"
    series.BitsAllocated, series.BitsStored, series.HighBit, series.PixelRepresentation = 16, 16, 15, 1
    return series


def _write_slice(path: Path, series: Dataset, image: sitk.Image, k: int, pixels: np.ndarray) -> None:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, series.SOPClassUID
    meta.MediaStorageSOPInstanceUID = UID(new_uid())
    dataset = FileDataset(str(path), series, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPInstanceUID, dataset.InstanceNumber = meta.MediaStorageSOPInstanceUID, str(k + 1)
    dataset.ImagePositionPatient = [_text(mm) for mm in image.TransformIndexToPhysicalPoint((0, 0, k))]
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.PixelData = pixels.tobytes()
    dataset.save_as(path, enforce_file_format=True)


def _kind_of(tag: str) -> str:
    """The DICOM kind (VR) of a tag."""
    return dictionary_VR(int(tag.replace("|", ""), 16))


def _text(number: float) -> str:
    """A number as DICOM writes it, in at most 16 characters."""
    for digits in range(15, 0, -1):
        text = f"{number:.{digits}g}"
        if len(text) <= 16:
            return text
    raise ValueError(f"{number} cannot be written in 16 characters")
