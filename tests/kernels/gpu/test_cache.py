"""The cache on a GPU, else in Triton's interpreter: the rules of `dipnet.cache.reference`."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from dipnet.cache.reference import Cache
from dipnet.errors import BackendError, InputError
from dipnet.kernels.gpu.cache import MOST_UNITS, Places, UnitCache, access, fetch, make_cache
from tests.kernels.gpu.device import DEVICE, WHY_NOT, needs_kernels

FIRST, GAMMA = 7, 0.25
ALIVE, NOT_COUNTED = torch.ones(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)

backends = ["reference", pytest.param("gpu", marks=needs_kernels)]
each_backend = pytest.mark.parametrize("backend", backends)
each_policy = pytest.mark.parametrize("policy", ["lru", "lfu"])


def device_of(backend: str) -> torch.device:
    return DEVICE if backend == "gpu" else torch.device("cpu")


def wanted_units(n: int, k: int) -> Tensor:
    """k of n, the first ones often, so that there are hits."""
    favoured = torch.rand(n) + torch.linspace(1, 0, n)
    mask = torch.zeros(n, dtype=torch.bool)
    mask[favoured.topk(k).indices] = True
    return mask


def use(cache: UnitCache, wanted: Tensor, most: int, backend: str, alive: Tensor = ALIVE) -> Places:
    device = cache.slot_of.device
    places = FIRST, FIRST + cache.slots
    made = access(
        cache,
        wanted.to(device),
        alive.to(device),
        first=places[0],
        past=places[1],
        most=most,
        backend=backend,
    )
    return Places(*(each.cpu() for each in made))


def check_state(cache: UnitCache, expected: Cache, counts: list[int]) -> None:
    """The same units are resident, with the same priorities; slots are each one's own."""
    slot_of = cache.slot_of.cpu().numpy()
    assert ((slot_of >= 0) == expected.resident).all()
    assert (cache.priority.cpu().numpy() == expected.priority).all()
    assert sorted(slot_of[slot_of >= 0]) == list(range(expected.resident.sum()))
    assert cache.clock.tolist() == [expected.resident.sum(), expected.clock]
    assert cache.counts.tolist() == counts
    assert cache.factor.cpu().tolist() == np.where(expected.resident, 1, GAMMA).tolist()


def check_places(made: Places, cache: UnitCache, wanted: Tensor, missing: Tensor) -> None:
    """Every wanted unit has a row of its own, and what was missing is brought there."""
    units, missed = wanted.nonzero().flatten(), missing.nonzero().flatten()
    count, misses = int(made.count), int(made.misses)
    assert made.units[:count].tolist() == units.tolist()
    assert not made.units[count:].any()
    assert made.missed[:misses].tolist() == missed.tolist()
    rows = dict(zip(units.tolist(), made.rows[:count].tolist(), strict=True))
    assert [rows[unit] for unit in missed.tolist()] == made.missed_rows[:misses].tolist()
    past = [row for row in rows.values() if row >= FIRST + cache.slots]
    assert sorted(past) == list(range(FIRST + cache.slots, FIRST + cache.slots + len(past)))
    slot_of = cache.slot_of.cpu()
    for unit, row in rows.items():
        assert slot_of[unit] == (-1 if row in past else row - FIRST)


@each_backend
@each_policy
@pytest.mark.parametrize("n", [1, 2, 33, 300])
def test_accesses(n: int, policy: str, backend: str) -> None:
    torch.manual_seed(n)
    for slots in sorted({0, 1, n // 3, n - 1, n}):
        cache = make_cache(n, slots, policy, device_of(backend), GAMMA)
        expected, counts = Cache(n, slots, policy), np.zeros(3, int)
        for k in [0, 1, n // 2, n // 2, n // 4, n, n // 3, n // 2]:
            wanted = wanted_units(n, k)
            missing = wanted & ~torch.from_numpy(expected.resident.copy())
            counts += expected.access(wanted.numpy())
            made = use(cache, wanted, max(1, k), backend)
            check_state(cache, expected, counts.tolist())
            check_places(made, cache, wanted, missing)


@each_backend
@each_policy
def test_priorities_that_tie(policy: str, backend: str) -> None:
    """Long runs of equal priorities, on both sides of what is admitted."""
    n, slots = 64, 20
    cache = make_cache(n, slots, policy, device_of(backend), GAMMA)
    expected, counts = Cache(n, slots, policy), np.zeros(3, int)
    for start, stop in [(0, 20), (10, 40), (30, 64), (0, 10), (50, 64), (5, 45), (0, 64), (60, 64)]:
        wanted = torch.zeros(n, dtype=torch.bool)
        wanted[start:stop] = True
        counts += expected.access(wanted.numpy())
        use(cache, wanted, n, backend)
        check_state(cache, expected, counts.tolist())


@each_backend
@each_policy
def test_what_is_not_counted_changes_nothing(policy: str, backend: str) -> None:
    n, slots = 40, 15
    cache = make_cache(n, slots, policy, device_of(backend), GAMMA)
    use(cache, wanted_units(n, 20), 20, backend)
    before = {f.name: getattr(cache, f.name) for f in dataclasses.fields(cache)}
    before = {name: v.clone() for name, v in before.items() if isinstance(v, Tensor)}
    wanted = wanted_units(n, 25)
    resident = (cache.slot_of >= 0).cpu()
    made = use(cache, wanted, 25, backend, NOT_COUNTED)
    assert all(torch.equal(value, getattr(cache, name)) for name, value in before.items())
    check_places(made, cache, wanted, wanted & ~resident)


@each_backend
def test_reset(backend: str) -> None:
    cache = make_cache(9, 4, "lfu", device_of(backend), GAMMA)
    use(cache, wanted_units(9, 5), 5, backend)
    cache.reset()
    check_state(cache, Cache(9, 4, "lfu"), [0, 0, 0])


@each_backend
@pytest.mark.parametrize("width", [4, 64, 2304])
@pytest.mark.parametrize("block", [1, 3])
def test_fetch(width: int, block: int, backend: str) -> None:
    device = device_of(backend)
    source = torch.randint(256, (30, width), dtype=torch.uint8)
    source = source.pin_memory() if device.type == "cuda" else source
    for count in (0, 1, 5):
        into = torch.zeros(12, width, dtype=torch.uint8, device=device)
        scales = torch.rand(30, block, device=device), torch.zeros(12, block, device=device)
        units = torch.tensor([3, 29, 0, 11, 4, 1], dtype=torch.int32, device=device)
        rows = torch.tensor([2, 0, 9, 11, 5, 1], dtype=torch.int32, device=device)
        valid = torch.tensor([count], dtype=torch.int32, device=device)
        fetch(source, units, rows, valid, into, scales, backend=backend)
        expected = torch.zeros(12, width, dtype=torch.uint8)
        taken, places = units[:count].long().cpu(), rows[:count].long().cpu()
        expected[places] = source[taken]
        assert torch.equal(into.cpu(), expected)
        assert torch.equal(scales[1][places.to(device)], scales[0][taken.to(device)])
        assert int(scales[1].count_nonzero()) == count * block


def test_bad_input() -> None:
    cpu = torch.device("cpu")
    with pytest.raises(InputError, match="between 0 and units = 4, not 5"):
        make_cache(4, 5, "lru", cpu)
    with pytest.raises(InputError, match=f"{MOST_UNITS} units at most"):
        make_cache(MOST_UNITS + 1, 5, "lru", cpu)
    cache = make_cache(4, 2, "lru", cpu)
    with pytest.raises(InputError, match=r"torch.bool of shape \(4,\), not torch.bool of shape"):
        use(cache, torch.ones(5, dtype=torch.bool), 4, "reference")
    lists = torch.zeros(1, dtype=torch.int32)
    source, into = (torch.zeros(2, width, dtype=torch.uint8) for width in (8, 4))
    with pytest.raises(InputError, match="records must be of one size"):
        fetch(source, lists, lists, lists, into)
    with pytest.raises(BackendError, match="no backend 'fast'"):
        use(cache, torch.ones(4, dtype=torch.bool), 4, "fast")


@pytest.mark.skipif(WHY_NOT is None, reason="the kernels can serve")
def test_a_backend_asked_for_by_name_never_falls_back() -> None:
    cache = make_cache(4, 2, "lru", torch.device("cpu"))
    with pytest.raises(BackendError, match="backend 'gpu'"):
        use(cache, torch.ones(4, dtype=torch.bool), 4, "gpu")
