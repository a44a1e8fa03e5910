"""A small Learn2Reg task of moved bodies, and the commands on it."""

import json
import pathlib

import nibabel
import numpy as np
from scipy import ndimage

import cli
from data_util import learn2reg

SIZE, SPACING = (24, 20, 16), np.array((1.5, 1.0, 2.5))
AFFINE = np.array([[-1.5, 0, 0, 30], [0, 1, 0, -12], [0, 0, 2.5, 7], [0, 0, 0, 1.0]])  # axes run to L, A, S
SHIFT = np.array((2, -1, 1))
SUBJECTS = ("0001", "0002", "0003", "0004")


def save(path, array, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


def body(shift=(0, 0, 0)):
    """Grey values [-900, 400] and labels 1 and 2 of a body that is moved by a shift in voxels."""
    place = np.moveaxis(np.indices(SIZE), 0, -1) - shift
    first = (((place - (9, 10, 8)) / (5, 4, 3)) ** 2).sum(-1) < 1
    second = (np.abs(place - (16, 10, 8)) <= (2, 3, 1)).all(-1)
    grey = -900 + 8 * place[..., 0] + 5 * place[..., 1] + 400.0 * first + 700.0 * second
    return grey.astype(np.float32), (first + 2 * second).astype(np.uint8)


def entry(name, **parts):
    return {"image": f"./imagesTr/{name}.nii.gz"} | {k: f"./{k}sTr/{name}.nii.gz" for k in parts if parts[k]}


def pair(fixed, moving):
    return {"fixed": f"./imagesTr/T_{fixed}_0000.nii.gz", "moving": f"./imagesTr/T_{moving}_0000.nii.gz"}


def describe(folder, **changes):
    """Write the description in the form that is used since 2022; ... takes a key away."""
    content = {
        "name": "T",
        "modality": {"0": "CT"},
        "labels": {"0": {"0": "background", "1": "liver", "2": "spleen"}},
        "tensorImageSize": {"0": "3D"},
        "tensorImageShape": {"0": [*SIZE]},
        "numTraining": 4,
        "training": [entry(f"T_{k}_0000", label=True) for k in SUBJECTS],
        "test": [],
        "training_paired_images": [],
        "registration_val": [pair("0003", "0004")],
        "registration_test": [],
    }
    content = {key: value for key, value in (content | changes).items() if value is not ...}
    (folder / "T_dataset.json").write_text(json.dumps(content))


def write_task(folder):
    """Four scans; 4 is 3 moved by SHIFT, so that the field of the pair 3, 4 is SHIFT."""
    for k, subject in enumerate(SUBJECTS):
        shift = SHIFT if subject == "0004" else (k % 2, 0, 0)
        name, (grey, labels) = f"T_{subject}_0000", body(shift)
        noise = np.random.default_rng(k).normal(0, 60, SIZE)
        save(folder / "imagesTr" / f"{name}.nii.gz", (grey + noise).astype(np.float32))
        save(folder / "labelsTr" / f"{name}.nii.gz", labels)
        save(folder / "masksTr" / f"{name}.nii.gz", (labels > 0).astype(np.uint8))
        (folder / "keypointsTr").mkdir(exist_ok=True)
        points = np.array([(8, 9.5, 7), (12, 7, 9.25), (10, 12, 6)]) + (shift if subject == "0004" else 0)
        np.savetxt(folder / "keypointsTr" / f"{name}.csv", points, delimiter=",", fmt="%.3f")
    describe(folder)


def command(*flags):
    return cli.run(learn2reg.main, [str(flag) for flag in flags])


def fails(capsys, *flags):
    """The one line that a command fails with."""
    capsys.readouterr()
    assert command(*flags) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def field(folder="fields", name="disp_0003_0004", value=SHIFT):
    """Write a displacement field by nibabel alone."""
    array = np.broadcast_to(np.asarray(value, np.float32), (*SIZE, 3)) if np.ndim(value) == 1 else value
    save(pathlib.Path(folder) / f"{name}.nii.gz", np.array(array, np.float32))


def scores(capsys, *flags):
    assert command("score", "task", "fields", *flags) == 0
    return json.loads(pathlib.Path("fields_scores.json").read_text())


def smooth_field(seed, size=SIZE, amplitude=4.0):
    noise = np.random.default_rng(seed).normal(size=(*size, 3))
    smooth = ndimage.gaussian_filter(noise, (2, 2, 2, 0))
    return (smooth * amplitude / np.abs(smooth).max()).astype(np.float32)
