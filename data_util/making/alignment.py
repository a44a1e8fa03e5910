"""A scan brought to a template before it becomes a volume: by an affine map that is found by grey values alone."""

import functools
import hashlib
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk

from data_util.scans.affine_search import find_affine
from data_util.scans.frame import Frame
from data_util.scans.images import orient, read_native
from errors import UserError


@dataclass(frozen=True)
class Alignment:
    """What the scans of a data set are brought to.

    Attributes:
        template: path of the template scan.
        kind: of the map, as in `find_affine`.
        digest: of the template's voxels and where they lie, by which another template of that name is known.
    """

    template: str
    kind: str
    digest: str

    @classmethod
    def to(cls, template: str, kind: str) -> "Alignment":
        """The alignment to a template scan.

        Raises:
            UserError: the template cannot be read.
        """
        _read.cache_clear()  # it may have been replaced
        image = _read(template)
        digest = hashlib.blake2b(repr(Frame.of(image)).encode(), digest_size=16)
        digest.update(sitk.GetArrayFromImage(image).tobytes())
        return cls(template, kind, digest.hexdigest())

    def find(self, image: sitk.Image) -> "AlignedScan":
        """Bring a scan in LPS to the template.

        Raises:
            UserError: no map is found, or the template cannot be read.
        """
        template = _read(self.template)
        try:
            return AlignedScan(Frame.of(template), find_affine(template, image, self.kind))
        except UserError as error:
            raise UserError(f"not brought to the template {self.template}: {error}") from error


@dataclass(frozen=True)
class AlignedScan:
    """Where a scan lies under its template.

    Attributes:
        frame: the template's.
        map: from places in the template to places in the scan, in mm (LPS).
    """

    frame: Frame
    map: sitk.AffineTransform

    @property
    def matrix(self) -> np.ndarray:
        """The map as a matrix [4, 4] of places (x, y, z, 1)."""
        whole = np.eye(4)
        whole[:3, :3] = np.reshape(self.map.GetMatrix(), (3, 3))
        whole[:3, 3] = self.map.TransformPoint((0.0, 0.0, 0.0))
        return whole

    def on_template(self, image: sitk.Image, nearest: bool = False) -> sitk.Image:
        """The scan, or labels of it (`nearest`), on the template's voxels; the darkest value, or 0, outside."""
        outside = 0.0 if nearest else float(sitk.GetArrayViewFromImage(image).min())
        seen = self.frame.resample(image, nearest, outside, self.map)
        for key in image.GetMetaDataKeys():  # the modality is there
            seen.SetMetaData(key, image.GetMetaData(key))
        return seen

    def in_scan(self, frame: Frame) -> Frame:
        """The frame in the scan that lies where a frame lies in the template; its axes need not be at right angles."""
        return frame.mapped(self.matrix[:3, :3], self.matrix[:3, 3])


@functools.lru_cache(maxsize=1)
def _read(template: str) -> sitk.Image:
    """The template scan, in LPS."""
    try:
        return orient(read_native(template))
    except UserError as error:
        raise UserError(f"--align: {error}") from error
