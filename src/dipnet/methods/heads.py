"""What Deja Vu and its bounds share: one mask over a layer's neurons, one over its heads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from dipnet.errors import InputError
from dipnet.methods.base import TopK
from dipnet.units import ModelSpec, ScoredOn, Site, check_density


@dataclass(frozen=True)
class NeuronsAndHeads(TopK):
    """Keeps the k best neurons and the k best query heads of every layer that is pruned.

    ``mlp_density`` and ``head_density`` are the shares kept there, of the neurons and of the heads;
    None leaves the MLPs or attention dense. The first ``dense_first`` and the last ``dense_last``
    layers are not pruned at all, and come on top of those shares. A neuron is skipped whole: its
    rows of ``gate`` and ``up`` and its column of ``down``. A head is skipped with its rows of ``q``
    and its columns of ``o``, and with its group's rows of ``k`` and ``v`` when the group has no
    other. What it puts out is then zero; its keys and values are not: a token that a head has
    skipped is still seen by those that do not skip it.
    """

    swept: ClassVar[str] = "mlp_density"
    neurons_scored_on: ClassVar[ScoredOn]
    heads_scored_on: ClassVar[ScoredOn]
    mlp_density: float | None = None
    head_density: float | None = None
    dense_first: int = field(default=0, kw_only=True)
    dense_last: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("mlp_density", "head_density"):
            if getattr(self, name) is not None:
                check_density(getattr(self, name), name)
        if self.mlp_density is None and self.head_density is None:
            raise InputError(f"{self.name} takes mlp_density, head_density or both")
        for name in ("dense_first", "dense_last"):
            if type(layers := getattr(self, name)) is not int or layers < 0:
                raise InputError(f"{name} is a number of layers from 0 up, not {layers!r}")

    def pruned_layers(self, spec: ModelSpec) -> range:
        """The layers that are pruned; InputError when none is left."""
        layers = range(self.dense_first, spec.layers - self.dense_last)
        if not layers:
            raise InputError(
                f"dense_first {self.dense_first} and dense_last {self.dense_last} leave none of "
                f"the {spec.layers} layers to prune: lower them"
            )
        return layers

    def sites(self, spec: ModelSpec) -> tuple[Site, ...]:
        return tuple(self._sites(spec))

    def _sites(self, spec: ModelSpec) -> Iterator[Site]:
        for layer in self.pruned_layers(spec):
            if self.head_density is not None:
                yield spec.head_site(layer, self.head_density, self.heads_scored_on)
            if self.mlp_density is not None:
                yield spec.neuron_site(
                    layer, self.mlp_density, self.neurons_scored_on, *spec.input_matrices
                )
