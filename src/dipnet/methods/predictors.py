"""Predictors of what a token will need: what `dipnet fit predictors` saves and Deja Vu runs.

For each layer a small network reads the residual stream (at `units.residual_place`) and scores the
layer's MLP neurons or its attention heads: ``w2 @ act(w1 @ x + b1) + b2``. One safetensors file
holds them; the key ``dipnet`` of its metadata says, as JSON, what they were fitted for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dipnet.described import Described, Size, Word
from dipnet.errors import InputError
from dipnet.files import write_file
from dipnet.units import LOOK_AHEADS, ModelSpec

Kind = Literal["mlp", "head"]
"""What is predicted: the neurons of an MLP, or the query heads of attention."""
Activation = Literal["none", "relu"]
"""What stands between a predictor's two matrices."""

KINDS: tuple[Kind, ...] = get_args(Kind)
FORMAT = "dipnet-predictors"
VERSION = 1
REMEDY = "fit some with `dipnet fit predictors MODEL --out FILE`"
KEY = "dipnet"
_PARTS = ("w1", "b1", "w2", "b2")


class PredictedModel(BaseModel):
    """The shape of the model that predictors were fitted on."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    family: Word
    activation: Word
    layers: Size
    width: Size
    neurons: Size
    heads: Size

    @classmethod
    def of(cls, spec: ModelSpec) -> PredictedModel:
        """What predictors have to know of a model of shape ``spec``."""
        return cls(
            family=spec.family,
            activation=spec.activation,
            layers=spec.layers,
            width=spec.width,
            neurons=spec.neurons,
            heads=spec.heads,
        )

    def units(self, kind: Kind) -> int:
        """What a predictor of that kind scores in one layer: neurons, or query heads."""
        return self.neurons if kind == "mlp" else self.heads

    def __str__(self) -> str:
        return (
            f"{self.family} ({self.activation}) of {self.layers} layers, width {self.width}, "
            f"{self.neurons} neurons and {self.heads} heads a layer"
        )


class Header(BaseModel):
    """What a file of predictors says of itself, the JSON in its metadata."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    format: Literal["dipnet-predictors"] = "dipnet-predictors"
    version: Literal[1] = 1
    model: PredictedModel
    look_ahead: Annotated[int, Field(ge=min(LOOK_AHEADS), le=max(LOOK_AHEADS))]
    activation: Activation = "none"
    kinds: Annotated[list[Kind], Field(min_length=1, max_length=len(KINDS))]
    card: dict[str, JsonValue]


@dataclass(frozen=True, eq=False)
class Predictor:
    """One layer's predictor: ``w1`` (rank, width), ``b1`` (rank,), ``w2`` (units, rank), ``b2``."""

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor

    @property
    def numbers(self) -> int:
        """Weights that a token reads to be scored."""
        return sum(getattr(self, part).numel() for part in _PARTS)

    def to(self, *, device: torch.device, dtype: torch.dtype) -> Predictor:
        """The same in another place or precision."""
        return Predictor(*(getattr(self, part).to(device, dtype) for part in _PARTS))


@dataclass(frozen=True, eq=False)
class Predictors:
    """The predictors of a model: for each kind one a layer, in order.

    ``look_ahead`` says how many blocks (attention or MLP) ahead of its own each reads the residual
    stream; ``card`` is what is known of the fit, as JSON. Raises InputError when the matrices do
    not fit ``model``.
    """

    model: PredictedModel
    look_ahead: int
    layers: Mapping[Kind, Sequence[Predictor]] = field(repr=False)
    activation: Activation = "none"
    card: Mapping[str, Any] = field(default_factory=dict, repr=False)
    source: str = ""

    def __post_init__(self) -> None:
        for kind, layers in self.layers.items():
            if len(layers) != self.model.layers:
                raise InputError(
                    f"there are {kind} predictors for {len(layers)} layers of {self.model.layers}"
                )
            for layer, predictor in enumerate(layers):
                self._check(kind, layer, predictor)

    def _check(self, kind: Kind, layer: int, predictor: Predictor) -> None:
        rank = predictor.w1.shape[0] if predictor.w1.dim() == 2 else 0
        units, width = self.model.units(kind), self.model.width
        wanted = {"w1": (rank, width), "b1": (rank,), "w2": (units, rank), "b2": (units,)}
        for part, shape in wanted.items():
            found = tuple(getattr(predictor, part).shape)
            if found != shape or not rank:
                raise InputError(
                    f"the {kind} predictor of layer {layer} has {part} of shape {found}, for "
                    f"{self.model} it must be {shape}"
                )

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What is predicted."""
        return tuple(kind for kind in KINDS if kind in self.layers)

    def numbers(self, kind: Kind, layer: int | None = None) -> int:
        """Weights that a token reads for the predictors of a kind, of one layer or of all."""
        layers = self.layers[kind] if layer is None else (self.layers[kind][layer],)
        return sum(predictor.numbers for predictor in layers)

    def scores(self, kind: Kind, layer: int, x: Tensor) -> Tensor:
        """(..., width) residual stream -> (..., units) scores, logits in at least float32.

        Computed on the device of ``x``. Takes no gradient.
        """
        x = x.detach()
        x = x if x.dtype == torch.float64 else x.float()
        predictor = self._near(kind, layer, x)
        inner = torch.nn.functional.linear(x, predictor.w1, predictor.b1)
        if self.activation == "relu":
            inner = inner.relu()
        return torch.nn.functional.linear(inner, predictor.w2, predictor.b2)

    def _near(self, kind: Kind, layer: int, x: Tensor) -> Predictor:
        """A layer's predictor on the device and in the precision of ``x``, kept for the next."""
        key = kind, layer, x.device, x.dtype
        if key not in self._placed:
            self._placed[key] = self.layers[kind][layer].to(device=x.device, dtype=x.dtype)
        return self._placed[key]

    @cached_property
    def _placed(self) -> dict[tuple[Kind, int, torch.device, torch.dtype], Predictor]:
        return {}

    def check_model(self, spec: ModelSpec) -> None:
        """Raise InputError, naming both, when these are the predictors of another model."""
        model = PredictedModel.of(spec)
        if self.model != model:
            raise InputError(
                f"these predictors are for a {self.model}; this model is a {model}: fit "
                "predictors on it (dipnet fit predictors)"
            )

    def save(self, path: str | Path) -> None:
        """Write them to one safetensors file, whole or not at all; InputError when that fails."""
        tensors = {
            f"{kind}.{layer}.{part}": getattr(predictor, part).detach().cpu().contiguous().clone()
            for kind, layers in self.layers.items()
            for layer, predictor in enumerate(layers)
            for part in _PARTS
        }
        header = Header(
            model=self.model,
            look_ahead=self.look_ahead,
            activation=self.activation,
            kinds=list(self.kinds),
            card=dict(self.card),
        )
        write_file(Path(path), save(tensors, metadata={KEY: header.model_dump_json()}))

    @classmethod
    def load(cls, path: str | Path) -> Predictors:
        """The predictors in a file, in float32, all of them checked.

        Raises InputError, in one line, when it is no such file, of another version or damaged.
        """
        path = Path(path)
        if not path.is_file():
            found = "is no file" if path.exists() else "does not exist"
            raise InputError(f"the predictors {path} {found}: {REMEDY}")
        try:
            with safe_open(path, framework="pt") as file:
                said = (file.metadata() or {}).get(KEY, "{}")
                header = _HEADERS.parse(said.encode(), str(path))
                layers = {kind: _read(path, file, kind, header) for kind in header.kinds}
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{path} holds no predictors, or is damaged: {error}; {REMEDY}"
            ) from None
        try:
            return cls(
                model=header.model,
                look_ahead=header.look_ahead,
                layers=layers,
                activation=header.activation,
                card=header.card,
                source=str(path),
            )
        except InputError as error:
            raise InputError(f"{path} is damaged: {error}; {REMEDY}") from None


def _read(path: Path, file: Any, kind: Kind, header: Header) -> list[Predictor]:
    """The predictors of one kind; InputError when a tensor is missing or not finite."""
    held = set(file.keys())
    found = []
    for layer in range(header.model.layers):
        parts = []
        for name in (f"{kind}.{layer}.{part}" for part in _PARTS):
            if name not in held:
                raise InputError(f"{path} is damaged: it has no tensor {name}")
            tensor = file.get_tensor(name)
            if not tensor.is_floating_point() or not tensor.isfinite().all():
                raise InputError(f"{path} is damaged: {name} does not hold finite numbers")
            parts.append(tensor.float())
        found.append(Predictor(*parts))
    return found


_HEADERS = Described("file of predictors", FORMAT, VERSION, Header, REMEDY)
