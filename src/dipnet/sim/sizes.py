"""What the units of a trace weigh, and how memory is divided among their caches.

In the bytes of a store's own geometry, so that what is simulated is what the engine reads. The
engine divides its budget with the same `divide_bytes`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, TypeVar, get_args

from dipnet.registry import unknown
from dipnet.store.geometry import WEIGHTS, Weights, column_stride, padded_outputs, record_bytes

if TYPE_CHECKING:
    from dipnet.sim.shape import ModelShape
    from dipnet.sim.trace import TraceSite

Split = Literal["wanted", "even"]
"""How a budget is divided: in proportion to the bytes that a token wants, or alike as in DIP's
paper."""
Name = TypeVar("Name", bound=Hashable)

FLOAT_BYTES = 4
"""The engine holds norms, biases, scales, keys and values in float32."""
_ATTENTION = (("q", "k", "v"), ("o",))


def is_streamed(site: TraceSite) -> bool:
    """Whether a site's weights come and go: the MLP's do, attention is always in memory."""
    return site.name.startswith("mlp.")


def unit_bytes(site: TraceSite, weights: str) -> int:
    """Bytes of a unit of ``site``: of its record, where a store of such weights has it as one.

    Raises InputError for unknown ``weights``.
    """
    return record_bytes(unit_stride(site, weights), unit_columns(site))


def unit_columns(site: TraceSite) -> int:
    """Columns of a unit's record: a neuron that is skipped whole has one of each matrix."""
    return site.block * (len(site.matrices) if site.name == "mlp.neuron" else 1)


def _unit_rows(site: TraceSite) -> int:
    """The numbers of a column in a unit's record."""
    return site.weights_per_unit // unit_columns(site)


def unit_stride(site: TraceSite, weights: str) -> int:
    """Bytes of a column in a unit's record; InputError for unknown ``weights``."""
    return column_stride(_known(weights), padded_outputs(_unit_rows(site)))


def pinned_bytes(shape: ModelShape, weights: str) -> int:
    """Bytes of everything that is always in memory, but for keys and values and for buffers.

    The records of attention and of the head, the scales of all groups' channels, norms and biases;
    of the embeddings the row of one token. The table itself stays on disk. Exact for a model whose
    head reads its width. Raises InputError for unknown ``weights``.
    """
    kind = _known(weights)
    channels = head = min(shape.width, shape.other_weights // shape.vocabulary)
    size = head * _record_bytes(kind, shape.vocabulary)
    for layer_group in _ATTENTION:
        rows = sum(shape.matrices[matrix][0] for matrix in layer_group)
        inputs = shape.matrices[layer_group[0]][1]
        size += shape.layers * inputs * _record_bytes(kind, rows)
        channels += shape.layers * inputs
    channels += shape.layers * (shape.matrices["up"][1] + shape.matrices["down"][1])
    floats = shape.other_weights - head * shape.vocabulary
    return size + FLOAT_BYTES * (floats + (0 if kind == "bf16" else channels))


def kv_bytes(shape: ModelShape, tokens: int) -> int:
    """Bytes of the keys and values of ``tokens`` tokens."""
    return FLOAT_BYTES * shape.layers * shape.kv_width * tokens


def divide_slots(
    sites: Sequence[TraceSite], weights: str, cache_bytes: int | None, split: Split = "wanted"
) -> list[int]:
    """Slots of every site when ``cache_bytes`` are for the caches; None holds everything.

    ``split`` "wanted" is the engine's rule; "even" gives every site the same bytes. Attention's
    sites are always held, and take nothing of the budget. Raises InputError for unknown
    ``weights`` or ``split``.
    """
    if split not in get_args(Split):
        raise unknown("split of a cache", split, get_args(Split))
    sizes = [unit_bytes(site, weights) for site in sites]
    slots = [site.units for site in sites]
    if cache_bytes is None:
        return slots
    streamed = [at for at, site in enumerate(sites) if is_streamed(site)]
    whole = {at: sites[at].units * sizes[at] for at in streamed}
    shares = {at: sites[at].density * whole[at] if split == "wanted" else 1.0 for at in streamed}
    for at, size in divide_bytes(whole, shares, cache_bytes).items():
        slots[at] = size // sizes[at]
    return slots


def divide_bytes(
    whole: Mapping[Name, int], shares: Mapping[Name, float], budget: int
) -> dict[Name, int]:
    """Bytes of each cache when ``budget`` bytes are for all of them.

    Every one gets its part of the budget in proportion to its positive share, but no more than its
    ``whole`` bytes; what one cannot use goes to the others. The order of the names does not matter.
    """
    given = dict(whole)
    sharing = dict(shares)
    left = budget
    while sharing:
        part = left / math.fsum(sharing.values())
        full = [name for name, share in sharing.items() if part * share >= whole[name]]
        for name in full:
            left -= whole[name]
            del sharing[name]
        if not full:
            break
    return given | {name: int(part * share) for name, share in sharing.items()}


def _record_bytes(weights: Weights, rows: int) -> int:
    return record_bytes(column_stride(weights, padded_outputs(rows)), 1)


def _known(weights: str) -> Weights:
    if weights not in WEIGHTS:
        raise unknown("kind of weights", weights, WEIGHTS)
    return weights
