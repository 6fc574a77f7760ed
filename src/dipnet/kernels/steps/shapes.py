"""What the kernels of one token are told about a model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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
