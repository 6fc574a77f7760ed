"""What the kernels of one token are told about a model and about its batch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

MOST_CHANNELS = 256
"""Of a head: a tile of keys and one of values have to fit into a multiprocessor."""


@dataclass(frozen=True, eq=False)
class Norm:
    """A normalisation: of the root mean square, or (``centred``) a layer norm with its bias."""

    weight: Tensor | None
    bias: Tensor | None
    epsilon: float
    centred: bool


@dataclass(frozen=True, eq=False)
class Heads:
    """Attention's heads: ``queries`` of them in ``groups`` that share keys, of ``size`` channels.

    Products of queries and keys are multiplied with ``scale``. Some models normalise
    queries and keys of each head before they are rotated.
    """

    queries: int
    groups: int
    size: int
    scale: float
    query_norm: Norm | None = None
    key_norm: Norm | None = None


@dataclass(frozen=True, eq=False)
class Rows:
    """Where a batch's sequences stand in their cache, whose columns they fill together.

    ``position`` (1,) int64 is the column of the token at hand, ``padding`` (batch,) int64 how many
    columns at the beginning of each sequence are none of its tokens.
    """

    position: Tensor
    padding: Tensor


@dataclass(frozen=True, eq=False)
class UsedHeads:
    """Heads that some sequence of a batch needs, counted over all projections one after the other:
    query heads, then groups' keys, then the same groups' values.

    ``index`` (n,) int32, of which ``count`` (1,) int32 are valid, lists them; the first ``queries``
    (1,) int32 are query heads, at most ``most`` of them. ``wanted`` (batch, heads) bool says which
    sequence keeps which; None where there is one sequence, which keeps them all.
    """

    index: Tensor
    count: Tensor
    queries: Tensor
    most: int
    wanted: Tensor | None = None


def most_used(kept: Tensor, queries: int, groups: int, ring: int) -> tuple[int, int]:
    """The most query heads that (batch, k) ``kept`` of ``queries`` can name together, and the most
    places of a list of these, of the keys and values of their groups, and of those of every
    ``ring``-th of the ``groups``.
    """
    most = min(queries, kept.numel())
    return most, most + 2 * min(groups, most + -(-groups // ring))
