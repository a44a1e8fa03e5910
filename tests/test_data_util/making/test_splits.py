import pathlib

import pytest

from data_util.making.sources import Source
from data_util.making.splits import split
from errors import UserError


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
