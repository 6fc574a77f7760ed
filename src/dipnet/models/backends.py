"""Which backend computes a step: by name, or the best that can."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache

from dipnet.errors import BackendError, InputError
from dipnet.kernels.gpu.choice import why_not as why_not_tensors
from dipnet.methods.base import Method
from dipnet.models import decoding, skipping
from dipnet.models.decoding.memory import free_text
from dipnet.models.families import Decoder
from dipnet.models.skipping.base import BACKENDS
from dipnet.units import Site, size_text


def choose(
    backend: str,
    decoder: Decoder,
    method: Method,
    sites: Sequence[Site],
    *,
    kept_inputs: int,
    cached: bool,
) -> str:
    """ "reference", "skip" or "gpu", for a backend's name.

    "auto" skips on a CPU, and takes the kernels on a GPU where they can serve; where they cannot it
    says so once. Weights that are being trained stay as they are: the reference.

    Raises BackendError when the backend asked for by name cannot serve that method on this model,
    or there is no such name, and InputError when ``kept_inputs`` is no number of tokens.
    """
    if type(kept_inputs) is not int or kept_inputs < 1:
        raise InputError(f"kept_inputs is a number of tokens from 1 up, not {kept_inputs!r}")
    if backend not in BACKENDS:
        raise BackendError(f"no backend {backend!r}; there are: {', '.join(BACKENDS)}")
    if backend == "auto":
        return _best(decoder, method, sites, cached)
    reason = _why_not(backend, decoder, method, sites, cached)
    if reason:
        raise BackendError(f"backend {backend!r} {reason}; there are: {', '.join(BACKENDS)}")
    return backend


def _best(decoder: Decoder, method: Method, sites: Sequence[Site], cached: bool) -> str:
    device = decoder.model.device.type
    fast = {"cpu": "skip", "cuda": "gpu"}.get(device)
    if fast is None or (device == "cuda" and (cached or decoder.model.training)):
        return "reference"
    reason = _why_not(fast, decoder, method, sites, cached)
    if reason and device == "cuda":
        _warn(reason)
    return "reference" if reason else fast


def _why_not(
    backend: str, decoder: Decoder, method: Method, sites: Sequence[Site], cached: bool
) -> str | None:
    if backend == "skip":
        return skipping.why_not(decoder, method, sites)
    if backend == "gpu":
        if cached:
            return "has no caches of units: everything is in the GPU's memory"
        reason = decoding.why_not(decoder, method, sites)
        return reason or why_not_tensors(next(decoder.model.parameters()))
    return None


def out_of_memory(backend: str, decoder: Decoder) -> bool:
    """The GPU's memory did not hold a matrix in another order beside the model: says so once.

    True where "auto" may go on with the reference. Raises BackendError for a backend by name.
    """
    spec, model = decoder.spec, decoder.model
    stacks = (("q", "k", "v"), ("o",), spec.input_matrices, ("down",))
    needed = size_text(max(spec.weights(*stack) for stack in stacks) * model.dtype.itemsize)
    reason = (
        f"needs {needed} more of the GPU's memory while weights are put in its order, and "
        f"{free_text(model.device)} is free: free some, or take a smaller model"
    )
    if backend != "auto":
        raise BackendError(f"backend {backend!r} {reason}") from None
    _warn(reason)
    return True


@cache
def _warn(reason: str) -> None:
    warnings.warn(f"masks are applied by the reference: backend 'gpu' {reason}", stacklevel=4)
