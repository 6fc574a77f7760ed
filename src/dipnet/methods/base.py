"""What every method shares: sites, scores, selection, and what it may ask of a model.

A method is a frozen dataclass. It names the sites where it decides a mask (``sites``), turns
activations into scores (``score``) and scores into masks (``select``). A method that needs the
weights fills itself in ``prepare``; one that is fitted on text does so in ``calibrated``. Neither
ever sees a model: both are handed a narrow view of one (``Weights``, ``Calibration``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor

from dipnet.errors import InputError
from dipnet.kernels import topk_mask
from dipnet.registry import METHODS, method_class
from dipnet.units import ModelSpec, Site, kept_units

SiteKey = tuple[int, str]
"""A site's (layer, name)."""


class Weights(Protocol):
    """Read access to a model's matrices."""

    def matrix(self, layer: int, name: str) -> Tensor:
        """The (outputs, inputs) weights of one matrix; a view, not a copy."""


class Scores(Protocol):
    """The distribution of one site's scores over the calibration text."""

    def threshold(self, density: float) -> float:
        """The score that a share ``density`` of all seen scores exceeds."""

    def share(self, threshold: float) -> float:
        """The share of all seen scores that exceeds ``threshold``."""


class Block(Protocol):
    """A decoder block and the calibration activations that reach it."""

    layer: int

    def error(self, method: Method) -> float:
        """Relative L2 error of the block's output when ``method`` prunes it."""

    def input_norms(self) -> Mapping[str, Tensor]:
        """For each MLP matrix the L2 norm over all tokens of every input channel: (inputs,)."""

    def pass_on(self, method: Method) -> None:
        """Let the blocks that follow see this block's output under ``method``, not the dense."""


class Calibration(Protocol):
    """What a method may learn from text."""

    @property
    def spec(self) -> ModelSpec:
        """The model's shapes."""

    @property
    def weights(self) -> Weights:
        """Read access to the model's matrices."""

    def scores(self, method: Method, masked: bool = False) -> Mapping[SiteKey, Scores]:
        """The distribution of ``method``'s scores at each of its sites, in the dense model; or
        ``masked``, in the one that it thins.
        """

    def blocks(self, tokens: int) -> Iterator[Block]:
        """The blocks in order of computation, over about ``tokens`` tokens of the text."""


@dataclass(frozen=True)
class Method(ABC):
    """How masks are decided."""

    name: ClassVar[str]
    needs_gate: ClassVar[bool] = False
    swept: ClassVar[str] = "density"
    """The field that a density on the command line sets, where the method has it."""

    @abstractmethod
    def sites(self, spec: ModelSpec) -> tuple[Site, ...]:
        """The places where this method decides a mask in a model of shape ``spec``.

        Raises InputError when the method cannot do what it was asked for on that model.
        """

    def score(self, site: Site, x: Tensor) -> Tensor:
        """(..., channels) activations -> (..., units) scores in at least float32.

        By default the magnitude of a channel times its factor where there is one, and the L2 norm
        of a block of them.
        """
        weighed, factor = magnitude(x), self.factor(site, x.device)
        return block_norms(weighed if factor is None else weighed * factor, site.block)

    def factor(self, site: Site, device: torch.device) -> Tensor | None:
        """(channels,) float32 on ``device`` that magnitudes are multiplied with before they are
        compared: what a channel's weights, or a text, say of its worth. None where all count alike.
        """
        return None

    @abstractmethod
    def select(self, site: Site, scores: Tensor, resident: Tensor | None = None) -> Tensor:
        """(..., units) scores -> (..., units) bool, True where a unit is kept.

        ``resident`` is a (units,) bool of the units whose weights are in memory, or (..., units)
        where every row has its own, None when all are; only a method that prefers them reads it.
        """

    def prepare(self, weights: Weights, spec: ModelSpec) -> Self:
        """This method with what it derives from the weights; itself when it needs none."""
        return self

    def calibrated(self, calibration: Calibration) -> Self:
        """This method, fitted on text; itself when there is nothing to fit."""
        return self

    @property
    def needs_calibration(self) -> bool:
        """Whether ``calibrated`` must come before use."""
        return False

    def calibrated_for(self, spec: ModelSpec) -> bool:
        """Whether what was fitted belongs to a model of shape ``spec``."""
        return True

    def added_weights(self, spec: ModelSpec) -> int:
        """Numbers that the method itself reads for a token: norms, thresholds, predictors."""
        return 0

    def weight_mask(self, layer: int, matrix: str) -> Tensor | None:
        """(outputs, inputs) bool for a matrix that is pruned once and for all; else None."""
        return None

    def check_model(self, spec: ModelSpec) -> None:
        """Raise InputError when this method can never work on a model of shape ``spec``."""
        if self.needs_gate and not spec.gated:
            usable = (name for name in METHODS if not method_class(name).needs_gate)
            raise InputError(
                f"{self.name} needs a gated MLP, and models of the family {spec.family} have none; "
                f"methods that work there: {', '.join(usable)}"
            )
        self.sites(spec)

    def check(self, spec: ModelSpec) -> None:
        """Raise InputError when this method cannot be used as it is on a model of that shape."""
        self.check_model(spec)
        if self.needs_calibration:
            raise InputError(
                f"{self.name} has to be calibrated on text first: in Python with "
                f"dipnet.calibrate(model, method, tokens), on the command line with --calibration"
            )
        if not self.calibrated_for(spec):
            raise InputError(
                f"this {self.name} was calibrated for a model of another shape or at another "
                f"density: calibrate it again"
            )


@dataclass(frozen=True)
class TopK(Method):
    """Keeps, for every token, the units of a site with the highest scores: always the same k."""

    def select(self, site: Site, scores: Tensor, resident: Tensor | None = None) -> Tensor:
        return topk_mask(scores, kept_units(site.density, site.units))


@dataclass(frozen=True)
class Threshold(Method):
    """Keeps the units whose score exceeds the threshold calibrated for their site."""

    thresholds: Mapping[SiteKey, float] | None = field(
        default=None, kw_only=True, repr=False, compare=False
    )
    calibrated_sites: tuple[Site, ...] = field(default=(), kw_only=True, repr=False, compare=False)

    @property
    def needs_calibration(self) -> bool:
        return self.thresholds is None

    def calibrated_for(self, spec: ModelSpec) -> bool:
        return self.calibrated_sites == self.sites(spec)

    def select(self, site: Site, scores: Tensor, resident: Tensor | None = None) -> Tensor:
        assert self.thresholds is not None, "check() comes first"
        return scores > self.thresholds[site.layer, site.name]


def magnitude(x: Tensor) -> Tensor:
    """(..., n) -> (..., n) absolute values in at least float32."""
    x = x.detach().abs()
    return x if x.dtype == torch.float64 else x.float()


def block_norms(magnitudes: Tensor, block: int) -> Tensor:
    """(..., units * block) -> (..., units) L2 norms of neighbouring channels, ``block`` a unit."""
    if block == 1:
        return magnitudes
    if block <= 4:  # torch's norm over so short a dimension takes several times as long
        squares = magnitudes * magnitudes
        return reduce(torch.add, (squares[..., i::block] for i in range(block))).sqrt()
    return torch.linalg.vector_norm(magnitudes.unflatten(-1, (-1, block)), dim=-1)
