"""A matrix whose rows are read one by one: what a kept unit brings along is one run of memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dipnet.errors import InputError
from dipnet.kernels import reference

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
KINDS = ("float", "int4", "int8", "bf16")
"""Plain floating numbers, or bytes as docs/store-format.md lays out a column."""
READ = 16
"""Bytes of a unit that a thread reads at once, in CUDA C++."""


class Weight(NamedTuple):
    """A unit-major matrix: (units, width) of floating numbers, or (units, stride) uint8.

    ``scales`` are (units,) float32 for int4 and int8, else None; ``width`` is the number of weights
    of a unit, without the padding that the store's bytes end with.
    """

    data: Tensor
    scales: Tensor | None
    kind: str
    width: int

    @classmethod
    def of(cls, weight: Weight | Tensor) -> Weight:
        """A plain (units, width) tensor as a Weight; a Weight as it is."""
        if isinstance(weight, Weight):
            return weight
        return cls(weight, None, "float", weight.shape[-1])

    @property
    def units(self) -> int:
        """Rows of the matrix."""
        return self.data.shape[0]

    @property
    def bits(self) -> int:
        """Bits of a weight."""
        return {"int4": 4, "int8": 8, "bf16": 16}.get(self.kind, self.data.element_size() * 8)

    @property
    def numbers(self) -> Tensor:
        """The (units, width or more) floating numbers of a weight that is no integers."""
        return self.data if self.kind == "float" else self.data.view(torch.bfloat16)

    def lies_aligned(self) -> bool:
        """Whether every unit begins at a multiple of READ."""
        data = self.data
        return data.data_ptr() % READ == 0 and data.stride(0) * data.element_size() % READ == 0

    def check(self) -> None:
        """Raise InputError when the tensors are not what the kind says."""
        if self.kind not in KINDS:
            raise InputError(f"no kind {self.kind!r} of weights; there are: {', '.join(KINDS)}")
        if self.kind == "float":
            wanted = "floating of shape (units, width), each row contiguous"
            fits = self.data.dtype in FLOATS and self.data.dim() == 2 and self._rows_lie_dense()
        else:
            stride = reference.row_bytes(self.kind, self.width)
            wanted = f"torch.uint8 of shape (units, {stride}) for {self.width} weights a unit"
            fits = self.data.dtype == torch.uint8 and self.data.shape[1:] == (stride,)
            fits = fits and self._rows_lie_dense()
        if not fits:
            found = shape_text(self.data)
            raise InputError(f"weights of kind {self.kind!r} must be {wanted}, not {found}")
        self._check_scales()

    def _rows_lie_dense(self) -> bool:
        return self.data.stride(1) == 1 or self.data.shape[1] <= 1

    def _check_scales(self) -> None:
        if (self.scales is None) != (self.kind in ("float", "bf16")):
            raise InputError("int4 and int8 weights have scales, others have none")
        if self.scales is not None and (
            self.scales.dtype != torch.float32 or self.scales.shape != self.data.shape[:1]
        ):
            raise InputError(f"scales must be torch.float32 of shape ({self.units},)")

    def rows(self, index: Tensor) -> Tensor:
        """The units at (...,) ``index`` as numbers: (..., width), float32 where they are bytes."""
        index = index.long()
        data = self.data[index]
        if self.kind == "float":
            return data
        padded = -(-self.width // reference.TILE) * reference.TILE
        flat = data.reshape(-1, data.shape[-1])
        if self.kind == "bf16":
            numbers = flat[:, : 2 * padded].clone().view(torch.bfloat16).float()
        else:
            assert self.scales is not None, "check() comes first"
            levels, multipliers = reference.stored_numbers(flat, padded, self.kind)
            steps = self.scales[index].reshape(-1, 1) * multipliers
            numbers = levels.float() * steps.repeat_interleave(reference.GROUP, dim=1)
        return numbers[:, : self.width].reshape(*index.shape, self.width)


def shape_text(tensor: Tensor) -> str:
    """The dtype and the shape of a tensor, for messages."""
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"
