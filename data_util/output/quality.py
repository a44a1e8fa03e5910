"""How good a registration is, voxel by voxel: maps to look at, and their numbers for the report."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

WINDOW = 9  # voxels, side of the cube in which two volumes are compared
LEAST_DEVIATION = 4.0  # grey values 0..255; a flatter cube shows nothing to compare
REGIONS = 4  # regions along each axis
LEAST_SHARE = 0.2  # of a region's voxels that must show something


@dataclass(frozen=True, eq=False)
class Quality:
    """Maps of a registration on the fixed volume's grid, float32 [X, Y, Z].

    Attributes:
        before, after: correlation of the fixed with the moving and with the warped volume in the cube around each
            voxel, -1..1; NaN where the fixed volume is flat.
        moved: mm by which each voxel is moved in all.
        residual: mm by which the last stage still moved it.
        apart: mm by which it is off after there and back, by the flows of both ways; None where only one is known.
    """

    before: np.ndarray
    after: np.ndarray
    moved: np.ndarray
    residual: np.ndarray
    apart: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        fixed: np.ndarray,
        moving: np.ndarray,
        warped: np.ndarray,
        flow: np.ndarray,
        last: np.ndarray,
        spacing: Any,
        apart: np.ndarray | None = None,
    ) -> "Quality":
        """The maps of a result.

        Args:
            fixed, moving, warped: volumes [X, Y, Z], 0..255.
            flow: composed flow of all stages [X, Y, Z, 3] in voxels.
            last: flow of the last stage alone.
            spacing: mm per voxel.
            apart: where each voxel comes back to after there and back, less where it was [X, Y, Z, 3]; or None.
        """
        before, after = local_correlation(fixed, moving), local_correlation(fixed, warped)
        off = None if apart is None else _length(apart, spacing)
        return cls(before, after, _length(flow, spacing), _length(last, spacing), off)

    def numbers(self) -> dict[str, Any]:
        """The maps as report.json tells them: mean and largest value, and the correlation of each region.

        Only voxels count around which the fixed volume shows something: elsewhere a flow is as it happens to be.
        A region is named by its place, from 0 at the patient's right, front and feet.
        """
        maps = {"moved_mm": self.moved, "residual_mm": self.residual, "inverse_consistency_mm": self.apart}
        shown = np.isfinite(self.after)
        ends = {
            name: {
                "mean": _rounded(values[shown].mean() if shown.any() else np.nan),
                "largest": _rounded(values[shown].max(initial=0)),
            }
            for name, values in maps.items()
            if values is not None
        }
        regions = [
            {"region": list(place), "before": _rounded(before), "after": _rounded(after)}
            for place, before, after in zip(*self._regions(), strict=True)
        ]
        local = {
            name: _rounded(np.mean(values[shown]) if shown.any() else np.nan)
            for name, values in (("before", self.before), ("after", self.after))
        }
        return {**ends, "local_correlation": local, "regions": regions}

    def _regions(self) -> tuple[list[tuple[int, ...]], list[float], list[float]]:
        """The regions that show something: their places, and the mean correlation in each before and after."""
        places: list[tuple[int, ...]] = []
        means: tuple[list[float], list[float]] = ([], [])
        edges = [np.linspace(0, n, REGIONS + 1).astype(int) for n in self.after.shape]
        for place in np.ndindex(REGIONS, REGIONS, REGIONS):
            part = tuple(slice(edges[axis][k], edges[axis][k + 1]) for axis, k in enumerate(place))
            if np.isfinite(self.after[part]).mean() > LEAST_SHARE:
                places.append(place)
                for mean, values in zip(means, (self.before, self.after), strict=True):
                    mean.append(float(np.nanmean(values[part])))
        return places, *means


def local_correlation(first: np.ndarray, second: np.ndarray, window: int = WINDOW) -> np.ndarray:
    """Pearson's correlation of two volumes in the cube around each voxel, the edge repeated.

    Args:
        first, second: [X, Y, Z], 0..255.
        window: side of the cube in voxels.

    Returns:
        float32 [X, Y, Z]; 0 where the second volume is flat, NaN where the first is.

    Example:
        >>> ramp = np.arange(0, 200, 10.0)[:, None, None] * np.ones((1, 4, 4))
        >>> float(local_correlation(ramp, 100 - ramp)[10, 2, 2].round(3))
        -1.0
    """
    a, b = (np.asarray(volume, np.float32) / 255 for volume in (first, second))

    def mean(values: np.ndarray) -> np.ndarray:
        return ndimage.uniform_filter(values, window, mode="nearest")

    mean_a, mean_b = mean(a), mean(b)
    variance_a, variance_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    together = mean(a * b) - mean_a * mean_b
    least = (LEAST_DEVIATION / 255) ** 2
    correlation = together / np.sqrt(np.maximum(variance_a, least) * np.maximum(variance_b, least))
    return np.where(variance_a < least, np.nan, np.clip(correlation, -1, 1)).astype(np.float32)


def _length(vectors: np.ndarray, spacing: Any) -> np.ndarray:
    """Length in mm of vectors in voxels."""
    return np.linalg.norm(vectors * np.asarray(spacing, np.float32), axis=-1).astype(np.float32)


def _mean(values: np.ndarray) -> float | None:
    """Mean, or None of nothing."""
    return _rounded(values.mean()) if values.size else None


def _rounded(value: Any) -> float | None:
    return round(float(value), 4) if np.isfinite(value) else None
