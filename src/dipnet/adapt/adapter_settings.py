"""What can be chosen when adapters are trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from dipnet.cache import CacheSettings
from dipnet.errors import InputError

Precision = Literal["auto", "float32", "bfloat16"]
"""What a forward pass computes in; "auto" is bfloat16 on a GPU, the weights' dtype on a CPU."""


@dataclass(frozen=True)
class AdapterSettings:
    """How adapters are trained.

    ``rank`` is that of LoRA's two factors, and the adapter counts twice (alpha is two ranks).
    AdamW makes ``steps`` steps of ``batch`` windows, at a learning ``rate`` that warms up and falls
    along a cosine. The windows of a step are computed in ``accumulate`` parts, with
    ``checkpointing`` each layer's activations once more in the backward pass: both save memory.

    The loss is ``kl`` times the Kullback-Leibler divergence from the dense model's next tokens to
    the masked model's, plus ``cross_entropy`` times that of the text, plus ``hidden`` times the
    relative squared error of the residual stream after each layer, averaged over layers.

    With ``cache``, the masks are those of a cache-aware method with a cache of that share:
    `adapt.stand_in` decides them for all tokens at once. ``seed`` decides everything random.
    """

    rank: int = 32
    rate: float = 1e-3
    steps: int = 1000
    batch: int = 16
    accumulate: int = 1
    kl: float = 1.0
    cross_entropy: float = 0.0
    hidden: float = 0.0
    cache: CacheSettings | None = None
    checkpointing: bool = False
    precision: Precision = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("rank", "steps", "batch", "accumulate")
        for name, least in (*((name, 1) for name in counts), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise InputError(f"{name} is a whole number from {least} on, not {value!r}")
        if not 0 < self.rate < math.inf:
            raise InputError(f"rate is a number above 0, not {self.rate!r}")
        losses = (self.kl, self.cross_entropy, self.hidden)
        if not all(0 <= loss < math.inf for loss in losses) or not any(losses):
            raise InputError(
                "kl, cross_entropy and hidden are numbers from 0 on, one of them above 0, not "
                + ", ".join(f"{loss!r}" for loss in losses)
            )
        if self.accumulate > self.batch:
            raise InputError(
                f"{self.batch} windows of a step cannot be computed in {self.accumulate} parts: "
                "lower accumulate or raise batch"
            )
        if self.precision not in get_args(Precision):
            known = ", ".join(get_args(Precision))
            raise InputError(f"precision is one of {known}, not {self.precision!r}")
        if not isinstance(self.cache, CacheSettings | None):
            raise InputError(f"cache is a dipnet.CacheSettings such as 0.5, not {self.cache!r}")

    @property
    def decides(self) -> dict[str, Any]:
        """What an interrupted training must be continued with; its rate may be another."""
        free = ("rate", "accumulate", "checkpointing")
        return {name: repr(value) for name, value in vars(self).items() if name not in free}
