"""What stands between the products of one token: norms, rotation, attention over a static cache.

On CUDA each is one launch, by Triton; elsewhere, and for other dtypes, plain torch. Nothing here
waits for the device, so a CUDA graph can hold it. Knows tensors; knows no site, method or model.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from dipnet.kernels.gpu.choice import why_not
from dipnet.kernels.steps import reference
from dipnet.kernels.steps.shapes import Heads, Norm


def add_norm(
    hidden: Tensor,
    delta: Tensor | None,
    norm: Norm,
    ring: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """A step of the residual stream: (1, n) ``hidden`` plus ``delta``, and that normalised.

    Returns the sum and the normalised sum. ``ring`` are (tokens, n) rows and a (1,) int64: that row
    is made the normalised sum, too.
    """
    return _backend(hidden, "norms").add_norm(hidden, delta, norm, ring)


def attend(
    qkv: Tensor,
    rotation: tuple[Tensor, Tensor] | None,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    heads: Heads,
    kept: Tensor | None = None,
) -> Tensor:
    """Attention of one token: what its heads put out, (1, heads * size).

    ``qkv`` (1, n) are the projections side by side; ``keys`` and ``values`` (1, groups, length,
    size) the cache, which gets the token's at ``position`` (1,) int64; what is behind that is not
    read. ``rotation`` are the cosines and sines of all positions, (length, rotated channels) each.

    Of ``kept`` heads, (1, k) int32, alone: ``qkv`` (tokens, n) begin with their queries, in row
    ``position`` % tokens, and their keys and values up to this token are in the cache (`complete`).
    """
    kernels = _backend(qkv, "attention")
    made: Tensor = kernels.attend(qkv, rotation, keys, values, position, heads, kept)
    return made


def complete(
    made: Tensor,
    index: Tensor,
    count: Tensor,
    kept: int,
    until: Tensor,
    rotation: tuple[Tensor, Tensor] | None,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    heads: Heads,
) -> None:
    """Write the keys and values that groups of heads lack, up to the token at ``position``.

    ``until`` (groups,) int64 is the last token of which each group has them; it is brought up to
    date. ``index`` (n,) int32, of which ``count`` (1,) are valid, are heads of all projections, one
    after the other: ``kept`` query heads, then some groups' keys, then the same groups' values.
    ``made`` (tokens, n * size) is what they make of the last tokens: token t is row t % tokens. No
    group may lack more tokens than that. The others are those of `attend`.
    """
    kernels = _backend(made, "attention")
    kernels.complete(made, index, count, kept, until, rotation, keys, values, position, heads)


def gated(pre: Tensor, activation: str) -> Tensor:
    """(1, 2n), gate and up side by side -> (1, n): ``activation(gate) * up``, each rounded."""
    return _backend(pre, "norms").gated(pre, activation)


def _backend(x: Tensor, module: str) -> ModuleType:
    if why_not(x):
        return reference
    from dipnet.kernels.steps import attention, norms  # they import triton

    return {"norms": norms, "attention": attention}[module]


__all__ = ["Heads", "Norm", "add_norm", "attend", "complete", "gated"]
