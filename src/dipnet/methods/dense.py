"""The dense model, as a method: the baseline of every comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dipnet.methods.base import Method
from dipnet.units import ModelSpec, Site


@dataclass(frozen=True)
class Dense(Method):
    """Prunes nothing."""

    name: ClassVar[str] = "dense"

    def sites(self, spec: ModelSpec) -> tuple[Site, ...]:
        return ()

    def select(self, site: Site, scores: Tensor, resident: Tensor | None = None) -> Tensor:
        raise NotImplementedError("the dense model has no sites")
