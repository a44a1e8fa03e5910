"""Scans that are in a data set twice, though not with the same bytes."""

import numpy as np

COARSE, NEAR_COPY = 12, 0.9995  # blocks along an axis, and the correlation from which two scans are near copies


def coarse(volume: np.ndarray) -> np.ndarray:
    """What a volume looks like from afar, float32 [n], of mean 0 and length 1; NaN where it is constant.

    A copy that was resampled, cropped by a voxel or stored in another type looks the same.
    """
    small: np.ndarray = volume.astype(np.float32)
    for axis, size in enumerate(volume.shape):
        edges = np.linspace(0, size, min(COARSE, size) + 1).astype(int)
        small = np.add.reduceat(small, edges[:-1], axis=axis) / np.expand_dims(
            np.diff(edges), tuple({0, 1, 2} - {axis})
        ).astype(np.float32)
    small = small.ravel() - small.mean()
    with np.errstate(invalid="ignore"):
        return small / np.linalg.norm(small)


def near_copies(looks: dict[str, np.ndarray]) -> list[tuple[str, str]]:
    """Pairs of scans that look the same from afar, by their `coarse` volumes."""
    pairs = []
    names = [name for name, look in looks.items() if np.isfinite(look).all()]
    for k, name in enumerate(names):
        others = [other for other in names[k + 1 :] if looks[other].shape == looks[name].shape]
        if others:
            similar = np.stack([looks[other] for other in others]) @ looks[name] > NEAR_COPY
            pairs += [(name, other) for other, is_near in zip(others, similar, strict=True) if is_near]
    return pairs


# ---------------------------------------------------------------------------------------------------- command
