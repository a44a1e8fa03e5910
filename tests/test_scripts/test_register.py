"""register.py from its command line: what it chooses by itself, what it leaves, and the page to look at."""

import base64
import io
import json
import re

import numpy as np
import pytest
import SimpleITK as sitk
from matplotlib.image import imread
from scipy import ndimage

import cli
import register
from data_util.output.quality import Quality, local_correlation
from data_util.output.registration_report import doubts
from data_util.scans.automatic_view import automatic_view, modality_of
from data_util.scans.frame import Frame
from data_util.scans.prepared import PreparedScan
from errors import UserError
from tests.test_data_util.scans.test_pair_transform import oblique

SIZE = (30, 26, 22)
MM = (6.0, 7.0, 8.0)  # per voxel: a head of 1 to 2 litres fits in


def head(shift=(0, 0, 0), scale=1.0, offset=0.0):
    """A bright ellipsoid with bright and dark parts inside, its centre shifted by voxels."""
    places = np.moveaxis(np.indices(SIZE), 0, -1) - (np.array(SIZE) - 1) / 2 - shift
    inside = ((places * MM / (70, 85, 75)) ** 2).sum(axis=-1) < 1
    parts = 300 * np.exp(-((places - (4, 3, 2)) ** 2).sum(axis=-1) / 12)
    parts -= 200 * np.exp(-((places - (-4, 1, -3)) ** 2).sum(axis=-1) / 9)
    grey = np.where(inside, 500 + parts, 0)
    return (ndimage.gaussian_filter(grey, 0.7) * scale + offset).astype(np.float32)


FRAME = oblique(SIZE, MM, (-80, -90, -85), (4, -3, 5))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The output folder of a registration of two NIfTIs without any flag but -o, at a small size."""
    home = tmp_path_factory.mktemp("register")
    for name, volume in (("fixed", head()), ("moving", head((2, -1, 1)))):
        sitk.WriteImage(FRAME.put(volume), str(home / f"{name}.nii.gz"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        flags = ("-o", "out", "--refine", "8", "-g", "-1", "--size", *SIZE)
        assert cli.run(register.main, ["fixed.nii.gz", "moving.nii.gz", *map(str, flags)]) == 0
    return home / "out"


def test_it_leaves_few_files(done):
    names = {"warped.nii.gz", "transform.h5", "inverse.h5", "report.json", "report.html", "summary.png"}
    assert {path.name for path in done.iterdir()} == names


def test_it_registers_and_says_what_it_chose(done):
    report = json.loads((done / "report.json").read_text())
    assert report["similarity"][-1] > 0.99 > report["similarity"][0] + 0.02
    view, affine = report["chosen"]
    assert re.fullmatch(r"scans of no known modality, [\d.]+ and [\d.]+ litres: prepared as heads or brains .*", view)
    assert affine.startswith(("found first: a turn of 0 degrees, a shift of", "no affine map was taken first"))
    assert report["doubts"] == []
    assert report["settings"]["network"] | {"image_size": None} == {
        "image_size": None, "similarity": "lncc", "reg_factor": 2.0, "warp_padding": False, "window": 5,
        "precision": "float32",
    }  # fmt: skip
    assert report["quality"]["local_correlation"]["after"] > report["quality"]["local_correlation"]["before"]
    assert report["quality"]["moved_mm"]["largest"] < 40


def test_the_page_holds_the_volumes_and_needs_nothing_else(done):
    page = (done / "report.html").read_text()
    assert not re.search(r"https?://|src=\"|href=", page)
    assert "moving.nii.gz registered to fixed.nii.gz" in page
    data = json.loads(re.search(r"^const data = (.*);$", page, re.M).group(1))
    packed = data["volumes"]["fixed"]
    nx, ny, nz = packed["size"]
    sheet = imread(io.BytesIO(base64.b64decode(packed["png"])))
    sheet = sheet.reshape(-1, ny, packed["columns"], nx).swapaxes(1, 2).reshape(-1, ny, nx)[:nz]
    assert [nx, ny, nz] == data["size"]
    volume = np.round(sheet.transpose(2, 1, 0) * 255)
    assert volume.min() == 1
    assert volume.max() == 255
    centre = ndimage.center_of_mass(volume - 1)
    np.testing.assert_allclose(centre, (np.array(volume.shape) - 1) / 2, atol=1.5)


def test_what_is_excluded_has_no_influence_and_both_ways_are_told():
    from registration import register as register_scans

    fixed, moving = (head(shift, scale=0.25) for shift in ((0, 0, 0), (1, -1, 0)))  # within 0..255, which is kept
    lesion = np.zeros(SIZE, np.uint8)
    lesion[8:12, 8:12, 8:14] = 1
    options = {"refine": 6, "affine": "none", "image_size": SIZE, "view": "none"}
    found = [
        register_scans(FRAME.put(scan), FRAME.put(moving), exclude_mask=mask, both_ways=scan is fixed, **options)
        for mask in (None, FRAME.put(lesion))
        for scan in (fixed, np.where(lesion, 230, fixed).astype(np.float32))
    ]
    flows = [result.stages[-1].composed_flow for result in found]
    assert np.abs(flows[1] - flows[0]).max() > 0.05
    np.testing.assert_array_equal(flows[3], flows[2])
    apart = found[0].report["quality"]["inverse_consistency_mm"]
    assert 0 < apart["mean"] < found[0].report["quality"]["moved_mm"]["mean"]
    assert found[0].quality.apart.shape == SIZE
    assert "inverse_consistency_mm" not in found[1].report["quality"]


@pytest.mark.parametrize(
    ("marked", "shift", "message"),
    [(1, 0, "leaves nothing of the fixed scan"), (0, 0, "marks no voxel where"), (1, 5000, "marks no voxel where")],
)
def test_an_excluded_mask_of_all_or_of_nothing_is_an_error(marked, shift, message):
    from registration import register as register_scans

    scan = FRAME.put(head(scale=0.25))
    mask = FRAME.put(np.full(SIZE, marked, np.uint8))
    mask.SetOrigin((np.array(FRAME.origin) + shift).tolist())
    with pytest.raises(UserError, match=f"the excluded mask {message}"):
        register_scans(scan, scan, exclude_mask=mask, refine=1, affine="none", image_size=SIZE, view="none")


def test_grey_values_as_labels_are_doubted(tmp_path, capsys):
    for name, volume in (("a", head()), ("grey", head().astype(np.int16)), ("labels", (head() > 250) * 700.0)):
        sitk.WriteImage(FRAME.put(volume), str(tmp_path / f"{name}.nii.gz"))
    scan = str(tmp_path / "a.nii.gz")
    found = {}
    for name in ("grey", "labels"):
        out = tmp_path / f"out-{name}"
        labels = str(tmp_path / f"{name}.nii.gz")
        quick = ("--affine", "none", "--refine", "1", "--size", "32", "32", "32")
        assert cli.run(register.main, [scan, scan, "-o", str(out), "--labels", labels, *quick]) == 0
        found[name] = json.loads((out / "report.json").read_text())["doubts"]
    assert any("grey.nii.gz looks like grey values" in doubt for doubt in found["grey"])
    assert not any("looks like grey values" in doubt for doubt in found["labels"])
    carried = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out-labels" / "labels.nii.gz")))
    assert set(np.unique(carried)) == {0, 700}


@pytest.mark.parametrize(("options", "message"), [
    ({"smoothness": -1.0}, "smoothness is -1.0; it must be a number from 0"),
    ({"exclude_mask": "a.nii", "refine": 0}, "exclude_mask is of the optimisation"),
    ({"both_ways": True, "checkpoint": "x", "refine": 5}, "without a network only"),
])  # fmt: skip
def test_options_that_do_not_go_together(options, message):
    from registration import register as register_scans

    with pytest.raises(UserError, match=message):
        register_scans("a", "b", **options)


def test_examples_and_version(capsys):
    for flag, said in (("--help", "python register.py fixed.nii.gz"), ("--version", f"networks {cli.VERSION}")):
        with pytest.raises(SystemExit) as end:
            register.main([flag])
        assert end.value.code == 0
        assert said in capsys.readouterr().out


def test_it_offers_the_library():
    from registration import Input

    assert register.Input is Input
    with pytest.raises(AttributeError, match="no attribute 'Inputs'; it offers Input, Options"):
        register.Inputs  # noqa: B018


@pytest.mark.parametrize(("text", "checkpoint", "value"), [
    (None, None, "auto"), (None, "own", 0), ("auto", "own", "auto"), ("0", None, 0), ("25", None, 25),
])  # fmt: skip
def test_steps_of_refinement(text, checkpoint, value):
    assert register.parse_refine(text, checkpoint) == value


def test_steps_that_are_no_number():
    with pytest.raises(UserError, match=r"--refine '2\.5' is neither a whole number from 0 nor auto"):
        register.parse_refine("2.5", None)


def as_scan(volume, modality=None):
    image = FRAME.put(volume)
    if modality:
        image.SetMetaData("0008|0060", modality)
    return image


def test_the_modality_is_the_headers_or_shown_by_hounsfield_units():
    assert modality_of(as_scan(head(), "MR")) == "MR"
    assert modality_of(as_scan(head(offset=-1000))) == "CT"
    assert modality_of(as_scan(head())) is None
    assert modality_of(as_scan(head(scale=0.001, offset=-300))) is None  # flat


def test_the_view_follows_what_the_scans_are():
    brain, text = automatic_view(as_scan(head(), "MR"), as_scan(head(), "MR"))
    assert (brain.crop, brain.percentiles) == ("brain", (1, 99))
    assert re.fullmatch(r"MR, (1\.\d|2\.0) and \S+ litres: prepared as heads or brains \(--preprocess\)", text)
    ct = as_scan(head(scale=2.1, offset=-1000))
    assert automatic_view(ct, ct)[0].crop == "body"
    large = FRAME.put(head())
    large.SetSpacing([2.2 * mm for mm in MM])
    assert automatic_view(large, as_scan(head()))[0].crop == "none"


def told(similarity, local, modalities=(None, None), correlation=(0.2, 0.9), shift=(1, 0, 0)):
    """What is doubted of a result."""
    frame = Frame.of(FRAME.put(head()))
    fixed, moving = (
        PreparedScan(as_scan(head(place), modality), frame, None, frame, np.zeros(SIZE), (1, 1), [])
        for modality, place in zip(modalities, ((0, 0, 0), shift), strict=True)
    )
    quality = {"local_correlation": {"after": local}}
    measured = {"similarity": list(correlation), "folding": [0, 0], "quality": quality}
    return doubts(fixed, moving, measured, None, (similarity,))


def test_what_is_hardly_alike_is_doubted_but_not_of_two_contrasts():
    assert told("ncc", 0.31) == told("ncc", None) == told("mi", 0.1, ("CT", "MR"), (0.5, 0.1)) == []
    assert "hardly alike after registration" in told("lncc", 0.1)[0]
    assert "the correlation fell from 0.500 to 0.100" in told("ncc", 0.5, correlation=(0.5, 0.1))[0]
    assert told("ncc", 0.5, ("CT", "MR"))[0].startswith("fixed is CT and moving MR: networks compare scans of one")


def test_one_scan_named_twice_is_doubted():
    assert told("lncc", 1.0, shift=(0, 0, 0)) == [
        "the two scans have the same grey values in every voxel; was one scan named twice?"
    ]


def test_correlation_around_each_voxel_is_pearsons():
    rng = np.random.default_rng(3)
    first, second = (ndimage.gaussian_filter(rng.uniform(0, 255, (15, 14, 13)), 1) * 3 - 250 for _ in range(2))
    found = local_correlation(first, second, 5)
    for x, y, z in ((7, 7, 6), (2, 11, 10), (12, 2, 2)):
        cube = tuple(slice(k - 2, k + 3) for k in (x, y, z))
        expected = np.corrcoef(first[cube].ravel(), second[cube].ravel())[0, 1]
        np.testing.assert_allclose(found[x, y, z], expected, atol=1e-4)


def test_maps_of_a_result():
    flow = np.zeros((*SIZE, 3), np.float32)
    flow[..., 1] = 2
    flat = np.zeros(SIZE)
    maps = Quality.of(head() / 4, flat, head() / 4, flow, 0.5 * flow, MM)
    assert np.unique(maps.moved).tolist() == [14.0]
    assert np.unique(maps.residual).tolist() == [7.0]
    numbers = maps.numbers()
    assert numbers["local_correlation"]["after"] == 1
    assert numbers["local_correlation"]["before"] == 0
    assert np.isnan(maps.after[0, 0, 0])  # nothing there to compare
    assert {tuple(region["region"]) for region in numbers["regions"]} <= set(np.ndindex(4, 4, 4))
    assert json.loads(json.dumps(numbers)) == numbers
