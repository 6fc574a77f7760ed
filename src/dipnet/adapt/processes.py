"""The processes that train together: those of `accelerate launch`, or this one alone."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Protocol, cast

import torch


class Processes(Protocol):
    """What accelerate's `PartialState` says of them."""

    num_processes: int
    process_index: int
    is_main_process: bool
    device: torch.device

    def wait_for_everyone(self) -> None:
        """Return when all processes have come here."""


@dataclass(frozen=True)
class _Alone:
    """One process, which sets nothing up: accelerate's state would stay for good."""

    device: torch.device
    num_processes: int = 1
    process_index: int = 0
    is_main_process: bool = True

    def wait_for_everyone(self) -> None:
        """There is nobody to wait for."""


def processes(device: str = "cuda") -> Processes:
    """Those that were launched together, to train on the CPU or each on a GPU of its own."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return cast(Processes, _Alone(torch.device(device)))
    from accelerate import PartialState

    return cast(Processes, PartialState(cpu=device == "cpu"))
