"""Replays: worked out by hand for every policy, the bound, and memory that does not grow."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from dataclasses import astuple, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dipnet.cache import make_cache
from dipnet.cache.belady import BLOCK
from dipnet.errors import InputError
from dipnet.sim.replay import POLICIES, Replay, replay
from dipnet.sim.trace import TraceCache
from dipnet.store.reads import GAP_BYTES
from tests.sim.masked import Masked, masked, site

each_policy = pytest.mark.parametrize("policy", POLICIES)

WANTED = [{1, 3}, {1, 4}, {0, 1}, {0, 1}, {2, 3}, {0, 1, 2, 3, 4}, set(), {0}]
APART = GAP_BYTES + 512
"""Bytes of records that are too large to read what lies between two of them."""
# (hits, misses, admitted, reads) of every token, with two slots
GOLDEN: dict[str, list[tuple[int, int, int, int]]] = {
    "none": [
        (0, 2, 0, 2),
        (0, 2, 0, 2),
        (0, 2, 0, 1),
        (0, 2, 0, 1),
        (0, 2, 0, 1),
        (0, 5, 0, 1),
        (0, 0, 0, 0),
        (0, 1, 0, 1),
    ],
    "lru": [
        (0, 2, 2, 2),  # {1, 3}
        (1, 1, 1, 1),  # {1, 4}
        (1, 1, 1, 1),  # {0, 1}
        (2, 0, 0, 0),
        (0, 2, 2, 1),  # {2, 3}
        (2, 3, 0, 2),  # 0 1 . . 4: nothing that is wanted goes
        (0, 0, 0, 0),
        (0, 1, 1, 1),
    ],
    "lfu": [
        (0, 2, 2, 2),  # {1, 3}
        (1, 1, 1, 1),  # 4 as often as 3: {1, 4}
        (1, 1, 1, 1),  # 0 as often as 4: {0, 1}
        (2, 0, 0, 0),  # 0 twice, 1 four times
        (0, 2, 1, 1),  # 3 for the second time, as 0: {1, 3}; 2 for the first
        (2, 3, 0, 3),  # 0 . 2 . 4
        (0, 0, 0, 0),
        (0, 1, 1, 1),  # 0 for the fourth time, 3 three: {0, 1}
    ],
    "belady": [
        (0, 2, 2, 2),  # 1 at 1, 3 at 4; 4 would be at 5
        (1, 1, 0, 1),  # 1 at 2 and 3 at 4 stay, 4 passes by
        (1, 1, 1, 1),  # 0 and 1 at 3, before 3
        (2, 0, 0, 0),  # both at 5
        (0, 2, 0, 1),  # all at 5: the lowest stay
        (2, 3, 0, 1),  # . . 2 3 4; 0 at 7, of the others the lowest
        (0, 0, 0, 0),
        (1, 0, 0, 0),
    ],
}


def replayed(trace: Masked, slots: Sequence[int], policy: str) -> Replay:
    """With large records: a read takes in neighbours and nothing else."""
    found = replay(trace, slots, policy, [APART] * len(trace.sites))
    assert all((counts.records == counts.misses).all() for counts in found.counts)
    return found


def rows(found: Replay, at: int = 0) -> list[tuple[int, ...]]:
    """The counts of every token, but for the records."""
    return list(zip(*(each.tolist() for each in astuple(found.counts[at])[:4]), strict=True))


@each_policy
def test_by_hand(policy: str) -> None:
    found = replayed(masked(WANTED, WANTED[::-1], WANTED), [2, 0, 2], policy)
    golden = GOLDEN[policy]
    assert rows(found, 0) == rows(found, 2) == golden
    assert found.slots == ((0, 0, 0) if policy == "none" else (2, 0, 2))
    nothing = [(0, len(wanted), 0) for wanted in WANTED[::-1]]
    assert [row[:3] for row in rows(found, 1)] == nothing
    hits, misses = (2 * sum(row[at] for row in golden) for at in (0, 1))
    assert (found.hits, found.misses) == (hits, misses + 16)
    assert found.tokens == 8
    assert all(each.dtype == np.int32 for each in astuple(found.counts[0]))


@pytest.mark.parametrize(("policy", "hits"), [("none", 0), ("lru", 6), ("lfu", 6), ("belady", 7)])
def test_golden_hits(policy: str, hits: int) -> None:
    """What the table adds up to, so that it is no copy of what the code gives."""
    assert sum(row[0] for row in GOLDEN[policy]) == hits
    assert {sum(row[:2]) for row in GOLDEN[policy]} == {0, 1, 2, 5}


@each_policy
def test_whole_sites_are_filled_first(policy: str) -> None:
    """As in the engine; attention is always held, the MLP not without a cache."""
    wanted = np.ones((3, 4), bool)
    trace = Masked([site(0, "mlp.in", 4), site(0, "attn.out", 4)], [wanted, wanted], 3)
    found = replayed(trace, [4, 4], policy)
    held = [(4, 0, 0, 0)] * 3
    assert rows(found, 0) == ([(0, 4, 0, 1)] * 3 if policy == "none" else held)
    assert rows(found, 1) == held


def test_bytes_and_rates() -> None:
    """Of the second site 2 and 1 records are read, and one between the two of a token."""
    wanted = np.array([[1, 1, 0, 0], [1, 0, 1, 0]], bool)
    sites = [site(0, "mlp.in", 4), site(0, "mlp.hidden", 4, block=4)]
    found = replay(Masked(sites, [wanted, wanted[::-1]], 2), [2, 2], "lru", [512, 1024])
    assert [row[:2] for row in rows(found, 0)] == [(0, 2), (1, 1)]
    assert [row[:2] for row in rows(found, 1)] == [(0, 2), (1, 1)]
    assert [counts.records.tolist() for counts in found.counts] == [[2, 1], [3, 1]]
    assert found.bytes == 3 * 512 + 4 * 1024
    assert found.hit_rate() == found.hit_rate("mlp.in") == 0.25
    assert found.hit_rate("mlp.neuron") is None


def test_a_rate_is_of_weights() -> None:
    """All that is wanted of the hidden site is resident, and its units weigh twice as much."""
    sites = [site(0, "mlp.in", 1), site(0, "mlp.hidden", 1, block=4)]
    found = replayed(Masked(sites, [np.ones((1, 1), bool)] * 2, 1), [0, 1], "lfu")
    assert found.hit_rate("mlp.in") == 0
    assert found.hit_rate("mlp.hidden") == 1
    assert found.hit_rate() == pytest.approx(2 / 3)


def test_nothing_wanted() -> None:
    found = replayed(masked([set(), set()]), [2], "lfu")
    assert found.hit_rate() is None
    assert found.bytes == 0
    empty = replayed(Masked([site(0, "mlp.in", 3)], [np.ones((0, 3), bool)], 0), [1], "belady")
    assert (empty.tokens, empty.bytes) == (0, 0)


@st.composite
def traces(draw: st.DrawFn) -> tuple[int, Masked]:
    units = draw(st.integers(1, 70))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    favour = rng.random(units) ** 2
    tokens = draw(st.sampled_from([1, 20, BLOCK, BLOCK + 1, 2 * BLOCK + 5]))
    wanted = rng.random((tokens, units)) < favour * rng.random((tokens, 1)) * 2
    slots = draw(st.sampled_from([0, 1, units // 2, units]) | st.integers(0, units))
    return slots, Masked([site(0, "mlp.hidden", units)], [wanted], tokens)


@settings(max_examples=60)
@given(case=traces())
def test_belady_never_loses(case: tuple[int, Masked]) -> None:
    slots, trace = case
    found = {policy: replayed(trace, [slots], policy) for policy in POLICIES}
    assert found["belady"].hits == max(each.hits for each in found.values())
    assert found["none"].hits == 0
    assert len({each.hits + each.misses for each in found.values()}) == 1


@settings(max_examples=30)
@given(case=traces(), policy=st.sampled_from(["lru", "lfu"]))
def test_counts_are_the_caches_own(case: tuple[int, Masked], policy: str) -> None:
    slots, trace = case
    wanted: NDArray[np.bool_] = trace.masks(0, 0, trace.tokens)
    cache, expected = make_cache(wanted.shape[1], slots, policy, "reference"), []
    if slots == wanted.shape[1]:
        cache.access(np.ones(slots, bool))
    for row in wanted:
        counts = cache.access(row)
        missed = np.sort(cache.missed)
        expected.append((*counts, len(missed) and 1 + int((np.diff(missed) > 1).sum())))
    assert rows(replayed(trace, [slots], policy)) == expected


def test_masks_decided_with_a_cache_fit_no_other() -> None:
    plain = masked(WANTED, WANTED)
    aware = replace(plain, cache=TraceCache("lfu", (2, 3), 0.2))
    assert rows(replayed(aware, [2, 3], "lfu")) == GOLDEN["lfu"]
    for slots, policy in [([2, 3], "lru"), ([2, 2], "lfu"), ([2, 3], "none"), ([2, 3], "belady")]:
        with pytest.raises(InputError, match=r"^the masks .* policy lfu and the trace's own slots"):
            replayed(aware, slots, policy)


def test_bad_arguments() -> None:
    trace = masked(WANTED)
    with pytest.raises(InputError, match=r"unknown cache policy 'lruu'.*belady, lfu, lru, none"):
        replayed(trace, [2], "lruu")
    with pytest.raises(InputError, match="slots are for 2 sites and the trace has 1"):
        replayed(trace, [2, 2], "lru")
    with pytest.raises(InputError, match="record_bytes are for 2 sites and the trace has 1"):
        replay(trace, [2], "lru", [APART, APART])
    for slots in (-1, 6):
        with pytest.raises(InputError, match=rf"mlp.in of layer 0 cannot have {slots} slots.* 5 "):
            replayed(trace, [slots], "none")


def test_progress_ends_with_all() -> None:
    tokens = BLOCK + 10
    sites = [site(layer, "mlp.in", 3) for layer in range(2)]
    seen: list[tuple[int, int]] = []
    trace = Masked(sites, [np.ones((tokens, 3), bool)] * 2, tokens)
    replay(trace, [1, 1], "lru", [APART] * 2, lambda *done: seen.append(done))
    ends = (BLOCK, tokens, tokens + BLOCK, 2 * tokens)
    assert seen == [(done, 2 * tokens) for done in ends]


@each_policy
def test_memory_does_not_grow_with_the_trace(policy: str) -> None:
    def made(start: int, stop: int) -> NDArray[np.bool_]:
        return np.random.default_rng(start).random((stop - start, 200)) < 0.5

    def peak(tokens: int) -> int:
        trace = Masked([site(0, "mlp.in", 200)], [made], tokens)
        tracemalloc.start()
        try:
            replayed(trace, [80], policy)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(BLOCK)  # what is imported and cached the first time
    short, long = peak(2 * BLOCK), peak(16 * BLOCK)
    assert long < short + 20_000  # a block's masks are 25 600 bytes; counts of 14 blocks 28 672
