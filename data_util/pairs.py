"""Which scans make pairs, and in which order training draws them: index logic alone.

Pairs are sequences: `len(pairs)` and `pairs[k] -> (fixed index, moving index)`, indices into a list of scans.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from errors import UserError

_FEISTEL_ROUNDS = 6


@dataclass(frozen=True)
class AllPairs:
    """All ordered pairs of `n` scans, (0,1), (0,2) .. (0,n-1), (1,0), (1,2) ..; computed, never listed."""

    n: int

    def __len__(self) -> int:
        return self.n * max(self.n - 1, 0)

    def __getitem__(self, k: int) -> tuple[int, int]:
        fixed, moving = divmod(range(len(self))[k], self.n - 1)
        return fixed, moving + (moving >= fixed)


def adjacent_pairs(n: int) -> tuple[tuple[int, int], ...]:
    """Scans 0 and 1, 2 and 3, .. both ways round: ((0,1), (1,0), (2,3), (3,2), ..).

    Raises:
        UserError: `n` is odd.
    """
    if n % 2:
        raise UserError(f"paired needs an even number of scans, two for each pair; there are {n}")
    return tuple((k, k ^ 1) for k in range(n))


def atlas_pairs(n: int, atlas: int) -> tuple[tuple[int, int], ...]:
    """Scan number `atlas` of `n` as the fixed image of every other: ((atlas,0), (atlas,1), ..)."""
    return tuple((atlas, k) for k in range(n) if k != atlas)


def listed_pairs(ids: Sequence[str], pairs: Sequence[tuple[str, str]]) -> tuple[tuple[int, int], ...]:
    """Pairs that are listed by the scans' ids, (fixed, moving), as indices into `ids`.

    Raises:
        UserError: a scan is not among `ids`.

    Example:
        >>> listed_pairs(["f/a", "f/b", "f/c"], [("f/c", "f/a")])
        ((2, 0),)
    """
    numbers = {scan_id: k for k, scan_id in enumerate(ids)}
    for pair in pairs:
        if lost := [scan_id for scan_id in pair if scan_id not in numbers]:
            raise UserError(f"the pair {list(pair)} names '{lost[0]}', which is not in the subset; add it there")
    return tuple((numbers[fixed], numbers[moving]) for fixed, moving in pairs)


def permute(k: int, n: int, seed: Any) -> int:
    """Element `k` of a pseudo-random permutation of range(n) that `seed` (int or tuple of ints) chooses.

    A Feistel network permutes the smallest 2^(2h) >= n; what falls outside range(n) is permuted again until it falls
    inside. A NumPy permutation would be shorter, and is not used for two reasons: a run that is continued with -c must
    draw the pairs that it would have drawn, and --val_pairs must validate the same pairs as before, so the order for a
    seed may never change; and any element can be computed alone, so a run may continue at any step without memory.

    Args:
        k: place in the permutation, 0 .. n - 1.
        n: number of elements.
        seed: int or tuple of ints.

    Returns:
        The element, 0 .. n - 1.

    Raises:
        IndexError: `k` is outside range(n).

    Example:
        >>> [permute(k, 5, seed=0) for k in range(5)]
        [2, 1, 4, 0, 3]
    """
    if not 0 <= k < n:
        raise IndexError(f"element {k} of a permutation of {n}")
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    while True:
        left, right = k >> half, k & ((1 << half) - 1)
        for turn in range(_FEISTEL_ROUNDS):
            digest = hashlib.blake2b(f"{seed} {turn} {right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & ((1 << half) - 1))
        k = left << half | right
        if k < n:
            return k


class TrainingOrder:
    """The endless order of training draws: `order[n] -> (subset index, pair index)` for n = 0, 1, 2, ...

    Shares are spread evenly (smooth weighted round robin): every draw adds its fraction to each subset's credit, the
    subset with the highest credit is drawn from and pays 1. Within a subset the draws follow a permutation, and then
    another one, so that no pair comes again before all have come.

    Args:
        lengths: number of pairs of each subset.
        fractions: share of the draws that each subset gets; they add up to 1.
        seed: the same seed gives the same order, and order[n] does not depend on what was asked before.
    """

    def __init__(self, lengths: Sequence[int], fractions: Sequence[float], seed: int) -> None:
        self._lengths = tuple(lengths)
        self._seed = seed
        self._weights = _whole_weights(fractions)
        # With whole weights the credits are back at zero after sum(weights) draws: one period tells every draw.
        self._period = []  # (subset, how many draws it had before in this period)
        period, credit, drawn = sum(self._weights), [0] * len(self._weights), [0] * len(self._weights)
        for _ in range(period):
            credit = [c + w for c, w in zip(credit, self._weights, strict=True)]
            winner = credit.index(max(credit))
            self._period.append((winner, drawn[winner]))
            credit[winner] -= period
            drawn[winner] += 1

    def __getitem__(self, n: int) -> tuple[int, int]:
        if n < 0:
            raise IndexError(f"draw {n}: draws are counted from 0")
        periods, place = divmod(n, len(self._period))
        subset, before = self._period[place]
        turn, k = divmod(periods * self._weights[subset] + before, self._lengths[subset])
        return subset, permute(k, self._lengths[subset], (self._seed, subset, turn))


def _whole_weights(fractions: Sequence[float]) -> tuple[int, ...]:
    """The smallest whole numbers in the proportion of `fractions`, to 5e-6: (0.75, 0.25) -> (3, 1)."""
    for total in range(1, 100_001):
        weights = tuple(round(f * total) for f in fractions)
        if all(abs(w - f * total) <= 5e-6 * total for w, f in zip(weights, fractions, strict=True)):
            return weights
    raise ValueError(f"fractions must be numbers that add up to 1, not {fractions}")
