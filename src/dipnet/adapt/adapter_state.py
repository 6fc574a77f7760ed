"""A training's state on the disk: one safetensors file, replaced as a whole.

It holds the adapters, AdamW's moments, the best adapters so far, and in its metadata how far it is
and of what training. Nothing else decides what comes next: the order of the windows and the
learning rate follow from the step, so that a continued training gives the bits of one that never
stopped.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dipnet.errors import InputError
from dipnet.files import make_folder, whole_file
from dipnet.units import size_text

STATE_NAME = "training.safetensors"
FORMAT = "dipnet-adapters-training/1"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
STATES_HELD = 2
"""At a time: a state and the one that replaces it."""
AGAIN = "make room and repeat the command"
CONTINUE = f"{AGAIN}, it goes on where it stopped"


@dataclass
class Course:
    """How far a training is, and how it went.

    ``history`` has for each measurement the step, the mean loss since the one before (None at step
    0) and the held-out perplexity; ``losses`` those of the steps since. ``best`` is the step that
    the best adapters are of. ``tokens`` were trained on, in ``seconds``.
    """

    step: int = 0
    best: int = 0
    tokens: int = 0
    seconds: float = 0.0
    history: list[tuple[int, float | None, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def best_perplexity(self) -> float:
        """The lowest held-out perplexity."""
        return min(perplexity for _, _, perplexity in self.history)


@dataclass
class State:
    """A training's tensors: adapters, the best of them, and two moments a parameter."""

    weights: dict[str, Tensor]
    best: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]
    course: Course

    def tensors(self) -> dict[str, Tensor]:
        """All of it by unique names, on the CPU."""
        groups: dict[str, Mapping[str, Tensor]] = {"weights": self.weights, "best": self.best}
        groups |= self.moments
        return {
            f"{group}/{name}": tensor.detach().cpu().contiguous()
            for group, held in groups.items()
            for name, tensor in held.items()
        }


class StateFile:
    """The state of one training in its folder; ``identity`` says which training it is."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.path = folder / STATE_NAME
        self.identity = json.loads(json.dumps(identity))

    def write(self, state: State) -> None:
        """Replace the file; InputError when there is no room, and the old one stays."""
        course = json.dumps(asdict(state.course))
        said = {"format": FORMAT, "identity": json.dumps(self.identity), "course": course}
        with write_errors(self.path.parent), whole_file(self.path) as file:
            file.write(save(state.tensors(), metadata=said))

    def read(self, device: torch.device) -> State | None:
        """What an interrupted training left; None where there is nothing.

        Raises InputError when the file is damaged or another training's.
        """
        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, framework="pt", device=str(device)) as file:
                said = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            identity, course = dict(json.loads(said["identity"])), json.loads(said["course"])
            state = _state(tensors, course)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError):
            raise self._foreign("is damaged or no state of a training") from None
        for name, value in self.identity.items():
            if identity.get(name) != value:
                raise self._foreign(f"is of a training with another {name}")
        return state

    def remove(self) -> None:
        """Forget the training: it is finished."""
        self.path.unlink(missing_ok=True)

    def _foreign(self, reason: str) -> InputError:
        return InputError(
            f"{self.path} {reason}: repeat its own command to continue it, remove it to begin "
            "anew, or name another folder"
        )


def _state(tensors: Mapping[str, Tensor], course: dict[str, Any]) -> State:
    """From a file's tensors and what its metadata says of the course."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        group, _, key = name.partition("/")
        groups.setdefault(group, {})[key] = tensor
    history = [(step, loss, perplexity) for step, loss, perplexity in course.pop("history")]
    weights, best = groups.pop("weights"), groups.pop("best")
    return State(weights, best, groups, Course(**course, history=history))


@contextmanager
def write_errors(folder: Path, remedy: str = CONTINUE) -> Iterator[None]:
    """Turn what the system says of a folder that cannot be written into one line.

    ``remedy`` is for a disk that is full.
    """
    make_folder(folder)
    try:
        yield
    except (OSError, InputError, SafetensorError) as raised:
        # An error of ours or of safetensors may stand for one of the system.
        error = raised if isinstance(raised, OSError) else raised.__context__
        full = isinstance(error, OSError) and error.errno in FULL
        if full or os.strerror(errno.ENOSPC) in str(raised):
            raise InputError(f"no room is left for {folder}: {remedy}") from None
        if isinstance(raised, InputError):
            raise
        raise InputError(f"cannot write {folder}: {raised}") from None


def check_room(folder: Path, needed: int) -> None:
    """Raise InputError when a disk has not so many bytes left: asked before hours of work."""
    make_folder(folder)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"adapters, merged weights and the training's state need {size_text(needed)} in "
            f"{folder}, and {size_text(free)} are free: make room, or name a folder on another disk"
        )
