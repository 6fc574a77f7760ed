"""Which implementation serves a call: the kernels where they can, else plain torch."""

from __future__ import annotations

import warnings
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from dipnet.errors import BackendError
from dipnet.kernels.gpu import reference
from dipnet.kernels.gpu.tiles import MOST_UNITS
from dipnet.kernels.gpu.weights import FLOATS

try:
    from dipnet.kernels.gpu import launch
except ImportError:  # no Triton: PyTorch brings it where it can use a GPU
    launch = None

BACKENDS = ("auto", "gpu", "reference")
OLDEST = (8, 0)
"""The compute capability from which the kernels run: bfloat16 needs it."""
SERVED = (*FLOATS, torch.int32, torch.uint8, torch.bool)


def serving(backend: str, *tensors: Tensor | None, units: int = 0) -> ModuleType:
    """The module that serves a call with these tensors, or a selection among ``units``."""
    return launch if kernels_serve(backend, *tensors, units=units) else reference


def kernels_serve(backend: str, *tensors: Tensor | None, units: int = 0) -> bool:
    """Whether the kernels serve a call with these tensors, and plain torch does not.

    Raises BackendError when the backend is unknown, or is "gpu" and cannot. "auto" takes plain
    torch then, and says so once where there is a GPU that one could expect to be used.
    """
    if backend not in BACKENDS:
        raise BackendError(f"no backend {backend!r}; there are: {', '.join(BACKENDS)}")
    if backend == "reference":
        return False
    reason = why_not(*tensors) or why_not_units(units)
    if reason is None:
        return True
    if backend == "gpu":
        raise BackendError(f"backend 'gpu' {reason}; there are: {', '.join(BACKENDS)}")
    if any(tensor is not None and tensor.is_cuda for tensor in tensors):
        _warn(reason)
    return False


def why_not(*tensors: Tensor | None) -> str | None:
    """Why the kernels cannot serve these tensors, as the end of a sentence; None when they can."""
    if launch is None:
        return "needs Triton: pip install triton"
    given = [tensor for tensor in tensors if tensor is not None]
    unserved = {tensor.dtype for tensor in given} - set(SERVED)
    if unserved:
        return f"takes float16, bfloat16 and float32, not {', '.join(map(str, unserved))}"
    devices = {tensor.device for tensor in given}
    if len(devices) > 1:
        return f"takes tensors of one device, not of {', '.join(sorted(map(str, devices)))}"
    device = devices.pop()
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return f"runs on the current GPU, not on {device}: choose it with torch.cuda.set_device"
    return why_not_device(device)


def why_not_units(units: int) -> str | None:
    """Why the kernels cannot select among so many units; None when they can."""
    return None if units <= MOST_UNITS else f"selects among {MOST_UNITS} units, not {units}"


@cache
def why_not_device(device: torch.device) -> str | None:
    """`why_not` for a device: an interpreter of Triton serves every one."""
    assert launch is not None, "why_not() comes first"
    if launch.INTERPRETED:
        return None
    if device.type != "cuda":
        return f"needs a CUDA GPU, not {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        found, oldest = (".".join(map(str, version)) for version in (capability, OLDEST))
        return f"needs compute capability {oldest} or higher; this GPU has {found}"
    return None


@cache
def _warn(reason: str) -> None:
    warnings.warn(
        f"the GPU kernels are not used, plain torch is: backend 'gpu' {reason}", stacklevel=4
    )
