"""Selection of units: selection.cu where thread blocks form clusters, else Triton's kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dipnet.kernels.gpu import compaction, nvrtc
from dipnet.kernels.gpu.tiles import Cut, cut_of
from dipnet.kernels.gpu.weights import FLOATS

SOURCE, KERNEL = "selection.cu", "select_units"


class AddNorm(NamedTuple):
    """What makes the scores in the same launch: (batch, n) ``delta`` is added to what is given, and
    (n,) ``weight`` multiplies it normalised by its root mean square. ``summed`` (what is given,
    where there is no delta) and ``normed`` are written. All of one dtype and contiguous.
    """

    delta: Tensor | None
    weight: Tensor
    summed: Tensor
    normed: Tensor
    epsilon: float


def topk_indices(scores: Tensor, k: int, magnitude: bool, factor: Tensor | None) -> Tensor:
    """(batch, n) floating -> (batch, k) int32, ascending."""
    if not (k and len(scores)):
        return scores.new_empty(len(scores), k, dtype=torch.int32)
    if not nvrtc.serves(scores.device):
        return compaction.select_topk(scores, k, magnitude, factor, into="index")
    index = scores.new_empty(len(scores), k, dtype=torch.int32)
    select(cut_of(scores.shape[1]), scores, magnitude, factor=factor, index=index, k=k)
    return index


def topk_mask(scores: Tensor, k: int, magnitude: bool, factor: Tensor | None) -> Tensor:
    """(batch, n) floating -> (batch, n) bool."""
    if k == 0 or scores.numel() == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if not nvrtc.serves(scores.device):
        return compaction.select_topk(scores, k, magnitude, factor, into="mask")
    mask = scores.new_empty(scores.shape, dtype=torch.bool)
    select(cut_of(scores.shape[1]), scores, magnitude, factor=factor, mask=mask, k=k)
    return mask


def keep_topk(x: Tensor, k: int, factor: Tensor | None) -> Tensor:
    """(batch, n) floating -> the same times the mask of its k highest magnitudes."""
    if k == 0 or x.numel() == 0:
        return x * 0
    if not nvrtc.serves(x.device):
        return compaction.select_topk(x, k, True, factor, into="kept")
    kept = torch.empty_like(x, memory_format=torch.contiguous_format)
    select(cut_of(x.shape[1]), x, True, factor=factor, kept=kept, k=k)
    return kept


def threshold_indices(x: Tensor, threshold: Tensor, magnitude: bool) -> tuple[Tensor, Tensor]:
    """(batch, n) and (1,) -> (batch, n) int32, ascending, and the (batch,) int32 valid ones."""
    if x.numel() == 0 or not nvrtc.serves(x.device):
        return compaction.select_above(x, threshold, magnitude, into="index")
    index = x.new_empty(x.shape, dtype=torch.int32)
    count = x.new_empty(len(x), dtype=torch.int32)
    cut = cut_of(x.shape[1])
    select(cut, x, magnitude, threshold=threshold, index=index, count=count)
    return index, count


def keep_above(x: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """(batch, n) and (1,) -> the same times the mask of what is above, (batch,) int32 counts."""
    if x.numel() == 0 or not nvrtc.serves(x.device):
        return compaction.select_above(x, threshold, True, into="kept")
    kept = torch.empty_like(x, memory_format=torch.contiguous_format)
    count = x.new_empty(len(x), dtype=torch.int32)
    select(cut_of(x.shape[1]), x, True, threshold=threshold, kept=kept, count=count)
    return kept, count


def union_indices(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(batch, n) bool -> (n,) int32, ascending, and the (1,) int32 valid ones."""
    return compaction.select_union(mask)


def select(
    cut: Cut,
    scores: Tensor,
    magnitude: bool,
    *,
    k: int = 0,
    factor: Tensor | None = None,
    threshold: Tensor | None = None,
    index: Tensor | None = None,
    count: Tensor | None = None,
    mask: Tensor | None = None,
    kept: Tensor | None = None,
    add_norm: AddNorm | None = None,
) -> None:
    """Launch the kernel: ``index`` (and ``count``), ``mask`` or ``kept`` are written."""
    batch, n = scores.shape
    scores = scores.contiguous()
    read = [scores, *(part for part in add_norm or () if isinstance(part, Tensor))]
    aligned = n % cut.each == 0 and all(part.data_ptr() % 16 == 0 for part in read)
    macros = {
        "KIND": FLOATS.index(scores.dtype),
        "MAGNITUDE": magnitude,
        "FACTOR": factor is not None,
        "ABOVE": threshold is not None,
        "MASK": mask is not None,
        "KEPT": kept is not None,
        "VECTOR": aligned,
        "NORM": add_norm is not None,
        "BLOCKS": cut.blocks,
        "THREADS": cut.threads,
        "EACH": cut.each,
    }
    numbers = tuple((name, int(value)) for name, value in macros.items())
    kernel = nvrtc.function(SOURCE, KERNEL, scores.device, numbers)
    given = (scores, factor, threshold, index, count, mask, kept, n, k, *(add_norm or ()))
    nvrtc.launch(kernel, (cut.blocks, batch), cut.threads, given)
