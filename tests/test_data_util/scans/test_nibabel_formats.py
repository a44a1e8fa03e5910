import nibabel
import numpy as np
import pytest

from data_util.scans.images import read_image, read_native
from errors import UserError
from tests import cases

# FreeSurfer's own grid: x to the left, y down and z to the front.
CORONAL = np.array(((2, 0, 0), (0, 0, -3), (0, -2, 0)), float)


def write(path, array, matrix=CORONAL):
    nibabel.save(nibabel.MGHImage(array, cases.affine(matrix)), path)


@pytest.mark.parametrize("ending", ["mgz", "mgh", "MGZ"])
@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int32, np.float32])
def test_a_volume_is_read_at_its_places(tmp_path, kind, ending):
    size = (20, 24, 22)
    values = cases.grey(cases.places(size, CORONAL))
    values = np.clip(values, 0, 255).astype(kind) if kind == np.uint8 else values.astype(kind)
    write(tmp_path / f"p.{ending}", values)
    native = read_native(tmp_path / f"p.{ending}")
    assert native.GetSize() == size
    image = read_image(tmp_path / f"p.{ending}")
    for voxel in ((0, 0, 0), (3, 7, 11), (19, 21, 23)):
        place = np.array(image.TransformIndexToPhysicalPoint(voxel))
        expected = cases.grey(place)
        assert image[voxel] == pytest.approx(np.clip(expected, 0, 255) if kind == np.uint8 else expected, abs=1)


def test_what_is_no_volume_is_refused(tmp_path):
    write(tmp_path / "time.mgz", np.zeros((4, 4, 4, 3), np.float32))
    with pytest.raises(UserError, match=r"time\.mgz: has 4 dimensions"):
        read_image(tmp_path / "time.mgz")
    for ending in ("mgz", "mgh"):
        path = tmp_path / f"cut.{ending}"
        for share in (0.01, 0.5, 0.95):
            write(path, np.random.default_rng(0).integers(0, 99, (20, 20, 20)).astype(np.int16))
            cases.cut(path, share)
            with pytest.raises(UserError, match=rf"cut\.{ending}: .*(cut short|cannot be read as an image)"):
                read_image(path)
