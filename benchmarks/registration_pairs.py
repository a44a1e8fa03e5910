"""The pairs of scans that benchmarks.registration registers, and the starts that it gives them.

A start turns, shifts or scales the moving scan in space by a known map, so the true map is known wherever it was known
before: for scans that are deformed by a warp of our own making, exactly; for two heads that their makers brought to the
same space (MNI), to the millimetres by which two heads differ.
"""

import functools
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from data_util.making.anatomy import make_phantom
from data_util.making.packages import fetch, unpack
from data_util.making.starter_sources import REFERENCE_FILES, TOTALSEGMENTATOR
from data_util.scans.automatic_view import modality_of
from data_util.scans.frame import Frame
from data_util.scans.images import match_labels, read_image
from errors import UserError

Labels = dict[str, tuple[sitk.Image, sitk.Image]]  # name of the set of labels -> on the fixed and the moving scan


class Pair(NamedTuple):
    """Two scans to register.

    Attributes:
        fixed, moving: SimpleITK images in LPS.
        labels: sets of label images that both have, with the same numbers for the same parts.
        truth: transform of places of the fixed scan to those of the moving one, or None where nobody knows.
    """

    fixed: sitk.Image
    moving: sitk.Image
    labels: Labels
    truth: sitk.Transform | None


class Sources(NamedTuple):
    """Folders of data that are not fetched here, or None: nilearn's templates, those of MRIcron; and two scans."""

    nilearn: Path | None
    mricron: Path | None
    given: dict[str, str | None]


# Parts that two atlases of the cortex both have: numbers of AAL (left, right) -> numbers of Harvard-Oxford.
CORTEX = {
    "precentral gyrus": ((1, 2), (7,)),
    "superior frontal gyrus": ((3, 4), (3,)),
    "middle frontal gyrus": ((7, 8), (4,)),
    "inferior frontal gyrus, opercular": ((11, 12), (6,)),
    "inferior frontal gyrus, triangular": ((13, 14), (5,)),
    "Rolandic operculum": ((17, 18), (42, 43)),
    "supplementary motor area": ((19, 20), (26,)),
    "insula": ((29, 30), (2,)),
    "anterior cingulate": ((31, 32), (29,)),
    "parahippocampal gyrus": ((39, 40), (34, 35)),
    "calcarine cortex": ((43, 44), (24,)),
    "cuneus": ((45, 46), (32,)),
    "lingual gyrus": ((47, 48), (36,)),
    "fusiform gyrus": ((55, 56), (37, 38, 39, 40)),
    "postcentral gyrus": ((57, 58), (17,)),
    "superior parietal lobule": ((59, 60), (18,)),
    "supramarginal gyrus": ((63, 64), (19, 20)),
    "angular gyrus": ((65, 66), (21,)),
    "precuneus": ((67, 68), (31,)),
    "Heschl's gyrus": ((79, 80), (45,)),
    "superior temporal gyrus": ((81, 82), (9, 10)),
    "temporal pole": ((83, 84, 87, 88), (8,)),
    "middle temporal gyrus": ((85, 86), (11, 12, 13)),
    "inferior temporal gyrus": ((89, 90), (14, 15, 16)),
}
# Organs in TotalSegmentator's numbers for CT and for MR.
ORGANS = {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 6, 7: 7, 52: 23, 63: 24, 64: 25}
MOST_ORGAN_NUMBER = 117


def starts() -> dict[str, Callable[[sitk.Image], sitk.AffineTransform]]:
    """Names of the starts, each with a function of the moving scan that gives the map of its places."""
    changes: dict[str, dict] = {"as it is": {}}
    for angle, axis in itertools.product((15, 30, 45), range(3)):
        changes[f"turned {angle} about {'xyz'[axis]}"] = {"angle": angle, "axis": np.eye(3)[axis]}
    changes |= {f"shifted {mm} mm": {"shift": mm} for mm in (20, 50)}
    changes |= {f"scaled {scale}": {"scale": scale} for scale in (0.8, 1.25)}
    changes["all at once"] = {"angle": 30, "axis": (1, 2, -2), "shift": 20, "scale": 0.8}
    return {name: functools.partial(_start, **change) for name, change in changes.items()}


def _start(
    scan: sitk.Image, angle: float = 0, axis: tuple[float, ...] = (0, 0, 1), shift: float = 0, scale: float = 1
) -> sitk.AffineTransform:
    """A turn in degrees and a scale about a scan's middle, and a shift in mm aslant."""
    rotation = sitk.VersorTransform()
    rotation.SetRotation([float(part) for part in axis], float(np.deg2rad(angle)))
    start = sitk.AffineTransform(3)
    start.SetCenter(Frame.of(scan).to_physical(np.subtract(scan.GetSize(), 1) / 2).tolist())
    start.SetMatrix((scale * np.array(rotation.GetMatrix())).tolist())
    start.SetTranslation((shift * np.array([2, -2, 1]) / 3).tolist())
    return start


def moved(scan: sitk.Image, start: sitk.Transform) -> sitk.Image:
    """A scan led elsewhere, on a grid in LPS that holds all of it; its lowest grey value outside."""
    frame = Frame.of(scan)
    corners = frame.to_physical(list(itertools.product(*((0, n - 1) for n in frame.size))))
    led = np.array([start.TransformPoint(corner) for corner in corners.tolist()])
    low, spacing = led.min(axis=0), np.array(frame.spacing)
    size = np.ceil((led.max(axis=0) - low) / spacing).astype(int) + 1
    grid = Frame(tuple(size.tolist()), frame.spacing, tuple(low.tolist()), tuple(np.eye(3).ravel()))
    lowest = float(sitk.GetArrayViewFromImage(scan).min())
    return grid.resample(sitk.Cast(scan, sitk.sitkFloat32), outside=lowest, transform=start.GetInverse())


def pairs(sources: Sources) -> dict[str, Callable[[], Pair]]:
    """Names of the pairs, each with the function that makes it.

    Raises:
        UserError: by such a function, where the pair's data are not here.
    """
    return {
        "MNI and Colin, brains": lambda: mni_and_colin(sources, "ch2bet"),
        "MNI brain and Colin's head": lambda: mni_and_colin(sources, "ch2"),
        "Colin deformed": lambda: colin_deformed(sources),
        "CT deformed": lambda: ct_deformed(),
        "CT and CT": lambda: two_cts(),
        "MR and made CT": lambda: mr_and_made_ct(sources),
        "CT and MR phantoms": lambda: phantoms(),
        "CT and MR": lambda: ct_and_mr(),
        "given": lambda: given(sources.given),
    }


HEADS = ("MNI and Colin, brains", "MNI brain and Colin's head", "Colin deformed")
TWO_MODALITIES = ("MR and made CT", "CT and MR phantoms", "CT and MR")


def _file(folder: Path | None, flag: str, name: str) -> Path:
    if folder is None:
        raise UserError(f"give --{flag} FOLDER, where {name} is")
    return folder / name


def mni_and_colin(sources: Sources, moving: str) -> Pair:
    """The MNI152 template (a brain) and Colin 27; tissues, and parts of the cortex that two atlases both have.

    Harvard-Oxford belongs to the MNI152 space, AAL to Colin 27. Where one atlas draws another line than the other, no
    registration can bring them together: the regions tell which method is better, not how good it is.
    """
    name = "mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
    fixed, grey, white = (
        read_image(_file(sources.nilearn, "nilearn", name.format(kind))) for kind in ("t1", "gm", "wm")
    )
    colin, brain, aal, oxford = (
        read_image(_file(sources.mricron, "mricron", f"{stem}.nii.gz"))
        for stem in (moving, "ch2bet", "aal", "HarvardOxford-cort-maxprob-thr0-1mm")
    )
    oxford = Frame.of(fixed).resample(oxford, nearest=True)
    atlases = (
        _renumbered(oxford, [new for _, new in CORTEX.values()]),
        _renumbered(aal, [n for n, _ in CORTEX.values()]),
    )
    both = {"tissues": (tissues_of_maps(fixed, grey, white), tissues(brain)), "regions": tuple(map(by_side, atlases))}
    return Pair(fixed, colin, both, sitk.Transform())  # type: ignore[arg-type]


def _renumbered(labels: sitk.Image, groups: list[tuple[int, ...]]) -> sitk.Image:
    """Labels of the k-th group as k, from 1; the others as 0."""
    table = np.zeros(int(sitk.GetArrayViewFromImage(labels).max()) + 1, np.uint8)
    for k, numbers in enumerate(groups, 1):
        table[[number for number in numbers if number < len(table)]] = k
    return _like(labels, table[sitk.GetArrayViewFromImage(labels)])


def by_side(labels: sitk.Image) -> sitk.Image:
    """Labels of 1..99, 100 more where they lie on the right of the space's middle plane (LPS, so x < 0)."""
    array = sitk.GetArrayFromImage(labels)
    frame = Frame.of(labels)
    right = frame.origin[0] + frame.spacing[0] * np.arange(frame.size[0]) < 0
    return _like(labels, np.where((array > 0) & right, array + 100, array).astype(np.uint8))


def tissues_of_maps(scan: sitk.Image, grey: sitk.Image, white: sitk.Image) -> sitk.Image:
    """Fluid 1, grey 2 and white matter 3 of a brain: what has most of its voxel, by maps of shares of 255."""
    brain, parts = (
        (sitk.GetArrayViewFromImage(scan) > 0),
        [sitk.GetArrayFromImage(i).astype(int) for i in (grey, white)],
    )
    shares = np.stack([255 - sum(parts), *parts])
    return _like(scan, np.where(brain, shares.argmax(axis=0) + 1, 0).astype(np.uint8))


def tissues(brain: sitk.Image) -> sitk.Image:
    """Fluid 1, grey 2 and white matter 3 of a brain's T1: three means of its grey values (k-means)."""
    grey = sitk.GetArrayFromImage(brain).astype(np.float32)
    inside = grey > 0
    means = np.percentile(grey[inside], [5, 40, 90])
    for _ in range(50):
        nearest = np.abs(grey[inside][:, None] - means).argmin(axis=1)
        means = np.array([grey[inside][nearest == k].mean() for k in range(3)])
    labels = np.zeros(grey.shape, np.uint8)
    labels[inside] = nearest + 1
    return _like(brain, labels)


def _like(image: sitk.Image, array: np.ndarray) -> sitk.Image:
    new = sitk.GetImageFromArray(array)
    new.CopyInformation(image)
    return new


def colin_deformed(sources: Sources) -> Pair:
    """Colin 27 and itself deformed, with other grey values, shading and noise."""
    scan, aal = (read_image(_file(sources.mricron, "mricron", f"{stem}.nii.gz")) for stem in ("ch2", "aal"))
    return deformed(scan, {"116 regions": aal}, 0)


def deformed(scan: sitk.Image, labels: dict[str, sitk.Image], seed: int, seen: sitk.Image | None = None) -> Pair:
    """A scan as moving one, and as fixed one itself deformed by a smooth warp.

    The fixed one has noise (20 HU) where the scan is a CT, and where it is not, other grey values, shading and noise.

    Args:
        scan: the moving scan.
        labels: its label images.
        seed: of the warp.
        seen: what is deformed in its place, such as another contrast on the same voxels; it stays as it is.
    """
    frame, rng = Frame.of(scan), np.random.default_rng(seed)
    truth = smooth_warp(frame, rng)
    fixed = _deform(frame, seen or scan, truth, sitk.sitkLinear)
    if seen is None and modality_of(scan) == "CT":
        grey = sitk.GetArrayFromImage(fixed)
        fixed = _like(fixed, (grey + rng.normal(0, 20, grey.shape)).astype(np.float32))
    elif seen is None:
        grey = sitk.GetArrayFromImage(fixed)
        low, high = np.percentile(grey, (1, 99.5))
        unit = np.clip((grey - low) / (high - low), 0, None)
        bias = ndimage.zoom(rng.uniform(0.9, 1.1, (3, 3, 3)), np.array(grey.shape) / 3, order=2)
        unit = unit**0.85 * bias[tuple(map(slice, grey.shape))] + rng.normal(0, 0.03, grey.shape)
        fixed = _like(fixed, (low + (high - low) * unit).astype(np.float32))
    carried: Labels = {
        name: (_deform(frame, image, truth, sitk.sitkNearestNeighbor), image) for name, image in labels.items()
    }
    return Pair(fixed, scan, carried, truth)


def smooth_warp(frame: Frame, rng: np.random.Generator) -> sitk.DisplacementFieldTransform:
    """A warp of up to 14 mm along each axis, about 4 on the mean, that does not fold."""
    grid = frame.box((0, 0, 0), frame.size, np.maximum(np.multiply(frame.size, frame.spacing) / 4, 8).astype(int))
    field = np.zeros((*grid.size, 3))
    for millimetres, length in ((16, 6.0), (32, 8.0)):
        sigma = [millimetres / mm for mm in grid.spacing]
        smooth = np.stack([ndimage.gaussian_filter(rng.normal(size=grid.size), sigma) for _ in range(3)], -1)
        field += length * smooth / np.abs(smooth).max()
    return sitk.DisplacementFieldTransform(sitk.Cast(grid.put(field), sitk.sitkVectorFloat64))


def _deform(frame: Frame, image: sitk.Image, truth: sitk.Transform, interpolator: int) -> sitk.Image:
    lowest = 0.0 if interpolator == sitk.sitkNearestNeighbor else float(sitk.GetArrayViewFromImage(image).min())
    return sitk.Resample(
        image if interpolator == sitk.sitkNearestNeighbor else sitk.Cast(image, sitk.sitkFloat32),
        *(frame.size, truth, interpolator, frame.origin, frame.spacing, frame.direction, lowest),
    )


@functools.cache
def _sample(name: str, is_label: bool = False) -> sitk.Image:
    """A reference file, or series, of the package that `data_util.sample` fetches."""
    with tempfile.TemporaryDirectory() as folder:
        unpack(fetch(TOTALSEGMENTATOR), {f"{REFERENCE_FILES}{name}": name}, Path(folder))
        return read_image(Path(folder, name), is_label=is_label)


def ct_deformed() -> Pair:
    """The larger CT of the sample, from the legs to the middle of the liver, and itself deformed."""
    scan = _sample("example_ct.nii.gz")
    organs = _sample("example_seg_fast_force_split.nii.gz", True)
    return deformed(scan, {"organs": match_labels(organs, scan)}, 1)


def two_cts() -> Pair:
    """The two CTs of the sample: two people, one from the legs to the liver, of the other 4 cm at the liver."""
    scans = _sample("example_ct_dicom"), _sample("example_ct.nii.gz")
    names = "example_seg_dicom.nii.gz", "example_seg_fast_force_split.nii.gz"
    both = [match_labels(_sample(name, True), scan) for name, scan in zip(names, scans, strict=True)]
    common = [
        n for n in range(1, MOST_ORGAN_NUMBER + 1) if all((sitk.GetArrayViewFromImage(i) == n).any() for i in both)
    ]
    organs = tuple(_renumbered(image, [(number,) for number in common]) for image in both)
    return Pair(*scans, {"organs": organs}, None)  # type: ignore[dict-item]


def mr_and_made_ct(sources: Sources) -> Pair:
    """The T1 of Colin 27 deformed, and a CT made of it: air, fat, muscle, bone, and tissues of the brain in HU."""
    scan, brain, aal = (read_image(_file(sources.mricron, "mricron", f"{n}.nii.gz")) for n in ("ch2", "ch2bet", "aal"))
    return deformed(made_ct(scan, brain), {"116 regions": aal}, 2, seen=scan)


def made_ct(scan: sitk.Image, brain: sitk.Image) -> sitk.Image:
    """A head in HU out of its T1: what is dark around the brain becomes bone, what is brightest becomes fat."""
    grey = sitk.GetArrayFromImage(scan).astype(np.float32)
    head = ndimage.binary_closing(ndimage.gaussian_filter(grey, 1) > 0.08 * np.percentile(grey, 99.5), iterations=4)
    head = np.stack([ndimage.binary_fill_holes(slice_) for slice_ in head])
    kinds, bright = sitk.GetArrayFromImage(tissues(brain)), np.percentile(grey[head], 85)
    hounsfield = np.select(
        [~head, kinds == 1, kinds == 2, kinds == 3, grey < 0.45 * np.median(grey[head]), grey > bright],
        [-1000.0, 8.0, 38.0, 28.0, 800.0, -80.0],
        50.0,
    )
    hounsfield = ndimage.gaussian_filter(hounsfield, 0.6) + np.random.default_rng(3).normal(0, 4, grey.shape)
    return _like(scan, hounsfield.astype(np.float32))


def phantoms() -> Pair:
    """A phantom of `data_util.phantoms` in HU, and it deformed, in another contrast."""
    phantom = make_phantom((96, 96, 96), 7)
    frame = Frame((96, 96, 96), (3.0, 3.0, 3.0), (0.0, 0.0, 0.0), tuple(np.eye(3).ravel()))
    unit = np.asarray(phantom.volume, np.float32) / 255
    seen = frame.put((200 * np.sin(2.2 * np.pi * ndimage.gaussian_filter(unit, 0.7)) ** 2).astype(np.float32))
    ct = frame.put(np.where(ndimage.gaussian_filter(unit, 1) < 0.06, -1000, 700 * unit - 300).astype(np.float32))
    return deformed(ct, {"organ": frame.put(np.asarray(phantom.segmentation, np.uint8) // 255)}, 4, seen=seen)


def ct_and_mr() -> Pair:
    """The sample's MR and CT of two people, 6 and 9 cm of which both show liver and kidneys."""
    fixed, moving = _sample("example_mr_sm.nii.gz"), _sample("example_ct_sm.nii.gz")
    both = (
        match_labels(_sample("example_seg_mr.nii.gz", True), fixed),
        match_labels(_sample("example_seg.nii.gz", True), moving),
    )
    organs = _renumbered(both[0], [(mr,) for mr in ORGANS.values()]), _renumbered(both[1], [(ct,) for ct in ORGANS])
    return Pair(fixed, moving, {"organs": organs}, None)


def given(paths: dict[str, str | None]) -> Pair:
    """The scans of the flags; where there is no moving one, the fixed one deformed, and itself."""
    fixed, moving, of_fixed, of_moving = (
        None if path is None else read_image(path, is_label=name.endswith("labels")) for name, path in paths.items()
    )
    if fixed is None:
        raise UserError("give --fixed and --moving, or --fixed alone, which is then deformed")
    if moving is None:
        return deformed(fixed, {} if of_fixed is None else {"labels": of_fixed}, 5)
    labels: Labels = {} if of_fixed is None or of_moving is None else {"labels": (of_fixed, of_moving)}
    return Pair(fixed, moving, labels, None)
