import numpy as np
import pytest
import SimpleITK as sitk

from data_util.making.brains import GREY_MATTER, WHITE_MATTER, brain_mask, tissue_labels
from data_util.scans.frame import Frame

SIZE, SPACING = (44, 52, 46), (4.0, 4.0, 4.5)


def made_up_head(centre=(88, 104, 100), stretch=(1.0, 1.0, 1.0), seed=0):
    """A head of ellipsoids, float32 image, and its tissues, uint8 [x, y, z]: 3 is fluid."""
    grids = np.meshgrid(*(np.arange(n) * mm for n, mm in zip(SIZE, SPACING, strict=True)), indexing="ij")

    def within(*radii, at=(0, 0, 0)):
        parts = zip(grids, centre, at, radii, stretch, strict=True)
        return sum(((x - c - a * s) / (r * s)) ** 2 for x, c, a, r, s in parts) < 1

    grey = np.zeros(SIZE, np.float32)
    tissues = np.zeros(SIZE, np.uint8)
    for radii, value in (((76, 92, 86), 190), ((70, 86, 80), 8)):  # fat of the scalp, bone
        grey[within(*radii)] = value
    grey[within(6, 12, 8, at=(0, 88, -20))] = 150  # a nose
    for radii, at, value, tissue in (
        ((60, 76, 70), (0, 0, 0), 85, GREY_MATTER),
        ((42, 60, 52), (0, 0, 5), 125, WHITE_MATTER),
        ((12, 26, 14), (0, 8, 4), 30, 3),
    ):
        inside = within(*radii, at=at)
        grey[inside], tissues[inside] = value, tissue
    grey += np.random.default_rng(seed).normal(0, 3, SIZE).astype(np.float32)
    return Frame(SIZE, SPACING, (0.0, 0.0, 0.0), tuple(np.eye(3).ravel())).put(np.maximum(grey, 0)), tissues


def dice(a, b):
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


@pytest.fixture(scope="module")
def found():
    """Mask of a head's brain, found by another head whose brain is known, and the head and its tissues."""
    template, known = made_up_head()
    brain = Frame.of(template).put((known > 0).astype(np.uint8))
    head, tissues = made_up_head(centre=(94, 98, 104), stretch=(0.94, 1.05, 0.97), seed=1)
    return brain_mask(head, template, brain), head, tissues


def test_the_brain_is_found_in_a_head_without_skull_and_scalp(found):
    mask, head, tissues = found
    assert mask.shape == SIZE
    assert dice(mask, tissues > 0) > 0.97
    grey = sitk.GetArrayViewFromImage(head).transpose(2, 1, 0)
    assert not (mask & (grey > 160)).any()
    assert mask[tissues == 3].mean() > 0.95  # fluid within is filled


def test_grey_and_white_matter_are_told_apart_and_fluid_is_neither(found):
    mask, head, tissues = found
    labels = tissue_labels(head, mask)
    assert labels.dtype == np.uint8
    for tissue in (GREY_MATTER, WHITE_MATTER):
        assert dice(labels == tissue, tissues == tissue) > 0.95
    assert not labels[~mask].any()
