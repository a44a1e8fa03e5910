import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_util.pairs import AllPairs, TrainingOrder, adjacent_pairs, atlas_pairs, permute
from errors import UserError


def draws(order, start, stop):
    return [order[n] for n in range(start, stop)]


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7])
def test_all_pairs_in_the_order_of_two_loops(n):
    assert list(AllPairs(n)) == [(i, j) for i in range(n) for j in range(n) if i != j]
    assert len(AllPairs(n)) == n * (n - 1)


def test_all_pairs_of_many_scans_cost_nothing():
    pairs = AllPairs(10**6)
    assert len(pairs) == 10**12 - 10**6
    assert pairs[0] == (0, 1)
    assert pairs[10**6 - 1] == (1, 0)
    assert pairs[-1] == (10**6 - 1, 10**6 - 2)
    with pytest.raises(IndexError):
        pairs[len(pairs)]


def test_adjacent_pairs():
    assert list(adjacent_pairs(6)) == [(0, 1), (1, 0), (2, 3), (3, 2), (4, 5), (5, 4)]
    assert len(adjacent_pairs(0)) == 0
    with pytest.raises(UserError, match=r"even number.* 19$"):
        adjacent_pairs(19)


def test_atlas_pairs_skip_the_atlas():
    assert list(atlas_pairs(4, 0)) == [(0, 1), (0, 2), (0, 3)]
    assert list(atlas_pairs(4, 2)) == [(2, 0), (2, 1), (2, 3)]
    assert len(atlas_pairs(1, 0)) == 0


@given(n=st.integers(1, 300), seed=st.integers(0, 2**31 - 1))
@settings(max_examples=40, deadline=None)
def test_permute_is_a_permutation(n, seed):
    assert sorted(permute(k, n, seed) for k in range(n)) == list(range(n))


def test_permute_is_random_access_in_a_large_range():
    n = 10**12 + 7
    some = [permute(k, n, 5) for k in range(1000)]
    assert len(set(some)) == 1000
    assert all(0 <= value < n for value in some)
    assert 0.45 * n < sum(some) / 1000 < 0.55 * n  # spread over the range: 5 standard errors are 0.046 n
    assert permute(999, n, 5) == some[-1]
    with pytest.raises(IndexError):
        permute(5, 5, 0)


def test_seeds_give_each_order_of_three_alike():
    orders = Counter(tuple(permute(k, 3, seed) for k in range(3)) for seed in range(3000))
    assert set(orders) == set(itertools.permutations(range(3)))
    assert all(400 < count < 600 for count in orders.values()), orders  # 500 expected, 5 standard deviations are 102


def test_permute_depends_on_every_part_of_the_seed():
    seeds = [0, 1, (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert len({tuple(permute(k, 50, seed) for k in range(50)) for seed in seeds}) == len(seeds)


def test_one_subset_without_replacement_and_fresh_each_round():
    order = TrainingOrder([20], [1.0], seed=3)
    rounds = [[pair for _, pair in draws(order, 20 * r, 20 * r + 20)] for r in range(4)]
    assert all(sorted(r) == list(range(20)) for r in rounds)
    assert len(set(map(tuple, rounds))) == 4
    other = [pair for _, pair in draws(TrainingOrder([20], [1.0], seed=4), 0, 20)]
    assert other != rounds[0]


def test_shares_in_a_batch():
    order = TrainingOrder([5, 7], [0.75, 0.25], seed=0)
    for step in range(10):
        assert Counter(s for s, _ in draws(order, 4 * step, 4 * step + 4)) == {0: 3, 1: 1}


def test_subsets_are_chosen_by_smooth_round_robin():
    assert [s for s, _ in draws(TrainingOrder([9, 9], [0.75, 0.25], 0), 0, 8)] == [0, 0, 1, 0, 0, 0, 1, 0]
    assert [s for s, _ in draws(TrainingOrder([9, 9], [0.5, 0.5], 0), 0, 4)] == [0, 1, 0, 1]  # ties to the first


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 400))
@settings(max_examples=40, deadline=None)
def test_shares_never_stray_by_a_whole_draw_for_each_other_subset(weights, n):
    fractions = [w / sum(weights) for w in weights]
    counts = Counter(s for s, _ in draws(TrainingOrder([3] * len(weights), fractions, 0), 0, n))
    assert all(abs(counts[s] - n * f) <= max(len(weights) - 1, 1e-6) for s, f in enumerate(fractions))


def test_shares_of_fractions_that_are_rounded_or_odd():
    thirds = TrainingOrder([4, 4], [0.333333, 0.666667], 0)
    assert Counter(s for s, _ in draws(thirds, 0, 3000)) == {0: 1000, 1: 2000}
    odd = TrainingOrder([4, 4, 4], [0.123457, 0.7, 0.176543], 0)
    counts = Counter(s for s, _ in draws(odd, 0, 100_000))
    assert [counts[s] for s in range(3)] == pytest.approx([12345.7, 70000, 17654.3], abs=4)


def test_each_subset_walks_its_own_rounds_without_replacement():
    order = TrainingOrder([6, 4], [0.75, 0.25], seed=1)
    drawn = draws(order, 0, 48)
    for subset, length in ((0, 6), (1, 4)):
        pairs = [pair for s, pair in drawn if s == subset]
        assert all(sorted(pairs[i : i + length]) == list(range(length)) for i in range(0, len(pairs), length))


def test_random_access_is_exact():
    lengths, fractions = [50, 3, 11], [0.5, 0.2, 0.3]
    one_by_one = draws(TrainingOrder(lengths, fractions, 9), 0, 300)
    backwards = TrainingOrder(lengths, fractions, 9)
    assert [backwards[n] for n in reversed(range(300))] == one_by_one[::-1]
    assert TrainingOrder(lengths, fractions, 9)[10**15] == backwards[10**15]
    with pytest.raises(IndexError):
        backwards[-1]


def test_the_order_for_a_seed_stays_what_it_was():
    """A continued run must see the order of the version that began it."""
    assert draws(TrainingOrder([380], [1.0], seed=0), 0, 6) == ORDER_OF_SEED_0


ORDER_OF_SEED_0 = [(0, 66), (0, 170), (0, 15), (0, 285), (0, 260), (0, 121)]
