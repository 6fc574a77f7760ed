"""topk_mask: every backend against a plain loop, and against each other bit for bit."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dipnet.errors import BackendError, InputError
from dipnet.kernels import native, topk_mask

CPU_BACKENDS = ["reference", "native"]
SPECIAL = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 3.4e38]

on_cpu = pytest.mark.parametrize("backend", CPU_BACKENDS)


def oracle(scores: torch.Tensor, k: int) -> list[bool]:
    """The definition for one row: sort by NaN first, then score, then lowest index."""
    values = scores.tolist()
    order = sorted(
        range(len(values)), key=lambda i: (not math.isnan(values[i]), -_number(values[i]), i)
    )
    kept = set(order[:k])
    return [i in kept for i in range(len(values))]


def _number(value: float) -> float:
    return 0.0 if math.isnan(value) else value


def check(scores: torch.Tensor, k: int, backend: str) -> None:
    mask = topk_mask(scores, k, backend)
    assert mask.dtype == torch.bool
    assert mask.shape == scores.shape
    n = scores.shape[-1]
    rows = zip(mask.reshape(-1, n), scores.detach().reshape(-1, n), strict=True)
    assert all(row.tolist() == oracle(score, k) for row, score in rows)


@st.composite
def rows_and_k(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    number = st.floats(width=32) | st.sampled_from(SPECIAL)
    row = draw(st.lists(number, min_size=1, max_size=200))
    return torch.tensor(row), draw(st.integers(0, len(row)))


@on_cpu
@settings(max_examples=300)
@given(case=rows_and_k())
def test_any_floats(backend: str, case: tuple[torch.Tensor, int]) -> None:
    check(*case, backend)


@on_cpu
@settings(max_examples=100)
@given(values=st.lists(st.sampled_from(SPECIAL), min_size=1, max_size=300), data=st.data())
def test_many_ties(backend: str, values: list[float], data: st.DataObject) -> None:
    check(torch.tensor(values), data.draw(st.integers(0, len(values))), backend)


@on_cpu
@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 448, 1344, 1345])
def test_row_lengths_and_ks(backend: str, n: int) -> None:
    scores = torch.randn(3, n)
    for k in sorted({0, 1, n // 3, n - 1, n}):
        check(scores, k, backend)


@on_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(backend: str, dtype: torch.dtype) -> None:
    check(torch.randn(4, 333).to(dtype), 100, backend)


def test_float64_orders_what_float32_cannot() -> None:
    scores = torch.tensor([1.0, 1.0 + 1e-12, 1.0], dtype=torch.float64)
    assert topk_mask(scores, 1).tolist() == [False, True, False]


@on_cpu
@pytest.mark.parametrize(
    "scores",
    [
        torch.randn(5, 40).T,
        torch.randn(6, 90)[:, ::3],
        torch.randn(6, 50)[::2],
        torch.randn(1, 21).expand(4, 21),
        torch.randn(2, 3, 4, 17),
        torch.randn(1, 30, requires_grad=True),
        torch.randn(0, 12),
        torch.randn(2, 0, 12),
        torch.randn(31),
    ],
    ids=["transposed", "strided", "skipped", "expanded", "4d", "grad", "no rows", "none", "1d"],
)
def test_layouts(backend: str, scores: torch.Tensor) -> None:
    mask = topk_mask(scores, 5, backend)
    assert not mask.requires_grad
    check(scores, 5, backend)


@on_cpu
def test_empty_rows(backend: str) -> None:
    assert topk_mask(torch.randn(3, 0), 0, backend).shape == (3, 0)


@on_cpu
def test_ties_go_to_the_lowest_index(backend: str) -> None:
    assert topk_mask(torch.ones(100), 7, backend).nonzero().flatten().tolist() == list(range(7))
    zeros = torch.tensor([-1.0, -0.0, 0.0, -0.0])
    assert topk_mask(zeros, 2, backend).tolist() == [False, True, True, False]


@on_cpu
def test_every_nan_is_above_infinity(backend: str) -> None:
    bits = torch.tensor([0x7F800000, 0x7F800001, -0x7FFFFF, 0x7FC00000, -1], dtype=torch.int32)
    scores = bits.view(torch.float32)
    assert scores.isnan().tolist() == [False, True, True, True, True]
    assert topk_mask(scores, 4, backend).tolist() == [False, True, True, True, True]
    assert topk_mask(scores, 2, backend).tolist() == [False, True, True, False, False]


@pytest.mark.parametrize("shape", [(512, 448), (300, 1344), (3, 14336), (1, 49152), (1, 70001)])
@pytest.mark.parametrize("kind", ["normal", "absolute", "relu", "bf16", "heavy tail"])
def test_native_equals_reference(shape: tuple[int, int], kind: str) -> None:
    scores = torch.randn(shape)
    scores = {
        "normal": scores,
        "absolute": scores.abs(),
        "relu": scores.relu(),
        "bf16": scores.bfloat16().float(),
        "heavy tail": scores**9,
    }[kind]
    for k in (1, shape[1] // 10, shape[1] // 2, shape[1] - 1):
        assert torch.equal(topk_mask(scores, k, "native"), topk_mask(scores, k, "reference"))


def test_thread_count_does_not_matter() -> None:
    scores, threads = torch.randn(401, 700), torch.get_num_threads()
    try:
        masks = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            masks.append(topk_mask(scores, 200, "native"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("k", [-1, 9])
def test_k_out_of_range(k: int) -> None:
    with pytest.raises(InputError, match=f"k must be between 0 and n = 8, not {k}"):
        topk_mask(torch.randn(2, 8), k)


@pytest.mark.parametrize("scores", [torch.arange(4), torch.tensor(1.0)], ids=["integers", "0d"])
def test_scores_that_cannot_be_ranked(scores: torch.Tensor) -> None:
    with pytest.raises(InputError, match="scores must be floating"):
        topk_mask(scores, 0)


@pytest.mark.parametrize("k", [0, 2])
def test_native_never_falls_back(k: int) -> None:
    with pytest.raises(BackendError, match=r"takes float32.*not torch.float64 on cpu.*reference"):
        topk_mask(torch.randn(4).double(), k, "native")


def test_unknown_backend() -> None:
    with pytest.raises(BackendError, match="no backend 'cuda'; there are: auto, reference, native"):
        topk_mask(torch.randn(4), 2, "cuda")


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_BUILT", False)
    with pytest.raises(BackendError, match="is not built"):
        topk_mask(torch.randn(4), 2, "native")
    check(torch.randn(50), 20, "auto")


def test_auto_prefers_native(monkeypatch: pytest.MonkeyPatch) -> None:
    served = []
    monkeypatch.setattr(native, "topk_mask", lambda scores, k: served.append(k))
    topk_mask(torch.randn(4), 2)
    topk_mask(torch.randn(4).double(), 3)
    assert served == [2]


@pytest.mark.cuda
def test_cuda_equals_cpu_and_is_captured_in_a_graph() -> None:
    scores = torch.randn(8, 1344)
    scores[0, :5] = torch.tensor([math.nan, math.inf, -0.0, 0.0, -math.inf])
    expected = topk_mask(scores, 448, "reference")
    static = scores.cuda()
    assert torch.equal(topk_mask(static, 448).cpu(), expected)  # also warms up for the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = topk_mask(static, 448)
    static.copy_(-scores)
    graph.replay()
    assert torch.equal(captured.cpu(), topk_mask(-scores, 448, "reference"))


needs_gpu = pytest.mark.cuda
on_gpu_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


@needs_gpu
@on_gpu_dtypes
def test_on_a_gpu(dtype: torch.dtype) -> None:
    """One launch, with the same bits; what it cannot serve is the reference's."""
    for shape in [(1, 1), (3, 33), (2, 5, 1025), (1, 14336), (0, 12), (4, 200_000)]:
        scores = torch.randn(shape).to(dtype)
        for k in sorted({0, 1, shape[-1] // 2, shape[-1]}):
            found = topk_mask(scores.cuda(), k)
            assert torch.equal(found.cpu(), topk_mask(scores, k, "reference"))


@needs_gpu
def test_special_scores_on_a_gpu() -> None:
    scores = torch.tensor(SPECIAL).repeat(9)
    for k in range(0, len(scores), 7):
        found = topk_mask(scores.cuda(), k, "gpu")
        assert torch.equal(found.cpu(), topk_mask(scores, k, "reference"))


@needs_gpu
def test_float64_on_a_gpu_is_the_references() -> None:
    scores = torch.tensor([1.0, 1.0 + 1e-12, 1.0], dtype=torch.float64).cuda()
    assert topk_mask(scores, 1).tolist() == [False, True, False]
    with pytest.raises(BackendError, match="takes float16, bfloat16 and float32"):
        topk_mask(scores, 1, "gpu")


def test_a_gpu_is_not_asked_about_a_cpu() -> None:
    with pytest.raises(BackendError, match="needs scores on a CUDA GPU, not on cpu"):
        topk_mask(torch.randn(4), 2, "gpu")
