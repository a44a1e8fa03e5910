import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_util.scans.view import CROPS, ENDS, PRESETS, View, flipped_axes
from errors import UserError

NUMBERS = st.floats(0.5, 99, allow_nan=False)
ORIENTATIONS = st.tuples(*map(st.sampled_from, ENDS)).map("".join)
VIEWS = st.builds(
    View,
    orientation=st.none() | ORIENTATIONS,
    crop=st.none() | st.sampled_from(CROPS),
    window=st.none() | st.tuples(NUMBERS, NUMBERS),
    spacing=st.none() | st.tuples(NUMBERS, NUMBERS, NUMBERS),
) | st.builds(View, percentiles=st.just((2, 98.5)))


@given(VIEWS)
def test_a_view_survives_json_beside_other_keys(view):
    values = json.loads(json.dumps({"base_network": "VTN", **view.to_dict()}))
    assert View.from_dict(values, "x.json") == view


@given(VIEWS, VIEWS)
def test_what_a_view_says_stays_and_the_rest_comes_from_the_other(view, other):
    both = view.completed(other)
    for name, value in view.to_dict().items():
        assert list(getattr(both, name)) == list(value)
    for name in ("orientation", "crop", "spacing"):
        if getattr(view, name) is None:
            assert getattr(both, name) == getattr(other, name)
    assert both.differences(view) == []


def test_only_what_both_know_can_differ():
    view, other = View("LPS", "liver", (120, 290)), View("RPI", None, (40, 400))
    assert view.differences(other) == ["orientation LPS, not RPI", "window (120.0, 290.0), not (40.0, 400.0)"]
    assert view.differences(View()) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"orientation": "LPX"}, "'LPX'"),
        ({"orientation": "PLS"}, "'PLS'"),
        ({"orientation": "lps"}, "'lps'"),
        ({"orientation": 7}, "7"),
        ({"crop": "heart"}, "'heart'"),
        ({"window": [120]}, r"\[120\]"),
        ({"window": [120, 0]}, "width"),
        ({"window": [120, float("nan")]}, "two numbers"),
        ({"window": [True, 290]}, "two numbers"),
        ({"window": "120,290"}, "'120,290'"),
        ({"percentiles": [99, 1]}, "lower one first"),
        ({"percentiles": [1, 101]}, "0..100"),
        ({"spacing": [1, 1, 0]}, "above 0"),
        ({"spacing": [1, 1]}, "three numbers"),
        ({"window": [1, 2], "percentiles": [1, 2]}, "leave one"),
    ],
)
def test_what_is_wrong_is_named_with_its_file(values, message):
    with pytest.raises(UserError, match=rf"^x\.json: .*{message}"):
        View.from_dict(values, "x.json")


def test_flipped_axes():
    assert [flipped_axes(o) for o in ("LPS", "RPI", "RAS", "LAI")] == [[], [0, 2], [0, 1], [1, 2]]


def test_presets_leave_the_orientation_open():
    assert all(view.orientation is None for view in PRESETS.values())
