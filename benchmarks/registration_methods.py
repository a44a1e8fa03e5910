"""One registration in a process of its own: python -m benchmarks.registration_methods JOB.json.

The job names the method, the fixed and the moving scan, a grid, and where the displacement on it (mm, LPS, from the
fixed to the moving scan) and the seconds are to be written. Only what a method needs is imported, so that an
interpreter with antspyx, and without TensorFlow, can run those of ANTs.
"""

import json
import resource
import sys
import time

import numpy as np
import SimpleITK as sitk

HERE, ANTS, ITK = "here", "ants", "itk"
STARTER = {"checkpoint": "starter-brain", "affine": "affine"}
# Name of a method -> who does it, and its options.
METHODS = {
    "here": (HERE, {}),
    "here, ncc": (HERE, {"net_args": "similarity='ncc'"}),
    "here, mind": (HERE, {"net_args": "similarity='mind'"}),
    "here, 60 steps": (HERE, {"refine": 60}),
    "starter": (HERE, STARTER),
    "starter, 10 steps": (HERE, {**STARTER, "refine": 10}),
    "starter, 30 steps": (HERE, {**STARTER, "refine": 30}),
    "starter, 60 steps": (HERE, {**STARTER, "refine": 60}),
    "starter, repeated": (HERE, {**STARTER, "rep": 2}),
    "SyN": (ANTS, {"type_of_transform": "SyN"}),
    "SyNQuick": (ANTS, {"type_of_transform": "antsRegistrationSyNQuick[s]"}),
    "ITK affine and demons": (ITK, {}),
}
ONE_MODALITY = ("here, ncc", "ITK affine and demons")
TWO_MODALITIES = ("here, mind",)
OF_HEADS = ("here, 60 steps", *(name for name in METHODS if name.startswith("starter")))


def main() -> None:
    """Do the job."""
    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    who, options = METHODS[job["method"]]
    field, told = {HERE: by_register, ANTS: by_ants, ITK: by_itk}[who](job, options)
    sitk.WriteImage(sitk.Cast(field, sitk.sitkVectorFloat32), job["field"])
    with open(job["told"], "w", encoding="utf-8") as file:
        json.dump(told, file)


class Timed:
    """Wall and CPU seconds of a block, all threads of this process and its children together."""

    def __enter__(self) -> "Timed":
        self.begin = time.perf_counter(), self._used()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = {"wall": time.perf_counter() - self.begin[0], "cpu": self._used() - self.begin[1]}

    @staticmethod
    def _used() -> float:
        both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(used.ru_utime + used.ru_stime for used in both)


def by_register(job: dict, options: dict) -> tuple[sitk.Image, dict]:
    """By `register` of this project, as its command does it."""
    from data_util.scans.frame import Frame
    from registration import register

    with Timed() as timed:
        found = register(job["fixed"], job["moving"], **options)
    grid = Frame.of(sitk.ReadImage(job["grid"]))
    told = {"stages": found.report["seconds"], "chosen": found.report["chosen"], "doubts": found.report["doubts"]}
    return grid.put(found.transform.displacement(grid)), {**timed.seconds, **told}


def by_ants(job: dict, options: dict) -> tuple[sitk.Image, dict]:
    """By ANTs' own affine start and SyN, with the defaults of antspyx and a fixed seed."""
    import ants

    with Timed() as timed:
        fixed, moving = ants.image_read(job["fixed"]), ants.image_read(job["moving"])
        found = ants.registration(fixed, moving, random_seed=1, **options)
    grid = ants.image_read(job["grid"])
    field = ants.apply_transforms(grid, moving, found["fwdtransforms"], compose=job["folder"] + "/composed_")
    return sitk.ReadImage(field), {**timed.seconds, "version": ants.__version__}


def by_itk(job: dict, _: dict) -> tuple[sitk.Image, dict]:
    """By SimpleITK: an affine map by Mattes' mutual information from the moments, then diffeomorphic demons.

    Like SyN's default, it ends at half the resolution.
    """
    with Timed() as timed:
        fixed, moving = (sitk.ReadImage(job[role], sitk.sitkFloat32) for role in ("fixed", "moving"))
        kind = sitk.CenteredTransformInitializerFilter.MOMENTS
        affine = sitk.CenteredTransformInitializer(fixed, moving, sitk.AffineTransform(3), kind)
        method = sitk.ImageRegistrationMethod()
        method.SetMetricAsMattesMutualInformation(32)
        method.SetMetricSamplingStrategy(method.REGULAR)
        method.SetMetricSamplingPercentage(0.2, 1)
        method.SetInterpolator(sitk.sitkLinear)
        method.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-4, 200)
        method.SetOptimizerScalesFromPhysicalShift()
        method.SetShrinkFactorsPerLevel([8, 4, 2])
        method.SetSmoothingSigmasPerLevel([4, 2, 1])
        method.SetSmoothingSigmasAreSpecifiedInPhysicalUnits(True)
        method.SetInitialTransform(affine, inPlace=True)
        method.Execute(fixed, moving)
        lowest = float(sitk.GetArrayViewFromImage(moving).min())
        level = sitk.Resample(moving, fixed, affine, sitk.sitkLinear, lowest)
        field = _demons(fixed, sitk.HistogramMatching(level, fixed, 256, 12, True))
        both = sitk.CompositeTransform([affine, sitk.DisplacementFieldTransform(field)])  # the last comes first
    grid = sitk.ReadImage(job["grid"])
    whole = sitk.TransformToDisplacementField(
        both, sitk.sitkVectorFloat32, grid.GetSize(), grid.GetOrigin(), grid.GetSpacing(), grid.GetDirection()
    )
    return whole, {**timed.seconds, "version": sitk.Version_VersionString()}


def _demons(fixed: sitk.Image, moving: sitk.Image) -> sitk.Image:
    """The displacement by demons on a quarter, then on half the resolution."""
    field = None
    for factor in (4, 2):
        one, other = (_smaller(image, factor) for image in (fixed, moving))
        demons = sitk.DiffeomorphicDemonsRegistrationFilter()
        demons.SetNumberOfIterations(60)
        demons.SetStandardDeviations(1.5)
        if field is None:
            field = demons.Execute(one, other)
            continue
        finer = sitk.ResampleImageFilter()
        finer.SetReferenceImage(one)
        finer.SetUseNearestNeighborExtrapolator(True)
        field = demons.Execute(one, other, finer.Execute(field))
    return sitk.Cast(field, sitk.sitkVectorFloat64)


def _smaller(image: sitk.Image, factor: int) -> sitk.Image:
    """An image smoothed and shrunk along its axes of many voxels."""
    shrink = [factor if n >= 16 * factor else 1 for n in image.GetSize()]
    sigma = [max(k - 1, 0.01) * mm / 2 for k, mm in zip(shrink, image.GetSpacing(), strict=True)]
    return sitk.Shrink(sitk.SmoothingRecursiveGaussian(image, sigma), shrink)


if __name__ == "__main__":
    np.seterr(all="ignore")
    main()
