"""Which view a pair of scans is given, and what is doubted about it."""

import numpy as np
import pytest
import SimpleITK as sitk

from data_util.scans.dicom import MODALITY
from data_util.scans.view import PRESETS, View
from views import choose_view


def scan(low, high, modality=None):
    """A scan whose values run from `low` to `high`."""
    image = sitk.GetImageFromArray(np.linspace(low, high, 24**3).reshape((24,) * 3).astype(np.float32))
    if modality is not None:
        image.SetMetaData(MODALITY, modality)
    return image


CT, UNKNOWN, MR = scan(-1000, 900), scan(0, 900), scan(0, 900, "MR")
BY_PERCENTILES = View("LPS", "brain", percentiles=(1, 99))
IN_A_WINDOW = View("RPI", "body", window=(40, 400))


@pytest.mark.parametrize(
    ("known", "fixed", "moving", "doubted"),
    [
        (BY_PERCENTILES, CT, MR, ["the fixed scan is a CT, but the model knows scans scaled by percentiles"]),
        (BY_PERCENTILES, MR, UNKNOWN, []),
        (IN_A_WINDOW, CT, MR, ["the moving scan is MR, but the model knows scans in a window of Hounsfield units"]),
        (IN_A_WINDOW, CT, UNKNOWN, []),
    ],
)
def test_scans_of_another_kind_than_the_model_was_trained_on_are_doubted(known, fixed, moving, doubted):
    view, chosen, remarks = choose_view(None, known, True, fixed, moving)
    assert view == known
    assert not chosen
    assert len(remarks) == len(doubted)
    assert all(remark.startswith(begin) for remark, begin in zip(remarks, doubted, strict=True))


def test_without_a_model_nothing_is_doubted():
    view, _, remarks = choose_view("brain", View(), False, CT, MR)
    assert view == View("LPS").completed(PRESETS["brain"])
    assert not remarks
