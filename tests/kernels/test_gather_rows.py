"""gather_rows: the reference against a plain loop, the native kernels against it bit for bit."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from dipnet import _native
from dipnet.errors import BackendError, InputError
from dipnet.kernels import BACKENDS, ROW_KINDS, gather_rows, native, reference
from dipnet.store import columns

SETS = ["portable", "avx2", "avx512"]
INPUTS = [1, 31, 32, 33, 128, 129, 640, 1000, 2049, 5120]

each_kind = pytest.mark.parametrize("kind", ROW_KINDS)
each_scaled = pytest.mark.parametrize("kind", ["int4", "int8"])
each_backend = pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "gpu"])


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _native.instruction_set()
    try:
        _native.use_instruction_set(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    _native.use_instruction_set(before)


def encoded(kind: str, n: int, inputs: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """Rows, their scales, and the (n, inputs) weights that they stand for."""
    rows, scales = columns.encode(torch.randn(inputs, n), kind)
    return rows, scales, columns.decode(rows, scales, kind, inputs).T


def random_bytes(kind: str, n: int, inputs: int) -> tuple[Tensor, Tensor | None]:
    """Rows of any bytes, also those that no encoder writes, but no NaN of bf16."""
    rows = torch.randint(256, (n, reference.row_bytes(kind, inputs)), dtype=torch.uint8)
    if kind == "bf16":
        rows[:, 1::2] = (rows[:, 1::2] & 0x80) | 0x3F
    return rows, None if kind == "bf16" else torch.rand(n)


def assert_same_bits(made: Tensor, expected: Tensor) -> None:
    assert made.dtype == expected.dtype == torch.float32
    assert made.shape == expected.shape
    assert torch.equal(made.isnan(), expected.isnan())
    kept = ~made.isnan()
    assert torch.equal(made[kept].view(torch.int32), expected[kept].view(torch.int32))


def check_bits(rows: Tensor, scales: Tensor | None, x: Tensor, mask: Tensor, kind: str) -> Tensor:
    made = gather_rows(rows, scales, x, mask, kind, "native")
    assert_same_bits(made, gather_rows(rows, scales, x, mask, kind, "reference"))
    return made


@each_kind
@each_backend
@pytest.mark.parametrize("inputs", INPUTS)
def test_decoded_weights(kind: str, backend: str, inputs: int) -> None:
    rows, scales, weights = encoded(kind, 7, inputs)
    x, mask = torch.randn(inputs), torch.rand(7) < 0.6
    made = gather_rows(rows, scales, x, mask, kind, backend)
    exact = weights.double() @ x.double()
    # Half a unit, of at most 2**-13 of the largest, for each input.
    rounding = 0 if kind == "bf16" else 2**-14 * x.abs().max().double()
    slack = weights.double().abs().sum(1) * rounding + exact.abs() * 2**-23 + 1e-12
    assert ((made - exact).abs() <= slack)[mask].all()
    assert not made[~mask].any()


@each_kind
@pytest.mark.parametrize("inputs", INPUTS)
def test_same_bits_of_any_bytes(instruction_set: str, kind: str, inputs: int) -> None:
    rows, scales = random_bytes(kind, 9, inputs)
    check_bits(rows, scales, torch.randn(inputs), torch.rand(9) < 0.7, kind)


@each_kind
@pytest.mark.parametrize("k", [0, 1, 11])
def test_how_many_are_kept(instruction_set: str, kind: str, k: int) -> None:
    rows, scales = random_bytes(kind, 11, 300)
    mask = torch.zeros(11, dtype=torch.bool)
    mask[torch.randperm(11)[:k]] = True
    made = check_bits(rows, scales, torch.randn(300), mask, kind)
    assert (made != 0).sum() == k


@each_kind
def test_no_rows(instruction_set: str, kind: str) -> None:
    rows, scales = random_bytes(kind, 0, 100)
    assert check_bits(rows, scales, torch.randn(100), torch.ones(0).bool(), kind).shape == (0,)


@each_kind
def test_zeros(instruction_set: str, kind: str) -> None:
    rows, scales = random_bytes(kind, 3, 200)
    made = check_bits(rows, scales, torch.zeros(200), torch.ones(3).bool(), kind)
    assert made.tolist() == [0, 0, 0]


@each_kind
@pytest.mark.parametrize("size", [1e-45, 1e-39, 1e-30, 1e4, 1e30])
def test_outliers(instruction_set: str, kind: str, size: float) -> None:
    rows, scales = random_bytes(kind, 5, 500)
    x = torch.randn(500)
    x[[3, 77, 499]] = torch.tensor([size, -size, size])
    check_bits(rows, scales, x, torch.ones(5).bool(), kind)
    check_bits(rows, scales, torch.randn(500) * size, torch.ones(5).bool(), kind)


@each_scaled
def test_an_outlier_spoils_its_own_group_only(kind: str) -> None:
    rows, scales, weights = encoded(kind, 40, 640)
    x = torch.randn(640)
    x[5] = 1e6
    weights[:, :32] = 0
    mask = torch.ones(40).bool()
    plain = gather_rows(rows, scales, x, mask, kind).double()
    alone = torch.zeros(640)
    alone[:32] = x[:32]
    rest = plain - gather_rows(rows, scales, alone, mask, kind)
    # A float of the size of 1e6 resolves no more than this.
    assert (rest - weights.double() @ x.double()).abs().max() < 1


@each_kind
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite(instruction_set: str, kind: str, value: float) -> None:
    rows, scales = random_bytes(kind, 6, 150)
    x, mask = torch.randn(150), torch.tensor([True, False, True, True, False, True])
    x[140] = value
    made = check_bits(rows, scales, x, mask, kind)
    assert not made[mask].isfinite().any()
    assert made[~mask].tolist() == [0, 0]
    assert kind == "bf16" or made[mask].isnan().all()


@each_scaled
def test_the_largest_sums(instruction_set: str, kind: str) -> None:
    inputs = 4096
    rows = torch.full((1, reference.row_bytes(kind, inputs)), 255, dtype=torch.uint8)
    rows[:, inputs // 2 if kind == "int4" else inputs :] = 127
    for sign in (1, -1):
        x = torch.full((inputs,), sign * (2 - 2**-13))
        made = check_bits(rows, torch.ones(1), x, torch.ones(1).bool(), kind)
        exact = inputs * x[0].item() * 127 * (7 if kind == "int4" else 127)
        assert made.item() == np.float32(exact)


@each_kind
def test_thread_count_does_not_matter(kind: str) -> None:
    rows, scales = random_bytes(kind, 1500, 3000)
    x, mask = torch.randn(3000), torch.rand(1500) < 0.9
    made = []
    for threads in (1, 2, 3, 7):
        y = np.full(1500, np.nan, np.float32)
        args = (None if scales is None else scales.numpy(), x.numpy(), mask.numpy(), y)
        _native.gather_rows(rows.numpy(), *args, kind, threads)
        made.append(torch.from_numpy(y))
    for other in made[1:]:
        assert_same_bits(other, made[0])


@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_of_x(backend: str, dtype: torch.dtype) -> None:
    rows, scales = random_bytes("int4", 4, 99)
    x, mask = torch.randn(198, requires_grad=True).to(dtype)[::2], torch.ones(8).bool()[::2]
    made = gather_rows(rows, scales, x, mask, "int4", backend)
    assert not made.requires_grad
    assert_same_bits(made, gather_rows(rows, scales, x.detach().float(), mask, "int4"))


def test_rows_apart_are_left_to_the_reference() -> None:
    rows, scales = random_bytes("int8", 8, 99)
    x, mask = torch.randn(99), torch.ones(4).bool()
    assert scales is not None
    made = gather_rows(rows[::2], scales[::2], x, mask, "int8")
    assert_same_bits(made, gather_rows(rows[::2].contiguous(), scales[::2], x, mask, "int8"))
    with pytest.raises(BackendError, match="takes rows that lie one after the other"):
        gather_rows(rows[::2], scales[::2], x, mask, "int8", "native")


@pytest.mark.parametrize("inputs", [1, 100, 128, 130, 5120, 17920])
@each_kind
def test_a_row_is_as_long_as_a_column(kind: str, inputs: int) -> None:
    stride = columns.encode(torch.ones(inputs, 1), kind)[0].shape[1]
    assert stride == reference.row_bytes(kind, inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "int2"}, "no kind 'int2' of weights; there are: int4, int8, bf16"),
        ({"scales": None}, "int4 and int8 rows have scales, bf16 rows have none"),
        ({"kind": "bf16"}, "int4 and int8 rows have scales, bf16 rows have none"),
        ({"x": torch.ones(2, 2)}, r"x must be floating of shape \(inputs,\), not torch.float32"),
        ({"x": torch.ones(99).int()}, "x must be floating"),
        ({"x": torch.ones(129)}, r"rows must be torch.uint8 of shape \(n, 192\) for 129 inputs"),
        ({"rows": torch.zeros(4, 128).char()}, "rows must be torch.uint8"),
        ({"mask": torch.ones(4)}, r"mask must be torch.bool of shape \(4,\), not torch.float32"),
        ({"mask": torch.ones(5).bool()}, r"mask must be torch.bool of shape \(4,\)"),
        ({"scales": torch.ones(4).double()}, "scales must be torch.float32"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    rows, scales = random_bytes("int4", 4, 99)
    mask = torch.ones(4).bool()
    given = {"rows": rows, "scales": scales, "x": torch.ones(99), "mask": mask, "kind": "int4"}
    with pytest.raises(InputError, match=message):
        gather_rows(**(given | change))


def test_the_extension_checks_for_itself() -> None:
    rows, scales, x = np.zeros((4, 128), np.uint8), np.ones(4, np.float32), np.ones(99, np.float32)
    mask, y = np.ones(4, bool), np.zeros(4, np.float32)
    for args, message in [
        ((rows, scales, x, mask, y, "int3", 1), "the kind is"),
        ((rows, scales, np.ones(129, np.float32), mask, y, "int4", 1), "rows are"),
        ((rows, None, x, mask, y, "int4", 1), "have scales"),
        ((rows, scales[:3], x, mask, y, "int4", 1), "scales are"),
        ((rows, scales, x, mask[:3], y, "int4", 1), "mask and y"),
        ((rows, scales, x, mask, y[:3], "int4", 1), "mask and y"),
        ((rows, scales, x, mask, y, "int4", 0), "threads"),
    ]:
        with pytest.raises(ValueError, match=message):
            _native.gather_rows(*args)


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_BUILT", False)
    rows, scales = random_bytes("int4", 4, 99)
    with pytest.raises(BackendError, match="is not built"):
        gather_rows(rows, scales, torch.ones(99), torch.ones(4).bool(), "int4", "native")
    assert gather_rows(rows, scales, torch.ones(99), torch.ones(4).bool(), "int4").shape == (4,)
