"""A store's matrices, read with nothing but its description: numpy and plain loops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file

Floats = NDArray[np.float32]


def read_group(store: Path, layer: int | None, name: str, step: int = 1) -> dict[str, Floats]:
    """The (rows, channels) matrices of a group, every ``step``-th column, weight by weight."""
    index = json.loads((store / "index.json").read_text())
    group = next(g for g in index["groups"] if (g["layer"], g["name"]) == (layer, name))
    rest = load_file(store / "rest.safetensors")
    label = "scale.head" if layer is None else f"scale.{layer}.{name}"
    size = group["channels"] * (len(group["matrices"]) if name == "mlp.neuron" else 1)
    scales = rest[label].numpy() if label in rest else np.ones(size, np.float32)
    records = (store / "records.bin").read_bytes()
    if name == "mlp.neuron":
        return _neurons(group, records, index["weights"], scales, step)
    columns = []
    for channel in range(0, group["channels"], step):
        unit, place = divmod(channel, group["block"])
        begin = group["offset"] + unit * group["record_bytes"] + place * group["stride"]
        column = records[begin : begin + group["stride"]]
        columns.append(_column(column, index["weights"], group["outputs"], scales[channel]))
    weights = np.stack(columns, axis=1)
    ends = np.cumsum(list(group["matrices"].values()))
    assert not weights[ends[-1] :].any(), "the padding is zero"
    return dict(zip(group["matrices"], np.split(weights, ends)[:-1], strict=True))


def _neurons(
    group: dict[str, Any], records: bytes, kind: str, scales: Floats, step: int
) -> dict[str, Floats]:
    """Of every matrix but the last the rows of every ``step``-th neuron, of that its columns."""
    found: dict[str, list[Floats]] = {matrix: [] for matrix in group["matrices"]}
    for neuron in range(0, group["channels"], step):
        begin = group["offset"] + neuron * group["record_bytes"]
        for place, matrix in enumerate(found):
            at = begin + place * group["stride"]
            scale = scales[neuron * len(found) + place]
            column = _column(records[at : at + group["stride"]], kind, group["outputs"], scale)
            assert not column[group["matrices"]["down"] :].any(), "the padding is zero"
            found[matrix].append(column[: group["matrices"]["down"]])
    made = {matrix: np.stack(columns) for matrix, columns in found.items()}
    return made | {"down": made["down"].T}


def _column(column: bytes, kind: str, outputs: int, scale: np.float32) -> Floats:
    if kind == "bf16":
        halves = np.frombuffer(column[: 2 * outputs], "<u2").astype(np.uint32) << 16
        return halves.view(np.float32)
    place, zero = (_place4, 8) if kind == "int4" else (_place8, 128)
    size = outputs // 2 if kind == "int4" else outputs
    multipliers = np.frombuffer(column[size : size + outputs // 32], np.int8)
    weights = np.empty(outputs, np.float32)
    for output in range(outputs):
        byte, shift = place(output)
        level = column[byte] >> shift & (15 if kind == "int4" else 255)
        weights[output] = scale * np.float32(multipliers[output // 32]) * (level - zero)
    return weights


def _place8(output: int) -> tuple[int, int]:
    """The byte that holds an output of int8."""
    tile, inside = divmod(output, 64)
    v, rest = divmod(inside, 16)
    line, j = divmod(rest, 4)
    return 64 * tile + 16 * line + 4 * v + j, 0


def _place4(output: int) -> tuple[int, int]:
    """The byte and the shift of the nibble that hold an output of int4."""
    tile, inside = divmod(output, 128)
    v, rest = divmod(inside, 32)
    half, lane = divmod(rest, 16)
    return 64 * tile + _place8(16 * v + lane)[0], 4 * half
