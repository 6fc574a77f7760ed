"""What can be chosen when predictors are fitted, and what follows from it for a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from dipnet.adapt.collect import Criterion, Rule, Target
from dipnet.errors import InputError
from dipnet.methods.predictors import Activation, Kind
from dipnet.units import LOOK_AHEADS, ModelSpec, check_density, kept_units

RELU_LIKE = ("relu", "relu2", "relu6")
"""Activations that leave most neurons at zero: a token wants those that are not."""
LARGEST_RANK = 1000
"""The paper's rank, for a model of width 12288."""
WIDTH_OVER_RANK = 4
"""What a rank is by default in narrower models (docs/predictors.md has the table behind it)."""
BUFFER = 2**30
"""Bytes of the tokens that are held at a time, unless those are too few."""
VISITS = 600_000
"""Tokens that are trained on by default, each time that one comes counted."""
MOST_EPOCHS = 10
LEAST_TOKENS = 8192
"""Tokens that are held at a time by default, however large the model."""


@dataclass(frozen=True)
class FitSettings:
    """How predictors are fitted.

    ``mlp_density`` and ``head_density`` are the shares of neurons and heads that will be kept:
    recall is measured there. None fits no predictors of that kind.

    ``look_ahead`` is how many blocks before its own a predictor reads the residual stream, ``rank``
    the width between its two matrices (by default a quarter of the model's, at most 1000) and
    ``activation`` what stands there, "none" or "relu". Without one, predictors of fewer heads than
    the rank take a rank of that number: more could not do more.

    ``target`` says which neurons a token wants: "active", those whose activation is not zero, or
    the top share of them by magnitude; by default "active" for ReLU models, and ``mlp_density`` for
    others. ``head_share`` is the top share of heads, by the norm of what they put out; by default
    ``head_density``. In the loss, what is wanted counts by its magnitude to the power
    ``magnitude``, relative to the layer's mean and ``positive_weight`` times; the rest counts 1.
    ``criterion`` "gradient" takes for the magnitude of a unit that of what it puts out times the
    gradient of the loss, as ShadowLLM does.

    AdamW makes ``epochs`` passes (by default 2 to 10, fewer over a long text) in batches of
    ``batch`` tokens, at a learning ``rate`` that warms up and falls along a cosine, with weight
    ``decay``; layers keep their best on held-out text, and stop when ``patience`` measurements (of
    10 in a fit) brought nothing better. ``seed``
    decides everything random. ``buffer`` is how many bytes of tokens are held at a time; by default
    1 GiB, or what 8192 tokens take if that is more.
    """

    mlp_density: float | None = 0.2
    head_density: float | None = 0.5
    look_ahead: int = 1
    rank: int | None = None
    activation: Activation = "none"
    target: Target | None = None
    head_share: float | None = None
    magnitude: float = 1.0
    positive_weight: float = 1.0
    criterion: Criterion = "magnitude"
    epochs: int | None = None
    batch: int = 512
    rate: float = 3e-3
    decay: float = 0.01
    patience: int = 3
    seed: int = 0
    buffer: int | None = None

    def __post_init__(self) -> None:
        for name in ("mlp_density", "head_density", "head_share"):
            if getattr(self, name) is not None:
                check_density(getattr(self, name), name)
        if self.mlp_density is None and self.head_density is None:
            raise InputError("there is nothing to fit: give mlp_density, head_density or both")
        if self.target is not None and self.target != "active":
            check_density(self.target, "target")
        if type(self.look_ahead) is not int or self.look_ahead not in LOOK_AHEADS:
            known = ", ".join(map(str, LOOK_AHEADS))
            raise InputError(f"look_ahead is one of {known} blocks, not {self.look_ahead!r}")
        for name, words in (("activation", Activation), ("criterion", Criterion)):
            if getattr(self, name) not in get_args(words):
                known = " or ".join(get_args(words))
                raise InputError(f"{name} is {known}, not {getattr(self, name)!r}")
        self._check_numbers()

    def _check_numbers(self) -> None:
        for name, least in (("rank", 1), ("epochs", 1), ("batch", 1), ("patience", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise InputError(f"{name} is a whole number from {least} on, not {value!r}")
        for name in ("rate", "positive_weight"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} is a number above 0, not {getattr(self, name)!r}")
        for name in ("decay", "magnitude"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} is a number from 0 on, not {getattr(self, name)!r}")

    def kept(self, spec: ModelSpec) -> dict[Kind, int]:
        """The deployed k of each kind that is fitted."""
        densities: dict[Kind, tuple[float | None, int]] = {
            "mlp": (self.mlp_density, spec.neurons),
            "head": (self.head_density, spec.heads),
        }
        return {
            kind: kept_units(density, units)
            for kind, (density, units) in densities.items()
            if density is not None
        }

    def rules(self, spec: ModelSpec) -> Mapping[Kind, Rule]:
        """What a token wants of each kind; InputError where that would be everything."""
        targets = self._targets(spec)
        for kind, target in targets.items():
            units, name = (spec.neurons, "neurons") if kind == "mlp" else (spec.heads, "heads")
            if target != "active" and kept_units(target, units) == units:
                raise InputError(
                    f"the top share {target:g} of {units} {name} is all of them: there is nothing "
                    "to predict; give a lower share, or fit the other kind alone"
                )
        return {
            kind: Rule(target, self.magnitude, self.positive_weight, self.criterion)
            for kind, target in targets.items()
        }

    def _targets(self, spec: ModelSpec) -> dict[Kind, Target]:
        targets: dict[Kind, Target] = {}
        if self.mlp_density is not None:
            natural: Target = "active" if spec.activation in RELU_LIKE else self.mlp_density
            targets["mlp"] = natural if self.target is None else self.target
        if self.head_density is not None:
            targets["head"] = self.head_density if self.head_share is None else self.head_share
        return targets

    def rank_of(self, kind: Kind, spec: ModelSpec) -> int:
        """The rank of the predictors of a kind."""
        rank = self.rank or min(LARGEST_RANK, max(1, spec.width // WIDTH_OVER_RANK))
        units = spec.neurons if kind == "mlp" else spec.heads
        return min(rank, units) if self.activation == "none" else rank

    def passes(self, tokens: int) -> int:
        """How often each of the text's tokens is trained on."""
        return self.epochs or max(2, min(MOST_EPOCHS, round(VISITS / tokens)))

    def room(self, bytes_per_token: int) -> int:
        """How many tokens are held at a time; InputError when ``buffer`` is less than a batch."""
        if self.buffer is None:
            return max(BUFFER // bytes_per_token, LEAST_TOKENS)
        if self.buffer < self.batch * bytes_per_token:
            raise InputError(
                f"a buffer of {self.buffer} bytes holds no batch of {self.batch} tokens of this "
                f"model: give at least {self.batch * bytes_per_token}"
            )
        return self.buffer // bytes_per_token
