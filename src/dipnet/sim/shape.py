"""The shape of a model that need not be there: all that a simulation knows of it.

Checked when it is made: a shape comes from a file, and its numbers become offsets and sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter

from dipnet.registry import unknown
from dipnet.units import ATTENTION_MATRICES, DecoderMatrices

SETTINGS = ConfigDict(strict=True, extra="ignore", revalidate_instances="always")
Size = Annotated[int, Field(ge=1, lt=2**31)]
"""A number of rows, columns, units or layers."""
Count = Annotated[int, Field(ge=0, lt=2**62)]
Word = Annotated[str, Field(min_length=1, max_length=200)]

SHAPES = {path.stem: path for path in sorted(Path(__file__).with_name("shapes").glob("*.json"))}
"""The files of the shapes that come with dipnet, by name."""

_ALWAYS = {*ATTENTION_MATRICES, "up", "down"}


@dataclass(frozen=True)
class ModelShape(DecoderMatrices):
    """What a simulation knows of a model.

    ``matrices`` maps a name (``gate``, ``up``, ``down``, ``q``, ``k``, ``v``, ``o``) to its
    (outputs, inputs); every layer has the same, and ``gate`` may be missing. ``other_weights``
    counts what a token reads beside those matrices: norms, biases, the output head, and one row of
    each embedding table. ``vocabulary`` is the number of the head's outputs, ``kv_width`` the
    numbers that a token's keys and values have in one layer. Raises ValueError when matrices are
    missing or do not fit each other.
    """

    __pydantic_config__ = SETTINGS

    name: Annotated[str, Field(max_length=1000)]
    family: Word
    activation: Word
    layers: Size
    matrices: Mapping[str, tuple[Size, Size]]
    other_weights: Count
    vocabulary: Size
    kv_width: Size

    def __post_init__(self) -> None:
        names = set(self.matrices)
        if not _ALWAYS <= names <= _ALWAYS | {"gate"}:
            raise ValueError(
                f"matrices are {', '.join(sorted(names))[:80]}; they must be q, k, v, o, up and "
                "down, and gate where there is one"
            )
        self._check_fit()

    def _check_fit(self) -> None:
        """What one matrix gives is what the next one takes."""
        outputs = {name: rows for name, (rows, _) in self.matrices.items()}
        inputs = {name: columns for name, (_, columns) in self.matrices.items()}
        width = {outputs["o"], outputs["down"]} | {inputs[name] for name in ("q", "k", "v")}
        width |= {inputs[name] for name in self.input_matrices}
        if len(width) != 1:
            raise ValueError("the matrices disagree about the model's width")
        if inputs["o"] != outputs["q"] or outputs["k"] != outputs["v"]:
            raise ValueError("the matrices of attention do not fit each other")
        if {outputs[name] for name in self.input_matrices} != {inputs["down"]}:
            raise ValueError("the matrices of the MLP do not fit each other")


def load_shape(name: str) -> ModelShape:
    """The shape of a well-known model; InputError lists those that come with dipnet."""
    if name not in SHAPES:
        raise unknown("shape", name, SHAPES)
    return TypeAdapter(ModelShape).validate_json(SHAPES[name].read_bytes())
