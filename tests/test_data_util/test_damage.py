"""Damage in a data set is found, files of others read nothing that they were not given, and names are names."""

import json
import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

import cli
from data_util import build, check
from data_util.config import load_dataset_config
from data_util.phantoms import write_dataset
from data_util.store import ScanStore
from errors import UserError

MEMBERS = ("volume", "segmentation", "point", "flow")
SIZE = (16, 18, 17)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms")
    write_dataset(folder / "p", SIZE, 2, 1, 0)
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch, phantoms):
    """A working folder with the set p: scans 0 to 5, of which 5 has a flow."""
    shutil.copy(phantoms / "p.h5", tmp_path)
    text = (phantoms / "p.json").read_text().replace(str(phantoms), str(tmp_path))
    (tmp_path / "p.json").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def look(capsys, *flags):
    capsys.readouterr()
    status = cli.run(check.main, ["p.json", *flags])
    return status, capsys.readouterr().out


def read(trusted=False):
    """Every array of every scan."""
    store = ScanStore(load_dataset_config("p.json", trusted).files)
    return [store.read(f"p/{k}", flow=True) for k in range(6)]


def without_checksums(path):
    """Write the file as older versions did."""
    with h5py.File(path) as file, h5py.File("old.h5", "w") as old:
        for key, group in file.items():
            for name, data in group.items():
                options = {} if name == "point" else {"chunks": data.chunks, "compression": "gzip"}
                old.create_dataset(f"{key}/{name}", data=data[...], **options).attrs.update(data.attrs)
            old[key].attrs.update(group.attrs)
    os.replace("old.h5", path)


@pytest.mark.parametrize("member", MEMBERS)
def test_every_array_has_a_checksum_and_a_changed_bit_is_found(folder, capsys, member):
    with h5py.File("p.h5") as file:
        dataset = file["5"][member]
        assert dataset.fletcher32
        chunks = [dataset.id.get_chunk_info(k) for k in range(dataset.id.get_num_chunks())]
    content = Path("p.h5").read_bytes()
    assert look(capsys)[0] == 0
    for chunk in (chunks[0], chunks[-1]):
        for place in (0, chunk.size // 2, chunk.size - 1):
            damaged = bytearray(content)
            damaged[chunk.byte_offset + place] ^= 1
            Path("p.h5").write_bytes(damaged)
            with pytest.raises(UserError, match=r"p\.h5: cannot be read as HDF5, perhaps cut off or damaged"):
                read()
            status, out = look(capsys)
            assert status == 1
            assert any(line.startswith("error") and "p/5" in line and "damaged" in line for line in out.splitlines())


def test_a_file_without_checksums_is_read_as_it_is_and_that_is_said(folder, capsys):
    good = read()
    without_checksums("p.h5")
    for old, new in zip(read(), good, strict=True):
        for member in ("volume", "segmentation", "points", "flow"):
            np.testing.assert_array_equal(getattr(old, member), getattr(new, member))
    status, out = look(capsys)
    assert status == 0
    assert "note: 19 arrays have no checksum, so that damage in them may go unnoticed" in out.splitlines()
    with h5py.File("p.h5", "r+") as file:
        file["0/segmentation"][...] = file["0/segmentation"][...] // 255
    status, out = look(capsys, "--fix")
    assert status == 0
    assert "note: 18 arrays have no checksum" in out
    with h5py.File("p_fixed.h5") as file:
        assert file["0/segmentation"].fletcher32


def test_quick_reads_no_array(folder, capsys, monkeypatch):
    with h5py.File("p.h5") as file:
        chunk = file["5/flow"].id.get_chunk_info(0)
    content = bytearray(Path("p.h5").read_bytes())
    content[chunk.byte_offset + 5] ^= 1
    Path("p.h5").write_bytes(content)
    status, out = look(capsys, "--quick")
    assert status == 0
    assert "note: --quick read no image; damage and wrong values are found without it" in out
    assert look(capsys)[0] == 1
    with h5py.File("p.h5", "r+") as file:
        del file["3/volume"]
    status, out = look(capsys, "--quick")
    assert status == 1
    assert "no dataset 'volume'" in out
    assert cli.run(check.main, ["p.json", "--quick", "--fix"]) == 1
    assert "--quick reads no image, and --fix and --figure need them" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ values of other files


@pytest.fixture
def secret(tmp_path_factory):
    """A folder with secret.h5, which has a scan, and secret.txt of as many bytes as a volume."""
    other = tmp_path_factory.mktemp("elsewhere")
    (other / "secret.txt").write_bytes(bytes(range(1, 256)) * 20)
    with h5py.File(other / "secret.h5", "w") as file:
        file["a/volume"] = np.full(SIZE, 77, np.uint8)
        file["a"].attrs["spacing"] = (1.0, 2.0, 3.0)
    return other


def external_storage(file, secret):
    del file["0/volume"]
    path = str(secret / "secret.txt")
    file["0"].create_dataset("volume", SIZE, np.uint8, external=[(path, 0, h5py.h5f.UNLIMITED)])


def linked_volume(file, secret):
    del file["0/volume"]
    file["0/volume"] = h5py.ExternalLink(secret / "secret.h5", "a/volume")


def linked_scan(file, secret):
    del file["0"]
    file["0"] = h5py.ExternalLink(secret / "secret.h5", "a")


def linked_by_a_relative_path(file, secret):
    del file["0"]
    file["0"] = h5py.ExternalLink(os.path.relpath(secret / "secret.h5", Path.cwd()), "a")


def linked_in_two_steps(file, secret):
    del file["0"]
    with h5py.File("beside.h5", "w") as beside:
        beside["b"] = h5py.ExternalLink(secret / "secret.h5", "a")
    file["0"] = h5py.ExternalLink("beside.h5", "b")


def linked_softly(file, secret):
    del file["0/volume"]
    file["x"] = h5py.ExternalLink(secret / "secret.h5", "a")
    file["0/volume"] = h5py.SoftLink("/x/volume")


def virtual(file, secret):
    del file["0/volume"]
    layout = h5py.VirtualLayout(SIZE, np.uint8)
    layout[...] = h5py.VirtualSource(str(secret / "secret.h5"), "a/volume", SIZE)
    file["0"].create_virtual_dataset("volume", layout)


def virtual_in_two_steps(file, secret):
    del file["0/volume"]
    file.create_dataset("hidden", SIZE, np.uint8, external=[(str(secret / "secret.txt"), 0, h5py.h5f.UNLIMITED)])
    layout = h5py.VirtualLayout(SIZE, np.uint8)
    layout[...] = h5py.VirtualSource(".", "hidden", SIZE)
    file["0"].create_virtual_dataset("volume", layout)


OUTSIDE = [linked_volume, linked_scan, linked_by_a_relative_path, linked_in_two_steps, linked_softly, virtual]


@pytest.mark.parametrize("plant", [external_storage, virtual_in_two_steps, *OUTSIDE])
def test_values_of_files_elsewhere_are_refused_unless_the_file_is_trusted(folder, secret, capsys, plant):
    with h5py.File("p.h5", "r+") as file:
        plant(file, secret)
    with pytest.raises(UserError, match=r"p\.h5, scan '0': ?.*(link to|other files|in another file)") as error:
        read()
    assert "\n" not in str(error.value)
    status, out = look(capsys)
    assert status == 1
    assert any(line.startswith("error") and "p/0" in line for line in out.splitlines())
    if plant is external_storage:
        with pytest.raises(UserError, match="has its values in another file"):
            read(trusted=True)
    elif plant in OUTSIDE:
        assert "--trust" in str(error.value)
        assert (read(trusted=True)[0].volume == 77).all()
        assert "--trust" not in look(capsys, "--trust")[1]


def test_links_within_the_folder_and_within_the_file_are_followed(folder):
    volume = read()[0].volume
    with h5py.File("p.h5", "r+") as file, h5py.File("beside.h5", "w") as beside:
        file.copy("0", beside, name="b")
        del file["0/volume"]
        file["0/volume"] = h5py.ExternalLink("beside.h5", "b/volume")
        del file["1"]
        file["1"] = h5py.SoftLink("/2")
        layout = h5py.VirtualLayout(SIZE, np.uint8)
        layout[...] = h5py.VirtualSource(".", "4/volume", SIZE)
        del file["3/volume"]
        file["3"].create_virtual_dataset("volume", layout)
    scans = read()
    np.testing.assert_array_equal(scans[0].volume, volume)
    np.testing.assert_array_equal(scans[1].volume, scans[2].volume)
    np.testing.assert_array_equal(scans[3].volume, scans[4].volume)


def test_a_file_that_is_a_symbolic_link_of_the_users_is_read(folder, tmp_path_factory):
    disk = tmp_path_factory.mktemp("disk")
    shutil.move("p.h5", disk / "p.h5")
    os.symlink(disk / "p.h5", "p.h5")
    assert len(read()) == 6


def test_fix_never_writes_through_a_link(folder, capsys):
    with h5py.File("p.h5", "r+") as file, h5py.File("beside.h5", "w") as beside:
        file.copy("0", beside, name="b")
        beside["b/segmentation"][...] = beside["b/segmentation"][...] // 255
        del file["0"]
        file["0"] = h5py.ExternalLink("beside.h5", "b")
    before = Path("beside.h5").read_bytes()
    assert cli.run(check.main, ["p.json", "--fix"]) == 1
    assert "scan '0': its '0' is a link into another file; mend that file" in capsys.readouterr().err
    assert Path("beside.h5").read_bytes() == before
    assert sorted(os.listdir()) == ["beside.h5", "p.h5", "p.json"]


# ---------------------------------------------------------------------------------------------------------- names

BAD_NAMES = ["a\nb", "a\tb", "a\x1b[31mb", "a\x85b", "a\u2028b", "x" * 121, "\u00e9" * 61]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_break_reports_and_files_are_refused_where_scans_are_opened(folder, capsys, name):
    with h5py.File("p.h5", "r+") as file:
        file.move("0", name)
    content = json.loads(Path("p.json").read_text())
    for entries in ([f"p/{name}", "p/1"], ["p/*"]):
        Path("p.json").write_text(json.dumps(content | {"subsets": content["subsets"] | {"train": entries}}))
        with pytest.raises(UserError, match=r"scan \"p/.*(control character|bytes long)") as error:
            ScanStore(load_dataset_config("p.json").files).expand(entries)
        assert str(error.value).isprintable()
        status, out = look(capsys)
        assert status == 1
        assert all(line.isprintable() for line in out.splitlines())
        assert any(line.startswith("error") and 'scan "p/' in line for line in out.splitlines())


def test_a_nul_in_an_id_is_a_control_character(folder):
    with pytest.raises(UserError, match=r'scan "p/a\\u0000b" has a control character; rename it'):
        ScanStore(load_dataset_config("p.json").files).expand(["p/a\0b"])


@pytest.mark.parametrize("name", [*BAD_NAMES[:2], "x" * 119, "a\udcffb"])
def test_build_refuses_names_that_cannot_be_used(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    os.makedirs("scans/images")
    for image in (name, "p1"):
        Path("scans/images", f"{image}.nii").write_text("")
    assert cli.run(build.main, ["scans", "-o", "sets/mine", "--split", "1/0/0"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert "rename it" in error
    assert error.isprintable()
    assert not Path("sets").exists()


def test_the_longest_name_is_built(tmp_path, monkeypatch):
    from tests.test_data_util.test_build import image_of, scan_of, write

    monkeypatch.chdir(tmp_path)
    name = "x" * (120 - len("mine/"))
    for k, image in enumerate((name, "p1")):
        write(image_of(scan_of(k)[0]), Path("scans/images", f"{image}.nii"))
    assert cli.run(build.main, ["scans", "-o", "mine", "--size", "8", "8", "8", "--split", "1/0/0"]) == 0
    assert cli.run(check.main, ["mine.json"]) == 0
