"""Small inputs of the kinds that users' real files are of, which a test makes with `make(name, folder)`.

All scans show the same, so that a scan can be checked at any place, on whatever grid it was read: the grey value (HU)
at a place (x, y, z) in mm (LPS) is `grey`, 7 x - 5 y + 9 z - 250, rounded where whole numbers are stored. Linear
interpolation leaves such a scan as it is. A label is `organ`, an ellipsoid. The usual grid has 20 x 22 x 24 voxels of
2 x 2 x 3 mm; the first voxel is at (-30, -25, -40).
"""

import json
import os
import shutil
import warnings

import h5py
import nibabel
import numpy as np
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian

SIZE, SPACING, ORIGIN = (20, 22, 24), (2.0, 2.0, 3.0), (-30.0, -25.0, -40.0)
MATRIX = np.diag(SPACING)  # mm a voxel
AXES = (1, 0, 0), (0, 1, 0)  # along a row of a slice, and down a column
CT, PET = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.128"
ENHANCED = "1.2.840.10008.5.1.4.1.1.2.1"
INTERCEPT = -1024
CASES = {}


def case(make):
    """Register a function(folder) as the maker of the case of its name."""
    CASES[make.__name__] = make
    return make


# ---------------------------------------------------------------------------------------------- what the scans show


def places(size=SIZE, matrix=MATRIX, origin=ORIGIN):
    """Places in mm of a grid's voxels: [X, Y, Z, 3]."""
    voxels = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), -1)
    return voxels @ np.transpose(matrix) + origin


def grey(where):
    """Grey values (HU) at places [..., 3]."""
    return np.asarray(where, float) @ (7, -5, 9) - 250


def activity(where):
    """Grey values of a PET at places: 1 to 7."""
    return grey(where) / 200 + 5.6


def organ(where):
    """Whether places lie in the organ."""
    return ((((where - np.array((-10, -4, -4))) / (10, 12, 18)) ** 2).sum(-1)) < 1


def scan(size=SIZE, matrix=MATRIX, origin=ORIGIN):
    """The scan on a grid, int16 [X, Y, Z]."""
    return np.rint(grey(places(size, matrix, origin))).astype(np.int16)


def person(number):
    """A scan and its label on the usual grid, of a person each: the same, 1.5 mm further to the left each time."""
    where = places() - (1.5 * number, 0, 0)
    return np.rint(grey(where)).astype(np.int16), organ(where).astype(np.uint8)


def stored(values, slope=1, intercept=INTERCEPT):
    """Values as they can be stored with a slope and an intercept."""
    return np.rint((values - intercept) / slope) * slope + intercept


# ----------------------------------------------------------------------------------------------------------- NIfTI


def affine(matrix=MATRIX, origin=ORIGIN):
    """NIfTI's affine, RAS, of a grid in LPS."""
    whole = np.eye(4)
    whole[:3, :3], whole[:3, 3] = matrix, origin
    return np.diag((-1, -1, 1, 1)) @ whole


def write_nifti(path, array, matrix=MATRIX, origin=ORIGIN, qform=None):
    """Write an array [X, Y, Z] as NIfTI; `qform` is another matrix for the qform."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(array, affine(matrix, origin))
    image.set_sform(affine(matrix, origin), 1)
    image.set_qform(affine(matrix if qform is None else qform, origin), 1)
    nibabel.save(image, path)


def write_other(path, array, compress=False):
    """Write an array as NRRD, MHA or MHD, as the name ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    image.SetSpacing(SPACING)
    image.SetOrigin(ORIGIN)
    sitk.WriteImage(image, str(path), compress)


def cut(path, share):
    """Keep only the first `share` of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


# ----------------------------------------------------------------------------------------------------------- DICOM


def slice_places(position, axes=AXES, shape=SIZE[:2], spacing=2.0):
    """Places of a slice's pixels, [columns, rows, 3], the first at `position`."""
    steps = [np.asarray(axis, float) * spacing for axis in axes]
    return places((*shape, 1), np.stack([*steps, np.zeros(3)], 1), position)[:, :, 0]


def dicom_file(sop, instance, series):
    """A DICOM data set with what every image needs but its pixels and geometry."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = sop
    meta.MediaStorageSOPInstanceUID = f"1.2.3.{series}.{instance}"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = sop, meta.MediaStorageSOPInstanceUID
    data.PatientName, data.PatientID = "Phantom^Test", "P1"
    data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = "1.2.3", f"1.2.3.{series}", "1.2.4"
    data.Modality = "PT" if sop == PET else "CT"
    data.SeriesNumber, data.InstanceNumber = 1, instance
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
    return data


def pixels(values, slope, intercept):
    """The bytes of values [columns, rows], below 0 as signed numbers have them."""
    return np.rint((values.T - intercept) / slope).astype(np.int64).astype("<u2").tobytes()


def numbers(values):
    """Numbers as DICOM's texts."""
    return [f"{value:.10g}" for value in values]


def usual_positions(count=SIZE[2], step=SPACING[2]):
    """Positions of axial slices."""
    return [(ORIGIN[0], ORIGIN[1], ORIGIN[2] + step * k) for k in range(count)]


def write_series(
    folder,
    positions=None,
    change=None,
    axes=AXES,
    shape=SIZE[:2],
    spacing=2.0,
    show=grey,
    slope=lambda k: 1,
    intercept=INTERCEPT,
    series=1,
    sop=CT,
    name="{:03d}.dcm",
):
    """Write a DICOM series, a file a slice.

    Args:
        positions: of the slices' first pixels; axial ones where None.
        change: function(k, data set) that edits the k-th slice.
        axes, shape, spacing: of every slice; shape is (columns, rows), spacing the mm from a pixel to the next.
        show: function of places to grey values.
        slope: function of k to the slope of the k-th slice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for k, position in enumerate(usual_positions() if positions is None else positions):
        data = dicom_file(sop, k + 1, series)
        data.ImagePositionPatient = numbers(position)
        data.ImageOrientationPatient = numbers(np.ravel(axes))
        data.PixelSpacing, data.SliceThickness = [str(spacing)] * 2, "3.0"
        data.Columns, data.Rows = shape
        data.RescaleSlope, data.RescaleIntercept = f"{slope(k):g}", f"{intercept:g}"
        data.PixelData = pixels(show(slice_places(position, axes, shape, spacing)), slope(k), intercept)
        if change is not None:
            change(k, data)
        data.save_as(folder / name.format(k), enforce_file_format=True)


def item(**members):
    """A sequence of one item."""
    data = Dataset()
    for name, value in members.items():
        setattr(data, name, value)
    return Sequence([data])


def write_enhanced(path, order, change=None, rescale=None, series=1, show=lambda where, j: grey(where)):
    """Write an enhanced CT, a frame for each number in `order`, which says how many slices above the lowest it lies.

    `rescale` is a function of the frame's number j to its (slope, intercept); one for all where None. `show` is a
    function of places and j to grey values.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = dicom_file(ENHANCED, 1, series)
    data.NumberOfFrames = len(order)
    data.Columns, data.Rows = SIZE[:2]
    measures = item(PixelSpacing=["2.0", "2.0"], SliceThickness="3.0", SpacingBetweenSlices="3.0")
    shared = item(
        PixelMeasuresSequence=measures, PlaneOrientationSequence=item(ImageOrientationPatient=numbers(np.ravel(AXES)))
    )
    if rescale is None:
        shared[0].PixelValueTransformationSequence = _transformation(1, INTERCEPT)
    data.SharedFunctionalGroupsSequence = shared
    frames, content = [], []
    for j, k in enumerate(order):
        position = (ORIGIN[0], ORIGIN[1], ORIGIN[2] + SPACING[2] * k)
        slope, intercept = (1, INTERCEPT) if rescale is None else rescale(j)
        frame = item(
            PlanePositionSequence=item(ImagePositionPatient=numbers(position)),
            FrameContentSequence=item(StackID="1", InStackPositionNumber=k + 1, DimensionIndexValues=[1, k + 1]),
        )[0]
        if rescale is not None:
            frame.PixelValueTransformationSequence = _transformation(slope, intercept)
        frames.append(frame)
        content.append(pixels(show(slice_places(position), j), slope, intercept))
    data.PerFrameFunctionalGroupsSequence = Sequence(frames)
    data.PixelData = b"".join(content)
    if change is not None:
        change(data)
    data.save_as(path, enforce_file_format=True)


def _transformation(slope, intercept):
    return item(RescaleSlope=f"{slope:g}", RescaleIntercept=f"{intercept:g}", RescaleType="HU")


def replace_spacing(folder, text):
    """Write another text of as many letters for the pixel spacing 2.0 by 2.0 into all files of a folder."""
    for file in folder.glob("*.dcm"):
        before, after = b"2.0\\2.0 ", text.encode().ljust(8)
        content = file.read_bytes()
        if content.count(before) != 1:
            raise ValueError(f"{file}: the spacing is not there once")
        file.write_bytes(content.replace(before, after))


# ----------------------------------------------------------------------------------------------- sets of scans, HDF5


def write_set(folder, count=4, points=None, labels=True, matrix=MATRIX, origin=ORIGIN, image="{}.nii.gz"):
    """Write images, labels and landmarks as `data_util.build` takes them; the persons' ids are p0, p1, ...

    `points` is the text of a CSV; `matrix` and `origin` are the labels' geometry alone.
    """
    for number in range(count):
        shown, label = person(number)
        write_nifti(folder / "images" / image.format(f"p{number}"), shown)
        if labels:
            write_nifti(folder / "labels" / f"p{number}.nii.gz", label, matrix, origin)
        if points is not None:
            (folder / "points").mkdir(exist_ok=True)
            (folder / "points" / f"p{number}.csv").write_text(points, encoding="utf-8")


INSIDE = "x,y,z\n-10.5,-4.25,-4.5\n-12,-6,2\n"  # landmarks


def volume(number):
    """Volume and labels of an HDF5 scan: uint8 [32, 32, 32] each; the labels are 1, and 2 within it."""
    where = places((32, 32, 32), np.eye(3) / 16, (-1, -1, -1)) - (0.06 * number, 0.04 * number, 0)
    outer, inner = (((where / radius) ** 2).sum(-1) < 1 for radius in ((0.7, 0.6, 0.8), (0.3, 0.4, 0.35)))
    return (30 + 90 * outer + 100 * inner).astype(np.uint8), (outer.astype(np.uint8) + inner).astype(np.uint8)


def write_hdf5(folder, change=None, count=4, masks=True, encoding="utf-8", edit=str, **config):
    """Write set.h5 and its config set.json: scans s0, s1, ...; the first two are scheme 1 and the others scheme 2.

    Args:
        change: function(number, members), where members is the dict of a scan's arrays, that edits it.
        masks: whether the segmentations are masks, 0 and 255, or the labels 1 and 2.
        encoding, edit: of the config; edit is a function of its text.
        config: entries of the config.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / "set.h5", "w") as file:
        for number in range(count):
            shown, labels = volume(number)
            members = {"volume": shown, "segmentation": (labels > 0).astype(np.uint8) * 255 if masks else labels}
            if change is not None:
                change(number, members)
            group = file.create_group(f"s{number}")
            group.attrs["spacing"] = (2.0, 2.0, 2.0)
            for name, value in members.items():
                group[name] = value
    ids = [f"set/s{number}" for number in range(count)]
    content = {
        "files": {"set": {"type": "HDF5", "path": "set.h5"}},
        "image_size": [32, 32, 32],
        "subsets": {"train": ids[:2], "val": ids[2:] or ids},
        "schemes": {"1": {"train": 1.0}, "2": {"val": 1.0}},
        **config,
    }
    (folder / "set.json").write_bytes(edit(json.dumps(content, indent=1)).encode(encoding))


# ----------------------------------------------------------------------------------------------------------- cases


@case
def plain(folder):
    """Nothing is wrong with these."""
    write_nifti(folder / "scan.nii.gz", scan())
    write_other(folder / "scan.nrrd", scan())
    write_other(folder / "scan.mha", scan())
    write_series(folder / "series")
    write_enhanced(folder / "enhanced" / "scan.dcm", range(SIZE[2]))
    write_set(folder / "set", points=INSIDE)
    write_hdf5(folder / "hdf5")
    write_hdf5(folder / "hdf5_labels", masks=False, segmentation_class_value={"outer": 1, "inner": 2})


@case
def cut_off_nifti(folder):
    for share in (50, 99):
        for ending in ("nii", "nii.gz"):
            path = folder / f"first_{share}_percent.{ending}"
            write_nifti(path, scan())
            cut(path, share / 100)


@case
def slope_per_slice(folder):
    write_series(folder / "pet", show=activity, slope=pet_slope, intercept=0, sop=PET)
    write_series(folder / "ct", slope=ct_slope)


def pet_slope(k):
    """Slope of the k-th slice of the PET."""
    return 1 if k == 0 else 0.0003 + 0.00001 * k


def ct_slope(k):
    """Slope of the k-th slice of the CT."""
    return 1 if k < 3 else 0.4


@case
def enhanced_shuffled(folder):
    order = np.random.default_rng(1).permutation(SIZE[2])
    write_enhanced(folder / "scan.dcm", [int(k) for k in order])


@case
def enhanced_gap(folder):
    write_enhanced(folder / "scan.dcm", [k for k in range(SIZE[2]) if k not in (10, 11, 12)])


@case
def enhanced_rescale_per_frame(folder):
    write_enhanced(folder / "scan.dcm", range(SIZE[2]), rescale=lambda j: (1 + 0.05 * j, INTERCEPT))


@case
def scouts_beside_enhanced(folder):
    """The scouts' three files are fewer slices than the one enhanced file has frames."""
    scouts = [(-60.0 + 4 * k, -25.0, 40.0) for k in range(3)]
    write_series(folder, scouts, axes=((0, 1, 0), (0, 0, -1)), series=0, name="scout_{}.dcm")
    write_enhanced(folder / "scan.dcm", range(SIZE[2]), series=1)


SHEAR = np.array(((2, 0, 0), (0, 2, 0.8), (0, 0, 3)))  # slices that each lie 0.8 mm further back


@case
def sheared_fixed(folder):
    """The fixed scan's axes are not at right angles. The moving one is plain."""
    array = scan(matrix=SHEAR)
    write_nrrd(folder / "fixed.nrrd", array, SHEAR)
    write_mha(folder / "fixed.mha", array, SHEAR)
    write_nifti(folder / "moving.nii.gz", scan())


def write_nrrd(path, array, matrix):
    """Write int16 values as NRRD with any matrix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    vectors = " ".join("(" + ",".join(f"{part:g}" for part in column) + ")" for column in np.transpose(matrix))
    header = (
        "NRRD0004",
        "type: short",
        "dimension: 3",
        "space: left-posterior-superior",
        "sizes: " + " ".join(map(str, array.shape)),
        f"space directions: {vectors}",
        "kinds: domain domain domain",
        "endian: little",
        "encoding: raw",
        "space origin: (" + ",".join(f"{part:g}" for part in ORIGIN) + ")",
    )
    path.write_bytes("\n".join((*header, "", "")).encode() + array.T.astype("<i2").tobytes())


def write_mha(path, array, matrix):
    """Write int16 values as MHA with any matrix."""
    lengths = np.linalg.norm(matrix, axis=0)
    header = (
        "ObjectType = Image",
        "NDims = 3",
        "BinaryData = True",
        "BinaryDataByteOrderMSB = False",
        "CompressedData = False",
        "TransformMatrix = " + " ".join(f"{part:.9g}" for part in (matrix / lengths).T.ravel()),
        "Offset = " + " ".join(f"{part:g}" for part in ORIGIN),
        "CenterOfRotation = 0 0 0",
        "AnatomicalOrientation = RAI",
        "ElementSpacing = " + " ".join(f"{part:.9g}" for part in lengths),
        "DimSize = " + " ".join(map(str, array.shape)),
        "ElementType = MET_SHORT",
        "ElementDataFile = LOCAL",
        "",
    )
    path.write_bytes("\n".join(header).encode() + array.T.astype("<i2").tobytes())


@case
def sheared_sform(folder):
    """A tilted gantry, converted: the sform has the tilt, which a qform cannot have."""
    write_nifti(folder / "scan.nii.gz", scan(matrix=SHEAR), SHEAR, qform=MATRIX)


def body(where):
    """Whether places lie in the body: a cylinder, so that the corners of every slice are outside."""
    middle = np.array(ORIGIN) + (np.array(SIZE) - 1) * SPACING / 2
    return (((where - middle)[..., :2] / (18, 20)) ** 2).sum(-1) < 1


@case
def nan_outside_body(folder):
    array = np.where(body(places()), grey(places()), np.nan).astype(np.float32)
    write_nifti(folder / "scan.nii.gz", array)
    write_nifti(folder / "scan.nii", array)


@case
def monochrome1(folder):
    """How a CT is to be drawn, white or black, changes nothing in its HU."""

    def change(k, data):
        data.PhotometricInterpretation = "MONOCHROME1"

    write_series(folder / "series", change=change)


PADDING = 63536  # -2000 as a signed number of 16 bits


@case
def padding_unsigned(folder):
    """The scanner's padding around the body is above all grey values."""

    def change(k, data):
        array = np.frombuffer(data.PixelData, "<u2").reshape(data.Rows, data.Columns).copy()
        array[~body(slice_places(usual_positions()[k])).T] = PADDING
        data.PixelData = array.tobytes()
        data.add_new((0x0028, 0x0120), "US", PADDING)

    write_series(folder / "series", change=change)


DRIFT = [(-30.0, -25.0, -40 + 3 * k + 0.27 * max(0, k - 30)) for k in range(60)]


@case
def drifting_slices(folder):
    """60 slices, 3 mm apart up to the 31st and 3.27 mm beyond: with one spacing for all, the middle is 4 mm off."""
    write_series(folder / "series", DRIFT, show=low_grey)


def low_grey(where):
    """`grey`, less steep along z, for long scans."""
    return grey(where) - 7 * np.asarray(where)[..., 2]


@case
def pixel_spacing_zero(folder):
    def change(k, data):
        data.PixelSpacing = ["0", "0"]

    write_series(folder / "series", change=change)


POINTS = {
    "decimal_comma": "x,y,z\n-10,5,-4,25,-4,5\n",
    "id_without_column": "x,y,z\n1,-10.5,-4.25,-4.5\n2,-12,-6,2\n",
    "id_and_no_header": "1,-10.5,-4.25,-4.5\n2,-12,-6,2\n",
}


@case
def points_malformed(folder):
    """The landmark meant is (-10.5, -4.25, -4.5)."""
    for name, text in POINTS.items():
        write_set(folder / name, 2, text, labels=False)
    write_nifti(folder / "scan.nii.gz", scan())


@case
def one_landmark_without_header(folder):
    write_set(folder, 2, "-10.5,-4.25,-4.5\n", labels=False)


@case
def landmarks_outside(folder):
    """Landmarks in voxels instead of mm, and of another scan: none lies in any volume."""
    write_set(folder, points="x,y,z\n110,111,112\n115,108,120\n")


@case
def label_without_geometry(folder):
    """Labels as of a tool that saves an array without its header: as many voxels, of 1 mm, from 0 on."""
    write_set(folder, points=INSIDE, matrix=np.eye(3), origin=(0, 0, 0))


@case
def lits_in_one_folder(folder):
    for number in range(4):
        shown, label = person(number)
        write_nifti(folder / f"volume-{number}.nii", shown)
        write_nifti(folder / f"segmentation-{number}.nii", label)


@case
def mhd_raw(folder):
    """In `all` images and labels are MHD, in `labels` the labels alone."""
    for number in range(4):
        shown, label = person(number)
        write_other(folder / "all" / "images" / f"p{number}.mhd", shown)
        write_other(folder / "all" / "labels" / f"p{number}.mhd", label)
        write_nifti(folder / "labels" / "images" / f"p{number}.nii.gz", shown)
        write_other(folder / "labels" / "labels" / f"p{number}.mhd", label)


@case
def background_label(folder):
    write_hdf5(folder, masks=False, segmentation_class_value={"background": 0, "outer": 1, "inner": 2})


@case
def nan_in_hdf5(folder):
    def change(number, members):
        if number == 3:
            members["volume"] = np.where(members["volume"] > 200, np.nan, members["volume"]).astype(np.float32)

    write_hdf5(folder, change)


def named(charset, name):
    """A change of a slice: the patient's name in a character set."""

    def change(k, data):
        data.SpecificCharacterSet, data.PatientName, data.PatientID = charset, name, "P2"
        data.SeriesDescription = name.replace("^", " ")

    return change


NAMES = {
    "name_latin1": ("ISO_IR 100", "Pr\u00fcfk\u00f6rper^Gro\u00df"),
    "name_chinese": ("ISO_IR 192", "\u6d4b\u8bd5^\u6a21\u578b"),
}


@case
def name_latin1(folder):
    write_series(folder / "series", change=named(*NAMES["name_latin1"]))


@case
def name_chinese(folder):
    write_series(folder / "series", change=named(*NAMES["name_chinese"]))


@case
def pixel_spacing_comma(folder):
    """Of three scans the second one's pixel spacing has decimal commas."""
    for number in range(3):
        write_series(folder / "images" / f"p{number}", show=lambda where, n=number: grey(where) - 20 * n)
    replace_spacing(folder / "images" / "p1", "2,0\\2,0")


@case
def one_slice(folder):
    write_nifti(folder / "scan.nii.gz", scan((20, 22, 1), np.diag((10, 10, 10))), np.diag((10, 10, 10)))
    write_nifti(folder / "other.nii.gz", scan((20, 22, 24), np.diag((10, 10, 10))), np.diag((10, 10, 10)))


@case
def direction_jitter(folder):
    """Every other slice says the same geometry in other digits."""

    def alternate(tag, even, odd):
        return lambda k, data: setattr(data, tag, odd if k % 2 else even)

    straight = ["1", "0", "0", "0", "1", "0"]
    for name, odd in (
        ("minus_zero", ["1", "-0", "0", "-0", "1", "0"]),
        ("millionth", ["1", "-0.000001", "0", "0.000001", "1", "0"]),
    ):
        write_series(folder / name, change=alternate("ImageOrientationPatient", straight, odd))
    spacings = ["0.78125", "0.78125"], ["0.7813", "0.7813"]
    write_series(folder / "spacing", spacing=0.78125, change=alternate("PixelSpacing", *spacings))


@case
def broken_link(folder):
    """All slices are there, and links to files that are not."""
    write_series(folder / "series")
    for number in range(5):
        os.symlink("gone.dcm", folder / "series" / f"link_{number}.dcm")


@case
def copied_slice(folder):
    """Two slices are there twice, in files of another name."""
    write_series(folder / "series")
    for k in (10, 11):
        shutil.copy(folder / "series" / f"{k:03d}.dcm", folder / "series" / f"again_{k:03d}.dcm")


@case
def empty_hdf5_volume(folder):
    """A volume without voxels, and one without a space for any."""

    def without_voxels(number, members):
        if number == 1:
            del members["segmentation"]
            members["volume"] = np.zeros((0, 32, 32), np.uint8)

    def without_space(number, members):
        if number == 1:
            del members["segmentation"]
            members["volume"] = h5py.Empty("f")

    write_hdf5(folder / "without_voxels", without_voxels)
    write_hdf5(folder / "without_space", without_space)


@case
def json_bom(folder):
    write_hdf5(folder, encoding="utf-8-sig")


FLOAT_LABEL = 1.0000046


@case
def float_labels(folder):
    """Labels that went through a resampling: 1.0000046 for 1."""
    write_set(folder)
    for number in range(4):
        label = person(number)[1]
        write_nifti(folder / "labels" / f"p{number}.nii.gz", (label * FLOAT_LABEL).astype(np.float32))


@case
def checkpoint_file(folder):
    """Two scans to register; the checkpoint is given as <run>/model-<step>.index."""
    write_nifti(folder / "fixed.nii.gz", scan())
    write_nifti(folder / "moving.nii.gz", scan())


@case
def register_arguments(folder):
    """A scan for register(); the other one is made from it in Python, as CASES.md says."""
    write_nifti(folder / "scan.nii.gz", scan())


def make(name, folder):
    """Make the case of a name in a folder, which need not be there, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pydicom")
        CASES[name](folder)
    return folder
