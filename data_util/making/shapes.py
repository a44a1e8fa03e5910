"""Anatomies that nobody has: regions of random shapes and grey values, in pairs of two individuals.

After the idea of SynthMorph (Hoffmann et al., IEEE TMI 2022): who has seen any shape in any contrast is bound to
none. Contrasts are drawn anew in training, by its augmentation; what is drawn here is the shapes.
"""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from data_util.grey_values import to_uint8
from data_util.hdf5 import Scan
from data_util.making.known_flows import smooth_flow, warp

REGIONS = 16
_COARSE = 4  # voxels; the fields that decide are drawn on a grid so coarse
_SMOOTHNESS = (1.2, 5.0)  # voxels of that grid
_LARGEST_FLOW = 0.07  # of the size


def shape_pair(size: Sequence[int], seed: Sequence[int]) -> tuple[Scan, Scan]:
    """Draw two individuals of one anatomy: the same regions and grey values, each deformed in its own way.

    A region is where one of 16 smooth random fields is the highest; what lies outside a lumpy ellipsoid is background.
    Each individual has a blur, a smooth factor and noise of its own. The segmentation holds the regions, 1 to 16.

    Args:
        size: (X, Y, Z), at least 16 voxels each.
        seed: whole numbers; another seed, another anatomy.
    """
    rng = np.random.default_rng(seed)
    smoothness = rng.uniform(*_SMOOTHNESS)
    fields = [_field(size, rng, smoothness) for _ in range(REGIONS)]
    regions = np.argmax(fields, axis=0).astype(np.uint8) + np.uint8(1)
    place = [np.linspace(-1, 1, n).reshape([-1 if k == axis else 1 for k in range(3)]) for axis, n in enumerate(size)]
    radii = rng.uniform(0.7, 0.95, 3)
    distance = sum((x / radius) ** 2 for x, radius in zip(place, radii, strict=True))
    regions[distance + 0.1 * _field(size, rng, 6.0) > 1] = 0
    grey = np.concatenate([[0.0], rng.uniform(30, 255, REGIONS)]).astype(np.float32)
    first, second = (_individual(regions, grey, rng) for _ in range(2))
    return first, second


def _individual(regions: np.ndarray, grey: np.ndarray, rng: np.random.Generator) -> Scan:
    size = regions.shape
    flow = smooth_flow(size, rng, rng.uniform(0.3, 1) * _LARGEST_FLOW * min(size))
    labels = warp(regions, flow, nearest=True).astype(np.uint8)
    image = ndimage.gaussian_filter(grey[labels], rng.uniform(0.3, 1.2))
    image *= np.exp(0.15 * _field(size, rng, 8.0))
    image += rng.uniform(0, 8) * rng.standard_normal(size, dtype=np.float32)
    return Scan(volume=to_uint8(image), segmentation=labels, spacing=(1.0, 1.0, 1.0))


def _field(size: Sequence[int], rng: np.random.Generator, smoothness: float) -> np.ndarray:
    """A smooth random field of deviation 1, float32 [X, Y, Z]."""
    coarse = [max(4, -(-n // _COARSE)) for n in size]
    field = ndimage.gaussian_filter(rng.standard_normal(coarse, dtype=np.float32), smoothness, mode="wrap")
    zoomed = ndimage.zoom(field, [n / m for n, m in zip(size, coarse, strict=True)], order=1, mode="nearest")
    return (zoomed - zoomed.mean()) / zoomed.std()
