"""The affine search on a made-up organ that is like none of its mirror images."""

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

from data_util.scans import affine_search
from data_util.scans.affine_search import KINDS, find_affine, find_voxel_affine, left_over
from data_util.scans.frame import Frame
from errors import UserError

SIZE, SPACING = (56, 60, 52), (3.0, 2.8, 3.2)
CENTRE = np.array([10.0, -20, 30])
FRAME = Frame(SIZE, SPACING, tuple(CENTRE - np.multiply(SIZE, SPACING) / 2), tuple(np.eye(3).ravel()))
BALLS = (
    (0, 0, 0, 45, 60),
    (30, 12, -8, 22, 110),
    (-22, 30, 15, 16, 160),
    (-8, -28, -26, 18, 30),
    (6, -10, 34, 14, 200),
)


def organ(places, contrast=1):
    """Grey values 0..255 at places in mm: balls in a ball; contrast -1 inverts what is inside."""
    value = np.zeros(places.shape[:-1])
    for *centre, radius, grey in BALLS:
        inside = 1 / (1 + np.exp((np.linalg.norm(places - CENTRE - centre, axis=-1) - radius) / 2))
        value += inside * (grey - value)
    return value if contrast > 0 else np.where(value > 10, 255 - value, 0)


def scan(matrix=((1, 0, 0), (0, 1, 0), (0, 0, 1)), shift=(0, 0, 0), contrast=1, seed=0):
    """The organ seen through a map about its centre: scan(p) = organ(matrix (p - centre) + centre + shift)."""
    voxels = np.moveaxis(np.indices(SIZE), 0, -1).reshape(-1, 3)
    places = (FRAME.to_physical(voxels) - CENTRE) @ np.transpose(matrix) + CENTRE + shift
    noise = np.random.default_rng(seed).normal(0, 2, len(places))
    return FRAME.put((organ(places, contrast) + noise).reshape(SIZE).astype(np.float32))


def turn(degrees, axis):
    return Rotation.from_rotvec(np.deg2rad(degrees) * np.array(axis) / np.linalg.norm(axis)).as_matrix()


def error(found, matrix, shift):
    """Largest distance in mm of places in the organ from where they should be led."""
    places = CENTRE + 30 * np.random.default_rng(0).uniform(-1, 1, (50, 3))
    led = np.array([found.TransformPoint(place.tolist()) for place in places])
    back = (led - CENTRE) @ np.transpose(matrix) + CENTRE + shift
    return np.linalg.norm(back - places, axis=1).max()


@pytest.mark.parametrize(
    ("kind", "matrix", "shift", "contrast"),
    [
        pytest.param("rigid", turn(20, (1, 2, -1)), (17, -5, 9), 1, marks=pytest.mark.slow),
        ("rigid", turn(45, (0, 1, 3)), (-25, 20, 10), -1),
        pytest.param("similarity", 0.8 * turn(30, (2, -1, 1)), (10, 10, -20), 1, marks=pytest.mark.slow),
        pytest.param(
            "affine", np.diag([1.15, 0.9, 1.05]) @ turn(40, (1, 0, 1)), (5, -30, 12), 1, marks=pytest.mark.slow
        ),
        ("affine", 1.25 * turn(45, (-1, 1, 1)), (20, 5, -15), -1),
    ],
)
def test_a_map_is_found_from_any_start_and_across_contrasts(kind, matrix, shift, contrast):
    found = find_affine(scan(), scan(matrix, shift, contrast, seed=1), kind)
    assert error(found, matrix, shift) < 3  # a voxel
    linear = np.reshape(found.GetMatrix(), (3, 3))
    assert np.linalg.det(linear) > 0
    if kind == "rigid":
        np.testing.assert_allclose(linear @ linear.T, np.eye(3), atol=1e-6)


@pytest.mark.parametrize("shelled", ["moving", pytest.param("fixed", marks=pytest.mark.slow)])
def test_an_organ_is_found_in_a_shell_that_the_other_scan_lacks(shelled):
    """As a brain in a head: over all voxels the two outlines are more alike than what is inside."""
    matrix, shift = turn(25, (1, 2, 0)), np.array([12.0, -9, 6])
    voxels = np.moveaxis(np.indices(SIZE), 0, -1).reshape(-1, 3)
    from_centre = np.linalg.norm((FRAME.to_physical(voxels) - CENTRE) @ matrix.T + shift, axis=1)
    shell = np.where((from_centre > 58) & (from_centre < 68), 120, 0).reshape(SIZE)
    inside = sitk.GetArrayFromImage(scan(matrix, shift)).T
    moving = FRAME.put(np.maximum(inside, shell).astype(np.float32))
    found = (
        find_affine(scan(), moving, "similarity") if shelled == "moving" else find_affine(moving, scan()).GetInverse()
    )
    assert error(found, matrix, shift) < 3


def test_threads_change_no_bit(monkeypatch):
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(affine_search, "MOST_THREADS", threads)
        monkeypatch.setattr(affine_search.os, "sched_getaffinity", lambda _: range(3))
        found.append(find_affine(scan(), scan(turn(10, (1, 2, 0)), (5, 0, 3), seed=1), "rigid").GetParameters())
    assert found[0] == found[1] == found[2]


def test_a_map_in_voxels_leads_the_middle_and_all_around_it_right():
    matrix, shift = turn(25, (1, -1, 2)), np.array([9.0, -6, 12])
    spacings = SPACING, np.multiply(SPACING, (1.5, 1, 0.8))  # the moving scan on another grid
    other = Frame(SIZE, tuple(spacings[1]), FRAME.origin, FRAME.direction)
    volumes = [sitk.GetArrayFromImage(s).T for s in (scan(), other.resample(scan(matrix, shift, seed=1)))]
    found, moved = find_voxel_affine(volumes, spacings, "rigid")
    middle = np.subtract(SIZE, 1) / 2
    voxels = middle + np.random.default_rng(0).uniform(-8, 8, (40, 3))
    led = (voxels - middle) @ (found + np.eye(3)).T + middle + moved
    back = (other.to_physical(led) - CENTRE) @ matrix.T + CENTRE + shift
    assert np.linalg.norm(back - FRAME.to_physical(voxels), axis=1).max() < 3


def test_a_mirror_image_is_not_mirrored_back():
    found = find_affine(scan(), scan(np.diag([-1.0, 1, 1])), "rigid")
    assert np.linalg.det(np.reshape(found.GetMatrix(), (3, 3))) > 0


def test_what_is_left_over_is_seen():
    fixed = sitk.GetArrayFromImage(scan()).T
    turned = sitk.GetArrayFromImage(scan(turn(30, (1, 1, 0)), (8, 0, 0))).T
    degrees, _ = left_over(FRAME, fixed, turned)
    assert degrees == pytest.approx(30, abs=4)
    assert left_over(FRAME, fixed, fixed) == (0, 0)
    assert left_over(FRAME, fixed, np.zeros_like(fixed)) == (0, 0)


def test_mistakes():
    assert KINDS == ("rigid", "similarity", "affine")
    with pytest.raises(UserError, match="'elastic'; known are rigid"):
        find_affine(scan(), scan(), "elastic")
    noise = FRAME.put(np.random.default_rng(5).normal(100, 30, SIZE).astype(np.float32))
    with pytest.raises(UserError, match="nothing in common"):
        find_affine(scan(), noise, "rigid")
    with pytest.raises(UserError, match="nearly everywhere"):
        find_affine(scan(), FRAME.put(np.zeros(SIZE, np.float32)))
