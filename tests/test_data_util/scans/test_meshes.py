"""Vertices of meshes replaced: files written by hand, byte by byte, and read back by an independent reading."""

import struct

import numpy as np
import pytest

from data_util.scans.meshes import read_mesh
from errors import UserError

POINTS = np.array([[1.5, -2.25, 3], [4, 5, 6.5], [-7, 8, 9], [0.125, 0.5, -1]])
NEW = POINTS[:, ::-1] * 2 + 1  # exact in float32
FACES = [[0, 1, 2], [1, 2, 3]]


def vtk(kind, binary, dataset="POLYDATA", title="3D Slicer output. SPACE=LPS"):
    head = f"# vtk DataFile Version 5.1\n{title}\n{'BINARY' if binary else 'ASCII'}\nDATASET {dataset}\n"
    head = f"{head}POINTS 4 {kind}\n".encode()
    tail = b"\nPOLYGONS 3 6\nOFFSETS vtktypeint64\n0 3 6\nPOINT_DATA 4\nNORMALS Normals float\n1 0 0\n"
    if binary:
        return head, lambda p: p.astype(">f4" if kind == "float" else ">f8").tobytes(), tail
    return head, lambda p: " ".join(f"{x:g}" for x in p.ravel()).encode(), tail


def ply(form):
    head = f"ply\nformat {form} 1.0\ncomment SPACE=RAS\nelement vertex 4\nproperty uchar red\nproperty float x\n"
    head = f"{head}property double y\nproperty float z\nelement face 2\n"
    head += "property list uchar int vertex_indices\nend_header\n"
    if form == "ascii":
        return (
            head.encode(),
            lambda p: "".join(f"7 {x:g} {y:g} {z:g}\n" for x, y, z in p).encode(),
            b"3 0 1 2\n3 1 2 3\n",
        )
    order = "<" if "little" in form else ">"
    tail = b"".join(struct.pack(f"{order}B3i", 3, *face) for face in FACES)
    return head.encode(), lambda p: b"".join(struct.pack(f"{order}Bfdf", 7, *row) for row in p), tail


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("kind", ["float", "double"])
def test_vtk(kind, binary, tmp_path):
    head, body, tail = vtk(kind, binary)
    (tmp_path / "a.vtk").write_bytes(head + body(POINTS) + tail)
    mesh = read_mesh(tmp_path / "a.vtk")
    np.testing.assert_array_equal(mesh.points, POINTS)
    assert (mesh.space, mesh.has_normals) == ("lps", True)
    written = mesh.content(NEW)
    assert written.startswith(head)
    assert written.endswith(tail if binary else tail.lstrip())
    (tmp_path / "a.vtk").write_bytes(written)
    np.testing.assert_array_equal(read_mesh(tmp_path / "a.vtk").points, NEW)
    if binary:
        assert written == head + body(NEW) + tail


@pytest.mark.parametrize("form", ["ascii", "binary_little_endian", "binary_big_endian"])
def test_ply(form, tmp_path):
    head, body, tail = ply(form)
    (tmp_path / "a.ply").write_bytes(head + body(POINTS) + tail)
    mesh = read_mesh(tmp_path / "a.ply")
    np.testing.assert_array_equal(mesh.points, POINTS)
    assert (mesh.space, mesh.has_normals) == ("ras", False)
    assert mesh.content(NEW) == head + body(NEW) + tail


def corners(points):
    return points[np.array(FACES).ravel()]


def normals(points):
    first, second, third = (points[np.array(FACES)[:, k]] for k in range(3))
    across = np.cross(second - first, third - first)
    return across / np.linalg.norm(across, axis=1)[:, None]


def test_binary_stl(tmp_path):
    faces = [
        struct.pack("<12fH", *normal, *POINTS[face].ravel(), 5)
        for normal, face in zip(normals(POINTS), FACES, strict=True)
    ]
    (tmp_path / "a.stl").write_bytes(b"solid binary".ljust(80) + struct.pack("<I", 2) + b"".join(faces))
    mesh = read_mesh(tmp_path / "a.stl")
    np.testing.assert_array_equal(mesh.points, corners(POINTS))
    written = mesh.content(corners(NEW))
    stored = [struct.unpack("<12fH", written[84 + 50 * k : 134 + 50 * k]) for k in range(2)]
    np.testing.assert_allclose([face[:3] for face in stored], normals(NEW), atol=1e-6)
    np.testing.assert_array_equal([face[3:12] for face in stored], corners(NEW).reshape(2, 9))
    assert [face[12] for face in stored] == [5, 5]


def test_stl_in_text(tmp_path):
    text = "solid organ\n"
    for face in FACES:
        rows = "".join("   vertex {:g} {:e} {:g}\n".format(*POINTS[k]) for k in face)
        text += f" facet normal 0 0 1\n  outer loop\n{rows}  endloop\n endfacet\n"
    (tmp_path / "a.stl").write_text(text + "endsolid organ\n")
    mesh = read_mesh(tmp_path / "a.stl")
    np.testing.assert_array_equal(mesh.points, corners(POINTS))
    (tmp_path / "a.stl").write_bytes(mesh.content(corners(NEW)))
    np.testing.assert_array_equal(read_mesh(tmp_path / "a.stl").points, corners(NEW))
    lines = (tmp_path / "a.stl").read_text().splitlines()
    assert lines[0] == "solid organ"
    assert lines[-1] == "endsolid organ"
    found = [line.split()[2:] for line in lines if "normal" in line]
    np.testing.assert_allclose(np.array(found, float), normals(NEW), atol=1e-6)


def wrong_files():
    head, body, tail = vtk("float", True)
    ply_head, ply_body, _ = ply("binary_little_endian")
    text_head, text_body, _ = ply("ascii")
    nan = np.where(POINTS == 9, np.nan, POINTS)
    image = b"# vtk DataFile Version 3.0\nimage\nASCII\nDATASET STRUCTURED_POINTS\nDIMENSIONS 2 2 2\n"
    return {
        "none.vtk": (None, "cannot be read (No such file"),
        "mesh.obj": (b"v 1 2 3\n", "is no mesh by its name"),
        "xml.vtk": (b"<?xml version='1.0'?>", "not that of a legacy VTK file"),
        "image.vtk": (image, "its data set is STRUCTURED_POINTS"),
        "whole.vtk": (head.replace(b"float", b"int") + body(POINTS), "POINTS are of type int"),
        "cut.vtk": (head + body(POINTS)[:-1], "it is cut short"),
        "nan.vtk": (head + body(nan) + tail, "1 vertices that are NaN"),
        "empty.vtk": (head.replace(b"POINTS 4", b"POINTS 0") + tail, "without vertices"),
        "cut_text.vtk": (vtk("float", False)[0] + b"1 2 3 4", "it is cut short"),
        "word.vtk": (vtk("float", False)[0] + b"1 2 3 4 5 6 7 8 x 1 2 3\n", "could not convert"),
        "cut.ply": (ply_head + ply_body(POINTS)[:-1], "it is cut short"),
        "cut_text.ply": (text_head + text_body(POINTS)[:-9], "it is cut short"),
        "flat.ply": (ply_head.replace(b"property float z\n", b""), "have no x, y and z"),
        "order.ply": (b"ply\nformat ascii 1.0\nelement face 0\nend_header\n", "first element is not vertex"),
        "text.ply": (b"hello", "not that of a PLY file"),
        "cut.stl": (b"solid binary".ljust(80) + struct.pack("<I", 2) + bytes(99), "it is cut short"),
        "faces.stl": (b"solid a\nfacet normal 0 0 1\nvertex 1 2 3\nendsolid a\n", "1 faces and 1 corners"),
        "empty.stl": (b"solid a\nendsolid a\n", "without vertices"),
    }


def test_what_is_no_mesh_is_refused_in_a_line(tmp_path):
    for name, (content, message) in wrong_files().items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as caught:
            assert not read_mesh(tmp_path / name), name
        assert message in str(caught.value), name
        assert "\n" not in str(caught.value), name
