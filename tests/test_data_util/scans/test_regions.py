import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from data_util.scans.frame import Frame
from data_util.scans.preprocessing import crop_box
from data_util.scans.regions import LIVER_RANGES, REGIONS, body_mask, brain_mask, doubts, liver_mask
from errors import UserError

AIR, FAT, MUSCLE, LIVER, BONE = -1000, -100, 30, 110, 700
IDENTITY = (1, 0, 0, 0, 1, 0, 0, 0, 1)


def person(spacing=(3.0, 3.5, 6.0), extent=(360, 280, 180), liver=LIVER, seed=0):
    """A made-up CT in mm: an elliptic body of fat, muscle and spine on a table, its liver on its right, and noise."""
    size = tuple(round(mm / step) for mm, step in zip(extent, spacing, strict=True))
    x, y, z = (np.arange(n) * step for n, step in zip(size, spacing, strict=True))
    x, y, z = x[:, None, None] - extent[0] / 2, y[None, :, None] - 130, z[None, None, :]
    ct = np.full(size, AIR, np.float32)
    ct[((x / 160) ** 2 + (y / 105) ** 2 <= 1) & (z >= 0)] = FAT
    ct[((x / 145) ** 2 + (y / 90) ** 2 <= 1) & (z >= 0)] = MUSCLE - 60
    organ = ((x + 65) / 70) ** 2 + ((y + 5) / 65) ** 2 + ((z - 100) / 60) ** 2 <= 1
    ct[organ] = liver
    ct[(x**2 + (y - 70) ** 2 <= 20**2) & (z >= 0)] = BONE
    ct[(np.abs(x) < 170) & (y > 125) & (y < 133) & (z >= 0)] = 200  # the table, apart from the back
    ct += np.random.default_rng(seed).normal(0, 12, size)
    return Frame(size, spacing, (-180, -130, 40), IDENTITY).put(ct.astype(np.int16)), organ


def literal_liver(image):
    """The algorithm word for word: a median over the disk's every voxel, connected regions at full resolution."""
    array = np.swapaxes(sitk.GetArrayFromImage(image), 0, 2).astype(np.float64)
    grey = ndimage.gaussian_filter(array, 2, mode="nearest")
    radius = 26 / np.array(image.GetSpacing()[:2])
    reach = radius.astype(int)
    x, y = np.ogrid[-reach[0] : reach[0] + 1, -reach[1] : reach[1] + 1]
    disk = (x / radius[0]) ** 2 + (y / radius[1]) ** 2 <= 1
    best, largest = None, 0
    for low, high in LIVER_RANGES:
        marked = (grey >= low) & (grey <= high)
        if marked.sum() <= largest:
            continue
        for k in range(marked.shape[2]):
            marked[..., k] = ndimage.median_filter(marked[..., k].astype(np.uint8), footprint=disk, mode="nearest")
        labels, _ = ndimage.label(marked)
        sizes = np.bincount(labels.ravel())[1:]
        if sizes.max(initial=0) > largest:
            best, largest = labels == np.argmax(sizes) + 1, sizes.max()
    return best


def dice(first, second):
    return 2 * np.sum(first & second) / (first.sum() + second.sum())


@pytest.mark.parametrize(
    ("spacing", "liver"), [((3.0, 3.5, 6.0), LIVER), ((3.0, 3.5, 6.0), 55), ((2.6, 1.9, 9.0), LIVER)]
)
def test_the_liver_is_what_the_literal_algorithm_finds(spacing, liver):
    image, organ = person(spacing, liver=liver)
    found, expected = liver_mask(image), literal_liver(image)
    assert found.dtype == bool
    assert dice(found, expected) > 0.98
    np.testing.assert_allclose(crop_box(found), crop_box(expected), atol=2)
    low, high = crop_box(found)
    assert organ[tuple(map(slice, low, high))].sum() > 0.95 * organ.sum()
    assert doubts(image, found, "liver") == []


def test_the_liver_box_holds_the_liver_where_the_slice_ends_in_it():
    image, organ = person()
    cut = image[10:, :, :]  # the edge of the slice goes through the liver
    low, high = crop_box(liver_mask(cut))
    box = np.zeros(cut.GetSize(), bool)
    box[tuple(map(slice, low, high))] = True
    assert np.sum(organ[10:] & box) > 0.98 * np.sum(organ[10:])


def test_a_scan_without_liver_is_refused():
    image, _ = person(liver=FAT)
    with pytest.raises(UserError, match="no liver found: no connected soft tissue of 50 ml"):
        liver_mask(image)


def test_a_scan_that_is_no_ct_is_refused():
    image, _ = person()
    magnetic = sitk.Cast(sitk.Abs(image), sitk.sitkInt16)
    with pytest.raises(UserError, match="lowest grey value is 0, and a CT in Hounsfield units has air"):
        liver_mask(magnetic)
    image.SetMetaData("0008|0060", "MR")
    with pytest.raises(UserError, match="the scan is MR"):
        liver_mask(image)


@pytest.mark.parametrize("spacing", [(3.0, 3.5, 6.0), (5.0, 2.0, 20.0)])
def test_the_body_is_found_without_its_table_and_with_its_lungs(spacing):
    image, _ = person(spacing)
    array = np.swapaxes(sitk.GetArrayFromImage(image), 0, 2).copy()
    size = array.shape
    x, y = ((np.arange(n) * step) for n, step in zip(size[:2], spacing, strict=False))
    x, y = x[:, None] - 180, y[None, :] - 130
    expected = np.broadcast_to(((x / 160) ** 2 + (y / 105) ** 2 <= 1)[..., None], size)
    lung = ((x - 70) / 40) ** 2 + (y / 50) ** 2 <= 1
    array[lung] = -850
    found = body_mask(Frame.of(image).put(array))
    assert dice(found, expected) > 0.97
    assert found[lung].mean() > 0.98
    assert not found[:, y[0] > 128].any()
    assert doubts(image, found, "body") == []


def test_the_body_of_an_mr_is_found_by_its_own_contrast():
    image, _ = person()
    array = np.swapaxes(sitk.GetArrayFromImage(image), 0, 2)
    mr = np.where(array > -500, 300 + array / 10, 15).astype(np.float32)
    expected = body_mask(image)
    assert dice(body_mask(Frame.of(image).put(mr)), expected) > 0.97


def test_a_head_is_cut_off_at_the_neck():
    size, spacing = (50, 60, 90), (4.0, 4.0, 4.0)
    x, y, z = (np.arange(n) * 4.0 for n in size)
    x, y = x[:, None, None] - 100, y[None, :, None] - 120
    head = (x / 75) ** 2 + (y / 95) ** 2 + ((z - 230) / 110) ** 2 <= 1
    neck = ((x / 55) ** 2 + (y / 60) ** 2 <= 1) & (z < 200)
    image = Frame(size, spacing, (0, 0, 0), IDENTITY).put(np.where(head | neck, 500, 20).astype(np.float32))
    found = brain_mask(image)
    rows = np.flatnonzero(found.any(axis=(0, 1)))
    assert rows[-1] == pytest.approx(340 / 4, abs=1)
    assert len(rows) == 200 / 4
    assert dice(found[..., rows[0] :], (head | neck)[..., rows[0] :]) > 0.97
    assert doubts(image, found, "brain") == []


@pytest.mark.parametrize("kind", ["body", "brain"])
@pytest.mark.parametrize("grey", [0, -1000, 7.5])
def test_a_scan_of_nothing_has_no_body(kind, grey):
    with pytest.raises(UserError, match="no body found"):
        REGIONS[kind](Frame((30, 31, 32), (4, 4, 4), (0, 0, 0), IDENTITY).put(np.full((30, 31, 32), grey, np.float32)))


def test_doubts_tell_size_and_side():
    image, organ = person()
    assert doubts(image, organ, "liver") == []
    speck = np.zeros_like(organ)
    speck[40:50, 30:40, 10:15] = True
    said = doubts(image, speck, "liver")
    assert said[0] == "the liver found has 32 ml, where 300 to 4000 are usual"
    mirrored = sitk.Flip(image, (True, False, False))
    mirrored.CopyInformation(image)
    assert "patient's left" in doubts(mirrored, organ[::-1], "liver")[-1]


def test_a_brain_alone_may_be_a_body():
    image = sitk.Image(20, 20, 20, sitk.sitkUInt8)
    image.SetSpacing((10, 10, 10))  # a voxel is 1 ml
    mask = np.zeros((20, 20, 20), bool)
    mask[:8, :8, :7] = True
    assert doubts(image, mask, "body") == ["the body found has 448 ml, where 500 to 150000 are usual"]
    mask[:12, :14, :11] = True
    assert doubts(image, mask, "body") == doubts(image, mask, "brain") == []
