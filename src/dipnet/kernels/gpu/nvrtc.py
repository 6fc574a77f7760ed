"""CUDA C++ compiled when it is first needed, with NVIDIA's own bindings (package cuda-bindings,
which PyTorch's CUDA builds bring along)."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from dipnet.errors import BackendError
from dipnet.kernels.gpu.common import HOPPER, INTERPRETED

try:
    from cuda.bindings import driver, nvrtc
except ImportError:
    driver = nvrtc = None


@cache
def serves(device: torch.device) -> bool:
    """Whether the kernels in CUDA C++ can be compiled for a device, and launched from here."""
    if INTERPRETED or driver is None:
        return False
    return torch.cuda.get_device_capability(device) >= HOPPER


@cache
def compiled(
    source: str, name: str, architecture: str, macros: tuple[tuple[str, int], ...]
) -> bytes:
    """The machine code of a file of this room, for an architecture such as "sm_90"."""
    room = files(__package__)
    headers = [file for file in room.iterdir() if file.name.endswith(".cuh")]
    texts, names = zip(*((h.read_bytes(), h.name.encode()) for h in headers), strict=True)
    given = (room.joinpath(source).read_bytes(), source.encode(), len(headers), texts, names)
    program = _checked(nvrtc.nvrtcCreateProgram(*given))
    options = [f"--gpu-architecture={architecture}", "--std=c++17"]
    options += [f"-D{macro}={value}" for macro, value in macros]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        lines = " ".join(log.decode(errors="replace").split())
        raise BackendError(f"{source} does not compile for {architecture}: {lines[:400]}")
    code = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc.nvrtcGetCUBIN(program, code))
    return code


@cache
def function(
    source: str, name: str, device: torch.device, macros: tuple[tuple[str, int], ...]
) -> Any:
    """A kernel of a file of this room, loaded on a device."""
    major, minor = torch.cuda.get_device_capability(device)
    code = compiled(source, name, f"sm_{major}{minor}", macros)
    library = _checked(driver.cuLibraryLoadData(code, [], [], 0, [], [], 0))
    kernel = _checked(driver.cuLibraryGetKernel(library, name.encode()))
    loaded = _checked(driver.cuKernelGetFunction(kernel))
    large_clusters = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
    _checked(driver.cuFuncSetAttribute(loaded, large_clusters, 1))
    return loaded


def launch(
    kernel: Any,
    grid: tuple[int, int],
    threads: int,
    arguments: tuple[Tensor | int | float | None, ...],
) -> None:
    """Launch on the current stream; the kernel may start while the one before it ends."""
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = *grid, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.hStream = torch.cuda.current_stream().cuda_stream
    overlap = driver.CUlaunchAttribute()
    overlap.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    overlap.value.programmaticStreamSerializationAllowed = 1
    config.attrs, config.numAttrs = [overlap], 1
    values, kinds = zip(*map(_argument, arguments), strict=True)
    _checked(driver.cuLaunchKernelEx(config, kernel, (values, kinds), 0))


def _argument(given: Tensor | int | float | None) -> tuple[int | float, type]:
    """A kernel's argument, and its kind: a pointer where it is no number."""
    if isinstance(given, int):
        return given, ctypes.c_int
    if isinstance(given, float):
        return given, ctypes.c_float
    return 0 if given is None else given.data_ptr(), ctypes.c_void_p


def _checked(result: tuple[Any, ...]) -> Any:
    """What a call of the bindings returned beside its status."""
    status, *values = result
    if status.value:
        raise BackendError(f"CUDA says {status.name}: run on another GPU, or backend='reference'")
    return values[0] if values else None
