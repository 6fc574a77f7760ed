"""The kernels: one function an operation, and the choice of the backend that serves a call.

An explicitly requested backend serves the call or raises `BackendError`; only "auto" chooses.
Knows tensors; knows no site, no method and no model.
"""

from types import ModuleType

import torch
from torch import Tensor

from dipnet.errors import BackendError, InputError
from dipnet.kernels import native, on_gpu, reference

BACKENDS = ("auto", "reference", "native", "gpu")
ROW_KINDS = ("int4", "int8", "bf16")
NO_ROWS = "multiplies rows by dipnet.kernels.gpu.rows_product"


def topk_mask(scores: Tensor, k: int, backend: str = "auto") -> Tensor:
    """Mask of the k highest scores of each row: (..., n) floating -> (..., n) bool.

    Exactly k are True in each row. Ties go to the lowest index, and NaN counts as the highest
    score, so that a NaN is never pruned silently. Every backend returns the same bits.

    Raises:
        InputError: scores have no last dimension or are not floating, or k is not in 0..n.
        BackendError: the requested backend is unknown or cannot serve these scores.
    """
    _check_scores(scores, k)
    chosen = _choose(backend, native.why_not(scores), on_gpu.why_not(scores))
    if k in (0, scores.shape[-1]):
        return _all_or_none(scores, k)
    return chosen.topk_mask(scores, k)


def cache_aware_topk(
    scores: Tensor, k: int, resident: Tensor, gamma: float, backend: str = "auto"
) -> Tensor:
    """`topk_mask` of scores that are ``gamma`` times as high where a unit is not resident.

    (..., n) floating scores and a bool ``resident``, (n,) for all rows or (..., n) -> (..., n)
    bool. Scores are magnitudes, so a ``gamma`` in (0, 1] prefers what is resident. The product is
    rounded to float32 (float64 for float64 scores), so every backend returns the same bits.

    Raises:
        InputError: as `topk_mask`; or resident is not bool of such a shape, or gamma not in (0, 1].
        BackendError: the requested backend is unknown or cannot serve these scores.
    """
    _check_scores(scores, k)
    if resident.dtype != torch.bool or resident.shape not in (scores.shape[-1:], scores.shape):
        raise InputError(
            f"resident must be bool of shape {tuple(scores.shape[-1:])} or that of the scores, not "
            f"{resident.dtype} of shape {tuple(resident.shape)}"
        )
    if not 0 < gamma <= 1:
        raise InputError(f"gamma must be in (0, 1], not {gamma!r}")
    if backend == "auto" and resident.dim() > 1:  # the product here, the selection by the fastest
        return topk_mask(reference.preferred(scores, resident, gamma), k)
    chosen = _choose(backend, native.why_not(scores, resident), on_gpu.why_not(scores, resident))
    if k in (0, scores.shape[-1]):
        return _all_or_none(scores, k)
    return chosen.cache_aware_topk(scores, k, resident, gamma)


def gather_rows(
    rows: Tensor, scales: Tensor | None, x: Tensor, mask: Tensor, kind: str, backend: str = "auto"
) -> Tensor:
    """Products of the kept rows of a matrix with a vector: (n,) float32, 0 where a row is dropped.

    A row is a column of docs/store-format.md that runs over inputs instead of outputs. ``rows`` is
    (n, stride) uint8, ``scales`` (n,) float32 (None for bf16), ``x`` (inputs,) floating, ``mask``
    (n,) bool, ``kind`` "int4", "int8" or "bf16".

    int4 and int8 round ``x`` to 15 bits in groups of 32 inputs, in a unit of at most 2**-13 of the
    group's largest. Everything but the sum over groups is exact, and that is of doubles in one
    order: every backend, instruction set and number of threads returns the same bits. A kept row is
    NaN for int4 and int8 where any of ``x`` is NaN or infinite; bf16 multiplies as floats do.

    Raises:
        InputError: a shape, a dtype or the kind is another, or scales are missing or not expected.
        BackendError: the requested backend is unknown or cannot serve these tensors.
    """
    _check_rows(rows, scales, x, mask, kind)
    chosen = _choose(backend, native.why_not_rows(rows, scales, x, mask), NO_ROWS)
    return chosen.gather_rows(rows, scales, x, mask, kind)


def _check_rows(rows: Tensor, scales: Tensor | None, x: Tensor, mask: Tensor, kind: str) -> None:
    if kind not in ROW_KINDS:
        raise InputError(f"no kind {kind!r} of weights; there are: {', '.join(ROW_KINDS)}")
    if (scales is None) != (kind == "bf16"):
        raise InputError("int4 and int8 rows have scales, bf16 rows have none")
    if x.dim() != 1 or not x.is_floating_point():
        raise InputError(f"x must be floating of shape (inputs,), not {_described(x)}")
    stride = reference.row_bytes(kind, len(x))
    if rows.dtype != torch.uint8 or rows.dim() != 2 or rows.shape[1] != stride:
        raise InputError(
            f"rows must be torch.uint8 of shape (n, {stride}) for {len(x)} inputs of {kind}, not "
            f"{_described(rows)}"
        )
    for name, given, dtype in (("scales", scales, torch.float32), ("mask", mask, torch.bool)):
        if given is not None and (given.dtype != dtype or given.shape != rows.shape[:1]):
            raise InputError(
                f"{name} must be {dtype} of shape ({len(rows)},), not {_described(given)}"
            )


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"


def _all_or_none(scores: Tensor, k: int) -> Tensor:
    return torch.full(scores.shape, k > 0, dtype=torch.bool, device=scores.device)


def _check_scores(scores: Tensor, k: int) -> None:
    if scores.dim() == 0 or not scores.is_floating_point():
        raise InputError(
            f"scores must be floating with shape (..., n), not {scores.dtype} of shape "
            f"{tuple(scores.shape)}"
        )
    if not 0 <= k <= scores.shape[-1]:
        raise InputError(f"k must be between 0 and n = {scores.shape[-1]}, not {k}")


def _choose(backend: str, no_native: str | None, no_gpu: str | None) -> ModuleType:
    """Module that serves the call, given why the others cannot (None: they can)."""
    if backend not in BACKENDS:
        raise BackendError(f"no backend {backend!r}; there are: {', '.join(BACKENDS)}")
    for name, module, reason in (("native", native, no_native), ("gpu", on_gpu, no_gpu)):
        if backend == name and reason:
            raise BackendError(f"backend {name!r} {reason}; there are: {', '.join(BACKENDS)}")
        if backend in (name, "auto") and not reason:
            return module
    return reference
