"""The cache: traces worked out by hand, the rules as invariants, and both backends alike."""

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import dipnet.cache
from dipnet.cache import (
    POLICIES,
    Cache,
    CacheSettings,
    CacheSlots,
    check_integrity,
    make_cache,
    reference,
)
from dipnet.errors import BackendError, InputError

each_backend = pytest.mark.parametrize("backend", ["reference", "native"])
each_policy = pytest.mark.parametrize("policy", POLICIES)

# wanted units -> (hits, misses, admitted), the units in the slots, the misses in their order
Step = tuple[set[int], tuple[int, int, int], list[int], list[int]]
TRACES: dict[str, list[Step]] = {
    "lru": [
        ({3, 1}, (0, 2, 2), [1, 3], [1, 3]),
        ({1, 4}, (1, 1, 1), [1, 4], [4]),
        ({0, 2, 4}, (1, 2, 1), [0, 4], [0, 2]),  # one victim only: 2 is streamed
        (set(), (0, 0, 0), [0, 4], []),
        ({0, 1, 2, 3, 4}, (2, 3, 0), [0, 4], [1, 2, 3]),  # nothing that is wanted goes
        ({2}, (0, 1, 1), [2, 4], [2]),  # 0 and 4 are as old: the lowest goes
        ({0, 3}, (0, 2, 2), [3, 0], [0, 3]),  # 4 is older than 2
    ],
    "lfu": [
        ({3, 1}, (0, 2, 2), [1, 3], [1, 3]),
        ({1, 4}, (1, 1, 1), [1, 4], [4]),  # as often as 3: it may take its place
        ({1, 2}, (1, 1, 1), [1, 2], [2]),
        ({1, 2}, (2, 0, 0), [1, 2], []),
        ({0, 4}, (0, 2, 1), [1, 4], [4, 0]),  # 4 for the second time, as 2; 0 is below 1
        ({0, 3}, (0, 2, 1), [1, 0], [0, 3]),
        ({0, 1, 2, 3, 4}, (2, 3, 0), [1, 0], [2, 3, 4]),
        (set(), (0, 0, 0), [1, 0], []),
    ],
}


def wants(units: int, wanted: set[int]) -> NDArray[np.bool_]:
    return np.isin(np.arange(units), list(wanted))


@each_backend
@each_policy
def test_by_hand(backend: str, policy: str) -> None:
    cache = make_cache(5, 2, policy, backend)
    for _ in range(2):  # and again after a reset
        for wanted, counts, slots, missed in TRACES[policy]:
            assert cache.access(wants(5, wanted)) == counts
            assert cache.unit_in.tolist() == slots
            assert cache.missed.tolist() == missed
            assert np.flatnonzero(cache.resident).tolist() == sorted(slots)
            check_integrity(cache)
        cache.reset()
        assert cache.unit_in.tolist() == [-1, -1]
        assert not cache.resident.any()


@st.composite
def traces(draw: st.DrawFn) -> tuple[int, int, list[NDArray[np.bool_]]]:
    """Units, slots, and masks: of any density, skewed to some units, none and all among them."""
    units = draw(st.integers(1, 80))
    slots = draw(st.sampled_from([0, 1, units // 2, units]) | st.integers(0, units))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    favour = rng.random(units) ** 2
    masks = [rng.random(units) < favour * rng.random() * 2 for _ in range(draw(st.integers(1, 30)))]
    for value in (False, True):
        masks.insert(draw(st.integers(0, len(masks))), np.full(units, value))
    return units, slots, masks


@each_policy
@settings(max_examples=150)
@given(case=traces())
def test_native_equals_reference(policy: str, case: tuple) -> None:
    units, slots, masks = case
    plain, native = (make_cache(units, slots, policy, b) for b in ("reference", "native"))
    for wanted in masks:
        assert native.access(wanted) == plain.access(wanted)
        for name in ("slot_of", "unit_in", "resident", "missed"):
            assert np.array_equal(getattr(native, name), getattr(plain, name)), name


@each_backend
@each_policy
@settings(max_examples=60)
@given(case=traces())
def test_the_rules_hold(backend: str, policy: str, case: tuple) -> None:
    units, slots, masks = case
    cache = make_cache(units, slots, policy, backend)
    for wanted in masks:
        before = cache.resident.copy()
        hits, misses, admitted = cache.access(wanted)
        after = cache.resident
        assert (hits, misses) == ((wanted & before).sum(), (wanted & ~before).sum())
        assert after[wanted & before].all(), "a wanted resident was evicted"
        assert not (after & ~before & ~wanted).any(), "a unit came that nobody wanted"
        assert (after & ~before).sum() == admitted
        assert after[cache.missed[:admitted]].all()
        assert not after[cache.missed[admitted:]].any()
        assert after.sum() == min(slots, before.sum() + misses)
        check_integrity(cache)


@each_backend
@each_policy
def test_a_dense_model_keeps_the_first_units(backend: str, policy: str) -> None:
    cache = make_cache(9, 4, policy, backend)
    assert [cache.access(np.ones(9, bool)) for _ in range(3)] == [(0, 9, 4), (4, 5, 0), (4, 5, 0)]
    assert cache.unit_in.tolist() == [0, 1, 2, 3]


@each_backend
def test_many_priorities(backend: str) -> None:
    """More accesses than a byte counts."""
    cache, oldest = make_cache(700, 699, "lru", backend), 0
    for unit in range(699):
        cache.access(wants(700, {unit}))
    cache.access(wants(700, {699}))
    assert cache.slot_of[oldest] == -1
    assert cache.unit_in[0] == 699


def test_a_large_site_alike() -> None:
    rng = np.random.default_rng(0)
    favour = rng.random(17920) ** 3
    for policy in POLICIES:
        plain, native = (make_cache(17920, 6000, policy, b) for b in ("reference", "native"))
        for _ in range(12):
            wanted = rng.random(17920) < favour
            assert native.access(wanted) == plain.access(wanted)
        assert np.array_equal(native.unit_in, plain.unit_in)


@each_backend
def test_a_copy_goes_its_own_way(backend: str) -> None:
    cache = make_cache(5, 2, "lru", backend)
    cache.access(wants(5, {1}))
    other = copy.deepcopy(cache)
    other.access(wants(5, {4}))
    assert (cache.unit_in.tolist(), other.unit_in.tolist()) == ([1, -1], [1, 4])


def test_views_keep_the_cache_alive_and_follow_it() -> None:
    cache = make_cache(5, 2, "lru", "native")
    resident = cache.resident
    cache.access(wants(5, {3}))
    assert resident.tolist() == [False, False, False, True, False]
    del cache
    assert resident[3]


@pytest.mark.parametrize("wanted", [np.ones(4, bool), np.ones((5, 1), bool)])
def test_native_checks_the_shape(wanted: NDArray[np.bool_]) -> None:
    with pytest.raises(ValueError, match="wanted must have the shape"):
        make_cache(5, 2, "lru", "native").access(wanted)


def test_integrity_finds_what_is_broken() -> None:
    def broken(**state: list) -> Cache:
        cache = reference.Cache(5, 3, "lru")
        cache.access(wants(5, {1, 2}))
        for name, values in state.items():
            getattr(cache, name)[:] = values
        return cache

    check_integrity(broken())
    for state, reason in [
        ({"slot_of": [-1, 0, 1, 2, -1]}, "3 resident units hold 2 slots"),
        ({"unit_in": [1, -1, 2]}, "a slot is free below"),
        ({"unit_in": [2, 1, -1]}, "unit holds another slot"),
        ({"resident": [True, True, True, False, False]}, "without a slot"),
    ]:
        with pytest.raises(RuntimeError, match=reason):
            check_integrity(broken(**state))


def test_settings() -> None:
    cache = CacheSettings(0.5, "lfu").make(9)
    assert (cache.units, cache.slots) == (9, 4)
    assert CacheSettings(1).make(9).slots == 9


def test_slots_of_each_site() -> None:
    caches = CacheSlots({(0, "mlp.in"): 3, (0, "mlp.hidden"): 9}, "lfu")
    made = caches.make(9, (0, "mlp.in"))
    assert made is not None
    assert (made.units, made.slots) == (9, 3)
    assert caches.make(9, (0, "mlp.hidden")) is None  # all of it is in memory
    assert caches.make(9, (1, "mlp.in")) is None
    with pytest.raises(InputError, match="slots must be between 0 and units = 2, not 3"):
        caches.make(2, (0, "mlp.in"))
    with pytest.raises(InputError, match="unknown cache policy 'fifo'"):
        CacheSlots({}, "fifo")


@pytest.mark.parametrize("share", [-0.1, 1.5, "0.5", True, float("nan"), None])
def test_a_share_is_of_the_units(share: object) -> None:
    with pytest.raises(InputError, match=r"share must be in 0\.\.1"):
        CacheSettings(share)


def test_bad_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="unknown cache policy 'fifo'; known: lru, lfu"):
        CacheSettings(0.5, "fifo")
    with pytest.raises(InputError, match="slots must be between 0 and units = 4, not 5"):
        make_cache(4, 5)
    with pytest.raises(BackendError, match="no backend 'cuda'"):
        make_cache(4, 2, backend="cuda")
    monkeypatch.setattr(dipnet.cache, "_BUILT", False)
    with pytest.raises(BackendError, match="is not built"):
        make_cache(4, 2, backend="native")
    assert isinstance(make_cache(4, 2), reference.Cache)
