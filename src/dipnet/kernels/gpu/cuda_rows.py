"""Products of kept output rows in CUDA C++: rows.cu.

The same sums as Triton's kernel in rows.py makes, which has fewer reads on their way at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dipnet.kernels.gpu import nvrtc
from dipnet.kernels.gpu.common import list_stride
from dipnet.kernels.gpu.reference import ACTIVATIONS
from dipnet.kernels.gpu.tiles import CudaRows
from dipnet.kernels.gpu.weights import FLOATS, READ, Weight

SOURCE, KERNEL = "rows.cu", "multiply_rows"


def cuda_rows_serve(x: Tensor, weights: tuple[Weight, ...], *added: Tensor | None) -> bool:
    """Whether the kernel takes these weights with rows of ``x``, and what is ``added``."""
    kinds = {tensor.dtype for tensor in added if tensor is not None}
    if len(kinds) > 1 or not nvrtc.serves(x.device):
        return False
    return all(
        weight.scales is None
        and weight.lies_aligned()
        and weight.width * weight.bits // 8 % READ == 0
        for weight in weights
    )


def cuda_rows(
    x: Tensor,
    index: Tensor,
    weights: tuple[Weight, ...],
    tile: CudaRows,
    dtype: torch.dtype,
    *,
    count: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    factor: Tensor | None = None,
    block: int = 1,
) -> Tensor:
    """One matrix, or gate and up: (batch, width) -> (batch, k * block) of ``dtype``."""
    kept = index.shape[-1] * block
    weight, up = weights[0].numbers, weights[-1].numbers
    x, out = _aligned(x), x.new_empty(len(x), kept, dtype=dtype)
    added = next((each.dtype for each in (bias, factor) if each is not None), x.dtype)
    macros = {
        "KIND": FLOATS.index(weight.dtype),
        "X": FLOATS.index(x.dtype),
        "ADDED": FLOATS.index(added),
        "OUT": FLOATS.index(dtype),
        "MATRICES": len(weights),
        "BLOCK": block,
        "ACTIVATION": list(ACTIVATIONS).index(activation),
        "THREADS": tile.threads,
        "LANES": tile.lanes,
        "UNITS": tile.units,
        "READS": tile.reads,
        "RESIDENT": tile.resident,
    }
    kernel = nvrtc.function(SOURCE, KERNEL, x.device, tuple(macros.items()))
    strides = weight.stride(0) * weight.element_size(), 0 if factor is None else factor.stride(0)
    given = (
        *(x, index, count, weight, up, bias, factor, out),
        *(kept, weights[0].width, list_stride(index), *strides),
    )
    places = tile.threads // tile.lanes * tile.units
    nvrtc.launch(kernel, (-(-kept // places), len(x)), tile.threads, given)
    return out


def _aligned(x: Tensor) -> Tensor:
    """Contiguous, at a multiple of READ: another kernel would add up in another order."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % READ else x
