"""The kernels: one function an operation, and the choice of the backend that serves a call.

An explicitly requested backend serves the call or raises `BackendError`; only "auto" chooses.
Knows tensors; knows no site, no method and no model.
"""

from types import ModuleType

import torch
from torch import Tensor

from dipnet.errors import BackendError, InputError
from dipnet.kernels import native, reference

BACKENDS = ("auto", "reference", "native")


def topk_mask(scores: Tensor, k: int, backend: str = "auto") -> Tensor:
    """Mask of the k highest scores of each row: (..., n) floating -> (..., n) bool.

    Exactly k are True in each row. Ties go to the lowest index, and NaN counts as the highest
    score, so that a NaN is never pruned silently. Every backend returns the same bits.

    Raises:
        InputError: scores have no last dimension or are not floating, or k is not in 0..n.
        BackendError: the requested backend is unknown or cannot serve these scores.
    """
    _check_scores(scores, k)
    chosen = _choose(backend, native.why_not(scores))
    if k in (0, scores.shape[-1]):
        return _all_or_none(scores, k)
    return chosen.topk_mask(scores, k)


def cache_aware_topk(
    scores: Tensor, k: int, resident: Tensor, gamma: float, backend: str = "auto"
) -> Tensor:
    """`topk_mask` of scores that are ``gamma`` times as high where a unit is not resident.

    (..., n) floating scores, (n,) bool ``resident`` -> (..., n) bool. Scores are magnitudes, so a
    ``gamma`` in (0, 1] prefers what is resident. The product is rounded to float32 (float64 for
    float64 scores), so every backend returns the same bits.

    Raises:
        InputError: as `topk_mask`; or resident is not bool of shape (n,), or gamma not in (0, 1].
        BackendError: the requested backend is unknown or cannot serve these scores.
    """
    _check_scores(scores, k)
    if resident.dtype != torch.bool or resident.shape != scores.shape[-1:]:
        raise InputError(
            f"resident must be bool of shape {tuple(scores.shape[-1:])}, not {resident.dtype} of "
            f"shape {tuple(resident.shape)}"
        )
    if not 0 < gamma <= 1:
        raise InputError(f"gamma must be in (0, 1], not {gamma!r}")
    chosen = _choose(backend, native.why_not(scores, resident))
    if k in (0, scores.shape[-1]):
        return _all_or_none(scores, k)
    return chosen.cache_aware_topk(scores, k, resident, gamma)


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


def _choose(backend: str, no_native: str | None) -> ModuleType:
    """Module that serves the call, given why the native one cannot (None: it can)."""
    if backend not in BACKENDS:
        raise BackendError(f"no backend {backend!r}; there are: {', '.join(BACKENDS)}")
    if backend == "native" and no_native:
        raise BackendError(f"backend 'native' {no_native}; there are: {', '.join(BACKENDS)}")
    return reference if backend == "reference" or no_native else native
