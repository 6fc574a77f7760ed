"""How the kernels of this room are launched."""

from __future__ import annotations

from typing import Any

import torch

from dipnet.kernels.gpu.common import overlaps


def overlapping(device: torch.device) -> dict[str, Any]:
    """Launch options by which a kernel may start while the one before it ends, where it can."""
    can = overlaps(device)
    return {"OVERLAP": can, **({"launch_pdl": True} if can else {})}
