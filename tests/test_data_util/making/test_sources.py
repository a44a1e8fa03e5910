import pathlib

import pytest

from data_util.making.sources import Source, find_sources, split
from errors import UserError


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_files_of_one_name_belong_together_and_others_are_passed_over(tmp_path):
    touch(tmp_path, "images/p10.nii.gz", "images/p2.NRRD", "images/p1.x/0.dcm", "images/.hidden", "images/notes.txt")
    touch(tmp_path, "labels/p10.mha", "labels/p1.x.nii", "points/p2.csv")
    first, second, third = find_sources(tmp_path)
    images, labels, points = (tmp_path / name for name in ("images", "labels", "points"))
    assert first == Source("p1.x", images / "p1.x", labels / "p1.x.nii")
    assert second == Source("p2", images / "p2.NRRD", points=points / "p2.csv")
    assert third == Source("p10", images / "p10.nii.gz", labels / "p10.mha")


def test_a_table_has_its_own_order_and_paths_from_its_folder(tmp_path):
    touch(tmp_path, "t/b.nii", "t/a.nii", "t/l.nii", "t/p.csv")
    (tmp_path / "t/list.csv").write_text("group,id,image,label,landmarks\ng, b ,b.nii,l.nii,p.csv\n,a,a.nii,,\n")
    folder = tmp_path / "t"
    assert find_sources(folder / "list.csv") == [
        Source("b", folder / "b.nii", folder / "l.nii", folder / "p.csv", "g"),
        Source("a", folder / "a.nii"),
    ]


def test_what_is_wrong_with_a_folder_is_told(tmp_path):
    with pytest.raises(UserError, match="is neither a folder nor a CSV"):
        find_sources(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"no scans found; put one file .* SCANS/images"):
        find_sources(tmp_path)
    touch(tmp_path, "one/images/a.nii", "one/labels/b.nii")
    with pytest.raises(UserError, match="there is no image 'b'"):
        find_sources(tmp_path / "one")
    touch(tmp_path, "two/images/a.nii", "two/images/a.nrrd")
    with pytest.raises(UserError, match="both would get the id 'a'"):
        find_sources(tmp_path / "two")
    touch(tmp_path, "flat/p.nii.gz", "flat/p_seg.nii.gz")
    with pytest.raises(UserError, match="looks like the labels of 'p'"):
        find_sources(tmp_path / "flat")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("id,image,colour\na,b,c\n", "unknown column 'colour'"),
        ("id,image\na,\n", "line 2: has no id or no image"),
        ("id,image\na,t.csv\na,t.csv\n", "line 3: id 'a' is there twice"),
        ("id,image\na,gone.nii\n", "line 2: image .*gone.nii: no such file"),
        ("id,image\na/b,t.csv\n", "id 'a/b' cannot name a scan"),
        ("id,image\na[1],t.csv\n", "cannot name a scan"),
        ("", "no scans found"),
    ],
)
def test_what_is_wrong_with_a_table_is_told(tmp_path, text, told):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=told):
        find_sources(tmp_path / "t.csv")


@pytest.mark.parametrize("seed", range(5))
def test_a_split_parts_no_group_and_gives_every_subset_a_pair(seed):
    sources = [Source(f"s{k}", pathlib.Path("x"), group=f"g{k // 3}" if k < 12 else None) for k in range(20)]
    found = split(sources, (0.8, 0.1, 0.1), seed, "all")
    assert sorted(scan for ids in found.values() for scan in ids) == sorted(source.id for source in sources)
    assert list(found) == ["train", "val", "test"]
    assert all(2 <= len(found[name]) <= 4 for name in ("val", "test"))
    for k in range(4):
        assert sum(f"s{3 * k}" in ids and {f"s{3 * k + 1}", f"s{3 * k + 2}"} <= set(ids) for ids in found.values()) == 1
    assert found["train"] == sorted(found["train"], key=lambda scan: int(scan[1:]))


def test_odd_numbers_make_no_pairs():
    scans = [Source(f"s{k}", pathlib.Path("x")) for k in range(5)]
    with pytest.raises(UserError, match="--pairs paired: 5 scans; every two neighbours"):
        split(scans, (1, 0, 0), 0, "paired")
    assert split(scans[:4], (1, 0, 0), 0, "paired")["train"] in (["s0", "s1", "s2", "s3"], ["s2", "s3", "s0", "s1"])
    grouped = [Source(name, pathlib.Path("x"), group=group) for name, group in (("a", "g"), ("b", "h"), ("c", "h"))]
    with pytest.raises(UserError, match=r"group 'g' has 1 scans \(a\)"):
        split(grouped, (1, 0, 0), 0, "paired")


def test_too_few_scans_for_a_split_are_told():
    scans = [Source(f"s{k}", pathlib.Path("x")) for k in range(5)]
    with pytest.raises(UserError, match=r"5 scans are too few for --split 0\.8/0\.1/0\.1: 'train' would get 1"):
        split(scans, (0.8, 0.1, 0.1), 0, "all")
