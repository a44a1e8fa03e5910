"""Register two raw scans from Python: DICOM or NIfTI in, the warped scan and its displacement field out.

    from register import Input, register

    result = register("a.nii.gz", "b.nii.gz")                               # without a model
    result = register("fixed/", "moving.nii.gz", "weights/VTN-10-liver")
    result.warped, result.displacement      # SimpleITK images on the voxels of the fixed file
    result.transform.to_moving(points)      # landmarks [n, 3] in mm

Options are those of `registration_options.Options`.
"""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import SimpleITK as sitk

from cli import AUTO
from data_util.grey_values import from_unit, to_unit
from data_util.output.quality import Quality
from data_util.output.registration_report import degrees, describe, doubts
from data_util.scans import affine_search, transform_chain
from data_util.scans.automatic_view import modality_of
from data_util.scans.frame import Frame
from data_util.scans.images import match_labels, orient, read_image, read_native, to_array
from data_util.scans.pair_transform import PairTransform
from data_util.scans.prepared import PreparedScan, prepare_scan
from data_util.scans.preprocessing import prepare
from data_util.scans.transform_files import read_linear
from data_util.scans.view import View
from errors import UserError
from progress import Clock
from registration_options import GIVEN, Input, Options, check_used, kind_of_map, options_of, used_without_network
from views import choose_view, run_view


@dataclass(frozen=True, eq=False)
class Registration:
    """Two registered scans.

    Attributes:
        fixed, moving: `PreparedScan`.
        stages: what was found after each cascade, and after refinement: a tuple of `network` stages (`flow`,
            `composed_flow` float32 [X, Y, Z, 3] in voxels and `warped` float32 [X, Y, Z] in 0..1, NumPy) on
            `fixed.frame`. Stage 0 is affine.
        transform: `PairTransform` from places in the fixed scan to places in the moving one, in mm.
        warped: the moving scan on the voxels of the fixed scan's file, interpolated once: SimpleITK image.
        displacement: the transform as a displacement field in mm (LPS) on the same voxels: SimpleITK image of vectors.
        quality: maps of how alike the volumes are and how far voxels are moved, on `fixed.frame` with its axes in LPS.
        report: settings, what was chosen and why, similarity, folding, doubts and seconds; fit for JSON.
    """

    fixed: PreparedScan
    moving: PreparedScan
    stages: tuple
    transform: PairTransform
    warped: sitk.Image
    displacement: sitk.Image
    quality: Quality
    report: dict[str, Any]

    @functools.cached_property
    def composite(self) -> sitk.CompositeTransform:
        """The transform as ITK has it, as `PairTransform.composite` makes it."""
        return self.transform.composite(Frame.of(self.fixed.image))

    @functools.cached_property
    def inverse(self) -> sitk.CompositeTransform:
        """The inverse of `composite`, from places in the moving scan to places in the fixed one."""
        return transform_chain.inverse(self.composite)


def register(
    fixed: Any,
    moving: Any,
    checkpoint: Any = None,
    view: View | str | None = None,
    on_step: Callable | None = None,
    **options: Any,
) -> Registration:
    """Register a moving scan to a fixed one.

    Args:
        fixed, moving: DICOM folder, image file, SimpleITK image, or `Input`, which can also name a mask and a series.
        checkpoint: run of the network, as in `network.load_model`, or a model that it loaded; None to register without.
        view: what the network is to see: a `View` or one of `view.PRESETS`. What it leaves open, or all of it where it
            is None, is as the run was trained; without a run, as `automatic_view` chooses.
        on_step: function of (step, loss) called after every step of refinement.
        options: how to register, by the names of `Options`.

    Returns:
        `Registration`.

    Raises:
        UserError: nothing to register with, an unknown view or kind, and what `read_native`, `prepare_scan`,
            `find_affine` and `load_model` raise.
    """
    how = options_of(checkpoint, options)
    kind = kind_of_map(checkpoint, view, how)
    given = None if kind != GIVEN else read_linear(how.initial_transform)
    clock = Clock()
    inputs = [source if isinstance(source, Input) else Input(source) for source in (fixed, moving)]
    scans = [_read(role, source) for role, source in zip(("fixed", "moving"), inputs, strict=True)]
    clock.stop("read")
    model = _find_model(checkpoint, how)
    view, chosen, remarks = choose_view(view, model.view, model.prefix is not None, scans[0][0], scans[1][0])
    model, multimodal = _for_modalities(model, how, scans[0][0], scans[1][0])
    chosen += multimodal
    clock.stop("load")
    fixed = prepare_scan("fixed", *scans[0], view, how.image_size if model.is_none else model.config.image_size)
    moving = prepare_scan("moving", *scans[1], view, fixed.frame.size)
    model = model._replace(config=model.config.replace(image_size=fixed.frame.size))
    clock.stop("preprocess")
    start = _Start(moving.frame, moving.volume)
    if kind != "none":
        start = _aligned(fixed, moving, view, given or kind, model)
    chosen += start.chosen
    remarks += start.doubts
    frame = start.frame
    kind = "none" if frame is moving.frame else kind
    clock.stop("affine")
    network = _load(model)
    clock.stop("load")
    pair = _tensor(fixed.volume), _tensor(start.volume)
    output, rep = _apply(network, *pair, how.rep)
    apart = None
    if how.rep == AUTO:
        chosen.append(f"Each cascade was applied {rep} times")
    clock.stop("network")
    if how.refine:
        output, apart = _refined(output, *pair, model.config, how, _weights(fixed, inputs[0], how), on_step)
        clock.stop("refine")
    stages = tuple(type(stage)(*_arrays(stage)) for stage in output.stages)
    affine = output.affine.matrix[0].numpy(), output.affine.shift[0].numpy()
    transform = PairTransform(fixed.frame, frame, *affine, stages[-1].composed_flow)
    warped, displacement = transform.warp(moving.image, fixed.file_frame)
    clock.stop("warp")
    measured = _measure(pair[0], _tensor(moving.volume), output.stages)
    quality = _quality(fixed, moving, stages, apart)
    measured["quality"] = quality.numbers()
    left_over = (
        affine_search.left_over(fixed.frame, fixed.volume, from_unit(stages[-1].warped))
        if kind in ("none", GIVEN) and not start.doubts
        else None
    )
    clock.stop("measure")
    report = {
        "settings": _settings(inputs, model, view, kind, replace(how, rep=rep)),
        "chosen": chosen,
        "fixed": describe(fixed),
        "moving": describe(moving),
        "doubts": [*remarks, *doubts(fixed, moving, measured, left_over, model.config.similarities)],
        **measured,
        "seconds": clock.seconds,
    }
    return Registration(fixed, moving, stages, transform, warped, displacement, quality, report)


def _read(role: str, source: Input) -> tuple[sitk.Image, Frame, sitk.Image | None]:
    """The scan in LPS, the frame of its file, and its mask."""
    try:
        native = read_native(source.scan, source.series)
        return orient(native), Frame.of(native), None if source.mask is None else read_image(source.mask, is_label=True)
    except UserError as error:
        raise UserError(f"{role} scan: {error}") from error


class _Model(NamedTuple):
    """A network that is given or to be loaded, or none.

    Attributes:
        network: a loaded one, or None.
        prefix: path of its checkpoint, or None.
        config: its options; of the loss alone where there is no network.
        view: how it sees scans, as far as its run knows.
    """

    network: Any
    prefix: Path | None
    config: Any
    view: View

    @property
    def is_none(self) -> bool:
        """Whether there is no network."""
        return self.network is None and self.prefix is None


def _find_model(checkpoint: Any, options: Options) -> _Model:
    """What `checkpoint` names, not loaded yet."""
    from network import checkpoints
    from network.refinement import default_config

    if checkpoint is not None and hasattr(checkpoint, "config"):  # a loaded network
        network, prefix = checkpoint, getattr(checkpoint, "checkpoint", None)
        if options.image_size not in (None, network.config.image_size):
            raise UserError(f"the loaded model works at {network.config.image_size}, not {options.image_size}")
        if options.net_args:
            raise UserError(f"net_args {options.net_args!r} change a model while it is loaded: give them to load_model")
        return _Model(network, prefix, network.config, View() if prefix is None else run_view(prefix.parent))
    prefix, config, view = None, default_config(), View()
    if checkpoint is not None:
        prefix = checkpoints.find_checkpoint(checkpoint)
        config = checkpoints.load_cascade_config(prefix.parent)
        view = run_view(prefix.parent)
    given, config = config.to_dict(), config.with_net_args(options.net_args)
    if prefix is None:
        check_used(config, given)
    config = config.executed(precision=options.precision, fast_reconstruction=options.fast_reconstruction)
    return _Model(None, prefix, config.replace(image_size=options.image_size or config.image_size), view)


def _for_modalities(model: _Model, options: Options, fixed: sitk.Image, moving: sitk.Image) -> tuple[_Model, list[str]]:
    """The model, with mutual information in place of correlation where no network is used and the modalities differ."""
    kinds = modality_of(fixed), modality_of(moving)
    if not model.is_none or kinds[0] == kinds[1] or re.search(r"\bsimilarity\s*=", options.net_args or ""):
        return model, []
    named = " and ".join(kind or "another modality" for kind in kinds)
    told = f"{named}: compared by mutual information (--net_args \"similarity='mind'\" is slower and often closer)"
    return model._replace(config=model.config.with_net_args("similarity='mi'")), [told]


class _Start(NamedTuple):
    """What the network or the optimisation starts from.

    Attributes:
        frame: of the moving volume, in the moving scan.
        volume: the moving volume on it, 0..255.
        chosen, doubts: sentences on how it was found, and on why it may be wrong.
    """

    frame: Frame
    volume: np.ndarray
    chosen: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()


def _aligned(
    fixed: PreparedScan, moving: PreparedScan, view: View, how: str | tuple[np.ndarray, np.ndarray], model: _Model
) -> _Start:
    """The moving volume brought to the fixed one by an affine map.

    Args:
        how: the kind of map to find; where the two volumes as they were cropped are more alike already, they stay as
            they are. Or the matrix and the offset of a given one, which is taken as it is.
    """
    if isinstance(how, tuple):
        frame = fixed.frame.mapped(*how)
        try:
            return _Start(frame, prepare(moving.image, frame, view)[0])
        except UserError as error:
            reason = str(error).partition(";")[0]
            raise UserError(
                f"where the initial transform leads, nothing is seen of the moving scan ({reason}); is it of these "
                "scans, from places in the fixed one to places in the moving one?"
            ) from error
    from network.losses import similarity_loss

    try:
        found = affine_search.find_affine(fixed.image, moving.image, how)
        matrix, offset = np.reshape(found.GetMatrix(), (3, 3)), np.array(found.TransformPoint((0.0, 0.0, 0.0)))
        frame = fixed.frame.mapped(matrix, offset)
        volume, _ = prepare(moving.image, frame, view)
    except UserError as error:  # no map is found, or nothing of the moving scan lies where it leads
        doubt = f"nothing in common was found by which the scans could be brought together first ({error})"
        return _Start(moving.frame, moving.volume, doubts=(doubt,))
    loss = similarity_loss(model.config)
    cropped, mapped = (float(loss(_tensor(fixed.volume), _tensor(v))[0]) for v in (moving.volume, volume))
    if mapped >= cropped:
        kept = "no affine map was taken first: the crops are more alike as they are"
        return _Start(moving.frame, moving.volume, (kept,))
    angle, shift, scale = affine_search.in_words(matrix, offset, fixed.frame)
    told = f"found first: a turn of {degrees(angle)}, a shift of {shift:.0f} mm, a scale of {scale:.2f}"
    return _Start(frame, volume, (told,))


def _load(model: _Model) -> Any:
    """The model's network, or None."""
    if model.network is not None or model.prefix is None:
        return model.network
    from network import checkpoints

    return checkpoints.open_model(model.prefix, model.config)


def _tensor(volume: np.ndarray) -> Any:
    import tensorflow as tf

    return tf.constant(to_unit(volume)[None, ..., None])


def _arrays(stage: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The parts of a stage of one pair, in NumPy and without batch and channel."""
    return stage.flow[0].numpy(), stage.composed_flow[0].numpy(), stage.warped[0, ..., 0].numpy()


def _apply(network: Any, fixed: Any, moving: Any, rep: int | str) -> tuple[Any, int]:
    """`CascadeOutput` of a pair, and how often each cascade was applied: 0 without a network."""
    from network import refinement

    if network is None:
        return refinement.identity(moving), 0
    if rep == AUTO:
        return refinement.repeat_while_better(network, fixed, moving)
    return network((fixed, moving), rep=rep), int(rep)


def _weights(fixed: PreparedScan, given: Input, how: Options) -> np.ndarray | None:
    """Where the optimisation compares, 0 or 1 on the fixed frame: in the given mask, but not in the excluded one."""
    if given.mask is None and how.exclude_mask is None:
        return None
    weights = np.ones(fixed.frame.size, np.float32)
    own = Frame.of(fixed.image)
    if given.mask is not None and fixed.region is not None:
        weights = to_array(fixed.frame.resample(own.put(fixed.region.astype(np.float32)), nearest=True))
    if how.exclude_mask is not None:
        excluded = to_array(match_labels(read_image(how.exclude_mask, is_label=True), fixed.image)) != 0
        if not excluded.any():
            raise UserError(
                "the excluded mask marks no voxel where the fixed scan lies; check its place, or leave it out"
            )
        marked = own.put(excluded.astype(np.float32))
        weights = weights * (1 - to_array(fixed.frame.resample(marked, nearest=True)))
        if not weights.any():
            raise UserError("the excluded mask leaves nothing of the fixed scan to compare; check its voxels and place")
    return weights


def _refined(
    output: Any, fixed: Any, moving: Any, config: Any, how: Options, weights: np.ndarray | None, on_step: Any
) -> tuple[Any, np.ndarray | None]:
    """The optimised `CascadeOutput`, and where both ways are asked for, how far each voxel is after there and back.

    The latter in voxels, float32 [X, Y, Z, 3].
    """
    import tensorflow as tf

    from network import refinement
    from network.spatial_transformer import compose

    mask = None if weights is None else tf.constant(weights[None, ..., None])
    steps, smoothness = how.refine or AUTO, how.smoothness
    output = refinement.refine(output, fixed, moving, config, steps, on_step, smoothness=smoothness, mask=mask)
    if not how.both_ways:
        return output, None
    start = refinement.identity(fixed)
    back = refinement.refine(start, moving, fixed, config, steps, on_step, smoothness=smoothness)
    apart = compose(back.stages[-1].composed_flow, output.stages[-1].composed_flow)
    return output, apart[0].numpy()


def _measure(fixed: Any, moving: Any, stages: Any) -> dict[str, Any]:
    """Similarity and folding before registration and after each stage."""
    from network import losses, metrics

    similarity = [losses.correlation(fixed, image) for image in (moving, *(stage.warped for stage in stages))]
    folding = [metrics.folding(metrics.jacobian_determinant(stage.composed_flow)) for stage in stages]
    return {
        "similarity": [round(float(value[0]), 6) for value in similarity],
        "folding": [0.0, *(round(float(share[0]), 8) for share in folding)],
        "jacobian_std": round(float(metrics.jacobian_std(stages[-1].composed_flow)[0]), 6),
    }


def _quality(fixed: PreparedScan, moving: PreparedScan, stages: tuple, apart: np.ndarray | None) -> Quality:
    """The maps of a result, with their axes in LPS."""
    volumes = fixed.in_lps(fixed.volume), moving.in_lps(moving.volume), from_unit(fixed.in_lps(stages[-1].warped))
    flows = fixed.in_lps(stages[-1].composed_flow), fixed.in_lps(stages[-1].flow)
    return Quality.of(*volumes, *flows, fixed.frame.spacing, None if apart is None else fixed.in_lps(apart))


def _settings(inputs: list[Input], model: _Model, view: View, kind: str, options: Options) -> dict[str, Any]:
    fixed, moving = inputs
    # The options of the network; where there is none, those of the optimisation alone.
    used = used_without_network(model.config) if model.is_none else model.config.to_dict()
    return {
        "fixed": _name(fixed.scan),
        "moving": _name(moving.scan),
        "fixed_series": fixed.series,
        "moving_series": moving.series,
        "fixed_mask": _name(fixed.mask),
        "moving_mask": _name(moving.mask),
        "checkpoint": None if model.prefix is None else str(model.prefix),
        "affine": kind,
        "initial_transform": _name(options.initial_transform),
        "rep": options.rep,
        "refine": options.refine,
        "orientation": view.orientation,
        "view": view.to_dict(),
        "network": used,
    }


def _name(source: Any) -> str | None:
    return str(source) if isinstance(source, str | Path) else None
