"""Factors: what channels' magnitudes are multiplied with before DIP compares them.

One safetensors file that `dipnet fit scores` writes: for layer l and site s the tensor ``l.s``, one
positive float32 number a channel. The key ``dipnet`` of its metadata is JSON that says which model
they are for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, JsonValue
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dipnet.described import CLOSED, Described
from dipnet.errors import InputError
from dipnet.files import write_file
from dipnet.methods.allocation import Shapes
from dipnet.methods.base import SiteKey
from dipnet.units import ModelSpec

FORMAT = "dipnet-scores"
VERSION = 1
REMEDY = "make them with `dipnet fit scores MODEL --out FILE`"
KEY = "dipnet"


class Header(BaseModel):
    """What a file of factors says of itself; ``fit`` is what is known of the fit, for people."""

    model_config = CLOSED

    format: Literal["dipnet-scores"] = "dipnet-scores"
    version: Literal[1] = 1
    model: Shapes
    fit: dict[str, JsonValue]


@dataclass(frozen=True, eq=False)
class Factors:
    """(channels,) float32 factors by site, of one model.

    Raises InputError when one is not of its site's shape, or not positive and finite.
    """

    model: Shapes
    values: Mapping[SiteKey, Tensor] = field(repr=False)
    fit: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for (layer, name), values in self.values.items():
            if not 0 <= layer < self.model.layers:
                raise InputError(f"{layer}.{name} is of no layer: there are {self.model.layers}")
            channels = self.model.channels(name)
            if tuple(values.shape) != (channels,) or not _usable(values):
                raise InputError(f"{layer}.{name} must be {channels} positive, finite numbers")

    def near(self, layer: int, name: str, device: torch.device) -> Tensor | None:
        """A site's factors on a device, kept there for the next time; None where it has none."""
        key = layer, name
        if key not in self.values:
            return None
        if (key, device) not in self._placed:
            self._placed[key, device] = self.values[key].to(device, torch.float32)
        return self._placed[key, device]

    @cached_property
    def _placed(self) -> dict[tuple[SiteKey, torch.device], Tensor]:
        return {}

    def check_model(self, spec: ModelSpec) -> None:
        """Raise InputError, naming both, when these are another model's."""
        self.model.check(spec, "these scores are")

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all; InputError when that fails."""
        tensors = {
            f"{layer}.{name}": values.detach().cpu().float().contiguous()
            for (layer, name), values in self.values.items()
        }
        header = Header(model=self.model, fit=dict(self.fit))
        write_file(Path(path), save(tensors, metadata={KEY: header.model_dump_json()}))

    @classmethod
    def load(cls, path: str | Path) -> Factors:
        """The factors in a file; InputError, in one line, when it holds none."""
        path = Path(path)
        if not path.is_file():
            found = "is no file" if path.exists() else "does not exist"
            raise InputError(f"the scores {path} {found}: {REMEDY}")
        try:
            with safe_open(path, framework="pt") as file:
                said = (file.metadata() or {}).get(KEY, "{}")
                header = _HEADERS.parse(said.encode(), str(path))
                names = list(file.keys())
                values = {_key(name, path): file.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} holds no scores, or is damaged: {error}; {REMEDY}") from None
        try:
            return cls(header.model, values, header.fit)
        except InputError as error:
            raise InputError(f"{path} is damaged: {error}; {REMEDY}") from None


def _key(name: str, path: Path) -> SiteKey:
    layer, _, site = name.partition(".")
    if not layer.isdigit():
        raise InputError(f"{path} is damaged: {name!r} is no site; {REMEDY}")
    return int(layer), site


def _usable(values: Tensor) -> bool:
    return values.is_floating_point() and bool((values.isfinite() & (values > 0)).all())


_HEADERS = Described("file of scores", FORMAT, VERSION, Header, REMEDY)
