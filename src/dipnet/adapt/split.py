"""Fit how DIP divides its density between the input mask and the hidden mask.

The DIP paper (https://arxiv.org/abs/2412.01380) allocates along a one-parameter curve between the
two densities; here the curve is ``hidden = density ** split`` and the parameter is the one with
the lowest perplexity on a text that is not the test text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import Tensor
from transformers import PreTrainedModel

from dipnet.errors import InputError
from dipnet.eval.perplexity import perplexity
from dipnet.methods.dip import DIP
from dipnet.models.attach import sparsify
from dipnet.models.families import describe
from dipnet.units import ModelSpec

AnyDIP = TypeVar("AnyDIP", bound=DIP)
CANDIDATES = (0.7, 1.0, 1.2, 1.4, 1.7, 2.0, 2.4, 2.8, 3.4, 4.0)
"""Splits that are tried."""


@dataclass(frozen=True)
class SplitFit:
    """The best split and the perplexity of every one that was tried, by split."""

    split: float
    perplexities: dict[float, float]


def fit_split(
    model: PreTrainedModel,
    method: AnyDIP,
    tokens: Tensor,
    *,
    window: int | None = None,
    bos: int | None = None,
    batch_size: int = 1,
    progress: Callable[[float, float], object] | None = None,
) -> tuple[AnyDIP, SplitFit]:
    """The method with its best split on (n,) ``tokens``, and what was measured.

    Windows begin with ``bos`` if given. Costs one evaluation of the text for each candidate;
    ``progress`` is called with the candidate and its perplexity.
    Raises InputError when ``method`` has no density to divide.
    """
    if method.density is None:
        raise InputError("only a method with one density can be fitted: give density alone")
    measured: dict[float, float] = {}
    for candidate in _candidates(method, describe(model)):
        with sparsify(model, candidate) as attached:
            result = perplexity(
                attached, tokens, window=window, bos=bos, batch_size=batch_size
            ).perplexity
        assert candidate.split is not None
        measured[candidate.split] = result
        if progress:
            progress(candidate.split, result)
    best = min(measured, key=measured.__getitem__)
    return replace(method, split=best), SplitFit(best, measured)


def _candidates(method: AnyDIP, spec: ModelSpec) -> Iterator[AnyDIP]:
    """The method with each split that leaves something for both masks at its density."""
    for split in CANDIDATES:
        candidate = replace(method, split=split)
        try:
            candidate.densities(spec)
        except InputError:
            continue
        yield candidate
