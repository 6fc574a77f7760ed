"""The kernels in CUDA C++ on a CPU: compiled by g++, with a `ptx.cuh` that says what PTX means.

What a GPU alone can show stays with it: races, what is out of bounds, speed. The logic is here, for
CI: which thread adds what, how blocks of a cluster meet, what is written where.
"""

from __future__ import annotations

import ctypes
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dipnet.kernels.gpu import nvrtc

Macros = tuple[tuple[str, int], ...]
OPTIONS = ("-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-pthread", "-fno-strict-aliasing")


class OnCPU:
    """What `nvrtc` does, in a folder that is given."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: dict[tuple[str, Macros], Any] = {}
        for room in (files(nvrtc.__package__), files(__package__)):  # the latter's ptx.cuh stays
            for file in room.iterdir():
                if file.name.endswith((".cu", ".cuh", ".cpp")):
                    (folder / file.name).write_bytes(file.read_bytes())

    def function(self, source: str, name: str, _device: torch.device, macros: Macros) -> Any:
        """A kernel of a file of the room, compiled."""
        if (source, macros) not in self.made:
            values = dict(macros)
            own = {"SOURCE": f'"{source}"', "KERNEL": name}
            own["CLUSTER_BLOCKS"] = str(values.get("PARTS") or values.get("BLOCKS", 1))
            named = [f"-D{macro}={value}" for macro, value in (own | values).items()]
            library = self.folder / f"{len(self.made)}.so"
            command = ["g++", *OPTIONS, *named, self.folder / "run.cpp", "-o", library]
            subprocess.run(command, check=True)
            self.made[source, macros] = ctypes.CDLL(str(library)).run
        return self.made[source, macros]

    def launch(
        self, kernel: Any, grid: tuple[int, int], threads: int, arguments: tuple[Any, ...]
    ) -> None:
        """Run all blocks, and come back."""
        values = [_argument(given) for given in arguments]
        pointers = [ctypes.cast(ctypes.pointer(value), ctypes.c_void_p) for value in values]
        kernel(*grid, threads, (ctypes.c_void_p * len(pointers))(*pointers))


def _argument(given: Tensor | int | float | None) -> Any:
    if isinstance(given, int):
        return ctypes.c_int(given)
    if isinstance(given, float):
        return ctypes.c_float(given)
    return ctypes.c_void_p(None if given is None else given.data_ptr())
