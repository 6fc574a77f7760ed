"""Belady's cache: a trace worked out by hand, every choice tried, and no other cache is better."""

from __future__ import annotations

from functools import cache
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dipnet.cache import POLICIES, belady, make_cache
from dipnet.cache.belady import Belady
from dipnet.errors import InputError

# wanted units -> (hits, misses, admitted), the units that are resident afterwards
BY_HAND: list[tuple[set[int], tuple[int, int, int], set[int]]] = [
    ({0, 1, 2}, (0, 3, 2), {1, 2}),  # used again at 3, 1 and 2: the last one is passed by
    ({1, 3}, (1, 1, 0), {1, 2}),  # 1 and 2 at 2, 3 never
    ({1, 2}, (2, 0, 0), {1, 2}),  # both at 4: no better place for their slots
    ({0}, (0, 1, 0), {1, 2}),  # 0 at 5
    ({1, 2, 4}, (2, 1, 1), {1, 4}),  # 4 at 5, 1 and 2 never: of those the lowest stays
    ({0, 4}, (1, 1, 1), {0, 1}),  # nothing is used again
    (set(), (0, 0, 0), {0, 1}),
]


def told(masks: NDArray[np.bool_], slots: int) -> Belady:
    tokens, units = masks.shape
    return Belady(units, slots, tokens, lambda start, stop: masks[start:stop])


def hits(cache: object, masks: NDArray[np.bool_]) -> int:
    return sum(cache.access(row)[0] for row in masks)


@pytest.mark.parametrize("block", [1, 2, 3, 128])
def test_by_hand(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(belady, "BLOCK", block)
    masks = np.array([np.isin(np.arange(5), list(wanted)) for wanted, *_ in BY_HAND])
    known = told(masks, 2)
    for row, (_, counts, resident) in zip(masks, BY_HAND, strict=True):
        assert known.access(row) == counts
        assert set(np.flatnonzero(known.resident)) == resident


@st.composite
def traces(draw: st.DrawFn, most: int, accesses: int) -> tuple[int, NDArray[np.bool_]]:
    """Slots, and masks of any density, skewed to some units, none and all among them."""
    units = draw(st.integers(1, most))
    slots = draw(st.integers(0, units))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    favour = rng.random(units) ** 2
    rows = [rng.random(units) < favour * rng.random() * 2 for _ in range(accesses)]
    for value in (False, True):
        rows.insert(draw(st.integers(0, len(rows))), np.full(units, value))
    return slots, np.array(rows)


def most_hits(slots: int, masks: NDArray[np.bool_]) -> int:
    """The most hits of any cache: everything that could be kept is tried after every access."""
    wants = [frozenset(np.flatnonzero(row)) for row in masks]

    @cache
    def best(at: int, resident: frozenset[int]) -> int:
        if at == len(wants):
            return 0
        could = resident | wants[at]
        kept = combinations(sorted(could), min(slots, len(could)))
        return len(resident & wants[at]) + max(best(at + 1, frozenset(each)) for each in kept)

    return best(0, frozenset())


@settings(max_examples=100)
@given(case=traces(most=5, accesses=6))
def test_nothing_has_more_hits(case: tuple[int, NDArray[np.bool_]]) -> None:
    slots, masks = case
    assert hits(told(masks, slots), masks) == most_hits(slots, masks)


@settings(max_examples=100)
@given(case=traces(most=60, accesses=40))
def test_no_policy_beats_it(case: tuple[int, NDArray[np.bool_]]) -> None:
    slots, masks = case
    known = hits(told(masks, slots), masks)
    for policy in POLICIES:
        assert known >= hits(make_cache(masks.shape[1], slots, policy), masks)


@settings(max_examples=60)
@given(case=traces(most=60, accesses=40), block=st.integers(1, 50))
def test_the_rules_hold_whatever_the_block(case: tuple[int, NDArray[np.bool_]], block: int) -> None:
    slots, masks = case
    plain = told(masks, slots)
    expected = [plain.access(row) for row in masks]
    usual, belady.BLOCK = belady.BLOCK, block
    try:
        known = told(masks, slots)
        for wanted, counts in zip(masks, expected, strict=True):
            before = known.resident.copy()
            found = known.access(wanted)
            after = known.resident
            assert found == counts
            assert found[:2] == ((wanted & before).sum(), (wanted & ~before).sum())
            assert found[2] == (after & ~before).sum()
            assert not (after & ~before & ~wanted).any(), "a unit came that nobody wanted"
            assert after.sum() == min(slots, (before | wanted).sum())
    finally:
        belady.BLOCK = usual


def test_a_dense_model_keeps_the_first_units() -> None:
    masks = np.ones((3, 9), bool)
    known = told(masks, 4)
    assert [known.access(row) for row in masks] == [(0, 9, 4), (4, 5, 0), (4, 5, 0)]
    assert np.flatnonzero(known.resident).tolist() == [0, 1, 2, 3]


def test_no_access_at_all() -> None:
    assert not told(np.ones((0, 3), bool), 2).resident.any()


@pytest.mark.parametrize("slots", [-1, 6])
def test_slots_must_fit(slots: int) -> None:
    with pytest.raises(InputError, match=f"between 0 and units = 5, not {slots}"):
        told(np.ones((2, 5), bool), slots)
