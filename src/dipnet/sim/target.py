"""The sites of the model that is simulated: a trace's own, or a trace's stretched over a shape.

A trace says what tokens wanted of *one* model. Of another model of which only the shapes are known,
each site gets the statistics of the trace's site at the same relative depth: the same shares of
units wanted, hit and missed, for a cache that holds the same share of the units.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from dipnet.errors import InputError
from dipnet.sim.shape import ModelShape
from dipnet.sim.sizes import FLOAT_BYTES, is_streamed
from dipnet.sim.trace import TraceSite

PLACES = ("attn.in", "attn.out", "attn.head", "mlp.in", "mlp.hidden", "mlp.neuron")
"""The names of sites, in the order in which a layer computes them."""
Key = tuple[int, str]
"""A site's (layer, name)."""


@dataclass(frozen=True)
class Target:
    """What is simulated: a shape, and its sites in the order of computation.

    ``sites`` are those where a mask is decided, ``sources`` the positions in the trace of the sites
    whose statistics they have; deciding reads ``added`` numbers of the method's own for a token.
    ``whole`` are MLP matrices that no mask thins: every token wants all of them, and they take
    their part of the cache.
    """

    shape: ModelShape
    sites: tuple[TraceSite, ...]
    sources: tuple[int, ...]
    added: int = 0

    @cached_property
    def whole(self) -> tuple[TraceSite, ...]:
        """The MLP's matrices that no site thins, as sites of density 1."""
        return tuple(_whole(self.shape, self.sites))

    @property
    def added_bytes(self) -> int:
        """Bytes that the method adds: predictors, norms, thresholds, in memory in float32."""
        return FLOAT_BYTES * self.added

    @property
    def cached(self) -> tuple[TraceSite, ...]:
        """The sites that are streamed through caches: the MLP's, thinned or not, in order.

        Attention is always in memory.
        """
        streamed = [site for site in self.sites if is_streamed(site)]
        return tuple(sorted((*streamed, *self.whole), key=place))


def place(site: TraceSite) -> tuple[int, int]:
    """Where in the order of computation a site stands."""
    return site.layer, PLACES.index(site.name)


def own_target(shape: ModelShape, sites: Sequence[TraceSite], added: int = 0) -> Target:
    """The model that was recorded, as it is; without sites, the dense model."""
    return Target(shape, tuple(sites), tuple(range(len(sites))), added)


def stretched(
    source: ModelShape, sites: Sequence[TraceSite], shape: ModelShape, added: int = 0
) -> Target:
    """The sites of ``shape`` with the statistics of a recorded model's ``sites``.

    What the method ``added`` there is as large a share of the MLP here. Raises InputError when a
    site thins a matrix that the shape does not have.
    """
    positions = {site.key: at for at, site in enumerate(sites)}
    # Attention is in memory anyway, and a shape does not say how many heads it has.
    names = sorted({site.name for site in sites} - {"attn.head"}, key=PLACES.index)
    made: list[TraceSite] = []
    sources: list[int] = []
    for layer in range(shape.layers):
        for name in names:
            at = positions.get((same_depth(layer, shape.layers, source.layers), name))
            if at is not None:
                made.append(_resized(sites[at], layer, source, shape))
                sources.append(at)
    size = shape.layers * shape.mlp_weights / (source.layers * source.mlp_weights)
    return Target(shape, tuple(made), tuple(sources), round(added * size))


def same_depth(layer: int, layers: int, others: int) -> int:
    """The layer of ``others`` that is as deep as the middle of ``layer`` among ``layers``."""
    return (2 * layer + 1) * others // (2 * layers)


def _resized(site: TraceSite, layer: int, source: ModelShape, shape: ModelShape) -> TraceSite:
    """A recorded site with the units and matrices that it has in another shape."""
    matrices = _matrices(site, source, shape)
    if site.name in ("mlp.hidden", "mlp.neuron"):
        channels = shape.matrices["down"][1]
    else:
        channels = shape.matrices[matrices[0]][1]
    if channels % site.block:
        raise InputError(
            f"blocks of {site.block} neurons do not divide the {channels} of {shape.name}: use a "
            "trace or a method with other blocks"
        )
    rows = site.name in ("mlp.hidden", "mlp.neuron")
    weights = {
        matrix: shape.matrices[matrix][1 if rows and matrix != "down" else 0] * site.block
        for matrix in matrices
    }
    return TraceSite(layer, site.name, channels // site.block, site.block, site.density, weights)


def _matrices(site: TraceSite, source: ModelShape, shape: ModelShape) -> list[str]:
    """The matrices that the site thins in ``shape``: the MLP's inputs stand for one another."""
    inputs = set(site.matrices) - {"down"}
    if inputs and inputs == set(source.input_matrices):
        ours = [*shape.input_matrices, *(["down"] if "down" in site.matrices else [])]
    else:
        ours = list(site.matrices)
    missing = [matrix for matrix in ours if matrix not in shape.matrices]
    if missing:
        raise InputError(
            f"the masks thin {missing[0]!r}, which {shape.name} does not have: use another method"
        )
    return ours


def _whole(shape: ModelShape, sites: Iterable[TraceSite]) -> Iterable[TraceSite]:
    thinned: dict[int, set[str]] = {}
    by_neurons = False
    for site in sites:
        thinned.setdefault(site.layer, set()).update(site.matrices)
        by_neurons = by_neurons or site.name == "mlp.neuron"
    width, neurons = shape.matrices["down"]
    for layer in range(shape.layers):
        found = thinned.get(layer, set())
        if by_neurons:
            if "down" not in found:  # in the same store: its records are of whole neurons, too
                weights = dict.fromkeys(shape.mlp_matrices, width)
                yield TraceSite(layer, "mlp.neuron", neurons, 1, 1.0, weights)
            continue
        left = [matrix for matrix in shape.input_matrices if matrix not in found]
        if left:
            outputs = {matrix: shape.matrices[matrix][0] for matrix in left}
            yield TraceSite(layer, "mlp.in", width, 1, 1.0, outputs)
        if "down" not in found:
            yield TraceSite(layer, "mlp.hidden", neurons, 1, 1.0, {"down": width})
