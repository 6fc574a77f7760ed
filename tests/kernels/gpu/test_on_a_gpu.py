"""Products of the shapes of large models, and by every cut of the tables, against the reference."""

from typing import Any

import pytest
import torch

from dipnet.kernels import gpu
from dipnet.kernels.gpu.tiles import CUDA_COLUMNS, CUDA_ROWS, Product
from tests.kernels.gpu.device import DEVICE, launch
from tests.kernels.gpu.test_products import HALVES, PACKED, check, each_dtype, kept, moved, packed

pytestmark = pytest.mark.cuda


@each_dtype
@pytest.mark.parametrize("shape", [(4096, 14336), (14336, 4096), (7168, 28673), (12288, 49152)])
def test_large_columns(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(1, shape[0], device=DEVICE, dtype=dtype)
    weight = torch.randn(shape, device=DEVICE, dtype=dtype)
    for share in (0.001, 0.1, 0.5, 1):
        index = gpu.topk_indices(x, round(share * shape[0]))
        residual = torch.randn(1, shape[1], device=DEVICE, dtype=dtype)
        check("columns_product", x, index, weight, residual=residual)
        once, again = (gpu.columns_product(x, index, weight, backend="gpu") for _ in range(2))
        assert torch.equal(once, again)


def only(table: dict[Product, Any], product: Product, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let one cut of a table of the kernels in CUDA C++ be all there is."""
    monkeypatch.setattr(launch, "nearest", lambda _, wanted: table[product])
    for other in ("columns", "integer_columns", "shared_columns", "rows", "shared_rows"):
        monkeypatch.setattr(launch, other, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("product", CUDA_COLUMNS)
def test_every_cut_of_columns(
    product: Product, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lists that end within a turn of a cut, and are shorter than one."""
    only(CUDA_COLUMNS, product, monkeypatch)
    units = 3001
    numbers: dict[str, Any] = {"device": DEVICE, "dtype": dtype}
    weight, up = (
        torch.randn(units, product.width, **numbers)
        if product.bits == 16
        else moved(packed(f"int{product.bits}", units, product.width))
        for _ in range(2)
    )
    x, added = torch.randn(2, units, **numbers), torch.randn(2, product.width, **numbers)
    for k in (1, 1300, units):
        index = kept(2, units, k).to(DEVICE)
        if product.matrices == 2:
            check("gated_columns", x / 64, index, weight, up, "silu")
        else:
            check("columns_product", x, index, weight, bias=added[0], residual=added)


@pytest.mark.parametrize(
    ("dtype", "x_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),  # predictors
        (torch.float32, torch.float32),
    ],
)
@pytest.mark.parametrize("product", CUDA_ROWS)
def test_every_cut_of_rows(
    product: Product, dtype: torch.dtype, x_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lists that end within a block, and units that end within a turn of its threads."""
    only(CUDA_ROWS, product, monkeypatch)
    units, numbers = 3001, {"device": DEVICE, "dtype": dtype}
    for width in (8, product.width + 8):
        weight, up = (torch.randn(units, width, **numbers) for _ in range(2))
        x, bias = torch.randn(2, width, **numbers).to(x_dtype), torch.randn(units, **numbers)
        for k in (1, 1300, units):
            index = kept(2, units, k).to(DEVICE)
            if product.matrices == 2:
                check("gated_rows", x / 64, index, weight, up, "silu")
            else:
                check("rows_product", x, index, weight, bias=bias, activation="relu")


@each_dtype
@pytest.mark.parametrize("shape", [(4096, 14336), (14336, 4096), (1000, 28672), (7167, 1001)])
def test_large_rows(shape: tuple[int, int], dtype: torch.dtype) -> None:
    width, units = shape
    x = torch.randn(1, width, device=DEVICE, dtype=dtype)
    weight = torch.randn(units, width, device=DEVICE, dtype=dtype)
    factor = torch.randn(1, units, device=DEVICE, dtype=dtype)
    for share in (0.001, 0.1, 0.5, 1):
        index = kept(1, units, round(share * units)).to(DEVICE)
        check("rows_product", x, index, weight, factor=factor)
        once, again = (gpu.rows_product(x, index, weight, backend="gpu") for _ in range(2))
        assert torch.equal(once, again)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("batch", [None, 1, 8])
def test_large_mlp(batch: int | None, dtype: torch.dtype) -> None:
    x = torch.randn(batch or 17, 4096, device=DEVICE, dtype=dtype)
    gate, up = (torch.randn(14336, 4096, device=DEVICE, dtype=dtype) / 64 for _ in range(2))
    index = kept(batch, 14336, 1434).to(DEVICE)
    check("gated_rows", x, index, gate, up, "silu")
    index = kept(batch, 4096, 2048).to(DEVICE)
    check("gated_columns", x, index, gate.t().contiguous(), up.t().contiguous(), "silu")


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("batch", [None, 1])
def test_large_packed_weights(batch: int | None, kind: str) -> None:
    weight, x = packed(kind, 4096, 14336), torch.randn(batch or 2, 14336)
    index = kept(batch, 4096, 2048)
    check("columns_product", x[:, :4096], index, weight)
    check("rows_product", x, index, weight)


@pytest.mark.parametrize("rows", [2, 8, 64])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_large_predictors(rows: int, dtype: torch.dtype) -> None:
    """Float32 times halves on tensor cores, with float32's digits."""
    for units, width in ((1000, 7168), (28672, 1000)):
        weight, x = torch.randn(units, width).to(dtype), torch.randn(rows, width)
        index, bias = torch.arange(units).int(), torch.randn(units)
        check("rows_product", x, index, weight, bias=bias)
        check("columns_product", torch.randn(rows, units), index, weight)
