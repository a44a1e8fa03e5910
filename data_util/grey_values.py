"""The grey values of stored volumes, 0 (black) to 255 (white), and of images as the network sees them, 0 to 1.

Everything that converts between the two does it here.
"""

import numpy as np

WHITE = np.float32(255)


def to_unit(volume: np.ndarray) -> np.ndarray:
    """Convert grey values from 0..255 to 0..1.

    Args:
        volume: numbers of any type and shape, 0..255.

    Returns:
        float32 of the same shape, 0..1.

    Example:
        >>> to_unit(np.array([0, 51, 255], np.uint8)).tolist()
        [0.0, 0.20000000298023224, 1.0]
    """
    return np.divide(volume, WHITE, dtype=np.float32)


def from_unit(image: np.ndarray) -> np.ndarray:
    """Convert grey values from 0..1 to 0..255; the inverse of `to_unit`.

    Args:
        image: numbers of any type and shape, 0..1.

    Returns:
        float32 of the same shape, 0..255, not rounded.

    Example:
        >>> from_unit(np.array([0, 0.5, 1])).tolist()
        [0.0, 127.5, 255.0]
    """
    return np.asarray(image, np.float32) * WHITE


def to_uint8(volume: np.ndarray) -> np.ndarray:
    """Round grey values 0..255 to whole numbers, and clip what lies outside.

    Args:
        volume: numbers of any type and shape.

    Returns:
        uint8 of the same shape.

    Example:
        >>> to_uint8(np.array([-3, 127.6, 300])).tolist()
        [0, 128, 255]
    """
    return np.clip(np.rint(volume), 0, 255).astype(np.uint8)
