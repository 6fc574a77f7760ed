"""TEAL: training-free activation sparsity (https://arxiv.org/abs/2408.14690)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from dipnet.methods.base import Block, Calibration, Scores, SiteKey, Threshold
from dipnet.units import ModelSpec, Site, check_density

STEP = 0.05
"""Share of the block's weights that one greedy step gives up."""

ALLOCATION_TOKENS = 512
"""Tokens on which a step's error is measured; the thresholds come from the whole text."""


@dataclass(frozen=True)
class TEAL(Threshold):
    """Thresholds on the inputs of every linear layer, attention's too.

    ``density`` is the share of the block's linear weights that is read. A greedy search divides it
    within each block (algorithm 1 of the paper): step by step, the site whose further pruning
    changes the block's output least gives up weights. Matrices that share an input share a mask
    (q, k, v; gate, up), where the paper thresholds each alone: one input channel is then one
    contiguous record of weights. With ``attention`` off only the MLP is pruned, and ``density`` is
    the share of its weights.
    """

    name: ClassVar[str] = "teal"
    density: float
    attention: bool = True

    def __post_init__(self) -> None:
        check_density(self.density)

    def sites(self, spec: ModelSpec) -> tuple[Site, ...]:
        return tuple(site for layer in range(spec.layers) for site in self.layer_sites(spec, layer))

    def layer_sites(self, spec: ModelSpec, layer: int) -> tuple[Site, ...]:
        """The sites of one block, in the order of computation."""
        attention = (
            spec.input_site(layer, "attn.in", self.density, "q", "k", "v"),
            spec.input_site(layer, "attn.out", self.density, "o"),
        )
        mlp = (
            spec.input_site(layer, "mlp.in", self.density, *spec.input_matrices),
            spec.neuron_site(layer, self.density, "hidden"),
        )
        return (*attention, *mlp) if self.attention else mlp

    def calibrated(self, calibration: Calibration) -> Self:
        scores = calibration.scores(self)
        thresholds: dict[SiteKey, float] = {}
        for block in calibration.blocks(ALLOCATION_TOKENS):
            sites = self.layer_sites(calibration.spec, block.layer)
            thresholds |= self._allocate(block, sites, scores)
        sites = self.sites(calibration.spec)
        return replace(self, thresholds=thresholds, calibrated_sites=sites)

    def _allocate(
        self, block: Block, sites: tuple[Site, ...], scores: Mapping[SiteKey, Scores]
    ) -> dict[SiteKey, float]:
        """The thresholds of one block: the cheapest next step, until the budget is met."""
        weights = {site.name: site.units * site.weights_per_unit for site in sites}
        total = sum(weights.values())
        densities = dict.fromkeys(weights, 1.0)

        def thresholds(trial: Mapping[str, float]) -> dict[SiteKey, float]:
            keys = {name: (block.layer, name) for name in trial}
            return {keys[name]: scores[keys[name]].threshold(d) for name, d in trial.items()}

        excess = total * (1 - self.density)
        while excess > total * 1e-9:
            step = min(STEP * total, excess)
            trials = [
                densities | {name: densities[name] - step / weights[name]}
                for name in weights
                if densities[name] * weights[name] > step
            ]
            if not trials:  # every site has less left than a step: take from all alike
                return thresholds(dict.fromkeys(weights, self.density))
            densities = min(
                trials, key=lambda trial: block.error(replace(self, thresholds=thresholds(trial)))
            )
            excess -= step
        return thresholds(densities)

    def added_weights(self, spec: ModelSpec) -> int:
        return len(self.sites(spec))
