"""One group of records in a file, and the native engine on it, without a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dipnet import _native
from dipnet.store.checksum import record_checksums
from dipnet.store.columns import encode
from dipnet.store.geometry import Weights, padded_outputs, record_bytes
from dipnet.streaming.reference import Floats, product

INSTRUCTION_SETS = ("portable", "avx2", "avx512")
GROUP = 3
OFFSET = 4096


def instruction_sets() -> list[str]:
    """Those that this CPU has."""
    best, found = _native.instruction_set(), []
    for name in INSTRUCTION_SETS:
        try:
            _native.use_instruction_set(name)
        except ValueError:
            continue
        found.append(name)
    _native.use_instruction_set(best)
    return found


@dataclass(frozen=True)
class Records:
    """What was written: ``columns`` (channels, stride) uint8, ``scales`` (channels,) or None."""

    path: Path
    kind: Weights
    columns: NDArray[np.uint8]
    scales: Floats | None
    rows: int
    block: int

    @property
    def channels(self) -> int:
        return len(self.columns)

    @property
    def units(self) -> int:
        return self.channels // self.block

    @property
    def record_bytes(self) -> int:
        return record_bytes(self.columns.shape[1], self.block)

    @property
    def layout(self) -> dict[str, Any]:
        """What `_native.Engine.add` is told of it."""
        return {
            "kind": self.kind,
            "channels": self.channels,
            "block": self.block,
            "outputs": padded_outputs(self.rows),
            "rows": self.rows,
            "stride": self.columns.shape[1],
            "record_bytes": self.record_bytes,
            "offset": OFFSET,
            "group": GROUP,
            "scale": self.scales,
        }

    def expected(self, x: Floats, masks: NDArray[np.bool_]) -> Floats:
        """(tokens, channels), (tokens, units) -> (tokens, rows), by the reference."""
        keep = np.repeat(masks, self.block, axis=1)
        made = [
            product(self.kind, self.columns, self.scales, row, kept, self.rows)
            for row, kept in zip(x, keep, strict=True)
        ]
        return np.stack(made)


def write(
    path: Path, kind: Weights, channels: int, rows: int, block: int = 1, zeros: bool = False
) -> Records:
    """Records of seeded weights; with ``zeros``, every third channel has none but zeros."""
    weights = torch.randn(rows, channels, generator=torch.Generator().manual_seed(rows))
    weights *= torch.logspace(-2, 2, channels)
    if zeros:
        weights[:, ::3] = 0
    columns, scales = encode(weights, kind)
    found = Records(
        path, kind, columns.numpy(), None if scales is None else scales.numpy(), rows, block
    )
    content = np.zeros((found.units, found.record_bytes), np.uint8)
    content[:, : block * columns.shape[1]] = found.columns.reshape(found.units, -1)
    sums = record_checksums(content, group=GROUP, first_unit=0)
    content[:, -8:] = np.asarray(sums, "<u8").view(np.uint8).reshape(-1, 8)
    path.write_bytes(b"\0" * OFFSET + content.tobytes())
    return found


class Site:
    """The native engine with one site."""

    def __init__(
        self,
        records: Records,
        slots: int,
        policy: str = "lru",
        backend: str = "pread",
        threads: int = 1,
        faults: tuple[tuple[int, int, int], ...] = (),
    ) -> None:
        self.records = records
        self.native = _native.Engine(
            str(records.path),
            depth=8,
            backend=backend,
            threads=threads,
            frame_bytes=0,
            largest_record=records.record_bytes,
            faults=faults,
        )
        self.number = self.native.add(**records.layout, slots=slots, policy=policy)

    def multiply(self, x: Floats, masks: NDArray[np.bool_]) -> Floats:
        """(tokens, channels), (tokens, units) -> (tokens, rows), as a model does it."""
        for mask in masks:
            self.native.access(self.number, mask)
        self.native.begin(self.number, x, masks)
        return self.finish(len(x))

    def finish(self, tokens: int) -> Floats:
        made = np.empty((tokens, self.records.rows), np.float32)
        self.native.finish(made)
        return made
