import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st

from data_util.making.labels import read_labels
from data_util.scans.frame import Frame
from data_util.scans.images import to_array
from errors import UserError

FRAME = Frame((4, 3, 2), (2, 2, 3), (-30, -25, -40), (1, 0, 0, 0, 1, 0, 0, 0, 1))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The path of a label image that each test writes anew."""
    return tmp_path_factory.mktemp("labels") / "p.nrrd"


def write(file, values, kind):
    array = np.zeros(FRAME.size, kind)
    array.ravel()[: len(values)] = values
    sitk.WriteImage(FRAME.put(array), str(file))
    return array


@settings(max_examples=50)
@given(
    st.lists(st.integers(0, 65535), min_size=1, max_size=20).filter(any),
    st.lists(st.floats(-9e-4, 9e-4), min_size=20, max_size=20),
)
def test_labels_that_are_nearly_whole_numbers_are_rounded(file, values, errors):
    write(file, np.add(values, errors[: len(values)]), np.float64)
    kept = to_array(read_labels(file, "all"))
    assert kept.ravel()[: len(values)].tolist() == values
    assert not kept.ravel()[len(values) :].any()


@settings(max_examples=50)
@given(st.one_of(st.floats(1.1e-3, 0.5), st.floats(0.5, 1 - 1.1e-3)), st.integers(-3, 70000))
def test_a_value_that_is_no_label_is_refused_and_told_in_full(file, part, whole):
    write(file, [1, 2, whole + part], np.float64)
    with pytest.raises(UserError, match="labels are whole numbers from 0 to 65535") as error:
        read_labels(file, "all")
    assert f"has the value {whole + part!r}," in str(error.value)


@pytest.mark.parametrize(("values", "kind"), [([1, -1], np.int16), ([1, 65536], np.int32), ([1, 1e9], np.float32)])
def test_whole_numbers_beyond_the_range_of_labels_are_refused(file, values, kind):
    write(file, values, kind)
    with pytest.raises(UserError, match=f"has the value {values[1]}"):
        read_labels(file, "all")


def test_what_is_kept(file):
    array = write(file, [3, 5, 300, 1.0000046 * 9], np.float32)
    kept = to_array(read_labels(file, {"both": [3, 9], "large": [300]}))
    np.testing.assert_array_equal(kept.ravel()[:4], [3, 0, 300, 3])
    assert kept.dtype == np.uint16
    kept = to_array(read_labels(file, {"mask": [3, 9]}))
    np.testing.assert_array_equal(kept, np.where((array == 3) | (array > 8.9) & (array < 10), 255, 0))
    with pytest.raises(UserError, match="has the labels 3, 5, 9, 300; say which to keep"):
        read_labels(file, None)
    with pytest.raises(UserError, match="no voxel of the labels wanted; its values are 3, 5, 9, 300"):
        read_labels(file, {"other": [4]})
