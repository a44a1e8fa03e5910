"""Images, figures, series and folders on a full disk: one line, and nothing of them, or the older ones, stays."""

import os

import numpy as np
import pytest
import SimpleITK as sitk
from matplotlib.figure import Figure

from data_util.output.figures import save_figure
from data_util.output.output_folder import new_folder
from data_util.output.pair_images import pair_name, save_pair
from data_util.output.registration_figures import flow_image
from data_util.output.registration_files import write_transform
from data_util.scans.dicom_writing import source_tags, write_series
from data_util.scans.images import write_image
from errors import UserError
from tests.test_data_util.output.test_pair_images import Result, image_of

NOISE = np.random.default_rng(0).normal(0, 100, (40, 40, 40)).astype(np.float32)


def noise():
    return sitk.GetImageFromArray(NOISE)


def is_one_line(error):
    return "\n" not in str(error.value) and ".partial" not in str(error.value) and "make space" in str(error.value)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.nrrd", "a.mha", "a.mhd", "a.hdr"])
def test_an_image_beyond_a_limit(name, tmp_path, file_limit, capfd):
    (tmp_path / name).write_text("old")
    with file_limit(100_000), pytest.raises(UserError, match=rf"cannot write .*/{name} \(.*MiB left") as error:
        write_image(noise(), tmp_path / name)
    assert is_one_line(error)
    assert os.listdir(tmp_path) == [name]
    assert (tmp_path / name).read_text() == "old"
    assert "ERROR: NWAD" not in capfd.readouterr().err


@pytest.mark.parametrize("missing", [1, 100])  # bytes
@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii"])
def test_an_image_that_lacks_its_last_bytes(name, missing, tmp_path, file_limit):
    write_image(noise(), tmp_path / name)
    whole = (tmp_path / name).stat().st_size
    with file_limit(whole - missing), pytest.raises(UserError, match="wrote only"):
        write_image(noise(), tmp_path / name)
    with file_limit(whole):
        write_image(noise(), tmp_path / name)


def test_images_of_several_files_are_read_back(tmp_path):
    for name in ("a.nii.gz", "a.mhd", "b.hdr", "a.nrrd"):
        write_image(noise(), tmp_path / name)
        np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / name))), NOISE)


def test_words_of_others_pass_while_an_image_is_written(tmp_path, capfd, monkeypatch):
    def write(*_, **__):
        os.write(2, b"** ERROR: NWAD: wrote only 0\nanother thread's\n")
        raise RuntimeError("ITK ERROR: x(0x1): failed")

    monkeypatch.setattr(sitk, "WriteImage", write)
    with pytest.raises(UserError, match="check the file's ending"):
        write_image(noise(), tmp_path / "a.mha")
    assert capfd.readouterr().err == "another thread's\n"


@pytest.mark.parametrize("file_format", ["nii", "npz"])
def test_images_of_a_pair_appear_together(file_format, tmp_path, file_limit):
    result = Result(
        {"fixed": image_of("fixed", np.zeros((40, 40, 40), np.float32)), "warped": image_of("warped", NOISE)},
        *np.ones((2, 3), np.float32),
    )
    with file_limit(100_000), pytest.raises(UserError) as error:
        save_pair(tmp_path / "run", result, ("fixed", "warped"), file_format)
    assert is_one_line(error)
    assert os.listdir(tmp_path / "run") == []
    save_pair(tmp_path / "run", result, ("fixed",))
    with file_limit(100_000), pytest.raises(UserError):
        save_pair(tmp_path / "run", result, ("fixed", "warped"), file_format)
    assert os.listdir(tmp_path / "run" / pair_name(result)) == ["fixed.nii.gz"]


def picture(folder):
    figure = Figure()
    figure.subplots().imshow(NOISE[0])
    save_figure(figure, folder / "a.png")


WRITERS = {
    "figure": picture,
    "flow": lambda folder: flow_image(folder / "a.png", np.stack([NOISE] * 3, -1)),
    "series": lambda folder: write_series(noise(), folder / "a", source_tags(noise()), "x"),
    "transform": lambda folder: write_transform(sitk.AffineTransform(3), folder / "a.tfm"),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_other_files_beyond_a_limit(kind, tmp_path, file_limit):
    with file_limit(100), pytest.raises(UserError, match=r"cannot write .*/a[.a-z]* \(.*MiB left") as error:
        WRITERS[kind](tmp_path)
    assert is_one_line(error)
    assert os.listdir(tmp_path) == []
    WRITERS[kind](tmp_path)
    assert len(os.listdir(tmp_path)) == 1


def test_an_output_folder_on_a_full_disk(small_disk, capfd):
    """What was there stays, and the reason is the disk's, whichever library meets it."""
    output = small_disk / "out"
    with new_folder(output, {}) as folder:
        (folder / "a").write_text("old")
    for write in (lambda folder: write_image(noise(), folder / "a.nii.gz"), *WRITERS.values()):
        with pytest.raises(UserError, match=r"cannot write .*MiB left in .*make space") as error:
            write_on_full(output, write)
        assert is_one_line(error)
        assert {path.name for path in output.iterdir()} == {"a", "report.json"}
        assert os.listdir(small_disk) == ["out"]
    assert "ERROR" not in capfd.readouterr().err


def fill(folder):
    """Leave no byte."""
    with (folder / "big").open("wb", buffering=0) as file:
        while True:
            try:
                file.write(b"x" * 4096)
            except OSError:
                return


def write_on_full(output, write):
    with new_folder(output, {}) as folder:
        fill(folder)
        write(folder)


def test_a_folder_without_room_for_its_report(small_disk):
    with pytest.raises(UserError, match=r"cannot write .*/out \(No space left on device"):
        write_on_full(small_disk / "out", lambda folder: None)
    assert os.listdir(small_disk) == []
