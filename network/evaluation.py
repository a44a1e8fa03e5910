"""Evaluation: the network applied to batches of pairs, one `PairResult` for each valid pair."""

import concurrent.futures
import dataclasses
import time
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import numpy as np
import tensorflow as tf

from .affine import Affine
from .kernels import forward_alone, whole_step
from .measuring import measurable_labels, measure_in_graph, measure_in_numpy
from .recursive_cascaded_networks import CascadeOutput, RecursiveCascadedNetwork, Stage, after_affine
from .refinement import join, refine, repeat_while_better
from .registry import IMAGES, METRICS, Metric, Value, default_metrics
from .scene import PairScene, Scene, Unregistered


@dataclasses.dataclass(frozen=True)
class EvaluationPlan:
    """What is done with every pair, and what is measured on it.

    Attributes:
        metrics: names out of `registry.METRICS`; None is those that are on by default.
        per_cascade: measure before registration and after every stage of the network, not only after the last.
        images: names out of `registry.IMAGES`: what to give with each result.
        adaptive: repeat the cascades as often as helps each pair (`repeat_while_better`) and give their number, `rep`.
            Only on one device, and the stages before the last are not kept.
        refine_steps: refine every pair by so many steps (`refine`), which is one more stage; 0 is not at all. Each
            value of the result is also given as it was before refinement, as `unrefined_<name>`. Only on one device.
        after_affine: the Batches have an affine map of each pair, which is the stage before the network's; whether it
            was found is given as `affine_found`.
    """

    metrics: tuple[str, ...] | None = None
    per_cascade: bool = False
    images: tuple[str, ...] = ()
    adaptive: bool = False
    refine_steps: int = 0
    after_affine: bool = False

    def rows(self, where: str) -> dict[str, Metric]:
        """The metrics that are measured in the 'graph' or in 'numpy', with their rows.

        Raises:
            UserError: there is no metric of a name.
        """
        names = default_metrics() if self.metrics is None else self.metrics
        rows = {name: METRICS.find(name) for name in names}
        return {name: row for name, row in rows.items() if row.where == where}

    def values(self) -> dict[str, Value]:
        """The values that a result can have, by name, and what each is."""
        rows = [*self.rows("graph").values(), *self.rows("numpy").values()]
        measured = {name: value for row in rows for name, value in row.values.items()}
        unrefined = {f"unrefined_{name}": value for name, value in measured.items() if name != "similarity_before"}
        others = {"rep": Value("applications of each cascade")} if self.adaptive else {}
        others |= {"affine_found": Value()} if self.after_affine else {}
        return {**measured, **others, **(unrefined if self.refine_steps else {})}


@dataclasses.dataclass(frozen=True)
class PairImage:
    """An image of a pair, and what it is.

    Attributes:
        array: [X, Y, Z], or [X, Y, Z, 3] for a flow.
        kind, side: as in `registry.Image`.
    """

    array: np.ndarray
    kind: str
    side: str


@dataclasses.dataclass(frozen=True)
class PairResult:
    """What was measured on one pair.

    Attributes:
        index: place of the pair in its scheme.
        fixed_id, moving_id: the scans, as reports name them.
        stages: what was measured after each cascade: a tuple of dicts, name -> NumPy value: a scalar, or an array with
            one value per label or landmark. NaN is 'not measured'. Every name is defined in docs/metrics.md. The last
            one is the result; the first one, if every cascade was measured, is the pair before registration.
        before: the values before registration, of those metrics in the graph that can be better or worse (overlap, for
            instance; not folding).
        seconds: time that registering and measuring took: the pair's share of its batch.
        images: name -> `PairImage`, as asked for.
        fixed_spacing, moving_spacing: float32 [3], mm per voxel, NaN where unknown.
    """

    index: int
    fixed_id: str
    moving_id: str
    stages: tuple[dict[str, np.ndarray], ...]
    before: dict[str, np.ndarray]
    seconds: float
    images: dict[str, PairImage]
    fixed_spacing: np.ndarray
    moving_spacing: np.ndarray

    @property
    def values(self) -> dict[str, np.ndarray]:
        """The result's values."""
        return self.stages[-1]


class Evaluator:
    """Applies a network to batches and measures what a plan asks for. Its graphs are kept.

    A label value that no segmentation can hold (0 is the background, and above 2**31 - 1 there is none) is not
    measured. Nor is anything of a pair of which an image or the flow is not finite somewhere: all its values are NaN.

    Args:
        network: the network.
        labels: the label values to measure, or None for 0/255 masks.
        plan: what to do and to measure; None is the metrics that are on by default.
        strategy: the strategy that the network was built under; its replicas share each batch.

    Raises:
        UserError: the plan names a metric that there is not.
    """

    def __init__(
        self,
        network: RecursiveCascadedNetwork,
        labels: Iterable[int] | None = None,
        plan: EvaluationPlan | None = None,
        strategy: tf.distribute.Strategy | None = None,
    ) -> None:
        self.network = network
        self.plan = EvaluationPlan() if plan is None else plan
        self.strategy = strategy or tf.distribute.get_strategy()
        self._labels = measurable_labels(labels)
        self._in_graph, self._in_numpy = self.plan.rows("graph"), self.plan.rows("numpy")
        # What is measured before registration, too: whatever can get better or worse.
        self._compared = {
            name: row for name, row in self._in_graph.items() if any(value.better for value in row.values.values())
        }
        self._needs = tuple(dict.fromkeys(name for row in self._in_numpy.values() for name in row.needs))
        # Replicas of this machine, where there are several machines.
        one = self.strategy.run(lambda: tf.constant(0))
        self._replicas = len(self.strategy.experimental_local_results(one))
        self._run = whole_step(forward_alone(lambda *inputs: self.strategy.run(self._measure, args=inputs)))
        self._graphs: dict[int | None, Callable[..., CascadeOutput]] = {}

    def prepare(self, spec: Mapping[str, tf.TensorSpec]) -> None:
        """Make the graph ahead of the first batch, which takes no values of the weights.

        Not where there are several devices, or adaptive repeats or refinement: their graphs are made when used.

        Args:
            spec: of the batches, a dataset's `element_spec`.
        """
        if self._replicas == 1 and not (self.plan.adaptive or self.plan.refine_steps):
            self._run.get_concrete_function({name: spec[name] for name in spec if name not in _OUTSIDE})

    def evaluate(
        self, batches: Iterable[Mapping[str, typing.Any]], images_of: Collection[int] | None = None
    ) -> Iterator[PairResult]:
        """Apply the network to every batch and measure.

        Args:
            batches: Batches with segmentations, landmarks, spacings, `valid`, `ids` and `index`.
            images_of: indices of the pairs whose images are wanted; None is all.

        Yields:
            `PairResult` for each valid pair, in order.

        Raises:
            UserError: a metric gives a value that its row does not name, or one of another shape.
        """
        with concurrent.futures.ThreadPoolExecutor() as pool:
            for measured in _one_ahead(pool, lambda batch: self._on_device(batch, images_of), map(dict, batches)):
                yield from self._results(pool, measured)

    def _on_device(self, batch: dict[str, typing.Any], images_of: Collection[int] | None) -> "_Measured":
        """Register a batch and measure on it what is measured in the graph."""
        started = time.perf_counter()
        pairs = {name: batch.pop(name).numpy() for name in _OUTSIDE if name in batch}
        pairs |= {name: batch[name].numpy() for name in ("fixed_spacing", "moving_spacing")}
        pairs["landmarks"] = batch["fixed_points"].shape[1]
        found = {"affine_found": pairs["affine_found"]} if self.plan.after_affine else {}
        counts: dict[str, np.ndarray] = {}
        if self.plan.adaptive or self.plan.refine_steps:
            output, counts = self._improved(batch)
            *values, images = self._run(batch, output.stages)
        else:
            *values, images = self._run(_split(batch, self.strategy, self._replicas))
        wanted = [
            i for i in np.flatnonzero(pairs["valid"]).tolist() if images_of is None or pairs["index"][i] in images_of
        ]
        stages, *others = tf.nest.map_structure(lambda value: _gather(value, self.strategy), values)
        stages[-1].update(counts | found)
        chosen = {i: {name: _pair(value, i, self.strategy) for name, value in images.items()} for i in wanted}
        before, finite, of_pair, of_stage = others
        seconds = time.perf_counter() - started
        return _Measured(pairs, stages, before, finite, of_pair, of_stage, chosen, seconds)

    def _measure(self, batch: dict[str, tf.Tensor], stages: tuple[Stage, ...] | None = None) -> tuple:
        """In the graph, for one replica's part of a batch: what `_Measured` holds, of which images all pairs'.

        The stages are the network's unless given: all of them (`per_cascade`), or the last, and with refinement the
        one before it.
        """
        stages = stages or self._registered(self.network, batch).stages
        none = tf.zeros_like(stages[0].flow)
        given = self._labels, self.network.config.warp_padding
        first = Unregistered(batch, Stage(none, none, batch["moving"]), *given)
        kept = len(stages) if self.plan.per_cascade else 2 if self.plan.refine_steps else 1
        scenes = [Scene(batch, stage, *given) for stage in stages[-kept:]]
        if self.plan.per_cascade:
            scenes.insert(0, first)
        names = {name for row in self._compared.values() for name, value in row.values.items() if value.better}
        before = measure_in_graph(self._compared, first)
        return (
            [measure_in_graph(self._in_graph, scene) for scene in scenes],
            {name: value for name, value in before.items() if name in names},
            [scene.is_finite for scene in scenes],
            {name: getattr(first, name) for name in self._needs if not IMAGES[name].of_stage},
            [{name: getattr(scene, name) for name in self._needs if IMAGES[name].of_stage} for scene in scenes],
            {name: getattr(scenes[-1], name) for name in self.plan.images},
        )

    def _registered(
        self, register: Callable[[tuple[tf.Tensor, tf.Tensor]], CascadeOutput], batch: Mapping[str, tf.Tensor]
    ) -> CascadeOutput:
        """`CascadeOutput` of a batch: what a function of (fixed, moving) gives, after the pairs' affine maps if any."""
        fixed, moving = batch["fixed"], batch["moving"]
        if not self.plan.after_affine:
            return register((fixed, moving))
        affine = Affine(batch["affine_matrix"], batch["affine_shift"])
        return after_affine(register, affine, fixed, moving, self.network.config)

    def _apply_network(self, images: tuple[tf.Tensor, tf.Tensor], rep: int | None = None) -> CascadeOutput:
        """The network's `CascadeOutput`; each number of repeats has a graph, which is kept."""

        def apply(fixed: tf.Tensor, moving: tf.Tensor) -> CascadeOutput:
            output = self.network((fixed, moving), rep=rep)
            # Of adaptive repeats the last stage alone is kept.
            return output._replace(stages=output.stages[-1:], velocities=()) if self.plan.adaptive else output

        if rep not in self._graphs:
            self._graphs[rep] = whole_step(forward_alone(apply))
        return self._graphs[rep](*images)

    def _improved(self, batch: Mapping[str, tf.Tensor]) -> tuple[CascadeOutput, dict[str, np.ndarray]]:
        """`CascadeOutput` of a batch with adaptive repeats and refinement, and the number of repeats: name -> [B]."""
        counts = {}

        def repeated(images: tuple[tf.Tensor, tf.Tensor]) -> CascadeOutput:
            # One by one: in a batch, all would go on until the last one ends.
            pairs = [
                repeat_while_better(self._apply_network, *(image[i : i + 1] for image in images))
                for i in range(images[0].shape[0])
            ]
            counts["rep"] = np.array([rep for _, rep in pairs])
            return join([output for output, _ in pairs])

        output = self._registered(repeated if self.plan.adaptive else self._apply_network, batch)
        if self.plan.refine_steps:
            output = refine(output, batch["fixed"], batch["moving"], self.network.config, self.plan.refine_steps)
        return output, counts

    def _results(self, pool: concurrent.futures.Executor, measured: "_Measured") -> Iterator[PairResult]:
        """`PairResult` of each valid pair of a batch. The NumPy metrics are measured here, each pair in a thread."""
        pairs, started = measured.pairs, time.perf_counter()
        valid = [int(i) for i in np.flatnonzero(pairs["valid"])]
        stages = list(pool.map(lambda i: self._stages(measured, i), valid))
        seconds = (measured.seconds + time.perf_counter() - started) / max(len(valid), 1)
        for i, values in zip(valid, stages, strict=True):
            yield PairResult(
                index=int(pairs["index"][i]),
                fixed_id=pairs["ids"][i][0].decode(),
                moving_id=pairs["ids"][i][1].decode(),
                stages=values,
                before={name: value[i] for name, value in measured.before.items()},
                seconds=seconds,
                images={
                    name: PairImage(_without_channel(array, name), IMAGES[name].kind, IMAGES[name].side)
                    for name, array in measured.images.get(i, {}).items()
                },
                fixed_spacing=pairs["fixed_spacing"][i],
                moving_spacing=pairs["moving_spacing"][i],
            )

    def _stages(self, measured: "_Measured", i: int) -> tuple[dict[str, np.ndarray], ...]:
        """Values of pair i after every stage, the NumPy metrics among them."""
        labels = (1,) if self._labels is None else self._labels
        spacings = measured.pairs["fixed_spacing"][i], measured.pairs["moving_spacing"][i]
        stages = []
        for values, finite, needed in zip(measured.stages, measured.finite, measured.of_stage, strict=True):
            images = {name: _without_channel(array[i], name) for name, array in {**measured.of_pair, **needed}.items()}
            scene = PairScene({name: images[name] for name in self._needs}, labels, *spacings)
            numpy_values = measure_in_numpy(self._in_numpy, scene, measured.pairs["landmarks"], bool(finite[i]))
            stages.append({**{name: value[i] for name, value in values.items()}, **numpy_values})
        if self.plan.refine_steps:
            *earlier, unrefined, last = stages
            before = {f"unrefined_{name}": value for name, value in unrefined.items() if name != "similarity_before"}
            stages = [*((*earlier, unrefined) if self.plan.per_cascade else ()), {**last, **before}]
        return tuple(stages)


# What of a batch the graph has no use for.
_OUTSIDE = ("valid", "ids", "index", "affine_found")


class _Measured(typing.NamedTuple):
    """A batch as it comes from the device, in NumPy.

    Attributes:
        pairs: what the pairs are: `valid`, `ids`, `index`, spacings, and the number of `landmarks`.
        stages: values of the graph metrics at each stage: name -> [B, ...].
        before: those before registration.
        finite: for each stage, bool [B].
        of_pair, of_stage: the images that NumPy metrics need: those that are the same at every stage, and for each
            stage the others.
        images: the images to give, of each pair that they are wanted of.
        seconds: time that all this took.
    """

    pairs: dict[str, typing.Any]
    stages: list[dict[str, np.ndarray]]
    before: dict[str, np.ndarray]
    finite: list[np.ndarray]
    of_pair: dict[str, np.ndarray]
    of_stage: list[dict[str, np.ndarray]]
    images: dict[int, dict[str, np.ndarray]]
    seconds: float


Item = typing.TypeVar("Item")
Product = typing.TypeVar("Product")


def _one_ahead(
    pool: concurrent.futures.Executor, function: Callable[[Item], Product], items: Iterable[Item]
) -> Iterator[Product]:
    """function(item) for each item, in order; the next one runs in the pool while the last one is being used.

    Never two at once: each takes the whole device and its memory, and TensorFlow may fail where a graph runs twice.
    """
    running = None
    for item in items:
        done: list[Product] = [] if running is None else [running.result()]
        running = pool.submit(function, item)
        yield from done
    if running is not None:
        yield running.result()


def _split(tensors: Mapping[str, tf.Tensor], strategy: tf.distribute.Strategy, n: int) -> typing.Any:
    """Each share of a batch, in order, for the `n` replicas of this machine."""

    def share(context: tf.distribute.ReplicaContext) -> dict[str, tf.Tensor]:
        return {name: tf.split(value, n)[context.replica_id_in_sync_group % n] for name, value in tensors.items()}

    return strategy.experimental_distribute_values_from_function(share)


def _gather(value: typing.Any, strategy: tf.distribute.Strategy) -> np.ndarray:
    """The replicas' parts of a value as one NumPy array over the whole batch."""
    return np.concatenate([part.numpy() for part in strategy.experimental_local_results(value)])


def _pair(value: typing.Any, i: int, strategy: tf.distribute.Strategy) -> np.ndarray:
    """Pair i's part of a value, as a NumPy array."""
    parts = strategy.experimental_local_results(value)
    size = parts[0].shape[0]
    return parts[i // size][i % size].numpy()


def _without_channel(array: np.ndarray, name: str) -> np.ndarray:
    """An image of a pair without the axis of its single channel; a flow keeps its three."""
    return array if IMAGES[name].kind == "flow" or array.ndim == 3 else array[..., 0]
