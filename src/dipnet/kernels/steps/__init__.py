"""What stands between the products of a token of each sequence: norms, rotation, attention over a
static cache.

On CUDA each is one launch, by Triton or CUDA C++ (a norm and a selection may be two); elsewhere,
and for other dtypes, plain torch. Nothing here waits for the device, so a CUDA graph can hold it.
Knows tensors; knows no site, method or model.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from dipnet.kernels.gpu import check_scores, check_threshold
from dipnet.kernels.gpu.choice import why_not
from dipnet.kernels.steps import reference
from dipnet.kernels.steps.shapes import MOST_CHANNELS, Heads, Norm, Rows, UsedHeads


def add_norm(
    hidden: Tensor,
    delta: Tensor | None,
    norm: Norm,
    ring: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """A step of the residual stream: (batch, n) ``hidden`` plus ``delta``, and that normalised.

    Returns the sum and the normalised sum. ``ring`` are (tokens, batch, n) and a (1,) int64: that
    place is made the normalised sum, too.
    """
    return _backend(hidden, "norms").add_norm(hidden, delta, norm, ring)


def add_norm_topk(
    hidden: Tensor, delta: Tensor | None, norm: Norm, k: int, factor: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`add_norm`, and (batch, k) int32: what `gpu.topk_indices` lists of the normalised sum.

    One launch where thread blocks form clusters, and ``norm`` is not centred. Raises InputError as
    `gpu.topk_indices` does.
    """
    check_scores(hidden, k, factor)
    return _backend(hidden, "norms").add_norm_topk(hidden, delta, norm, k, factor)


def add_norm_above(
    hidden: Tensor, delta: Tensor | None, norm: Norm, threshold: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`add_norm`, and (batch, n) and (batch,) int32: what `gpu.threshold_indices` lists of the
    normalised sum. One launch where `add_norm_topk` is one.
    """
    check_threshold(threshold)
    return _backend(hidden, "norms").add_norm_above(hidden, delta, norm, threshold)


def attend(
    qkv: Tensor,
    rotation: tuple[Tensor, Tensor] | None,
    keys: Tensor,
    values: Tensor,
    rows: Rows,
    heads: Heads,
    used: UsedHeads | None = None,
) -> Tensor:
    """Attention of a token of each sequence: what its heads put out, (batch, heads * size).

    ``qkv`` (batch, n) are the projections side by side; ``keys`` and ``values`` (batch, groups,
    length, size) the cache, which gets the token's at ``rows.position``; what is behind that is not
    read, nor is padding. ``rotation`` are the cosines and sines of all positions, (length, rotated
    channels) each, of which a token takes its sequence's own.

    Of ``used`` heads alone, (batch, used.most * size): ``qkv`` (tokens * batch, n) begin with their
    queries, the token's in rows ``position`` % tokens * batch and on, and their keys and values up
    to this token are in the cache (`complete`). Zero where a sequence does not want a head, and
    behind those that are valid.
    """
    kernels = _backend(qkv, "attention")
    made: Tensor = kernels.attend(qkv, rotation, keys, values, rows, heads, used)
    return made


def complete(
    made: Tensor,
    used: UsedHeads,
    until: Tensor,
    rotation: tuple[Tensor, Tensor] | None,
    keys: Tensor,
    values: Tensor,
    rows: Rows,
    heads: Heads,
) -> None:
    """Write the keys and values that the used groups of heads lack, up to this token.

    ``until`` (batch, groups) int64 is the column of the last token of which each group has them; it
    is brought up to date. ``made`` (tokens * batch, n * size) is what the n listed heads make of
    the last tokens: that of column t is in rows t % tokens * batch and on. No group may lack more
    tokens than that. The others are those of `attend`.
    """
    _backend(made, "attention").complete(made, used, until, rotation, keys, values, rows, heads)


def list_heads(kept: Tensor, turn: Tensor, queries: int, groups: int, ring: int) -> UsedHeads:
    """The heads that a token of each sequence needs: those kept of ``queries``, and the keys and
    values of their groups and of those whose turn it is: each of ``groups``, once in ``ring``.

    ``kept`` (batch, k) int32 are each sequence's own, all different; ``turn`` (1,) int64 is below
    ``ring``.
    """
    made: UsedHeads = _backend(kept, "lists").list_heads(kept, turn, queries, groups, ring)
    return made


def gated(pre: Tensor, activation: str) -> Tensor:
    """(batch, 2n), gate and up side by side -> (batch, n): ``activation(gate) * up``, rounded."""
    return _backend(pre, "norms").gated(pre, activation)


def _backend(x: Tensor, module: str) -> ModuleType:
    if why_not(x):
        return reference
    from dipnet.kernels.steps import attention, lists, norms  # they import triton

    return {"norms": norms, "attention": attention, "lists": lists}[module]


__all__ = [
    "MOST_CHANNELS",
    "Heads",
    "Norm",
    "Rows",
    "UsedHeads",
    "add_norm",
    "add_norm_above",
    "add_norm_topk",
    "attend",
    "complete",
    "gated",
    "list_heads",
]
