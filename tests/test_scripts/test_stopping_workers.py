"""A run on two workers that a cluster stops loses nothing, whenever the signals come."""

import pytest

from tests.campaign.stopped_workers import campaign, difference, undisturbed


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("stopping")


@pytest.mark.slow
def test_two_runs_that_nobody_stops_have_the_same_bits(home):
    assert difference(undisturbed(home, "again"), undisturbed(home)) is None


@pytest.mark.slow
def test_twenty_stops_lose_nothing(home):
    tries = []
    for done in campaign(home, tries=20, seed=0):
        print(done, flush=True)
        tries.append(done)
    assert [str(done) for done in tries if done.lost is not None] == []
    assert sum(len(done.steps) for done in tries) > 0
