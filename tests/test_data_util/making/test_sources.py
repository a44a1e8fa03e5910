import pytest

from data_util.making.sources import Source, find_sources
from errors import UserError


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_a_table_has_its_own_order_and_paths_from_its_folder(tmp_path):
    touch(tmp_path, "t/b.nii", "t/a.nii", "t/l.nii", "t/p.csv")
    (tmp_path / "t/list.csv").write_text("group,id,image,label,landmarks\ng, b ,b.nii,l.nii,p.csv\n,a,a.nii,,\n")
    folder = tmp_path / "t"
    assert find_sources(folder / "list.csv")[0] == [
        Source("b", folder / "b.nii", folder / "l.nii", folder / "p.csv", "g"),
        Source("a", folder / "a.nii"),
    ]


def test_a_table_may_have_semicolons_a_byte_order_mark_and_fewer_cells_in_a_row(tmp_path):
    touch(tmp_path, "a.nii", "b.nii", "l.nii")
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbfID;Image;Label\r\na;a.nii;l.nii\r\n;;\r\nb;b.nii\r\n")
    a, b = find_sources(tmp_path / "t.csv")[0]
    assert a == Source("a", tmp_path / "a.nii", tmp_path / "l.nii")
    assert b == Source("b", tmp_path / "b.nii")


def test_a_place_without_scans_is_told(tmp_path):
    with pytest.raises(UserError, match="is neither a folder nor a CSV"):
        find_sources(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"no scans found; put one file .* SCANS/images"):
        find_sources(tmp_path)
    touch(tmp_path, "images/a.png")
    with pytest.raises(UserError, match=r"no scans found; .*1 file or folder passed over: a\.png; the endings known"):
        find_sources(tmp_path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("id,image,colour\na,b,c\n", "unknown column 'colour'"),
        ("id,image\na,\n", "line 2: has no id or no image"),
        ("id,image\na,t.csv\na,t.csv\n", "line 3: id 'a' is there twice"),
        ("id,image\na,gone.nii\n", "line 2: image .*gone.nii: no such file"),
        ("id,image\na/b,t.csv\n", "id 'a/b' cannot name a scan"),
        ("id,image\na[1],t.csv\n", "cannot name a scan"),
        ("id,image\na,t.csv,l.nii\n", "line 2: has 3 cells and the header 2"),
        ("id,image,id\na,t.csv,b\n", "two columns 'id'"),
        ("", "no scans found"),
    ],
)
def test_what_is_wrong_with_a_table_is_told(tmp_path, text, told):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=told):
        find_sources(tmp_path / "t.csv")
