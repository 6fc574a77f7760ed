"""What is free of a device's memory, for checks and for messages that say what is needed."""

from __future__ import annotations

import torch

from dipnet.units import size_text


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
