"""Evaluation: the network applied to batches of pairs, one `PairResult` for each valid pair."""

import concurrent.futures
import dataclasses
import functools
import time
import typing

import numpy as np
import tensorflow as tf

from . import metrics
from .losses import correlation
from .recursive_cascaded_networks import Stage
from .refinement import join, refine, repeat_while_better


@dataclasses.dataclass(frozen=True)
class PairResult:
    """What was measured on one pair.

    Attributes:
        index: place of the pair in its scheme.
        fixed_id, moving_id: the scans, as reports name them.
        stages: what was measured after each cascade: a tuple of dicts, name -> NumPy value: a scalar, or an array with
            a value a label or landmark. NaN is 'not measured'. Every name is defined in docs/metrics.md. The last
            one is the result; the first one, if every cascade was measured, is the pair before registration.
        seconds: time that registering and measuring took, the pair's share of its batch.
        images: name -> array of the pair, as asked for: `flow` [X, Y, Z, 3] in voxels, and [X, Y, Z] `jacobian` (the
            determinant), `fixed`, `moving`, `warped` (0..1), and the label maps `fixed_seg`, `moving_seg`,
            `warped_seg`, of which a missing one is -1 everywhere.
        fixed_spacing, moving_spacing: float32 [3], mm a voxel, NaN where unknown.
    """

    index: int
    fixed_id: str
    moving_id: str
    stages: tuple
    seconds: float
    images: dict
    fixed_spacing: np.ndarray
    moving_spacing: np.ndarray

    @property
    def values(self):
        """The result's values."""
        return self.stages[-1]


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a metric looks at: a batch and a stage of the network on it. The rest is computed when first used."""

    batch: dict
    stage: Stage
    labels: tuple | None
    padding: bool

    @functools.cached_property
    def fixed_seg(self):
        """Label map of the fixed scans."""
        return metrics.label_map(self.batch["fixed_seg"], self.labels)

    @functools.cached_property
    def moving_seg(self):
        """Label map of the moving scans."""
        return metrics.label_map(self.batch["moving_seg"], self.labels)

    @functools.cached_property
    def warped_seg(self):
        """Label map of the moving scans, warped by the stage."""
        return metrics.carry_labels(self.batch["moving_seg"], self.stage.composed_flow, self.labels, self.padding)

    @functools.cached_property
    def determinant(self):
        """Determinant of the Jacobian of the stage's transformation."""
        return metrics.jacobian_determinant(self.stage.composed_flow)


def _overlap(scene):
    dice, jaccard = metrics.overlap(scene.fixed_seg, scene.warped_seg, scene.labels)
    return {"dice": dice, "jaccard": jaccard}


def _landmarks(scene):
    seen = scene.batch["fixed_points"], scene.batch["moving_points"], scene.stage.composed_flow
    in_mm = metrics.landmark_distances(*seen, scene.batch["moving_spacing"])
    return {"landmark_distance": metrics.landmark_distances(*seen), "landmark_distance_mm": in_mm}


def _jacobian(scene):
    return {"jacobian_std": metrics.jacobian_std(scene.stage.composed_flow)}


def _folding(scene):
    return {"folding": metrics.folding(scene.determinant)}


def _sdlogj(scene):
    return {"sdlogj": metrics.sd_log_jacobian(scene.determinant)}


def _similarity(scene):
    fixed, moving, warped = scene.batch["fixed"], scene.batch["moving"], scene.stage.warped
    return {"similarity_before": _correlation(fixed, moving), "similarity": _correlation(fixed, warped)}


def _correlation(fixed, other):
    varied = [tf.reduce_max(image, [1, 2, 3, 4]) > tf.reduce_min(image, [1, 2, 3, 4]) for image in (fixed, other)]
    return tf.where(varied[0] & varied[1], correlation(fixed, other), float("nan"))


def _flow_error(scene):
    if "true_flow" not in scene.batch:
        return {}
    true_flow, foreground = scene.batch["true_flow"], scene.fixed_seg > 0
    return {"flow_error": metrics.flow_error(scene.stage.composed_flow, true_flow, foreground)}


# Measured where the network runs: name -> function of a Scene giving the named values.
_IN_GRAPH = {
    "overlap": _overlap,
    "landmarks": _landmarks,
    "jacobian": _jacobian,
    "folding": _folding,
    "sdlogj": _sdlogj,
    "similarity": _similarity,
    "flow_error": _flow_error,
}
# `surface` is measured afterwards on the CPU, and much the slowest.
METRICS = (*_IN_GRAPH, "surface")
DEFAULT_METRICS = tuple(_IN_GRAPH)

# name -> function of a Scene giving that image of every pair.
IMAGES = {
    "flow": lambda scene: scene.stage.composed_flow,
    "jacobian": lambda scene: scene.determinant,
    "fixed": lambda scene: scene.batch["fixed"][..., 0],
    "moving": lambda scene: scene.batch["moving"][..., 0],
    "warped": lambda scene: scene.stage.warped[..., 0],
    "fixed_seg": lambda scene: scene.fixed_seg[..., 0],
    "moving_seg": lambda scene: scene.moving_seg[..., 0],
    "warped_seg": lambda scene: scene.warped_seg[..., 0],
}


def evaluate(
    network,
    batches,
    labels=None,
    chosen=DEFAULT_METRICS,
    strategy=None,
    per_cascade=False,
    images=(),
    images_of=None,
    adaptive=False,
    refine_steps=0,
):
    """Apply the network to every batch and measure the chosen metrics.

    Args:
        network: `RecursiveCascadedNetwork`.
        batches: iterable of Batches with segmentations, landmarks, spacings, `valid`, `ids` and `index`.
        labels: the label values to measure, or None for 0/255 masks.
        chosen: names out of `METRICS`.
        strategy: `tf.distribute.Strategy` that the network was built under; its replicas share each batch.
        per_cascade: measure before registration and after every stage of the network, not only after the last.
        images: names out of `IMAGES`: what to hand over with each result.
        images_of: indices of the pairs whose images are wanted; None is all.
        adaptive: repeat the cascades as often as helps each pair (`repeat_while_better`) and give their number, `rep`.
            Only on one device, and the stages before the last are not kept.
        refine_steps: refine every pair by so many steps (`refine`), which is one more stage; 0 is not at all. Each
            value of the result is also given as it was before, as `unrefined_<name>`. Only on one device.

    Yields:
        `PairResult` for each valid pair, in order.
    """
    strategy = strategy or tf.distribute.get_strategy()
    labels = None if labels is None else tuple(labels)
    # Replicas of this machine, where there are several machines.
    replicas = len(strategy.experimental_local_results(strategy.run(lambda: tf.constant(0))))
    run = _measuring(network, labels, tuple(chosen), strategy, per_cascade, 2 if refine_steps else 1, tuple(images))

    def on_device(batch):
        started = time.perf_counter()
        about = {name: batch.pop(name).numpy() for name in ("valid", "ids", "index")}
        about |= {name: batch[name].numpy() for name in ("fixed_spacing", "moving_spacing")}
        if adaptive or refine_steps:
            output, notes = _improved(network, batch["fixed"], batch["moving"], adaptive, refine_steps)
            stages, maps, pictures = run(batch, output.stages)
        else:
            notes = {}
            stages, maps, pictures = run(_split(batch, strategy, replicas))
        wanted = [i for i in np.flatnonzero(about["valid"]) if images_of is None or about["index"][i] in images_of]
        stages = [{name: _gather(value, strategy) for name, value in stage.items()} for stage in stages]
        stages[-1].update(notes)
        return _Measured(
            about,
            stages,
            tf.nest.map_structure(lambda value: _gather(value, strategy), maps),
            {i: {name: _pair(value, i, strategy) for name, value in pictures.items()} for i in wanted},
            time.perf_counter() - started,
        )

    with concurrent.futures.ThreadPoolExecutor() as pool:
        for measured in _one_ahead(pool, on_device, map(dict, batches)):
            yield from _results(pool, measured, labels, refine_steps > 0, per_cascade)


class _Measured(typing.NamedTuple):
    """A batch as it comes from the device, in NumPy: what the pairs are, values of each stage, label maps, images."""

    about: dict
    stages: list
    maps: tuple
    images: dict
    seconds: float


def _one_ahead(pool, function, items):
    """function(item) for each item, in order; the next one runs in the pool while the last one is being used.

    Never two at once: each takes the whole device and its memory, and a graph of TensorFlow may fail beside itself.
    """
    running = None
    for item in items:
        done = [] if running is None else [running.result()]
        running = pool.submit(function, item)
        yield from done
    if running is not None:
        yield running.result()


def _results(pool, measured, labels, refined, per_cascade):
    """`PairResult` of each valid pair of a batch. The surfaces are measured here, a thread a pair."""
    about, started = measured.about, time.perf_counter()
    pairs = np.flatnonzero(about["valid"])
    if measured.maps:
        fixed, warped = measured.maps
        for stage, label_map in zip(measured.stages, warped, strict=True):
            stage.update(_surfaces(pool, fixed, label_map, labels, about["fixed_spacing"], pairs))
    stages = _with_unrefined(measured.stages, per_cascade) if refined else measured.stages
    seconds = (measured.seconds + time.perf_counter() - started) / max(len(pairs), 1)
    for i in pairs:
        yield PairResult(
            int(about["index"][i]),
            *(text.decode() for text in about["ids"][i]),
            tuple({name: value[i] for name, value in stage.items()} for stage in stages),
            seconds,
            measured.images.get(i, {}),
            about["fixed_spacing"][i],
            about["moving_spacing"][i],
        )


# Training evaluates the same network again and again: its graph is made once.
@functools.lru_cache(maxsize=1)
def _measuring(network, labels, chosen, strategy, per_cascade, kept, images):
    """Graph that measures a (distributed) batch: values of each stage, label maps for the surfaces, images.

    The stages are the network's unless given: all of them (`per_cascade`), or the last `kept`.
    """

    def measure(batch, stages=None):
        stages = stages or network((batch["fixed"], batch["moving"])).stages
        if per_cascade:
            none = tf.zeros_like(stages[0].flow)
            stages = (Stage(none, none, batch["moving"]), *stages)
        else:
            stages = stages[-kept:]
        scenes = [Scene(batch, stage, labels, network.config.warp_padding) for stage in stages]
        values = [_measured(scene, chosen) for scene in scenes]
        maps = (scenes[-1].fixed_seg, [scene.warped_seg for scene in scenes]) if "surface" in chosen else ()
        return values, maps, {name: IMAGES[name](scenes[-1]) for name in images}

    return tf.function(lambda *seen: strategy.run(measure, args=seen))


def _improved(network, fixed, moving, adaptive, steps):
    """`CascadeOutput` of a batch with adaptive repeats and refinement, and what is to be said of it: name -> [B]."""
    notes = {}
    if adaptive:
        found = [repeat_while_better(network, fixed[i : i + 1], moving[i : i + 1]) for i in range(fixed.shape[0])]
        output = join([output for output, _ in found])
        notes["rep"] = np.array([rep for _, rep in found])
    else:
        output = network((fixed, moving))
    if steps:
        output = refine(output, fixed, moving, network.config, steps)
    return output, notes


def _with_unrefined(stages, per_cascade):
    """Measured stages of which the last also tells the values of the one before, `unrefined_<name>`."""
    before = {f"unrefined_{name}": value for name, value in stages[-2].items() if name != "similarity_before"}
    return [*(stages[:-1] if per_cascade else ()), {**stages[-1], **before}]


def _measured(scene, chosen):
    metrics_here = [_IN_GRAPH[name] for name in chosen if name in _IN_GRAPH]
    return {name: value for metric in metrics_here for name, value in metric(scene).items()}


def _surfaces(pool, fixed, warped, labels, spacing, pairs):
    """Values of the metric `surface` for a batch: name -> [B, K], from label maps [B, X, Y, Z, 1]."""
    labels = (1,) if labels is None else labels
    names = ("hd95", "surface_distance", "hd95_mm", "surface_distance_mm")
    table = {name: np.full((len(fixed), len(labels)), np.nan, np.float32) for name in names}

    def measure(i):
        sides = fixed[i, ..., 0], warped[i, ..., 0]
        table["hd95"][i], table["surface_distance"][i] = metrics.surface_distances(*sides, labels)
        if not np.isnan(spacing[i]).any():
            in_mm = metrics.surface_distances(*sides, labels, spacing[i])
            table["hd95_mm"][i], table["surface_distance_mm"][i] = in_mm

    list(pool.map(measure, pairs))
    return table


def _split(tensors, strategy, n):
    """Each share of a batch, in order, for the `n` replicas of this machine."""

    def share(context):
        return {name: tf.split(value, n)[context.replica_id_in_sync_group % n] for name, value in tensors.items()}

    return strategy.experimental_distribute_values_from_function(share)


def _gather(value, strategy):
    """The replicas' parts of a value as one NumPy array over the whole batch."""
    return np.concatenate([part.numpy() for part in strategy.experimental_local_results(value)])


def _pair(value, i, strategy):
    """Pair i's part of a value, as a NumPy array."""
    parts = strategy.experimental_local_results(value)
    size = parts[0].shape[0]
    return parts[i // size][i % size].numpy()
