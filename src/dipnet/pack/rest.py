"""rest.safetensors: what belongs to no group, written in pieces to places known beforehand.

The safetensors library writes whole files from memory; an embedding table may be larger than that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod

import torch
from torch import Tensor

from dipnet.pack.checkpoint import Checkpoint
from dipnet.store.geometry import round_up

PIECE_BYTES = 16 << 20
HEADER_ALIGNMENT = 64
"""The tensors begin at a multiple of a cache line."""


@dataclass(frozen=True)
class NeuronRows:
    """Parts of a bias that have one number for each neuron of a layer."""

    layer: int
    parts: tuple[slice, ...]


@dataclass(frozen=True)
class RestTensor:
    """A tensor of the rest: its name, and where in the checkpoint it is.

    A ``table`` is looked up by rows and stored in bf16; everything else in float32.
    """

    name: str
    tensor: str
    shape: tuple[int, ...]
    table: bool = False
    neurons: NeuronRows | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in the store."""
        return torch.bfloat16 if self.table else torch.float32


class Rest:
    """The layout of rest.safetensors: the scales of the groups, then the tensors."""

    def __init__(self, scales: Sequence[tuple[str, int]], tensors: Sequence[RestTensor]) -> None:
        # The four-byte numbers come first, so that all are aligned.
        self.tensors = sorted(tensors, key=lambda tensor: tensor.table)
        entries: list[tuple[str, tuple[int, ...], torch.dtype]]
        entries = [(name, (channels,), torch.float32) for name, channels in scales]
        entries += [(tensor.name, tensor.shape, tensor.dtype) for tensor in self.tensors]
        sizes = [prod(shape) * dtype.itemsize for _, shape, dtype in entries]
        ends = list(accumulate(sizes))
        self.header = _header(
            {
                name: {
                    "dtype": "BF16" if dtype == torch.bfloat16 else "F32",
                    "shape": list(shape),
                    "data_offsets": [end - size, end],
                }
                for (name, shape, dtype), size, end in zip(entries, sizes, ends, strict=True)
            }
        )
        self.size = len(self.header) + sum(sizes)
        self._begins = {
            name: len(self.header) + end - size
            for (name, _, _), size, end in zip(entries, sizes, ends, strict=True)
        }

    def begin(self, name: str) -> int:
        """The offset of a tensor's first byte in the file."""
        return self._begins[name]

    def pieces(
        self, checkpoint: Checkpoint, orders: Mapping[int, Tensor]
    ) -> Iterator[tuple[int, bytes]]:
        """The tensors' bytes in pieces, each with its place in the file; not the scales."""
        for tensor in self.tensors:
            if tensor.neurons:
                yield self.begin(tensor.name), _bias(checkpoint, tensor, orders)
                continue
            row_bytes = prod(tensor.shape[1:]) * tensor.dtype.itemsize
            step = max(1, PIECE_BYTES // row_bytes)
            for start in range(0, tensor.shape[0], step):
                rows = slice(start, min(start + step, tensor.shape[0]))
                values = checkpoint.read(tensor.tensor, rows).to(tensor.dtype)
                yield self.begin(tensor.name) + start * row_bytes, _raw(values)


def _header(entries: Mapping[str, object]) -> bytes:
    text = json.dumps(entries, separators=(",", ":")).encode()
    size = round_up(8 + len(text), HEADER_ALIGNMENT) - 8
    return size.to_bytes(8, "little") + text.ljust(size)


def _bias(checkpoint: Checkpoint, tensor: RestTensor, orders: Mapping[int, Tensor]) -> bytes:
    """A bias with its neurons in the order of the store."""
    assert tensor.neurons
    values = checkpoint.read(tensor.tensor, slice(0, tensor.shape[0])).to(tensor.dtype)
    if tensor.neurons.layer in orders:
        for part in tensor.neurons.parts:
            values[part] = values[part][orders[tensor.neurons.layer]]
    return _raw(values)


def _raw(values: Tensor) -> bytes:
    return values.contiguous().view(torch.uint8).numpy().tobytes()
