"""What is free of a device's memory, for checks and for messages that say what is needed."""

from __future__ import annotations

import torch

from dipnet.units import size_text

SHORTAGE = ("out of memory", "out_of_memory", "alloc_failed")
"""What CUDA, Triton, the driver and cuBLAS say of it."""


def ran_out(error: BaseException | None) -> bool:
    """Whether an error, or one that it followed, is for want of a GPU's memory.

    Only PyTorch's allocator raises OutOfMemoryError. A graph that cannot be made, a kernel that
    cannot be loaded and a library without its handle have errors of their own, and the capture of a
    graph that is broken off hides what broke it.
    """
    while error is not None:
        said = str(error).lower()
        if isinstance(error, torch.OutOfMemoryError) or any(word in said for word in SHORTAGE):
            return True
        error = error.__cause__ or error.__context__
    return False


def free_bytes(device: torch.device) -> int | None:
    """What is free on a GPU, PyTorch's own reserve included; None elsewhere."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + reserve)


def free_text(device: torch.device) -> str:
    """`free_bytes` for people."""
    free = free_bytes(device)
    return "too little" if free is None else size_text(free)
