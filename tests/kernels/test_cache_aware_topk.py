"""cache_aware_topk: every backend against a plain loop, and against each other bit for bit."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dipnet.errors import BackendError, InputError
from dipnet.kernels import cache_aware_topk, native, topk_mask

SPECIAL = [0.0, 1.0, 0.5, 0.2, math.inf, math.nan, 1e-45, 3.4e38]

on_cpu = pytest.mark.parametrize("backend", ["reference", "native"])


def oracle(scores: list[float], resident: list[bool], gamma: float, k: int) -> list[bool]:
    """One row by the definition: products in float32, NaN first, then score, then lowest index."""
    products = [
        float(np.float32(score) * np.float32(1.0 if here else gamma))
        for score, here in zip(scores, resident, strict=True)
    ]
    ranked = sorted(
        range(len(products)),
        key=lambda i: (not math.isnan(products[i]), -products[i] if products[i] >= 0 else 0, i),
    )
    kept = set(ranked[:k])
    return [i in kept for i in range(len(products))]


@on_cpu
@settings(max_examples=200)
@given(data=st.data())
def test_any_row(backend: str, data: st.DataObject) -> None:
    number = st.floats(0, width=32) | st.sampled_from(SPECIAL)
    scores = data.draw(st.lists(number, min_size=1, max_size=120))
    n = len(scores)
    resident = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    gamma = data.draw(st.floats(0.01, 1))
    k = data.draw(st.integers(0, n))
    mask = cache_aware_topk(torch.tensor(scores), k, torch.tensor(resident), gamma, backend)
    assert mask.tolist() == oracle(scores, resident, gamma, k)


@pytest.mark.parametrize("shape", [(401, 448), (2, 3, 1344), (14336,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gamma", [0.2, 0.999])
def test_native_equals_reference(shape: tuple[int, ...], dtype: torch.dtype, gamma: float) -> None:
    scores, resident = torch.randn(shape).abs().to(dtype), torch.rand(shape[-1]) < 0.5
    masks = [
        cache_aware_topk(scores, shape[-1] // 3, resident, gamma, backend)
        for backend in ("reference", "native")
    ]
    assert torch.equal(*masks)
    assert (masks[0].sum(-1) == shape[-1] // 3).all()


@on_cpu
def test_gamma_1_is_the_plain_mask(backend: str) -> None:
    scores, resident = torch.randn(5, 300), torch.rand(300) < 0.5
    plain = topk_mask(scores, 99)
    assert torch.equal(cache_aware_topk(scores, 99, resident, 1, backend), plain)
    everywhere = torch.ones(300, dtype=torch.bool)
    assert torch.equal(cache_aware_topk(scores, 99, everywhere, 0.1, backend), plain)


@on_cpu
def test_what_is_resident_is_preferred(backend: str) -> None:
    scores = torch.tensor([1.0, 0.9, 0.8, 0.3, 0.1])
    resident = torch.tensor([False, False, True, True, True])
    mask = cache_aware_topk(scores, 2, resident, 0.5, backend)
    assert mask.tolist() == [True, False, True, False, False]
    mask = cache_aware_topk(scores, 2, resident, 0.25, backend)
    assert mask.tolist() == [False, False, True, True, False]


def test_float64_stays_float64() -> None:
    scores = torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64)
    assert cache_aware_topk(scores, 1, torch.zeros(2, dtype=torch.bool), 0.5).tolist() == [0, 1]


def test_no_gradient() -> None:
    scores = torch.rand(4, requires_grad=True)
    assert not cache_aware_topk(scores, 2, torch.ones(4, dtype=torch.bool), 0.5).requires_grad


@pytest.mark.parametrize(
    "resident",
    [torch.ones(4), torch.ones(3, dtype=torch.bool), torch.ones(1, 4, dtype=torch.bool)],
)
def test_a_residency_is_a_flag_for_each_unit(resident: torch.Tensor) -> None:
    with pytest.raises(InputError, match=r"resident must be bool of shape \(4,\)"):
        cache_aware_topk(torch.rand(2, 4), 2, resident, 0.5)


@pytest.mark.parametrize("gamma", [0, -1, 1.01, math.nan])
def test_gamma_is_a_share(gamma: float) -> None:
    with pytest.raises(InputError, match=r"gamma must be in \(0, 1\]"):
        cache_aware_topk(torch.rand(2, 4), 2, torch.ones(4, dtype=torch.bool), gamma)


@pytest.mark.parametrize("k", [0, 2, 4])
def test_native_never_falls_back(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    resident = torch.ones(4, dtype=torch.bool)
    with pytest.raises(BackendError, match=r"not torch.float64 on cpu"):
        cache_aware_topk(torch.rand(4).double(), k, resident, 0.5, "native")
    with pytest.raises(BackendError, match=r"takes a residency on cpu, not on meta"):
        cache_aware_topk(torch.rand(4), k, resident.to("meta"), 0.5, "native")
    monkeypatch.setattr(native, "_BUILT", False)
    with pytest.raises(BackendError, match="is not built"):
        cache_aware_topk(torch.rand(4), k, resident, 0.5, "native")


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_each_row_may_have_its_own_residency(backend: str) -> None:
    scores, resident = torch.rand(3, 5, 33), torch.rand(3, 5, 33) < 0.5
    found = cache_aware_topk(scores, 11, resident, 0.2, backend)
    for row in range(3):
        for token in range(5):
            alone = cache_aware_topk(scores[row, token], 11, resident[row, token], 0.2, "reference")
            assert torch.equal(found[row, token], alone)
    with pytest.raises(BackendError, match="takes one residency for all rows"):
        cache_aware_topk(scores, 11, resident, 0.2, "native")
