"""Wanda: pruning by weights and activations (https://arxiv.org/abs/2306.11695), static."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

from torch import Tensor

from dipnet.errors import InputError
from dipnet.kernels import topk_mask
from dipnet.methods.base import Calibration, Method
from dipnet.units import ModelSpec, Site, check_density, kept_units

TOKENS = 16384
"""Calibration tokens that are used at most; each block runs over them twice."""

PATTERNS = {"unstructured": None, "2:4": (2, 4)}


@dataclass(frozen=True)
class Wanda(Method):
    """The same weights for every token: those with the largest ``|W_ij| * ||x_j||``.

    Weights are compared within one output row (``unstructured``) or within each group of four
    consecutive inputs of a row (``2:4``, density 0.5 only). Only the MLP is pruned, as by the
    dynamic methods it is compared with; layers are pruned in order, each calibrated on what the
    pruned ones before it produce.
    """

    name: ClassVar[str] = "wanda"
    density: float = 0.5
    pattern: str = "unstructured"
    masks: Mapping[tuple[int, str], Tensor] = field(
        default_factory=dict, kw_only=True, repr=False, compare=False
    )
    calibrated_at: tuple[float, str] | None = field(
        default=None, kw_only=True, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        check_density(self.density)
        if self.pattern not in PATTERNS:
            raise InputError(
                f"unknown pattern {self.pattern!r} for wanda; known: {', '.join(PATTERNS)}"
            )
        if self.pattern == "2:4" and self.density != 0.5:
            raise InputError(f"pattern 2:4 has density 0.5, not {self.density:g}")

    @property
    def needs_calibration(self) -> bool:
        return not self.masks

    def calibrated_for(self, spec: ModelSpec) -> bool:
        shapes = {
            (layer, matrix): spec.matrices[matrix]
            for layer in range(spec.layers)
            for matrix in spec.mlp_matrices
        }
        fitting = shapes == {key: tuple(mask.shape) for key, mask in self.masks.items()}
        return fitting and self.calibrated_at == (self.density, self.pattern)

    def sites(self, spec: ModelSpec) -> tuple[Site, ...]:
        return ()

    def select(self, site: Site, scores: Tensor, resident: Tensor | None = None) -> Tensor:
        raise NotImplementedError("a static method decides no mask per token")

    def weight_mask(self, layer: int, matrix: str) -> Tensor | None:
        return self.masks.get((layer, matrix))

    def calibrated(self, calibration: Calibration) -> Self:
        masks: dict[tuple[int, str], Tensor] = {}
        for block in calibration.blocks(TOKENS):
            norms = block.input_norms()
            for matrix in calibration.spec.mlp_matrices:
                weight = calibration.weights.matrix(block.layer, matrix)
                masks[block.layer, matrix] = self.mask(weight, norms[matrix])
            block.pass_on(replace(self, masks=masks))
        return replace(self, masks=masks, calibrated_at=(self.density, self.pattern))

    def mask(self, weight: Tensor, input_norm: Tensor) -> Tensor:
        """(outputs, inputs) weights, (inputs,) norms -> (outputs, inputs) bool."""
        scores = weight.detach().abs().float() * input_norm
        group = PATTERNS[self.pattern]
        if group is None:
            return topk_mask(scores, kept_units(self.density, scores.shape[1]))
        kept, size = group
        if scores.shape[1] % size:
            raise InputError(f"pattern 2:4 needs inputs in fours; a matrix has {scores.shape[1]}")
        return topk_mask(scores.unflatten(1, (-1, size)), kept).flatten(1)

    def added_weights(self, spec: ModelSpec) -> int:
        """Where the kept weights are: one bit for each weight, in units of 16-bit weights."""
        return spec.layers * spec.mlp_weights // 16 if self.density < 1 else 0
