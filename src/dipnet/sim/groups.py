"""The records of a layer's groups, as a walk of a token through our engine needs them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dipnet.sim.shape import ModelShape
from dipnet.store.geometry import Weights, column_stride, padded_outputs, record_bytes
from dipnet.store.reads import GAP_BYTES, READ_BYTES

HEAD = "head"

Array = NDArray[np.float64]
Key = tuple[int, str]


@dataclass
class Group:
    """The records of one group, and how many each of the (tokens,) finds and misses.

    The misses take ``reads`` reads of ``records`` records, with those in the gaps. ``early`` misses
    were read ahead and are right; they are there at ``early_end``, in seconds from the token's
    beginning.
    """

    layer: int
    name: str
    units: int
    block: int
    stride: int
    record_bytes: int
    masked: bool
    hits: Array
    misses: Array
    reads: Array
    records: Array
    early: Array | float = 0.0
    early_end: Array | float = 0.0

    @property
    def channels(self) -> int:
        """The inputs of its product."""
        return self.units * self.block

    @property
    def streamed(self) -> bool:
        """Whether anything of it is ever read."""
        return bool(self.misses.any())

    def read(self, missing: Array) -> tuple[Array, Array]:
        """The reads and bytes of so many of the misses, spread as all of them are."""
        if missing is self.misses:
            return self.reads, self.records * self.record_bytes
        found = self._scattered(missing), self._scattered(self.misses)
        some = self.misses > 0
        reads, records = (
            counted * np.divide(part, whole, out=np.zeros_like(part), where=some)
            for counted, part, whole in zip((self.reads, self.records), *found, strict=True)
        )
        return reads, np.maximum(records, missing) * self.record_bytes

    def _scattered(self, missing: Array) -> tuple[Array, Array]:
        """The reads, and the records that they take in, if misses lay anywhere."""
        gap = GAP_BYTES // self.record_bytes
        absent = 1 - missing / self.units
        apart = absent**gap
        passed = 1 - (gap + 1) * apart + gap * apart * absent
        share = np.divide(absent * passed, 1 - absent, out=np.zeros_like(absent), where=absent < 1)
        records = missing * (1 + share)
        reads = np.maximum(missing * apart * absent, records * self.record_bytes / READ_BYTES)
        return np.maximum(reads, np.minimum(missing, 1.0)), records


def pinned_groups(shape: ModelShape, weights: Weights, like: Array) -> list[Group]:
    """Attention's groups and the head's: always in memory, wanted whole by the (tokens,) ``like``.

    The head's layer is the number of layers.
    """
    of = shape.matrices
    reads = of["q"][0] + of["k"][0] + of["v"][0]
    head_inputs = min(shape.width, shape.other_weights // shape.vocabulary)
    sizes = []
    for layer in range(shape.layers):
        sizes += [
            (layer, "attn.in", of["q"][1], reads),
            (layer, "attn.out", of["o"][1], of["o"][0]),
        ]
    if head_inputs:
        sizes.append((shape.layers, HEAD, head_inputs, shape.vocabulary))
    return [_pinned(*size, weights, like) for size in sizes]


def _pinned(
    layer: int, name: str, channels: int, rows: int, weights: Weights, like: Array
) -> Group:
    stride = column_stride(weights, padded_outputs(rows))
    none = np.zeros_like(like)
    return Group(
        layer=layer,
        name=name,
        units=channels,
        block=1,
        stride=stride,
        record_bytes=record_bytes(stride, 1),
        masked=False,
        hits=np.full_like(like, channels),
        misses=none,
        reads=none,
        records=none,
    )
