"""Selection on the GPU, else in Triton's interpreter, against the reference: the same indices."""

import pytest
import torch
from torch import Tensor

from dipnet.errors import BackendError, InputError
from dipnet.kernels import gpu
from dipnet.kernels.gpu.tiles import MOST_UNITS, cut_of
from tests.kernels.gpu.device import DEVICE, needs_kernels

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SPECIAL = [0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), float("nan"), 1e-7, -1e-7, 6.0]

each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_sign = pytest.mark.parametrize("magnitude", [True, False])


def few_values(batch: int, n: int, dtype: torch.dtype) -> Tensor:
    """Scores with many ties, zeros of both signs, infinities and NaN."""
    picked = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), (batch, n))]
    return torch.where(torch.rand(batch, n) < 0.5, picked, torch.randn(batch, n)).to(dtype)


def check_topk(scores: Tensor, k: int, **how: object) -> None:
    wanted = gpu.topk_indices(scores, k, backend="reference", **how)
    found = gpu.topk_indices(scores.to(DEVICE), k, backend="gpu", **how)
    assert torch.equal(found.cpu(), wanted)
    mask = gpu.topk_mask(scores.to(DEVICE), k, backend="gpu", **how).cpu()
    assert torch.equal(mask, gpu.topk_mask(scores, k, backend="reference", **how))
    assert (mask.sum(1) == k).all()
    check_kept(scores, k)


def check_kept(scores: Tensor, k: int, factor: Tensor | None = None) -> None:
    wanted = gpu.keep_topk(scores, k, factor=factor, backend="reference")
    there = None if factor is None else factor.to(DEVICE)
    kept = gpu.keep_topk(scores.to(DEVICE), k, factor=there, backend="gpu").cpu()
    assert kept.dtype == scores.dtype
    torch.testing.assert_close(kept, wanted, rtol=0, atol=0, equal_nan=True)


@needs_kernels
@each_dtype
@each_sign
@pytest.mark.parametrize("n", [1, 33, 1025])
def test_topk(n: int, dtype: torch.dtype, magnitude: bool) -> None:
    for k in sorted({0, 1, n // 2, n}):
        check_topk(few_values(2, n, dtype), k, magnitude=magnitude)


@needs_kernels
@each_dtype
@each_sign
def test_all_scores_alike(dtype: torch.dtype, magnitude: bool) -> None:
    for value in (0.0, -3.5, float("nan")):
        check_topk(torch.full((2, 130), value, dtype=dtype), 7, magnitude=magnitude)


@needs_kernels
@each_dtype
def test_a_factor_multiplies_in_float32(dtype: torch.dtype) -> None:
    scores, factor = few_values(3, 500, dtype), torch.rand(500)
    wanted = gpu.topk_indices(scores, 111, factor=factor, backend="reference")
    found = gpu.topk_indices(scores.to(DEVICE), 111, factor=factor.to(DEVICE), backend="gpu")
    assert torch.equal(found.cpu(), wanted)
    check_kept(scores, 111, factor)


@needs_kernels
@each_dtype
@each_sign
@pytest.mark.parametrize("n", [1, 33, 1025])
def test_threshold(n: int, dtype: torch.dtype, magnitude: bool) -> None:
    x = few_values(3, n, dtype)
    for threshold in (-1.0, 0.0, 1.0):
        at = torch.tensor([threshold])
        wanted, counts = gpu.threshold_indices(x, at, magnitude=magnitude, backend="reference")
        given = (x.to(DEVICE), at.to(DEVICE))
        found, found_counts = gpu.threshold_indices(*given, magnitude=magnitude, backend="gpu")
        assert torch.equal(found_counts.cpu(), counts)
        kept, kept_counts = gpu.keep_above(*given, backend="gpu")
        wanted_kept, wanted_counts = gpu.keep_above(x, at, backend="reference")
        torch.testing.assert_close(kept.cpu(), wanted_kept, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(kept_counts.cpu(), wanted_counts)
        for row, wanted_row, count in zip(found.cpu(), wanted, counts, strict=True):
            assert torch.equal(row[:count], wanted_row[:count])


@needs_kernels
@pytest.mark.parametrize(("batch", "n"), [(1, 1), (3, 33), (8, 700)])
def test_union(batch: int, n: int) -> None:
    for density in (0.0, 0.1, 1.0):
        mask = torch.rand(batch, n) < density
        index, count = (part.cpu() for part in gpu.union_indices(mask.to(DEVICE), backend="gpu"))
        kept = mask.any(0)
        assert int(count) == int(kept.sum())
        wanted = torch.cat([kept.nonzero(), (~kept).nonzero()]).squeeze(1).int()
        assert torch.equal(index, wanted)


@pytest.mark.cuda
@each_dtype
@each_sign
@pytest.mark.parametrize("n", [4096, 14336, 49153, 131072])
def test_large(n: int, dtype: torch.dtype, magnitude: bool) -> None:
    for k in (1, n // 10, n // 2, n):
        check_topk(torch.randn(2, n).to(dtype), k, magnitude=magnitude)
        check_topk(few_values(1, n, dtype), k, magnitude=magnitude)


@pytest.mark.cuda
@each_dtype
@pytest.mark.parametrize("n", [14336, 49153])
def test_large_threshold(n: int, dtype: torch.dtype) -> None:
    test_threshold(n, dtype, True)


@pytest.mark.parametrize(
    ("scores", "k", "complaint"),
    [
        (torch.zeros(3), 1, "scores must be floating of shape"),
        (torch.zeros(1, 3, dtype=torch.int32), 1, "scores must be floating of shape"),
        (torch.zeros(1, 3), 4, "k must be between 0 and n = 3, not 4"),
        (torch.zeros(1, 3), -1, "k must be between 0 and n = 3, not -1"),
    ],
)
def test_bad_scores(scores: Tensor, k: int, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        gpu.topk_indices(scores, k)


def test_other_bad_arguments() -> None:
    with pytest.raises(InputError, match="factor must be"):
        gpu.topk_mask(torch.zeros(1, 3), 1, factor=torch.zeros(4))
    with pytest.raises(InputError, match="factor must be"):
        gpu.keep_topk(torch.zeros(1, 3), 1, factor=torch.zeros(4))
    with pytest.raises(InputError, match="threshold must be"):
        gpu.threshold_indices(torch.zeros(1, 3), torch.tensor(1.0))
    with pytest.raises(InputError, match="threshold must be"):
        gpu.keep_above(torch.zeros(1, 3), torch.tensor(1.0))
    with pytest.raises(InputError, match="mask must be"):
        gpu.union_indices(torch.zeros(1, 3))


@needs_kernels
def test_too_many_units() -> None:
    scores = torch.zeros(1, MOST_UNITS + 1, device=DEVICE)
    with pytest.raises(BackendError, match="selects among 131072 units, not 131073"):
        gpu.topk_indices(scores, 1, backend="gpu")
    assert gpu.topk_indices(scores[:, :-1], 1, backend="reference").tolist() == [[0]]


@pytest.mark.parametrize("units", [1, 4096, 4097, 14336, 32769, 49152, 65537, MOST_UNITS])
def test_a_cluster_holds_all_scores(units: int) -> None:
    cut = cut_of(units)
    assert units <= cut.blocks * cut.threads * cut.each
    assert cut.blocks in (1, 2, 4, 8, 16)
