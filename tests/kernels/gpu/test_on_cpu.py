"""The kernels in CUDA C++, on a CPU, against the reference: `on_cpu`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="what launches the kernels knows Triton's, too")

from dipnet.kernels.gpu import nvrtc, reference
from dipnet.kernels.gpu.cuda_columns import cuda_columns, cuda_columns_serve
from dipnet.kernels.gpu.cuda_rows import cuda_rows, cuda_rows_serve
from dipnet.kernels.gpu.selection import AddNorm, select
from dipnet.kernels.gpu.tiles import CudaColumns, CudaRows, Cut
from dipnet.kernels.gpu.weights import Weight
from dipnet.kernels.steps import Norm
from dipnet.kernels.steps import reference as steps_reference
from tests.kernels.gpu.on_cpu import OnCPU
from tests.kernels.gpu.test_products import close, kept, packed

HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> OnCPU:
    return OnCPU(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(autouse=True)
def on_cpu(compiler: OnCPU, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "function", compiler.function)
    monkeypatch.setattr(nvrtc, "launch", compiler.launch)


def weights(kind: str, units: int, width: int, dtype: torch.dtype, number: int) -> list[Weight]:
    if kind == "float":
        return [Weight.of(torch.randn(units, width).to(dtype)) for _ in range(number)]
    return [packed(kind, units, width) for _ in range(number)]


@pytest.mark.parametrize(
    ("kind", "dtype", "width", "tile"),
    [
        ("float", HALF, 8, CudaColumns(8, 1, 64, 2)),
        ("float", BFLOAT, 136, CudaColumns(8, 2, 64, 4)),
        ("float", HALF, 520, CudaColumns(32, 3, 128, 2)),
        ("float", HALF, 600, CudaColumns(64, 4, 128, 4)),
        ("float", FLOAT, 76, CudaColumns(8, 3, 64, 2)),
        ("bf16", FLOAT, 70, CudaColumns(16, 2, 32, 2)),
        ("int8", HALF, 150, CudaColumns(8, 2, 64, 2)),
        ("int4", BFLOAT, 300, CudaColumns(8, 3, 64, 2)),
        ("int4", FLOAT, 130, CudaColumns(16, 2, 64, 4, words=2)),
        ("int4", HALF, 130, CudaColumns(8, 1, 64, 2, words=1)),
    ],
)
def test_columns(kind: str, dtype: torch.dtype, width: int, tile: CudaColumns) -> None:
    units = 90
    (weight,) = weights(kind, units, width, dtype, 1)
    x, added = torch.randn(2, units).to(dtype), torch.randn(2, width).to(dtype)
    count = torch.tensor([0, 17], dtype=torch.int32)
    for k, given in ((1, None), (31, count), (units, None)):
        index, named = kept(2, units, k), {"bias": added[0], "residual": added}
        wanted = reference.columns_product(
            x, index, weight, given, added[0], added, compact=False, block=1
        )
        close(cuda_columns(x, index, (weight,), tile, count=given, **named), wanted)


@pytest.mark.parametrize("kind", ["int4", "int8"])
@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_columns_of_any_size(kind: str, size: float) -> None:
    """Levels are multiplied as the lowest bits of a float, and what they are multiplied with must
    neither end in 0 nor in infinity."""
    (weight,), x = weights(kind, 40, 130, FLOAT, 1), size * torch.randn(1, 40)
    index, tile = kept(1, 40, 23), CudaColumns(8, 2, 64, 2)
    wanted = reference.columns_product(x, index, weight, None, None, None, False, 1)
    close(cuda_columns(x, index, (weight,), tile), wanted)


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_columns_of_one_sign(kind: str) -> None:
    """A level is more than 0 until a sum's end: what it is more than its weight adds up."""
    weight, x = packed(kind, 2048, 130), torch.randn(1, 2048).abs()
    index, tile = kept(1, 2048, 2048), CudaColumns(8, 4, 64, 4)
    wanted = reference.columns_product(x, index, weight, None, None, None, False, 1)
    close(cuda_columns(x, index, (weight,), tile), wanted)


@pytest.mark.parametrize("kind", ["int4", "int8"])
@pytest.mark.parametrize("x", [float("inf"), 1e30])
def test_columns_of_what_is_too_large(kind: str, x: float) -> None:
    weight, index = packed(kind, 40, 130), kept(1, 40, 23)
    made = cuda_columns(torch.full((1, 40), x), index, (weight,), CudaColumns(8, 2, 64, 2))
    assert made.isnan().all()


@pytest.mark.parametrize("compact", [False, True])
def test_blocks_of_columns(compact: bool) -> None:
    tile, (weight,) = CudaColumns(8, 2, 64, 2), weights("float", 48, 72, HALF, 1)
    index, count = kept(None, 12, 7), torch.tensor([5], dtype=torch.int32)
    x = torch.randn(3, 28 if compact else 48).to(HALF)
    wanted = reference.columns_product(x, index, weight, count, None, None, compact, 4)
    named: dict[str, Any] = {"count": count, "compact": compact, "block": 4}
    close(cuda_columns(x, index, (weight,), tile, **named), wanted)


@pytest.mark.parametrize(
    ("kind", "width", "activation", "tile"),
    [
        ("float", 200, "silu", CudaColumns(16, 2, 64, 2)),
        ("float", 96, "gelu", CudaColumns(64, 3, 128, 4)),
        ("int8", 100, "relu", CudaColumns(8, 1, 64, 2)),
        ("int4", 260, "gelu_tanh", CudaColumns(8, 2, 64, 2)),
    ],
)
def test_gate_and_up(kind: str, width: int, activation: str, tile: CudaColumns) -> None:
    gate, up = weights(kind, 70, width, HALF, 2)
    x, index = torch.randn(2, 70).to(HALF) / 8, kept(2, 70, 33)
    wanted = reference.gated_columns(x, index, gate, up, activation, None)
    close(cuda_columns(x, index, (gate, up), tile, activation=activation), wanted)


@pytest.mark.parametrize(
    ("dtype", "x_dtype", "out", "width", "tile"),
    [
        (HALF, HALF, HALF, 8, CudaRows(8, 64, 1, 1)),
        (BFLOAT, BFLOAT, BFLOAT, 200, CudaRows(16, 64, 2, 2)),
        (FLOAT, FLOAT, FLOAT, 140, CudaRows(32, 128, 4, 1)),
        (BFLOAT, FLOAT, FLOAT, 1000, CudaRows(64, 128, 2, 4)),
        (HALF, BFLOAT, FLOAT, 600, CudaRows(128, 256, 1, 8)),
        (FLOAT, HALF, HALF, 36, CudaRows(4, 32, 2, 1)),
    ],
)
def test_rows(
    dtype: torch.dtype, x_dtype: torch.dtype, out: torch.dtype, width: int, tile: CudaRows
) -> None:
    units = 90
    (weight,) = weights("float", units, width, dtype, 1)
    x, bias, factor = (torch.randn(2, n).to(x_dtype) for n in (width, units, units))
    count = torch.tensor([0, 17], dtype=torch.int32)
    for k, given, made in ((1, None, factor), (31, count, None), (units, None, factor)):
        index = kept(2, units, k)
        wanted = reference.rows_product(
            x, index, weight, given, bias[0], "relu", made, block=1, dtype=out
        )
        named: dict[str, Any] = {"count": given, "bias": bias[0], "factor": made}
        close(cuda_rows(x, index, (weight,), tile, out, activation="relu", **named), wanted)


def test_blocks_of_rows() -> None:
    (weight,) = weights("bf16", 48, 128, HALF, 1)
    x, index, count = torch.randn(1, 128), kept(None, 12, 7), torch.tensor([5], dtype=torch.int32)
    wanted = reference.rows_product(
        x, index, weight, count, None, "none", None, block=4, dtype=FLOAT
    )
    tile = CudaRows(16, 64, 3, 1)
    close(cuda_rows(x, index, (weight,), tile, FLOAT, count=count, block=4), wanted)


@pytest.mark.parametrize(
    ("activation", "tile"), [("silu", CudaRows(64, 128, 1, 2)), ("gelu", CudaRows(8, 64, 3, 1))]
)
def test_rows_of_gate_and_up(activation: str, tile: CudaRows) -> None:
    gate, up = weights("float", 70, 200, HALF, 2)
    x, index = torch.randn(2, 200).to(HALF) / 8, kept(2, 70, 33)
    wanted = reference.gated_rows(x, index, gate, up, activation, None)
    close(cuda_rows(x, index, (gate, up), tile, HALF, activation=activation), wanted)


def scores(n: int, dtype: torch.dtype) -> Tensor:
    """With ties, zeros of both signs, infinities and NaN."""
    made = torch.randint(-40, 40, (2, n)).to(dtype) / 8
    made[0, : n // 50] = float("nan")
    made[1, 3], made[1, 5], made[0, -1] = float("inf"), float("-inf"), -0.0
    return made


@pytest.mark.parametrize(
    ("dtype", "n", "cut", "magnitude", "weighed"),
    [
        (HALF, 250, Cut(1, 64, 4), True, False),
        (BFLOAT, 1000, Cut(2, 128, 4), True, False),
        (FLOAT, 999, Cut(4, 64, 4), True, False),
        (HALF, 2048, Cut(4, 64, 8), False, False),
        (BFLOAT, 700, Cut(2, 128, 4), True, True),
        (FLOAT, 4000, Cut(16, 64, 4), False, True),
    ],
)
def test_topk(n: int, dtype: torch.dtype, cut: Cut, magnitude: bool, weighed: bool) -> None:
    given, factor = scores(n, dtype), torch.rand(n) if weighed else None
    for k in (1, n // 3, n):
        index = torch.empty(2, k, dtype=torch.int32)
        select(cut, given, magnitude, factor=factor, index=index, k=k)
        assert torch.equal(index, reference.topk_indices(given, k, magnitude, factor))


def test_masks_and_what_is_kept() -> None:
    given, cut, k = scores(500, HALF), Cut(2, 64, 4), 170
    mask = torch.empty(2, 500, dtype=torch.bool)
    select(cut, given, True, mask=mask, k=k)
    assert torch.equal(mask, reference.topk_mask(given, k, True, None))
    found = torch.empty_like(given)
    select(cut, given, True, kept=found, k=k)
    wanted = reference.keep_topk(given, k, None)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("cut", [Cut(1, 128, 4), Cut(4, 32, 4)])
def test_thresholds(cut: Cut) -> None:
    given, threshold = scores(500, BFLOAT), torch.tensor([2.6])
    index, count = torch.empty(2, 500, dtype=torch.int32), torch.empty(2, dtype=torch.int32)
    select(cut, given, True, threshold=threshold, index=index, count=count)
    wanted, counted = reference.threshold_indices(given, threshold, True)
    assert torch.equal(count, counted)
    for row, many in enumerate(count.tolist()):
        assert torch.equal(index[row, :many], wanted[row, :many])


@pytest.mark.parametrize("cut", [Cut(1, 64, 4), Cut(2, 32, 4)])
@pytest.mark.parametrize("dtype", [HALF, BFLOAT, FLOAT])
def test_norm_before_selection(cut: Cut, dtype: torch.dtype) -> None:
    hidden, delta = (torch.randn(2, 240).to(dtype) for _ in range(2))
    norm = Norm(torch.rand(240).to(dtype), None, 1e-5, centred=False)
    summed, normed = torch.empty_like(hidden), torch.empty_like(hidden)
    index = torch.empty(2, 80, dtype=torch.int32)
    made = AddNorm(delta, norm.weight, summed, normed, norm.epsilon)
    select(cut, hidden, True, index=index, k=80, add_norm=made)
    wanted = steps_reference.add_norm(hidden, delta, norm, None)
    assert torch.equal(summed, wanted[0])
    close(normed, wanted[1])
    assert torch.equal(index, reference.topk_indices(normed, 80, True, None))


def test_what_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "serves", lambda device: True)
    x, half = torch.zeros(1, 72), torch.zeros(1, 72).half()
    whole, odd = Weight.of(torch.zeros(9, 72)), Weight.of(torch.zeros(9, 71))
    apart = Weight.of(torch.zeros(9, 73)[:, :72])
    shifted = Weight.of(torch.zeros(9 * 72 + 1)[1:].view(9, 72))
    for weight, served in ((whole, True), (odd, False), (apart, False), (shifted, False)):
        assert cuda_columns_serve(x, (weight,)) is served
        assert cuda_rows_serve(x, (weight,)) is served
    assert not cuda_rows_serve(x, (packed("int8", 9, 128),))
    assert not cuda_rows_serve(x, (packed("bf16", 9, 70),))  # x ends within a read
    assert cuda_columns_serve(x, (packed("bf16", 9, 70),), x, None)
    assert not cuda_columns_serve(x, (whole,), half)
    assert cuda_rows_serve(x, (whole,), half, None)
    assert not cuda_rows_serve(x, (whole,), half, x)


def test_rows_of_x_that_is_not_aligned() -> None:
    x, (weight,) = torch.randn(1, 41)[:, 1:], weights("float", 30, 40, FLOAT, 1)
    index, tile = kept(1, 30, 9), CudaRows(8, 64, 1, 1)
    found = cuda_rows(x, index, (weight,), tile, FLOAT)
    assert torch.equal(found, cuda_rows(x.clone(), index, (weight,), tile, FLOAT))
