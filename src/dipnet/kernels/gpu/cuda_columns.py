"""Products of kept input channels in CUDA C++, by clusters of thread blocks: columns.cu.

The same sums as Triton's kernels in columns.py and integers.py make. Those wait for each part of
the list before they read on, and meet in the GPU's memory.
"""

from __future__ import annotations

from torch import Tensor

from dipnet.kernels.gpu import nvrtc
from dipnet.kernels.gpu.common import list_stride
from dipnet.kernels.gpu.reference import ACTIVATIONS
from dipnet.kernels.gpu.tiles import CudaColumns
from dipnet.kernels.gpu.weights import FLOATS, READ, Weight
from dipnet.kernels.reference import TILE

SOURCE, KERNEL = "columns.cu", "multiply_columns"
INTEGERS = ("int8", "int4")
WORD = 4
"""Bytes; up to four are read at once."""


def cuda_columns_serve(x: Tensor, weights: tuple[Weight, ...], *added: Tensor | None) -> bool:
    """Whether the kernel takes these weights, and what is ``added`` in the numbers of ``x``."""
    if any(tensor is not None and tensor.dtype != x.dtype for tensor in added):
        return False
    whole = all(weight.lies_aligned() and _bytes(weight) % READ == 0 for weight in weights)
    return whole and nvrtc.serves(x.device)


def cuda_columns(
    x: Tensor,
    index: Tensor,
    weights: tuple[Weight, ...],
    tile: CudaColumns,
    *,
    count: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    compact: bool = False,
    block: int = 1,
) -> Tensor:
    """One matrix, or gate and up: (batch, channels) -> (batch, width)."""
    weight, up = weights[0], weights[-1]
    x, out = x.contiguous(), x.new_empty(len(x), weight.width)
    size = _bytes(weight)
    vectors = size // (WORD * tile.words)
    macros = {
        "KIND": _kind(weight),
        "X": FLOATS.index(x.dtype),
        "MATRICES": len(weights),
        "COMPACT": int(compact),
        "BLOCK": block,
        "ACTIVATION": list(ACTIVATIONS).index(activation),
        "THREADS": tile.threads,
        "LANES": tile.lanes,
        "PARTS": tile.parts,
        "WORDS": tile.words,
        "READS": tile.reads,
        "RESIDENT": tile.resident,
    }
    kernel = nvrtc.function(SOURCE, KERNEL, x.device, tuple(macros.items()))
    sizes = (index.shape[-1] * block, weight.width, vectors, x.stride(0), list_stride(index))
    given = (
        *(x, index, count, weight.data, weight.scales, up.data, up.scales),
        *(bias, residual if residual is None else residual.contiguous(), out),
        *(*sizes, weight.data.stride(0) * weight.data.element_size(), size),
    )
    grid = (-(-vectors // (tile.lanes // len(weights))) * tile.parts, len(x))
    nvrtc.launch(kernel, grid, tile.threads, given)
    return out


def _kind(weight: Weight) -> int:
    if weight.kind in INTEGERS:
        return len(FLOATS) + INTEGERS.index(weight.kind)
    return FLOATS.index(weight.numbers.dtype)


def _bytes(weight: Weight) -> int:
    """Of a unit's weights; multipliers lie behind them."""
    padded = weight.width if weight.kind == "float" else -(-weight.width // TILE) * TILE
    return padded * weight.bits // 8
