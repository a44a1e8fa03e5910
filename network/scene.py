"""What a metric looks at, `Scene` and `PairScene`, and the metrics of `registry.METRICS` as functions of these.

The formulas are the pure functions of `metrics` and `losses`; here each gets its inputs, and its values their names.
"""

import dataclasses
import functools

import numpy as np
import tensorflow as tf

from . import metrics
from .kernels import fast_volume_sum
from .label_maps import carry_labels, label_map
from .losses import correlation
from .recursive_cascaded_networks import Stage


@dataclasses.dataclass(frozen=True)
class Scene:
    """A batch of pairs and one stage of the network on it, in TensorFlow. What is derived is computed when first used.

    Attributes:
        batch: the Batch: name -> tensor, as `data_util.dataset` lists them.
        stage: the flow of the stage, composed from all cascades up to it, and the moving image warped by it.
        labels: the label values to measure, or None where the segmentations are masks.
        padding: whether warping sees one voxel of zeros around the moving image.
    """

    batch: dict[str, tf.Tensor]
    stage: Stage
    labels: tuple[int, ...] | None
    padding: bool

    @property
    def fixed(self) -> tf.Tensor:
        """Fixed images, float32 [B, X, Y, Z, 1] in 0..1."""
        return self.batch["fixed"]

    @property
    def moving(self) -> tf.Tensor:
        """Moving images, float32 [B, X, Y, Z, 1] in 0..1."""
        return self.batch["moving"]

    @property
    def warped(self) -> tf.Tensor:
        """Moving images warped by `flow`, float32 [B, X, Y, Z, 1]."""
        return self.stage.warped

    @property
    def flow(self) -> tf.Tensor:
        """Composed flow, float32 [B, X, Y, Z, 3] in voxels."""
        return self.stage.composed_flow

    @functools.cached_property
    def jacobian(self) -> tf.Tensor:
        """Determinant of the Jacobian of p + flow(p), float32 [B, X, Y, Z]."""
        return metrics.jacobian_determinant(self.flow)

    @functools.cached_property
    def fixed_seg(self) -> tf.Tensor:
        """Label map of the fixed scans, int32 [B, X, Y, Z, 1]; -1 everywhere where there is none."""
        return label_map(self.batch["fixed_seg"], self.labels)

    @functools.cached_property
    def moving_seg(self) -> tf.Tensor:
        """Label map of the moving scans, as `fixed_seg`."""
        return label_map(self.batch["moving_seg"], self.labels)

    @functools.cached_property
    def warped_seg(self) -> tf.Tensor:
        """Label map of the moving scans warped by `flow`, as `fixed_seg`."""
        return carry_labels(self.batch["moving_seg"], self.flow, self.labels, self.padding)

    @functools.cached_property
    def landmark_offsets(self) -> tf.Tensor:
        """From each moving landmark to the fixed one carried along `flow`, float32 [B, L, 3] in voxels."""
        return metrics.landmark_offsets(self.batch["fixed_points"], self.batch["moving_points"], self.flow)

    @functools.cached_property
    def is_finite(self) -> tf.Tensor:
        """Whether both images and the flow of a pair are finite everywhere: bool [B]. If not, nothing is measured."""
        return _are_finite(self.fixed, self.moving, self.flow)


class Unregistered(Scene):
    """A batch of pairs as it is: the stage's flow is 0, and labels and landmarks stay where they are."""

    @functools.cached_property
    def warped_seg(self) -> tf.Tensor:
        """Label map of the moving scans, as `fixed_seg`."""
        return self.moving_seg

    @functools.cached_property
    def landmark_offsets(self) -> tf.Tensor:
        """From each moving landmark to the fixed one, float32 [B, L, 3] in voxels."""
        return self.batch["fixed_points"] - self.batch["moving_points"]

    @functools.cached_property
    def is_finite(self) -> tf.Tensor:
        """Whether both images of a pair are finite everywhere: bool [B]."""
        return _are_finite(self.fixed, self.moving)


def _are_finite(*volumes: tf.Tensor) -> tf.Tensor:
    """Whether a pair's volumes [B, ..] are finite everywhere, and their sums too, which tell it quickly: bool [B]."""
    return tf.reduce_all(tf.math.is_finite([fast_volume_sum(volume) for volume in volumes]), 0)


@dataclasses.dataclass(frozen=True)
class PairScene:
    """One pair and one stage of the network on it, in NumPy.

    Attributes:
        images: the images that the metric needs: name -> [X, Y, Z], or [X, Y, Z, 3] for `flow`.
        labels: the label values to measure; (1,) where the segmentations are masks.
        fixed_spacing, moving_spacing: float32 [3], mm per voxel, NaN where unknown.
    """

    images: dict[str, np.ndarray]
    labels: tuple[int, ...]
    fixed_spacing: np.ndarray
    moving_spacing: np.ndarray


def measure_overlap(scene: Scene) -> dict[str, tf.Tensor]:
    """Dice and Jaccard of every label."""
    dice, jaccard = metrics.overlap(scene.fixed_seg, scene.warped_seg, scene.labels)
    return {"dice": dice, "jaccard": jaccard}


def measure_landmarks(scene: Scene) -> dict[str, tf.Tensor]:
    """Distance of every landmark, in voxels and in mm."""
    in_mm = metrics.landmark_distances(scene.landmark_offsets, scene.batch["moving_spacing"])
    return {"landmark_distance": metrics.landmark_distances(scene.landmark_offsets), "landmark_distance_mm": in_mm}


def measure_jacobian(scene: Scene) -> dict[str, tf.Tensor]:
    """Standard deviation of the Jacobian determinant, by forward differences."""
    return {"jacobian_std": metrics.jacobian_std(scene.flow)}


def measure_folding(scene: Scene) -> dict[str, tf.Tensor]:
    """Share of folded voxels."""
    return {"folding": metrics.folding(scene.jacobian)}


def measure_sdlogj(scene: Scene) -> dict[str, tf.Tensor]:
    """Standard deviation of the logarithm of the Jacobian determinant."""
    return {"sdlogj": metrics.sd_log_jacobian(scene.jacobian)}


def measure_similarity(scene: Scene) -> dict[str, tf.Tensor]:
    """Correlation of the images, before registration and after."""
    before = _correlation(scene.fixed, scene.moving)
    similarity = before if scene.warped is scene.moving else _correlation(scene.fixed, scene.warped)
    return {"similarity_before": before, "similarity": similarity}


def _correlation(fixed: tf.Tensor, other: tf.Tensor) -> tf.Tensor:
    """Correlation of two images; NaN where one of them is constant."""
    varied = [tf.reduce_max(image, [1, 2, 3, 4]) > tf.reduce_min(image, [1, 2, 3, 4]) for image in (fixed, other)]
    return tf.where(varied[0] & varied[1], correlation(fixed, other), float("nan"))


def measure_flow_error(scene: Scene) -> dict[str, tf.Tensor]:
    """Mean distance from the true flow inside the fixed segmentation; no value where no pair has a true flow."""
    if "true_flow" not in scene.batch:
        return {}
    return {"flow_error": metrics.flow_error(scene.flow, scene.batch["true_flow"], scene.fixed_seg > 0)}


def measure_surface(pair: PairScene) -> dict[str, np.ndarray]:
    """Distances of the surfaces of every label, in voxels and in mm."""
    label_maps = pair.images["fixed_seg"], pair.images["warped_seg"]
    hd95, mean = metrics.surface_distances(*label_maps, pair.labels)
    if np.isnan(pair.fixed_spacing).any():
        hd95_mm, mean_mm = np.full((2, len(pair.labels)), np.nan, np.float32)
    else:
        hd95_mm, mean_mm = metrics.surface_distances(*label_maps, pair.labels, pair.fixed_spacing)
    return {"hd95": hd95, "surface_distance": mean, "hd95_mm": hd95_mm, "surface_distance_mm": mean_mm}
