import os
import pathlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_util.making.folders import data_files, list_folder
from data_util.making.sources import Source, find_sources
from errors import UserError

DICOM = b"\0" * 128 + b"DICM"


def touch(folder, *names):
    """Make files; those whose name ends in .dcm, and those in a folder of slices, begin as DICOM does."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(DICOM if "slice" in path.name or path.suffix == ".dcm" else b"")


def listed(folder):
    """The scans of a folder as {id: (image, label, points)}, by their paths below it, and the remarks as one text."""
    sources, remarks = find_sources(folder)

    def below(path):
        return path and str(path.relative_to(folder))

    return {s.id: (below(s.image), below(s.label), below(s.points)) for s in sources}, "\n".join(remarks)


def test_files_of_one_name_belong_together_and_others_are_remarked_on(tmp_path):
    touch(tmp_path, "images/p10.nii.gz", "images/p2.NRRD", "images/p1.x/0.dcm", "images/.hidden", "images/notes.txt")
    touch(tmp_path, "labels/p10.mha", "labels/p1.x.nii", "labels/p2/a.dcm", "points/p2.csv", "points/p1.x.xlsx")
    touch(tmp_path, "masks/p2.nii", "readme.md")
    sources, remarks = find_sources(tmp_path)
    images, labels, points = (tmp_path / name for name in ("images", "labels", "points"))
    assert sources == [
        Source("p1.x", images / "p1.x", labels / "p1.x.nii"),
        Source("p2", images / "p2.NRRD", points=points / "p2.csv"),
        Source("p10", images / "p10.nii.gz", labels / "p10.mha"),
    ]
    assert [remark.partition("; ")[0] for remark in remarks] == [
        f"{images}: 1 file or folder passed over: notes.txt",
        f"{labels}: 1 file or folder passed over: p2/",
        f"{points}: 1 file or folder passed over: p1.x.xlsx",
        f"{tmp_path}: 2 files or folders passed over: masks/, readme.md",
    ]


def test_volumes_and_segmentations_in_one_folder_are_pairs(tmp_path):
    touch(tmp_path, *(f"{word}-{k}.nii" for k in (0, 1, 10) for word in ("volume", "segmentation")), "volume-2.nii")
    scans, remarks = listed(tmp_path)
    assert scans == {
        "volume-0": ("volume-0.nii", "segmentation-0.nii", None),
        "volume-1": ("volume-1.nii", "segmentation-1.nii", None),
        "volume-2": ("volume-2.nii", None, None),
        "volume-10": ("volume-10.nii", "segmentation-10.nii", None),
    }
    assert remarks.endswith("3 label images found by name, such as segmentation-0.nii for volume-0.nii")


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("volume-7.nii.gz", "segmentation-7.nii.gz"),
        ("Volume-7.nii", "Segmentation-7.nii"),
        ("liver-orig007.mhd", "liver-seg007.mhd"),
        ("img0007.nii.gz", "label0007.nii.gz"),
        ("p7.nii.gz", "p7_seg.nii.gz"),
        ("p7_image.nrrd", "p7_label.nrrd"),
        ("case_00007.nii", "mask_case_00007.nii"),
        ("patient007_frame01.nii.gz", "patient007_frame01_gt.nii.gz"),
    ],
)
def test_labels_are_never_taken_for_scans(tmp_path, image, label):
    other = label.replace("7", "8")
    for place in ("", "images/"):
        folder = tmp_path / (place or "flat")
        touch(folder, place + image, place + label)
        ((scan, (found, labels, _)),) = listed(folder)[0].items()
        assert scan == image.partition(".")[0]
        assert (found, labels) == (place + image, place + label)
    touch(tmp_path / "two", f"images/{image}", f"labels/{label}")
    assert listed(tmp_path / "two")[0] == {image.partition(".")[0]: (f"images/{image}", f"labels/{label}", None)}
    if "gt" not in label:
        touch(tmp_path / "lonely", image, other)
        with pytest.raises(UserError, match=rf"{other}: looks like labels, not like a scan, and there is no image"):
            find_sources(tmp_path / "lonely")


def test_two_labels_of_one_image_and_one_label_of_two_images_are_refused(tmp_path):
    touch(tmp_path / "labels2", "p1.nii", "p1_seg.nii", "p1_mask.nii")
    with pytest.raises(UserError, match="both would be the labels of 'p1'; keep one"):
        find_sources(tmp_path / "labels2")
    touch(tmp_path / "images2", "images/p1.nii", "images/p1_image.nii", "labels/p1_seg.nii")
    with pytest.raises(UserError, match=r"p1_seg\.nii: p1 and p1_image could be its image"):
        find_sources(tmp_path / "images2")
    touch(tmp_path / "own", "images/p1.nii", "images/p1_mask.nii", "labels/p1.nii", "labels/p1_mask.nii")
    assert listed(tmp_path / "own")[0] == {
        "p1": ("images/p1.nii", "labels/p1.nii", None),
        "p1_mask": ("images/p1_mask.nii", "labels/p1_mask.nii", None),
    }


def test_what_is_wrong_with_a_folder_is_told(tmp_path):
    touch(tmp_path, "one/images/a.nii", "one/labels/b.nii")
    with pytest.raises(UserError, match="there is no image 'b'"):
        find_sources(tmp_path / "one")
    touch(tmp_path, "two/images/a.nii", "two/images/a.nrrd")
    with pytest.raises(UserError, match="both would get the id 'a'"):
        find_sources(tmp_path / "two")
    touch(tmp_path, "three/images/a.nii", "three/points/b.csv")
    with pytest.raises(UserError, match=r"b\.csv: there is no image 'b'"):
        find_sources(tmp_path / "three")


def test_headers_have_their_data_files_and_other_data_is_remarked_on(tmp_path):
    images = tmp_path / "images"
    touch(images, "a.mhd", "a.raw", "b.hdr", "b.img", "c.hdr", "c.img.gz", "d.nhdr", "other.raw.gz", "e.raw", "f.img")
    (images / "a.mhd").write_text("NDims = 3\nElementDataFile = a.raw\n")
    (images / "d.nhdr").write_text("NRRD0004\ndimension: 3\ndata file: other.raw.gz\n\n")
    scans, remarks = listed(tmp_path)
    assert scans == {
        name: (f"images/{file}", None, None)
        for name, file in {"a": "a.mhd", "b": "b.hdr", "c": "c.hdr", "d": "d.nhdr"}.items()
    }
    assert "2 files or folders passed over: e.raw, f.img; the endings known here" in remarks
    assert data_files(images / "d.nhdr") == [images / "other.raw.gz"]
    (images / "a.mhd").write_bytes(b"NDims = 3\nElementDataFile = LOCAL\n" + bytes(range(256)) * 300)
    assert data_files(images / "a.mhd") == []
    touch(images, "voxels/a.raw")
    (images / "a.mhd").write_text("NDims = 3\nElementDataFile = voxels/a.raw\n")
    assert data_files(images / "a.mhd") == [images / "voxels/a.raw"]
    assert list(listed(tmp_path)[0]) == ["a", "b", "c", "d"]


def test_channels_of_nnunet_are_no_part_of_a_name(tmp_path):
    touch(tmp_path, *(f"imagesTr/liver_{k}_0000.nii.gz" for k in (1, 2)), "imagesTr/liver_1_0001.nii.gz")
    touch(tmp_path, *(f"labelsTr/liver_{k}.nii.gz" for k in (1, 2)), "imagesTs/liver_3_0000.nii.gz")
    (tmp_path / "dataset.json").write_text('{"labels": {"background": 0, "liver": 1, "left lobe": 2}}')
    scans, remarks = listed(tmp_path)
    assert scans == {
        f"liver_{k}": (f"imagesTr/liver_{k}_0000.nii.gz", f"labelsTr/liver_{k}.nii.gz", None) for k in (1, 2)
    }
    assert "only channel 0000 is taken; passed over are liver_1_0001.nii.gz" in remarks
    assert "1 file or folder passed over: imagesTs/" in remarks
    assert (
        "dataset.json: names the labels; to keep them all by these names give --labels liver=1,left_lobe=2" in remarks
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"labels": {"0": "background", "1": "liver"}}', "--labels liver=1"),
        ('{"labels": {"background": 0, "whole": [1, 2]}}', "no table of labels can be read"),
        ("{}", "no table of labels can be read"),
        ("\ufeff{]", "no table of labels can be read"),
    ],
)
def test_a_description_of_labels_is_told_or_passed_over(tmp_path, text, told):
    touch(tmp_path, "imagesTr/a.nii.gz")
    (tmp_path / "dataset.json").write_text(text, encoding="utf-8")
    assert told in listed(tmp_path)[1]


def test_learn2reg_has_the_channel_in_the_names_of_labels_and_landmarks_too(tmp_path):
    touch(tmp_path, "imagesTr/Lung_0001_0000.nii.gz", "imagesTr/Lung_0002_0000.nii.gz")
    touch(tmp_path, "labelsTr/Lung_0001_0000.nii.gz", "landmarksTr/Lung_0002_0000.csv", "masksTr/Lung_0001_0000.nii.gz")
    scans, remarks = listed(tmp_path)
    assert scans == {
        "Lung_0001": ("imagesTr/Lung_0001_0000.nii.gz", "labelsTr/Lung_0001_0000.nii.gz", None),
        "Lung_0002": ("imagesTr/Lung_0002_0000.nii.gz", None, "landmarksTr/Lung_0002_0000.csv"),
    }
    assert "passed over: masksTr/" in remarks


@pytest.mark.parametrize("images", ["images", "imagesTr"])
def test_scans_that_are_numbered_from_0_are_not_channels(tmp_path, images):
    names = [f"case_{k:04d}" for k in range(4)]
    touch(tmp_path, *(f"{images}/{name}.nii" for name in names), *(f"labels{images[6:]}/{n}.nii" for n in names[1:]))
    assert list(listed(tmp_path)[0]) == names
    touch(tmp_path / "alone", *(f"images/{name}.nii" for name in names))
    assert list(listed(tmp_path / "alone")[0]) == names


def test_slices_are_found_in_the_one_folder_that_has_them(tmp_path):
    images = tmp_path / "images"
    touch(images, "p1/slice1", "p1/slice2", "p2/study/series/slice1", "p2/DICOMDIR", "p2/info.txt")
    touch(images, "p3/a/slice1", "p3/b/slice1", "p4/t1.nii", "p4/t2.nii", "p5/notes.txt", "p6/slice1", "p6/old/slice1")
    sources = {source.id: source for source in find_sources(tmp_path)[0]}
    assert [sources[name].image for name in ("p1", "p2", "p5", "p6")] == [
        images / "p1",
        images / "p2/study/series",
        images / "p5",
        images / "p6",
    ]
    assert not any(sources[name].problem for name in ("p1", "p2", "p5", "p6"))
    assert "p3: has DICOM slices in 2 folders, a, b; which is the scan is not known" in sources["p3"].problem
    assert "p4: holds t1.nii, t2.nii; which is the scan is not known" in sources["p4"].problem
    assert "p6: slices further down are passed over: old" in "\n".join(find_sources(tmp_path)[1])
    (tmp_path / "t.csv").write_text("id,image\np2,images/p2\np3,images/p3\n")
    (second, third), _ = find_sources(tmp_path / "t.csv")
    assert second.image == images / "p2/study/series"
    assert "2 folders" in third.problem
    os.symlink(images / "p2", images / "p2/study/loop")
    assert list_folder(tmp_path).images["p2"] == images / "p2/study/series"


def test_a_folder_for_each_scan_with_its_image_and_labels(tmp_path):
    touch(tmp_path, "case_0/imaging.nii.gz", "case_0/segmentation.nii.gz", "case_1/scans/t1.mhd", "case_1/t1.txt")
    scans, remarks = listed(tmp_path)
    assert scans == {
        "case_0": ("case_0/imaging.nii.gz", "case_0/segmentation.nii.gz", None),
        "case_1": ("case_1/scans/t1.mhd", None, None),
    }
    assert "taken as scans: case_0/imaging.nii.gz with segmentation.nii.gz, case_1/scans/t1.mhd" in remarks
    (tmp_path / "t.csv").write_text("id,image\na,case_0\n")
    assert find_sources(tmp_path / "t.csv")[0] == [
        Source("a", tmp_path / "case_0/imaging.nii.gz", tmp_path / "case_0/segmentation.nii.gz")
    ]
    touch(tmp_path, "case_0/mask.nii.gz", "case_2/mask.nii")
    problems = [source.problem for source in find_sources(tmp_path)[0]]
    assert "case_0: holds imaging.nii.gz, mask.nii.gz, segmentation.nii.gz; which is the scan" in problems[0]
    assert problems[1] is None
    assert "case_2: holds mask.nii; which is the scan" in problems[2]


def test_links_are_followed_and_broken_ones_are_the_problem_of_their_scan_alone(tmp_path):
    touch(tmp_path, "elsewhere/a.nii", "elsewhere/series/slice1", "images/d.nii", "points/d.csv")
    (tmp_path / "labels").mkdir()
    os.symlink(tmp_path / "elsewhere/a.nii", tmp_path / "images/a.nii")
    os.symlink(tmp_path / "elsewhere/series", tmp_path / "images/b")
    os.symlink("gone.nii", tmp_path / "images/c.nii")
    os.symlink("gone", tmp_path / "images/e")
    os.symlink("gone.nii", tmp_path / "labels/d.nii")
    problems = {source.id: source.problem for source in find_sources(tmp_path)[0]}
    assert list(problems) == ["a", "b", "c", "d", "e"]
    assert problems["a"] is None
    assert problems["b"] is None
    for name, path in (("c", "images/c.nii"), ("d", "labels/d.nii"), ("e", "images/e")):
        assert re.fullmatch(rf".*/{path}: is a link to gone\S*, which is not there; mend .*", problems[name])


endings = st.sampled_from([".nii", ".nii.gz", ".NRRD", ".mha"])
kinds = st.sampled_from([("{}", "{}"), ("volume-{}", "segmentation-{}"), ("{}_orig", "{}_seg"), ("img{}", "label{}")])
layouts = st.sampled_from([("", ""), ("images/", "labels/"), ("Images/", "Labels/"), ("imagesTr/", "labelsTr/")])
strangers = st.sets(st.sampled_from(["a.png", "b.raw", "sub.txt", "c.json", "noending"]))


@given(st.data())
def test_every_file_is_used_or_named(tmp_path_factory, data):
    """Whatever the layout: labels are those of their image, and nothing is passed over in silence."""
    folder = tmp_path_factory.mktemp("scans")
    images, labels = data.draw(layouts)
    image_name, label_name = data.draw(kinds)
    if not images and image_name == label_name:
        image_name, label_name = "volume-{}", "segmentation-{}"
    numbers = data.draw(st.sets(st.integers(0, 999), min_size=1, max_size=5))
    labelled = data.draw(st.sets(st.sampled_from(sorted(numbers))))
    others = {images + name for name in data.draw(strangers)}
    scans = {k: images + image_name.format(f"{k:03d}") + data.draw(endings) for k in numbers}
    segmentations = {k: labels + label_name.format(f"{k:03d}") + data.draw(endings) for k in labelled}
    touch(folder, *scans.values(), *segmentations.values(), *others)
    found, remarks = listed(folder)
    assert sorted(found.values()) == sorted((scans[k], segmentations.get(k), None) for k in numbers)
    for name in others:
        assert pathlib.Path(name).name in remarks
    if not others:
        assert "passed over" not in remarks
