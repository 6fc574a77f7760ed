"""What was touched: exact counts of units and weights, by site, layer and model.

Counts stay on the model's device until they are read, so that counting never waits for it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from dipnet.methods.base import Method, SiteKey
from dipnet.units import ATTENTION_MATRICES, ModelSpec, Site

if TYPE_CHECKING:
    from dipnet.models.decoding.counts import StepCounts
    from dipnet.models.recording import Recorder


@dataclass(frozen=True)
class Density:
    """Shares of weights read for a token, averaged over the sparse tokens seen so far.

    ``mlp`` and ``attention`` are shares of those matrices' weights; ``total`` is the share of
    everything that the dense model reads for a token, and includes ``added``: what the method
    itself reads, over the same denominator. The ``_by_layer`` shares have one entry for each
    layer; ``total_by_layer`` is of its MLP's and attention's weights together. ``sites`` maps
    ``layer.site`` to the share of units kept.
    """

    tokens: int
    mlp: float
    attention: float
    total: float
    added: float
    mlp_by_layer: tuple[float, ...]
    attention_by_layer: tuple[float, ...]
    total_by_layer: tuple[float, ...]
    sites: dict[str, float]


@dataclass(frozen=True)
class CacheUsage:
    """What the caches held of the units that sparse tokens kept.

    ``hits`` and ``misses`` map ``layer.site`` to units, exactly. ``hit_rate`` is the share of all
    kept units' weights that was resident; None when no unit was asked for.
    """

    hits: dict[str, int]
    misses: dict[str, int]
    hit_rate: float | None


class Usage:
    """Counts kept units for one method on one model; tokens processed dense are left out.

    ``recorder`` sees the masks that are counted while a trace is recorded. ``gathered`` counts, by
    matrix, the weights that were really read by a backend that skips the others, once for a whole
    batch; prompts are not in it. ``steps`` counts on the device what decoding on a GPU keeps.
    """

    recorder: Recorder | None = None
    steps: StepCounts | None = None

    def __init__(self, method: Method, spec: ModelSpec) -> None:
        self.method = method
        self.spec = spec
        self.sites = {(site.layer, site.name): site for site in method.sites(spec)}
        self.reset()

    def reset(self) -> None:
        """Forget all counts."""
        self._tokens: Tensor | int = 0
        self._kept: dict[SiteKey, Tensor | int] = dict.fromkeys(self.sites, 0)
        self._groups: dict[SiteKey, Tensor | int] = dict.fromkeys(self.sites, 0)
        self._hits: dict[SiteKey, Tensor | int] = {}
        self.gathered: Counter[str] = Counter()
        if self.steps is not None:
            self.steps.reset()

    def count_tokens(self, tokens: Tensor | int) -> None:
        """Count sparse tokens of one forward call: a number, or a bool mask of them."""
        counted = tokens if isinstance(tokens, int) else tokens.sum()
        self._tokens = self._tokens + counted

    def count_units(self, site: Site, mask: Tensor, tokens: Tensor | None) -> None:
        """Count the kept units of a (..., n) mask over all tokens, or those in (...) ``tokens``."""
        counted = mask if tokens is None else mask & tokens.unsqueeze(-1)
        key = (site.layer, site.name)
        self._kept[key] = self._kept[key] + counted.sum()
        group = site.group
        if group > 1:
            groups = counted.unflatten(-1, (-1, group)).any(dim=-1)
            self._groups[key] = self._groups[key] + groups.sum()

    def count_hits(self, site: Site, hits: Tensor | int) -> None:
        """Count the kept units that the site's cache held."""
        key = (site.layer, site.name)
        self._hits[key] = self._hits.get(key, 0) + hits

    def count_gathered(self, matrix: str, weights: int) -> None:
        """Count weights that were read because units of theirs were kept."""
        self.gathered[matrix] += weights

    def cache(self) -> CacheUsage:
        """Hits and misses so far, of the sites that have a cache and have used it."""
        hits = {key: int(self._hits[key]) for key in self.sites if key in self._hits}
        kept = {key: self._kept_units(key) for key in hits}
        size = {key: self.sites[key].weights_per_unit for key in hits}
        wanted = sum(kept[key] * size[key] for key in hits)
        resident = sum(hits[key] * size[key] for key in hits)
        return CacheUsage(
            hits={f"{key[0]}.{key[1]}": hits[key] for key in hits},
            misses={f"{key[0]}.{key[1]}": kept[key] - hits[key] for key in hits},
            hit_rate=resident / wanted if wanted else None,
        )

    def density(self) -> Density:
        """The shares so far; with no sparse token yet, those of the dense model."""
        tokens = int(self._tokens) + (self.steps.decoded() if self.steps else 0)
        kept = {key: self._mean_kept(key, tokens) for key in self.sites}
        mlp = [self._read(layer, "mlp", tokens) for layer in range(self.spec.layers)]
        attention = [self._read(layer, "attn", tokens) for layer in range(self.spec.layers)]
        added = self.method.added_weights(self.spec)
        all_read = sum(mlp) + sum(attention) + self.spec.other_weights + added
        return Density(
            tokens=tokens,
            mlp=sum(mlp) / (self.spec.layers * self.spec.mlp_weights),
            attention=sum(attention) / (self.spec.layers * self.spec.attention_weights),
            total=all_read / self.spec.weights_per_token,
            added=added / self.spec.weights_per_token,
            mlp_by_layer=tuple(read / self.spec.mlp_weights for read in mlp),
            attention_by_layer=tuple(read / self.spec.attention_weights for read in attention),
            total_by_layer=tuple(
                (of_mlp + of_attention) / (self.spec.mlp_weights + self.spec.attention_weights)
                for of_mlp, of_attention in zip(mlp, attention, strict=True)
            ),
            sites={
                f"{layer}.{name}": kept[layer, name] / site.units
                for (layer, name), site in self.sites.items()
            },
        )

    def _mean_kept(self, key: SiteKey, tokens: int) -> float:
        return self._kept_units(key) / tokens if tokens else float(self.sites[key].units)

    def _kept_units(self, key: SiteKey) -> int:
        return int(self._kept[key]) + (self.steps.kept(key) if self.steps else 0)

    def _kept_groups(self, key: SiteKey) -> int:
        return int(self._groups[key]) + (self.steps.kept_groups(key) if self.steps else 0)

    def _dropped(self, key: SiteKey, tokens: int) -> float:
        """Weights that a site's mask saves a token, on average."""
        site = self.sites[key]
        if not tokens:
            return 0.0
        whole = tokens * site.units
        saved = (whole - self._kept_units(key)) * site.weights_per_unit
        if site.group > 1:
            saved += (whole // site.group - self._kept_groups(key)) * site.weights_per_group
        return saved / tokens

    def _read(self, layer: int, part: str, tokens: int) -> float:
        """Weights of a layer's MLP (``mlp``) or attention (``attn``) read for a token."""
        spec = self.spec
        names = spec.mlp_matrices if part == "mlp" else ATTENTION_MATRICES
        read = sum(self._dense_or_static(layer, name) for name in names)
        for key in self.sites:
            if key[0] == layer and key[1].startswith(part):
                read -= self._dropped(key, tokens)
        return read

    def _dense_or_static(self, layer: int, matrix: str) -> float:
        mask = self.method.weight_mask(layer, matrix)
        return self.spec.weights(matrix) if mask is None else int(mask.sum())
