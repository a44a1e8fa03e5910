"""Made-up anatomy: a body with an organ in it, its label and landmarks, for phantoms.

There is one template, a body of the population, written as formulas over the unit box -1..1 (so it has no resolution).
An individual is the template seen through a flow of its own, and adds lesions, intensities, texture and noise. Arrays
are [x, y, z], oriented as LPS: x runs to the patient's left, y to the back, z to the head.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from data_util.grey_values import to_uint8
from data_util.hdf5 import Scan
from data_util.making.known_flows import carry_points, individual_flow
from errors import UserError

SMALLEST_SIZE = 16

ORGAN_CENTRE, ORGAN_RADII = np.array([-0.22, -0.12, 0.0]), np.array([0.56, 0.48, 0.66])
# The vessel tree: places of its nodes, and its branches as (from, to, radius). Nodes 1, 2 and 3 are branch points.
VESSEL_NODES = ORGAN_CENTRE + ORGAN_RADII * np.array(
    [
        [0.95, 0.35, -0.30],
        [0.38, 0.15, -0.10],
        [-0.12, 0.28, 0.28],
        [-0.05, -0.30, -0.20],
        [-0.60, 0.40, 0.22],
        [-0.20, 0.05, 0.72],
        [-0.58, -0.18, -0.42],
        [0.18, -0.68, 0.05],
    ]
)
VESSELS = [(0, 1, 0.075), (1, 2, 0.055), (1, 3, 0.055), (2, 4, 0.04), (2, 5, 0.04), (3, 6, 0.04), (3, 7, 0.04)]
CYSTS = ORGAN_CENTRE + ORGAN_RADII * np.array([[-0.62, -0.30, 0.25], [0.30, -0.40, 0.50], [-0.25, 0.55, -0.45]])
CYST_RADIUS = 0.075
# Grey values of the tissues, as a CT of the body and as an MR of it may show them; those of lesions are two.
GREY_VALUES = {
    "fat": (55, 215),
    "muscle": (105, 70),
    "spleen": (140, 50),
    "stomach": (70, 160),
    "aorta": (185, 20),
    "bone": (225, 30),
    "marrow": (180, 190),
    "organ": (150, 120),
    "vessels": (205, 60),
    "cysts": (85, 235),
}
LESIONS = ([120, 175], [180, 75])
LANDMARKS = np.concatenate([VESSEL_NODES[1:4], CYSTS])


def _distance_to_branch(place: Sequence[np.ndarray], start: np.ndarray, end: np.ndarray) -> np.ndarray:
    along = end - start
    share = sum((place[k] - start[k]) * along[k] for k in range(3)) / (along @ along)
    share = np.clip(share, 0, 1)
    return np.sqrt(sum((place[k] - start[k] - share * along[k]) ** 2 for k in range(3)))


def _ellipsoid(place: Sequence[np.ndarray], centre: Any, radii: Any) -> np.ndarray:
    """Return about how far outside an ellipsoid a place is: negative inside, zero on it."""
    radius = np.sqrt(sum(((place[k] - centre[k]) / radii[k]) ** 2 for k in range(3)))
    return (radius - 1) * np.float32(np.mean(radii))


def _draw_body(
    place: Sequence[np.ndarray], rng: np.random.Generator, edge: float, mr: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Paint an individual at template places (three arrays [X, Y, Z], -1..1): the image, 0..255, and the organ mask.

    Edges are `edge` wide. It is painted as a CT, or as an `mr` of the same body. What is drawn at random differs from
    one individual to the next; the rest is the template.
    """
    x, y, z = place
    image = np.full(x.shape, 6, dtype=np.float32)
    grey = {name: values[mr] for name, values in GREY_VALUES.items()}

    def paint(outside: np.ndarray, value: float, spread: float = 4, within: Any = 1) -> np.ndarray:
        inside = within / (1 + np.exp(np.clip(outside / edge, -30, 30)))
        image[...] += inside * (value + rng.uniform(-spread, spread) - image)
        return inside

    outline = (np.sqrt((x / 0.88) ** 2 + (y / 0.74) ** 2) - 1) * 0.8 + 0.015 * np.cos(3 * z) * np.cos(4 * x)
    paint(outline, grey["fat"])
    inside_rim = paint(outline + 0.07, grey["muscle"])  # muscle and bowel
    spleen = _ellipsoid(place, (0.55, 0.12, 0.15), (0.22, 0.26, 0.40))
    paint(spleen, grey["spleen"])
    stomach = _ellipsoid(place, (0.42, -0.32, 0.25), (0.20, 0.20, 0.42))
    paint(stomach, grey["stomach"])
    aorta = np.hypot(x - 0.12, y - 0.26) - 0.07
    paint(aorta, grey["aorta"])
    spine = np.hypot((x - 0.03) / 1.1, y - 0.50) - 0.15
    paint(spine, grey["bone"])
    paint(spine + 0.06, grey["marrow"])

    lumps = 0.05 * np.sin(5 * x + 1) * np.cos(4 * y - 0.5) + 0.05 * np.sin(5 * z + 2 * x) + 0.04 * np.cos(6 * y + 3 * z)
    notch = _ellipsoid(place, (0.16, 0.30, -0.25), (0.22, 0.30, 0.45))
    organ = np.maximum(_ellipsoid(place, ORGAN_CENTRE, ORGAN_RADII) + lumps, -notch)
    within = paint(organ, grey["organ"])
    vessels = np.minimum.reduce(
        [_distance_to_branch(place, VESSEL_NODES[a], VESSEL_NODES[b]) - r for a, b, r in VESSELS]
    )
    paint(vessels, grey["vessels"], within=within)
    for centre in CYSTS:
        paint(_ellipsoid(place, centre, np.full(3, CYST_RADIUS)), grey["cysts"], within=within)
    for _ in range(rng.integers(1, 4)):  # lesions
        centre = ORGAN_CENTRE + ORGAN_RADII * rng.uniform(-0.6, 0.6, 3)
        paint(_ellipsoid(place, centre, rng.uniform(0.03, 0.09, 3)), rng.choice(LESIONS[mr]), spread=8, within=within)

    texture = ndimage.gaussian_filter(rng.standard_normal(x.shape, dtype=np.float32), 1.5)
    image += inside_rim * texture * (3 / texture.std())
    image += 2 * rng.standard_normal(x.shape, dtype=np.float32)
    return image, organ < 0


def make_phantom(size: Sequence[int], seed: Any, mr: bool = False) -> Scan:
    """Make the individual of a seed: a Scan [X, Y, Z] with mask and six landmarks float32 [6, 3].

    The landmarks are the three branch points of the organ's vessel tree and the centres of its three cysts; their
    order is the same in everyone.

    Args:
        size: (X, Y, Z).
        seed: anything that numpy.random.default_rng takes.
        mr: as an MR shows the individual, in place of a CT.

    Returns:
        The Scan.

    Raises:
        UserError: the size is below 16 voxels along an axis.
    """
    check_size(size)
    rng = np.random.default_rng(seed)
    flow = individual_flow(size, rng)
    last = np.array(size, dtype=np.float32) - 1
    place = [(np.indices(size, dtype=np.float32)[k] + flow[..., k]) * (2 / last[k]) - 1 for k in range(3)]
    image, organ = _draw_body(place, rng, 1.2 / min(size), mr)
    return Scan(
        volume=to_uint8(image),
        segmentation=np.where(organ, 255, 0).astype(np.uint8),
        points=carry_points((LANDMARKS + 1) / 2 * last, flow),
    )


def check_size(size: Sequence[int]) -> None:
    """Raise a UserError where a phantom cannot have so many voxels along x, y, z."""
    if len(size) != 3 or min(size) < SMALLEST_SIZE:
        raise UserError(f"phantom size {tuple(size)}: give three numbers of at least {SMALLEST_SIZE} voxels")
