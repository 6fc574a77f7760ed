"""What stands between a token's products: the kernels against plain torch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from dipnet.errors import InputError
from dipnet.kernels import gpu, steps
from dipnet.kernels.steps import Heads, Norm, Rows, UsedHeads, reference
from tests.kernels.gpu.device import DEVICE, needs_kernels

GPU_DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DTYPES = GPU_DTYPES if DEVICE.type == "cuda" else GPU_DTYPES[:2]  # interpreted, bfloat16 is cut off
CLOSE: dict[torch.dtype, dict[str, float]] = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 4e-3, "atol": 4e-3},
    torch.bfloat16: {"rtol": 3e-2, "atol": 3e-2},
}

pytestmark = needs_kernels
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
SHAPES = [
    (8, 4, 16, 16, 150, False),
    (3, 1, 8, 8, 40, True),
    (6, 6, 10, 0, 200, False),
    (4, 2, 12, 6, 260, True),
]
"""Queries, groups, a head's size, its rotated channels, the cache's length, and norms of heads."""


def batches(several: int) -> pytest.MarkDecorator:
    """One row and several of each dtype; interpreted, which is slow, one of them of each."""
    on_gpu = list(itertools.product((1, several), DTYPES))
    cases = on_gpu if DEVICE.type == "cuda" else list(zip((1, several), DTYPES, strict=True))
    return pytest.mark.parametrize(("batch", "dtype"), cases)


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def close(made: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(made, wanted, **CLOSE[wanted.dtype])


@each_dtype
@pytest.mark.parametrize("n", [1, 24, 257, 1030])
@pytest.mark.parametrize("centred", [False, True])
def test_add_norm(n: int, centred: bool, dtype: torch.dtype) -> None:
    bias = random(n, dtype=dtype) if centred else None
    norm = Norm(random(n, dtype=dtype), bias, 1e-5, centred)
    for batch in (1, 3):
        hidden, delta = random(batch, n, dtype=dtype), random(batch, n, dtype=dtype)
        ring, place = random(3, batch, n, dtype=dtype), torch.tensor([2], device=DEVICE)
        for added in (None, delta):
            wanted = reference.add_norm(hidden, added, norm, None)
            total, normed = steps.add_norm(hidden, added, norm, (ring, place))
            assert torch.equal(ring[2], normed)
            close(total, wanted[0])
            close(normed, wanted[1])


def each_width(*large: int) -> pytest.MarkDecorator:
    on_gpu = [pytest.param(n, marks=pytest.mark.cuda) for n in large]
    return pytest.mark.parametrize("n", [1, 33, *on_gpu])


def normed_alike(made: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    """Sums to the last bit; a mean over them may be summed in another order."""
    assert torch.equal(made[0], wanted[0])
    close(made[1], wanted[1])
    if made[1].dtype != torch.float32:
        assert (made[1] != wanted[1]).sum() <= 1 + wanted[1].numel() / 100


@each_dtype
@each_width(1000, 3072, 4096, 4097, 5120, 8192, 20000)
def test_add_norm_topk(n: int, dtype: torch.dtype) -> None:
    norm = Norm(random(n, dtype=dtype), None, 1e-5, False)
    for batch, k in {(1, 1), (1, n), (3, (n + 1) // 2)}:
        hidden, delta = random(batch, n, dtype=dtype), random(batch, n, dtype=dtype)
        for added, factor in itertools.product((None, delta), (None, torch.rand(n, device=DEVICE))):
            summed, normed, index = steps.add_norm_topk(hidden, added, norm, k, factor)
            normed_alike((summed, normed), steps.add_norm(hidden, added, norm))
            assert torch.equal(index, gpu.topk_indices(normed, k, factor=factor))


@each_dtype
@each_width(1000, 4096, 5120, 20000)
def test_add_norm_above(n: int, dtype: torch.dtype) -> None:
    threshold = torch.tensor([0.5], device=DEVICE)
    for batch, number in itertools.product((1, 3), (n, n + 1)):  # at any address
        norm = Norm(random(number, dtype=dtype)[-n:], None, 1e-5, False)
        hidden, delta = random(batch, n, dtype=dtype), random(batch, n, dtype=dtype)
        for added in (None, delta):
            summed, normed, index, count = steps.add_norm_above(hidden, added, norm, threshold)
            normed_alike((summed, normed), steps.add_norm(hidden, added, norm))
            wanted, counts = gpu.threshold_indices(normed, threshold)
            assert torch.equal(count, counts)
            for own, other, valid in zip(index, wanted, counts.tolist(), strict=True):
                assert torch.equal(own[:valid], other[:valid])


def test_add_norm_of_other_kinds() -> None:
    """A layer norm, and weights of another dtype, before a selection."""
    hidden = random(2, 40, dtype=torch.float16)
    norms = [
        Norm(random(40, dtype=torch.float16), random(40, dtype=torch.float16), 1e-5, True),
        Norm(random(40, dtype=torch.float32), None, 1e-5, False),
    ]
    for norm in norms:
        summed, normed, index = steps.add_norm_topk(hidden, hidden, norm, 7)
        normed_alike((summed, normed), steps.add_norm(hidden, hidden, norm))
        assert torch.equal(index, gpu.topk_indices(normed, 7))


def test_selections_that_no_kernel_takes() -> None:
    hidden, weight = random(1, 8, dtype=torch.float16), random(8, dtype=torch.float16)
    norm = Norm(weight, None, 1e-5, False)
    with pytest.raises(InputError, match="k must be between 0 and n = 8, not 9"):
        steps.add_norm_topk(hidden, None, norm, 9)
    with pytest.raises(InputError, match=r"factor must be torch\.float32 of shape \(8,\)"):
        steps.add_norm_topk(hidden, None, norm, 3, weight)
    with pytest.raises(InputError, match=r"threshold must be torch\.float32"):
        steps.add_norm_above(hidden, None, norm, weight[:1])


@each_dtype
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated(activation: str, dtype: torch.dtype) -> None:
    pre = random(2, 2 * 777, dtype=dtype)
    close(steps.gated(pre, activation), reference.gated(pre, activation))


def heads_of(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Heads, Any]:
    queries, groups, size, rotary, length, normed = shape
    norms = [Norm(random(size, dtype=dtype), None, 1e-6, False) for _ in range(2 * normed)]
    rotation = None
    if rotary:
        rotation = random(length, rotary, dtype=dtype), random(length, rotary, dtype=dtype)
    return Heads(queries, groups, size, size**-0.5, *norms), rotation


@pytest.mark.parametrize(("queries", "groups"), [(56, 56), (8, 2), (15, 5), (1, 1)])
@pytest.mark.parametrize("batch", [1, 3])
def test_list_heads(batch: int, queries: int, groups: int) -> None:
    for k, ring in itertools.product({1, (queries + 1) // 2, queries}, (1, 2, 16)):
        kept = torch.stack([some(queries, k) for _ in range(batch)])
        turn = torch.randint(ring, (1,), device=DEVICE)
        wanted = reference.list_heads(kept, turn, queries, groups, ring)
        made = steps.list_heads(kept, turn, queries, groups, ring)
        count = int(wanted.count)
        assert torch.equal(made.index[:count], wanted.index[:count])
        assert (int(made.count), int(made.queries)) == (count, int(wanted.queries))
        assert made.most == wanted.most <= len(made.index) == len(wanted.index)
        if batch == 1:
            assert made.wanted is wanted.wanted is None
        else:
            assert torch.equal(made.wanted, wanted.wanted)


def test_listed_heads_are_those_needed() -> None:
    """Four groups of two heads, of which the last has its turn."""
    kept = torch.tensor([[0, 5], [1, 5]], dtype=torch.int32)
    for kernels in (steps, reference):
        made = kernels.list_heads(kept.to(DEVICE), torch.tensor([3], device=DEVICE), 8, 4, 4)
        assert made.index[: int(made.count)].tolist() == [0, 1, 5, 8, 10, 11, 12, 14, 15]
        assert int(made.queries) == 3


def some(number: int, most: int) -> Tensor:
    """Places of some of ``number``, ascending."""
    return torch.randperm(number)[:most].sort().values.int().to(DEVICE)


def rows_at(batch: int, column: int) -> Rows:
    """Sequences of which some begin behind padding; that of column 0 has none."""
    padding = torch.arange(batch) * (column // batch)
    return Rows(torch.tensor([column], device=DEVICE), padding.to(DEVICE))


def used_heads(heads: Heads, batch: int, used: int) -> UsedHeads:
    """Half of the query heads, of which sequences want some, and keys of ``used`` groups."""
    kept = some(heads.queries, (heads.queries + 1) // 2)
    first = heads.queries + some(heads.groups, used)
    index = torch.cat([kept, first, first + heads.groups])
    count, queries = (
        torch.tensor([number], dtype=torch.int32, device=DEVICE)
        for number in (len(index), len(kept))
    )
    room = index.new_zeros(2 * (heads.groups - used))
    wanted = (torch.rand(batch, heads.queries) < 0.6).to(DEVICE) if batch > 1 else None
    most = len(kept) + (batch > 1)  # not all that is listed is valid
    return UsedHeads(torch.cat([index, room]), count, queries, most, wanted)


@batches(3)
@pytest.mark.parametrize("shape", SHAPES)
def test_attend(batch: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    queries, groups, size, _, length, _ = shape
    heads, rotation = heads_of(shape, dtype)
    for at in (0, 5, length - 1) if batch == 1 else (length // 2,):
        rows = rows_at(batch, at)
        qkv = random(batch, (queries + 2 * groups) * size, dtype=dtype)
        caches = [random(batch, groups, length, size, dtype=dtype) for _ in "kv"]
        copies = [cache.clone() for cache in caches]
        wanted = reference.attend(qkv, rotation, *caches, rows, heads, None)
        close(steps.attend(qkv, rotation, *copies, rows, heads), wanted)
        for copy, cache in zip(copies, caches, strict=True):
            close(copy, cache)
        used = used_heads(heads, batch, 1)
        made = random(3 * batch, len(used.index) * size, dtype=dtype)
        wanted = reference.attend(made, rotation, *copies, rows, heads, used)
        close(steps.attend(made, rotation, *copies, rows, heads, used), wanted)


@batches(2)
@pytest.mark.parametrize("shape", SHAPES)
def test_complete(batch: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    _, groups, size, _, length, _ = shape
    heads, rotation = heads_of(shape, dtype)
    ring, most = 5, max(1, groups - 1)
    for at in (0, 3, length - 1):
        for number in {0, 1, most}:
            rows, used = rows_at(batch, at), used_heads(heads, batch, number)
            made = random(ring * batch, len(used.index) * size, dtype=dtype)
            until = at - torch.randint(0, ring + 1, (batch, groups))
            until = until.to(DEVICE).maximum(rows.padding[:, None] - 1)
            caches = [random(batch, groups, length, size, dtype=dtype) for _ in "kv"]
            copies = [cache.clone() for cache in caches]
            reached = until.clone()
            reference.complete(made, used, until, rotation, *caches, rows, heads)
            steps.complete(made, used, reached, rotation, *copies, rows, heads)
            assert torch.equal(until, reached)
            for copy, cache in zip(copies, caches, strict=True):
                close(copy, cache)
