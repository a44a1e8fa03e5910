"""Two real abdominal CTs with liver masks, as a small data set: fetched with pip, and nothing of them redistributed.

They are reference files of the tests in the source distribution of totalsegmentator (Apache 2.0), fetched once into a
cache folder and checked by sha256. One CT shows the lower body up to the middle of the liver, the other 4 cm of a
liver: so the first is cut to the 4 cm at its upper end, where both show the liver at its widest. Both are then
cropped to the liver's surroundings, resampled and windowed.

    python -m data_util.sample -o datasets/sample --size 128 128 128
"""

import argparse
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from cli import run
from data_util.hdf5 import Scan
from data_util.making.known_flows import deform, known_pair, placement_flow, smooth_flow
from data_util.making.new_set import check_size, write_scans
from data_util.making.packages import fetch, unpack
from data_util.making.slabs import common_slab, read_ct
from data_util.making.starter_sources import REFERENCE_FILES, TOTALSEGMENTATOR
from data_util.scans.frame import Frame
from data_util.scans.images import to_array
from data_util.scans.preprocessing import crop_frame, prepare
from data_util.scans.view import PRESETS

CTS = (  # image, labels
    ("example_ct.nii.gz", "example_seg_fast_force_split.nii.gz"),
    ("example_ct_dicom", "example_seg_dicom.nii.gz"),
)
N_TRAIN, N_KNOWN = 6, 2  # deformed training scans and known pairs made of each CT


def extract(archive: Path, folder: Path) -> None:
    """Write the two CTs with their labels from the archive into a folder.

    Raises:
        UserError: as `packages.unpack`.
    """
    unpack(archive, {f"{REFERENCE_FILES}{name}": name for pair in CTS for name in pair}, folder)


def crop_ct(image: sitk.Image, liver: np.ndarray, size: tuple[int, int, int]) -> Scan:
    """Crop to the liver's surroundings, resample to `size`, window: -> Scan, its spacing that of its own voxels."""
    frame = crop_frame(image, liver, size)
    mask = frame.resample(Frame.of(image).put(liver.astype(np.uint8) * np.uint8(255)), nearest=True)
    return Scan(
        volume=prepare(image, frame, PRESETS["liver"])[0],
        segmentation=to_array(mask),
        spacing=np.asarray(frame.spacing),
    )


def write_dataset(
    prefix: str | Path, size: tuple[int, int, int], seed: Any = 0, overwrite: bool = False
) -> tuple[Path, Path]:
    """Write the sample set, PREFIX.h5 and PREFIX.json, fetching the CTs where needed; return both paths.

    train  each CT deformed N_TRAIN times (scheme "1"), by a smooth flow and a small affine one. Training is
           unsupervised, and never sees the two CTs undeformed, but it does see this anatomy: the scores on `real`
           and `known` tell how well the network fits these two people, not how it does on others.
    real   the two CTs, as they are: one adjacent pair (scheme "2").
    known  N_KNOWN adjacent pairs (s, d) of each CT, scheme "known": s is the CT deformed in yet another way, d is s
           deformed by a known smooth flow; the pair fixed d, moving s has its true flow in the file.

    Args:
        prefix: path of both files without their endings.
        size: voxels along x, y, z, at least 16 each.
        seed: another seed, other deformations; from 0.
        overwrite: replace files that are there.

    Returns:
        Paths of the HDF5 file and the config.

    Raises:
        UserError: a size or the seed is too small, or as `packages.fetch`, `extract`, `read_ct` and `write_scans` say.
    """
    check_size(size, seed)
    name = Path(prefix).name
    n_train, n_known = N_TRAIN * len(CTS), N_KNOWN * len(CTS)
    first_known = n_train + len(CTS)

    def scans() -> Iterator[Scan]:
        with tempfile.TemporaryDirectory() as folder:
            extract(fetch(TOTALSEGMENTATOR), Path(folder))
            cts = common_slab([read_ct(Path(folder, image), Path(folder, labels)) for image, labels in CTS])
        originals = [crop_ct(*ct, size) for ct in cts]
        for k in range(n_train):
            yield _individual(originals[k % len(CTS)], [seed, k])
        yield from originals
        for k in range(n_known):
            source = first_known + 2 * k
            scan = _individual(originals[k % len(CTS)], [seed, source])
            flow = smooth_flow(size, [seed, source + 1], amplitude=0.08 * min(size))
            yield from known_pair(scan, flow, f"{name}/{source}")

    subsets = {
        "train": range(n_train),
        "real": range(n_train, first_known),
        "known": range(first_known, first_known + 2 * n_known),
    }
    schemes = {"1": {"train": 1.0}, "2": {"real": 1.0}, "known": {"known": 1.0}}
    view = {"orientation": "LPS", "crop": "mask", "window": PRESETS["liver"].window}
    return write_scans(prefix, scans(), size, "liver", subsets, schemes, overwrite, **view)


def _individual(scan: Scan, seed: Any) -> Scan:
    rng = np.random.default_rng(seed)
    size = scan.volume.shape
    flow = smooth_flow(size, rng, 0.06 * min(size)) + placement_flow(size, rng, shift=0.03, scale=0.06, degrees=5)
    return deform(scan, flow)


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m data_util.sample", description="Write a set of two real CTs.")
    parser.add_argument("-o", "--output", default="datasets/sample", help="prefix of the .h5 and .json (%(default)s)")
    parser.add_argument(
        "--size", type=int, nargs=3, default=[128] * 3, metavar=("X", "Y", "Z"), help="voxels (128 128 128)"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed, other deformations (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    args = parser.parse_args(argv)
    data, config = write_dataset(args.output, args.size, args.seed, args.overwrite)
    train, known = N_TRAIN * len(CTS), N_KNOWN * len(CTS)
    size = "x".join(str(n) for n in args.size)
    print(f"{data}: {train} training scans, the pair of real CTs, {known} known pairs, {size} voxels")
    print(f"{config}: the config, for -d")
    print(f"next: python train.py -d {shlex.quote(str(config))}")


if __name__ == "__main__":
    sys.exit(run(main))
