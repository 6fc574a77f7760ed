"""Products of kept units on the GPU, else in Triton's interpreter, against the reference."""

import itertools
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dipnet.errors import BackendError, InputError
from dipnet.kernels import gpu
from dipnet.kernels.gpu import choice, reference
from dipnet.kernels.gpu.tiles import TritonColumns
from dipnet.kernels.gpu.weights import Weight
from dipnet.kernels.reference import row_bytes
from tests.kernels.gpu.device import DEVICE, launch, needs_kernels

HALVES = [torch.float16, torch.bfloat16]
PACKED = ["int4", "int8", "bf16"]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}

each_dtype = pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
each_packed = pytest.mark.parametrize("kind", PACKED)
each_end = pytest.mark.parametrize("width", [150, 152])
"""Units that end within a read of 16 bytes (Triton), and with one (CUDA C++)."""


def kept(batch: int | None, n: int, k: int) -> Tensor:
    """A list for each row, or one for all: int32, ascending."""
    lists = [torch.randperm(n)[:k].sort().values for _ in range(batch or 1)]
    return (torch.stack(lists) if batch else lists[0]).int()


def packed(kind: str, units: int, width: int) -> Weight:
    """Random bytes: every pattern is a weight; of the bf16 ones, all that are finite and small."""
    data = torch.randint(256, (units, row_bytes(kind, width)), dtype=torch.uint8)
    if kind == "bf16":
        numbers = torch.randn(units, data.shape[1] // 2).bfloat16()
        return Weight(numbers.view(torch.uint8), None, kind, width)
    return Weight(data, torch.rand(units) / 1000, kind, width)


def moved(given: object) -> object:
    """The tensors of an argument on the device of the test."""
    if isinstance(given, Weight):
        return Weight(*(moved(part) for part in given))
    return given.to(DEVICE) if isinstance(given, Tensor) else given


def check(name: str, *args: object, **named: object) -> None:
    """Backend "gpu" returns what the reference does."""
    function = getattr(gpu, name)
    wanted = function(*args, **named, backend="reference")
    there = [moved(arg) for arg in args], {key: moved(arg) for key, arg in named.items()}
    found = function(*there[0], **there[1], backend="gpu")
    close(found.cpu(), wanted.cpu())


def close(found: Tensor, wanted: Tensor) -> None:
    """Alike, and as near as their numbers allow."""
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    error = (found.double() - wanted.double()).norm()
    assert error <= TOLERANCE[wanted.dtype] * wanted.double().norm()


@needs_kernels
@each_dtype
@pytest.mark.parametrize(("units", "width"), [(1, 1), (33, 70), (70, 33), (9, 40)])
@pytest.mark.parametrize("batch", [None, 1, 2])
def test_columns(batch: int | None, units: int, width: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(batch or 2, units).to(dtype), torch.randn(units, width).to(dtype)
    for k in sorted({0, 1, units // 2, units}):
        check("columns_product", x, kept(batch, units, k), weight)
    index = kept(batch, units, -(-units // 2))
    check("gated_columns", x, index, weight, torch.randn_like(weight), "silu")


@needs_kernels
@each_dtype
@pytest.mark.parametrize(("units", "width"), [(1, 1), (7, 70), (18, 33), (9, 40)])
@pytest.mark.parametrize("batch", [None, 1, 2])
def test_rows(batch: int | None, units: int, width: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(batch or 2, width).to(dtype), torch.randn(units, width).to(dtype)
    for k in sorted({0, 1, units // 2, units}):
        check("rows_product", x, kept(batch, units, k), weight)
    index = kept(batch, units, -(-units // 2))
    check("gated_rows", x, index, weight, torch.randn_like(weight), "silu")


@needs_kernels
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("bits", [16, 4])
def test_lists_cut_into_parts(parts: int, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tile = TritonColumns(16 if bits == 4 else 32, parts, 1, 2)
    monkeypatch.setattr(launch, "nearest", lambda table, product: tile)
    monkeypatch.setattr(launch, "cuda_columns_serve", lambda *given: False)
    weight = packed("int4", 40, 70) if bits == 4 else torch.randn(40, 70)
    for k in (0, 1, 40):
        added = {"bias": torch.randn(70), "residual": torch.randn(2, 70)}
        check("columns_product", torch.randn(2, 40), kept(2, 40, k), weight, **added)
    up = packed("int4", 40, 70) if bits == 4 else torch.randn(40, 70)
    check("gated_columns", torch.randn(2, 40), kept(2, 40, 30), weight, up, "silu")


@needs_kernels
@each_packed
@pytest.mark.parametrize(("units", "width"), [(1, 1), (9, 150)])
@pytest.mark.parametrize("batch", [None, 2])
def test_packed_weights(batch: int | None, units: int, width: int, kind: str) -> None:
    weight, up = packed(kind, units, width), packed(kind, units, width)
    index = kept(batch, units, -(-units // 2))
    x = torch.randn(batch or 2, units)
    check("columns_product", x, index, weight, bias=torch.randn(width))
    check("gated_columns", x, index, weight, up, "relu")
    x = torch.randn(batch or 2, width)
    check("rows_product", x, index, weight, bias=torch.randn(units))
    check("gated_rows", x, index, weight, up, "relu")


@needs_kernels
@pytest.mark.parametrize("activation", gpu.ACTIVATIONS)
def test_activations(activation: str) -> None:
    weight, up, index = torch.randn(9, 24), torch.randn(9, 24), kept(1, 9, 7)
    check("gated_columns", torch.randn(1, 9), index, weight, up, activation)
    check("gated_rows", torch.randn(1, 24), index, weight, up, activation)
    check("rows_product", torch.randn(1, 24), index, weight, activation=activation)


@needs_kernels
@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize("kind", ["float", "int8"])
def test_what_is_added_and_counted(batch: int | None, kind: str) -> None:
    units, width, block, rows = 12, 70, 2, batch or 2
    weight = packed(kind, units, width) if kind != "float" else torch.randn(units, width)
    index = kept(batch, units // block, 5)
    for counts in ([0] * (batch or 1), [4, 1][: batch or 1]):
        count = torch.tensor(counts, dtype=torch.int32)
        shared = {"count": count, "block": block}
        added = {"bias": torch.randn(width), "residual": torch.randn(rows, width)}
        check("columns_product", torch.randn(rows, units), index, weight, **shared, **added)
        few = torch.randn(rows, 5 * block)
        check("columns_product", few, index, weight, **shared, **added, compact=True)
        made = {"bias": torch.randn(units), "factor": torch.randn(rows, units)}
        check("rows_product", torch.randn(rows, width), index, weight, **shared, **made)


@needs_kernels
def test_numbers_of_different_dtypes() -> None:
    for batch, (one, other) in itertools.product([None, 2], itertools.permutations(HALVES)):
        x, weight = torch.randn(2, 16).to(one), torch.randn(16, 16).to(other)
        check("columns_product", x, kept(batch, 16, 9), weight, bias=torch.randn(16))
        check("rows_product", x, kept(batch, 16, 9), weight, bias=torch.randn(16))


@needs_kernels
@each_end
@pytest.mark.parametrize("other", HALVES)
@pytest.mark.parametrize("batch", [None, 2])
def test_float32_and_halves(batch: int | None, other: torch.dtype, width: int) -> None:
    """To float32's digits: what predictors score decides which units are kept."""
    x, weight = torch.randn(2, width), torch.randn(40, width).to(other)
    check("rows_product", x, kept(batch, 40, 33), weight, bias=torch.randn(40))
    check("columns_product", torch.randn(2, 40), kept(batch, 40, 33), weight)
    check("columns_product", torch.randn(2, 40).to(other), kept(batch, 40, 33), weight.float())


@needs_kernels
@each_end
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", ["float16", "float32", "int8"])
@pytest.mark.parametrize("batch", [None, 1])
def test_products_in_float32(batch: int | None, kind: str, dtype: torch.dtype, width: int) -> None:
    """As if x had been float32, to the last bit."""
    x = torch.randn(2 if batch is None else 1, width).to(DEVICE, dtype)
    weight = moved(packed(kind, 40, width) if kind == "int8" else torch.randn(40, width))
    weight = weight.half() if kind == "float16" else weight
    named = {"bias": torch.randn(40, device=DEVICE), "activation": "relu"}
    for k, backend in itertools.product((0, 1, 33), ("gpu", "reference")):
        index = kept(batch, 40, k).to(DEVICE)
        found = gpu.rows_product(x, index, weight, **named, dtype=torch.float32, backend=backend)
        wanted = gpu.rows_product(x.float(), index, weight, **named, backend=backend)
        assert found.dtype == torch.float32
        assert torch.equal(found, wanted)


@needs_kernels
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e38, 1e-30])
def test_parts_of_what_is_no_usual_number(value: float) -> None:
    """Float32 times bfloat16 with a shared list is cut into parts, which must not make up any."""
    x, weight = torch.zeros(2, 40), torch.ones(9, 40, dtype=torch.bfloat16)
    x[0, 7], x[1, 3] = value, -value
    index = torch.arange(9).int()
    wanted = gpu.rows_product(x, index, weight, backend="reference")
    given = (x.to(DEVICE), index.to(DEVICE), weight.to(DEVICE))
    found = gpu.rows_product(*given, backend="gpu").cpu()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0, equal_nan=True)


@needs_kernels
def test_rows_further_apart_than_they_are_long() -> None:
    weight = torch.randn(9, 100)[:, :60]
    check("columns_product", torch.randn(1, 9), kept(1, 9, 5), weight)
    check("rows_product", torch.randn(1, 60), kept(1, 9, 5), weight)


@needs_kernels
def test_nan_of_a_kept_unit_is_passed_on() -> None:
    x = torch.randn(1, 40)
    x[0, 7] = torch.nan
    weight = torch.randn(40, 30).to(DEVICE)
    found = [
        gpu.columns_product(x.to(DEVICE), torch.tensor([[3, unit]]).int().to(DEVICE), weight)
        for unit in (7, 8)
    ]
    assert found[0].isnan().all()
    assert not found[1].isnan().any()


def test_a_compiler_finds_no_break() -> None:
    gate, up = (torch.randn(64, 48) / 8 for _ in range(2))

    def step(x: Tensor) -> Tensor:
        hidden = gpu.gated_columns(x, gpu.topk_indices(x, 32), gate, up, "silu")
        above, count = gpu.threshold_indices(hidden, torch.tensor([0.1]))
        made = gpu.columns_product(hidden, above, up[:48], count=count, residual=hidden)
        few = gpu.rows_product(made, above, gate[:48], count=count)
        few += gpu.rows_product(made.half(), above, gate[:48], count=count, dtype=torch.float32)
        several = gpu.gated_rows(made, gpu.topk_indices(made, 5), gate[:48], up[:48], "relu")
        masked, _ = gpu.keep_above(gpu.keep_topk(made, 9), torch.tensor([0.1]))
        return few.sum() + several.sum() + masked.sum()

    x = torch.randn(2, 64)
    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(x), step(x))


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"x": torch.zeros(1, 9)}, r"x must be floating of shape \(batch, 8\)"),
        ({"index": torch.zeros(1, 2)}, r"index must be torch.int32 of shape \(1, k\)"),
        ({"index": torch.zeros(2, 2, dtype=torch.int32)}, "index must be torch.int32"),
        ({"weight": torch.zeros(8, 4).t().contiguous().t()}, "each row contiguous"),
        ({"weight": torch.zeros(8, 4).double()}, "weights of kind 'float' must be floating"),
        ({"weight": Weight(torch.zeros(8, 4), None, "int3", 4)}, "no kind 'int3' of weights"),
        ({"weight": Weight(torch.zeros(8, 4), None, "int8", 4)}, "must be torch.uint8 of shape"),
        ({"weight": packed("int8", 8, 4)._replace(scales=None)}, "int4 and int8 weights have"),
        (
            {"count": torch.zeros(2, dtype=torch.int32)},
            r"count must be torch.int32 of shape \(1,\)",
        ),
        ({"bias": torch.zeros(8)}, r"bias must be floating of shape \(4,\)"),
        ({"residual": torch.zeros(4)}, r"residual must be floating of shape \(1, 4\)"),
        ({"block": 3}, "blocks of 3 do not divide the 8 units"),
    ],
)
def test_bad_arguments(given: dict[str, object], complaint: str) -> None:
    good = {"x": torch.zeros(1, 8), "index": torch.zeros(1, 2, dtype=torch.int32)}
    with pytest.raises(InputError, match=complaint):
        gpu.columns_product(**{**good, "weight": torch.zeros(8, 4), **given})


def test_bad_pairs() -> None:
    x, index = torch.zeros(1, 8), torch.zeros(1, 2, dtype=torch.int32)
    with pytest.raises(InputError, match=r"dtype must be .* that of x, or"):
        gpu.rows_product(x, index, torch.zeros(8, 8), dtype=torch.float16)
    with pytest.raises(InputError, match="no kernel has the activation 'swish'"):
        gpu.gated_columns(x, index, torch.zeros(8, 4), torch.zeros(8, 4), "swish")
    with pytest.raises(InputError, match="gate and up must be of one kind, shape and stride"):
        gpu.gated_rows(x, index, torch.zeros(8, 8), torch.zeros(9, 8), "silu")


def test_backends_that_cannot_serve() -> None:
    x = torch.zeros(1, 8, dtype=torch.float64)
    with pytest.raises(BackendError, match="no backend 'cuda'; there are: auto, gpu, reference"):
        gpu.topk_indices(x, 2, backend="cuda")
    with pytest.raises(BackendError, match="backend 'gpu' "):
        gpu.topk_indices(x, 2, backend="gpu")
    assert gpu.topk_indices(x, 2).tolist() == [[0, 1]]


def test_auto_warns_once_where_a_gpu_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "why_not", lambda *tensors: "is out of order today")
    on_gpu = SimpleNamespace(is_cuda=True)
    with pytest.warns(UserWarning, match="plain torch is: backend 'gpu' is out of order today"):
        assert choice.serving("auto", on_gpu) is reference
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choice.serving("auto", on_gpu) is reference
        assert choice.serving("auto", torch.zeros(1)) is reference
