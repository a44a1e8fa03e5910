"""Register two raw scans from Python: DICOM or NIfTI in, the warped scan and its displacement field out.

>>> from register import register
>>> result = register("fixed/", "moving.nii.gz", "weights/VTN-10-liver")
>>> result.warped, result.displacement      # SimpleITK images in the fixed scan's space and resolution
>>> result.transform.to_moving(points)      # landmarks [n, 3] in mm
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from data_util.scans.dicom import MODALITY
from data_util.scans.frame import Frame
from data_util.scans.images import match_labels, orient, read_image, to_array
from data_util.scans.pair_transform import PairTransform
from data_util.scans.preprocessing import KINDS, find_frame, find_region, prepare
from data_util.scans.regions import doubts
from errors import UserError

# The axes that networks see: those of the data sets written here, and those that the published ones were trained on.
LPS, PUBLISHED = "LPS", "RPI"
AUTO = "auto"  # repeats


@dataclass(frozen=True, eq=False)
class PreparedScan:
    """A scan and what the network sees of it.

    image   SimpleITK image in LPS.
    region  bool [x, y, z] on its grid, the organ found or given; None where the whole scan is taken.
    frame   `Frame` of the volume, its axes the network's.
    volume  uint8 [X, Y, Z].
    doubts  what is unusual about the region found, a list of sentences.
    """

    image: sitk.Image
    region: np.ndarray | None
    frame: Frame
    volume: np.ndarray
    doubts: list

    @property
    def box(self):
        """Corners of the frame in voxels of the image, float64 (low [3], high [3])."""
        corners = self.frame.to_physical([(0, 0, 0), np.subtract(self.frame.size, 1)])
        return np.sort(Frame.of(self.image).to_voxel(corners), axis=0)

    def in_lps(self, array):
        """An array [X, Y, Z] on the frame, or a flow [X, Y, Z, 3], with its axes turned to LPS."""
        signs = np.sign(np.diag(np.linalg.solve(Frame.of(self.image).matrix, self.frame.matrix)))
        turned = np.flip(array, np.flatnonzero(signs < 0))
        return turned * signs.astype(np.float32) if array.ndim == 4 else turned


@dataclass(frozen=True, eq=False)
class Step:
    """What was found after a cascade, on the fixed frame: the affine one, the others, and refinement.

    flow    composed flow of all cascades so far, float32 [X, Y, Z, 3] in voxels: warped(p) = moving(p + flow(p)).
    warped  the moving volume warped by it once, uint8 [X, Y, Z].
    """

    flow: np.ndarray
    warped: np.ndarray


@dataclass(frozen=True, eq=False)
class Registration:
    """Two registered scans.

    fixed, moving  `PreparedScan`.
    steps          a `Step` a cascade, and one of refinement.
    transform      `PairTransform` from places in the fixed scan to places in the moving one, in mm.
    warped         the moving scan in the fixed scan's space and resolution, interpolated once: SimpleITK image.
    displacement   the transform as a displacement field in mm on that grid: SimpleITK image of vectors.
    report         settings, similarity, folding, doubts and seconds; fit for JSON.
    """

    fixed: PreparedScan
    moving: PreparedScan
    steps: tuple
    transform: PairTransform
    warped: sitk.Image
    displacement: sitk.Image
    report: dict


def register(
    fixed,
    moving,
    checkpoint=None,
    rep=1,
    preprocess="liver",
    fixed_mask=None,
    moving_mask=None,
    fixed_series=None,
    moving_series=None,
    refine=0,
    image_size=None,
    orientation=None,
    net_args="",
    on_step=None,
    **execution,
):
    """Register a moving scan to a fixed one.

    Args:
        fixed, moving: DICOM folder or image file, or SimpleITK image.
        checkpoint: run of the network, as in `network.load_model`; None to register by refinement alone.
        rep: how often each deformable cascade is applied in a row, or 'auto': as often as it helps.
        preprocess: what the network is to see, one of `data_util.scans.preprocessing.KINDS`.
        fixed_mask, moving_mask: label image (file or SimpleITK image), the organ where it is not 0; None to find it.
        fixed_series, moving_series: id of a series in the DICOM folder; None for the largest.
        refine: steps of optimisation of the result for this very pair, after the network.
        image_size: (X, Y, Z) to work at; None is the run's, or 128 x 128 x 128 without a run.
        orientation: where the network's axes run to, as in the data it was trained on: three letters, L or R, P or A,
            S or I. None is LPS, or RPI for a published run.
        net_args: as in `network.load_model`.
        on_step: function of (step, loss) called after every step of refinement.
        execution: how to compute, as in `network.load_model`.

    Returns:
        `Registration`.

    Raises:
        UserError: an unknown kind or orientation, nothing to register with, and what `read_image`, `find_frame`,
            `prepare` and `load_model` raise.
    """
    if preprocess not in KINDS:
        raise UserError(f"unknown kind of scan {preprocess!r}; known are {', '.join(KINDS)}")
    if refine < 0 or (checkpoint is None and not refine):
        raise UserError(f"{refine} steps of refinement and checkpoint {checkpoint}: give a checkpoint, or steps from 1")
    clock = _Clock()
    images = [_image(*source) for source in ((fixed, fixed_series), (moving, moving_series))]
    masks = [None if mask is None else _image(mask) for mask in (fixed_mask, moving_mask)]
    clock.stop("read")
    prefix, config, trained_on = _find_run(checkpoint, image_size, net_args, execution)
    orientation = orientation or trained_on
    flips = _flips(orientation)
    clock.stop("load")
    scans = [
        _scan(role, image, mask, preprocess, config.image_size, flips)
        for role, image, mask in zip(("fixed", "moving"), images, masks, strict=True)
    ]
    clock.stop("preprocess")
    network = None if prefix is None else _load(prefix, config)
    clock.stop("load")
    pair = [_tensor(scan.volume) for scan in scans]
    output, rep = _apply(network, *pair, rep)
    clock.stop("network")
    if refine:
        from network import refinement

        output = refinement.refine(output, *pair, config, refine, on_step)
        clock.stop("refine")
    steps = tuple(_step(stage) for stage in output.stages)
    affine = output.affine.matrix[0].numpy(), output.affine.shift[0].numpy()
    transform = PairTransform(scans[0].frame, scans[1].frame, *affine, steps[-1].flow)
    warped, displacement = transform.warp(scans[1].image, Frame.of(scans[0].image))
    clock.stop("warp")
    report = {
        "settings": {
            "fixed": _source(fixed),
            "moving": _source(moving),
            "fixed_series": fixed_series,
            "moving_series": moving_series,
            "fixed_mask": _source(fixed_mask),
            "moving_mask": _source(moving_mask),
            "checkpoint": None if prefix is None else str(prefix),
            "rep": rep,
            "refine": refine,
            "preprocess": preprocess,
            "orientation": orientation,
            "network": config.to_dict(),
        },
        "fixed": _describe(scans[0]),
        "moving": _describe(scans[1]),
        "doubts": _all_doubts(*scans),
        **_measure(*pair, output.stages),
        "seconds": clock.seconds,
    }
    return Registration(*scans, steps, transform, warped, displacement, report)


class _Clock:
    """Adds up the wall time of named stages."""

    def __init__(self):
        self.seconds, self._last = {}, time.perf_counter()

    def stop(self, stage):
        now = time.perf_counter()
        self.seconds[stage] = round(self.seconds.get(stage, 0) + now - self._last, 3)
        self._last = now


def _image(source, series=None):
    return orient(source) if isinstance(source, sitk.Image) else read_image(source, series)


def _source(source):
    return str(source) if isinstance(source, str | Path) else None


def _flips(orientation):
    """Axes of LPS that run the other way in an orientation."""
    ends = ("LR", "PA", "SI")
    if len(orientation) != 3 or not all(letter in pair for letter, pair in zip(orientation, ends, strict=True)):
        raise UserError(f"orientation {orientation!r} is not L or R, P or A, S or I; write for example LPS or RPI")
    return [axis for axis in range(3) if orientation[axis] == ends[axis][1]]


def _scan(role, image, mask, kind, size, flips):
    try:
        if mask is not None:
            region, unusual = to_array(match_labels(mask, image)) != 0, []
        else:
            region = find_region(image, kind)
            unusual = [] if region is None else doubts(image, region, kind)
        frame = find_frame(image, kind, size, region).flipped(flips)
        return PreparedScan(image, region, frame, prepare(image, frame, kind), unusual)
    except UserError as error:
        raise UserError(f"{role} scan: {error}") from error


def _find_run(checkpoint, image_size, net_args, execution):
    """Path of a checkpoint, the options of its run, and its orientation; without one: None, the defaults, and LPS."""
    from network import CascadeConfig, checkpoints

    prefix, config, orientation = None, CascadeConfig(), LPS
    if checkpoint is not None:
        prefix = checkpoints.find_checkpoint(checkpoint)
        config = checkpoints.load_cascade_config(prefix.parent)
        orientation = LPS if (prefix.parent / checkpoints.CONFIG_FILE).is_file() else PUBLISHED
    config = config.with_net_args(net_args)
    config = config.executed(**execution).replace(image_size=image_size or config.image_size)
    return prefix, config, orientation


def _load(prefix, config):
    from network import checkpoints
    from network.recursive_cascaded_networks import build_network

    network = build_network(config)
    checkpoints.restore(network, prefix)
    return network


def _tensor(volume):
    import tensorflow as tf

    return tf.constant(volume[None, ..., None] / np.float32(255))


def _apply(network, fixed, moving, rep):
    """`CascadeOutput` of a pair, and how often each cascade was applied: none of them without a network."""
    from network import refinement

    if network is None:
        return refinement.identity(moving), 0
    if rep == AUTO:
        return refinement.repeat_while_better(network, fixed, moving)
    return network((fixed, moving), rep=rep), rep


def _step(stage):
    warped = np.rint(stage.warped[0, ..., 0].numpy() * 255).astype(np.uint8)
    return Step(stage.composed_flow[0].numpy(), warped)


def _measure(fixed, moving, stages):
    """Similarity and folding before registration and after each step."""
    from network import losses, metrics

    similarity = [losses.correlation(fixed, image) for image in (moving, *(stage.warped for stage in stages))]
    folding = [metrics.folding(metrics.jacobian_determinant(stage.composed_flow)) for stage in stages]
    return {
        "similarity": [round(float(value[0]), 6) for value in similarity],
        "folding": [0.0, *(round(float(share[0]), 8) for share in folding)],
        "jacobian_std": round(float(metrics.jacobian_std(stages[-1].composed_flow)[0]), 6),
    }


def _describe(scan):
    frame = scan.frame
    region = None if scan.region is None else round(float(scan.region.sum() * np.prod(scan.image.GetSpacing()) / 1000))
    return {
        "size": scan.image.GetSize(),
        "spacing": scan.image.GetSpacing(),
        "region_ml": region,
        "frame": {name: getattr(frame, name) for name in ("size", "spacing", "origin", "direction")},
    }


def _all_doubts(fixed, moving):
    found = [f"{role}: {doubt}" for role, scan in (("fixed", fixed), ("moving", moving)) for doubt in scan.doubts]
    modalities = [scan.image.GetMetaData(MODALITY) for scan in (fixed, moving) if scan.image.HasMetaDataKey(MODALITY)]
    if len(set(modalities)) > 1:
        found.append(f"fixed is {modalities[0]} and moving {modalities[1]}, and networks compare scans of one modality")
    return found
