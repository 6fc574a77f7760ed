"""A store's index: what its records are and where they lie, checked before anything is read.

Nothing in a store is trusted: every number that later becomes an offset, a size or a shape is
checked here against the others and against the files.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dipnet.described import Bytes, Digest, Size, Word
from dipnet.errors import InputError, complaint
from dipnet.store.geometry import (
    GROUP_ALIGNMENT,
    MAX_CHANNELS,
    WEIGHTS,
    Unit,
    Weights,
    column_stride,
    padded_outputs,
    record_bytes,
)

FORMAT = "dipnet-store"
VERSIONS: dict[Unit, Literal[1, 2]] = {"column": 1, "neuron": 2}
"""The version of a store by what a record of its MLP holds."""
INDEX_NAME, RECORDS_NAME, REST_NAME = "index.json", "records.bin", "rest.safetensors"
ALLOCATION_NAME = "allocation.json"
MAX_INDEX_BYTES = 64 << 20
"""An index of a thousand layers has a megabyte; what is larger is no index."""

GroupName = Literal["attn.in", "attn.out", "mlp.in", "mlp.hidden", "mlp.neuron", "head"]
LAYER_GROUPS: dict[Unit, tuple[GroupName, ...]] = {
    "column": ("attn.in", "attn.out", "mlp.in", "mlp.hidden"),
    "neuron": ("attn.in", "attn.out", "mlp.neuron"),
}
"""The groups of a layer, in the order of the file."""
MATRICES: dict[str, tuple[tuple[str, ...], ...]] = {
    "attn.in": (("q", "k", "v"),),
    "attn.out": (("o",),),
    "mlp.in": (("gate", "up"), ("up",)),
    "mlp.hidden": (("down",),),
    "mlp.neuron": (("gate", "up", "down"), ("up", "down")),
    "head": (("head",),),
}
"""The matrices that a group may hold, in the order of its outputs."""

_SETTINGS = ConfigDict(frozen=True, strict=True, extra="ignore")


class Group(BaseModel):
    """The matrices of a layer that share an input, stored column by column, or an MLP's neurons.

    ``layer`` is None for the head. ``matrices`` maps each matrix to its rows, in the order in which
    they follow each other in the ``outputs``, which are padded with zero rows. ``channels`` counts
    the input channels; a unit is ``block`` neighbouring ones.

    Of ``mlp.neuron`` the units are the neurons, which are ``down``'s input channels, and the
    ``outputs`` are ``down``'s: a record holds a neuron's row of every matrix before it, which has
    as many numbers, and its column.
    """

    model_config = _SETTINGS

    layer: Annotated[int, Field(ge=0, lt=2**31)] | None
    name: GroupName
    matrices: dict[str, Size]
    channels: Size
    block: Size
    outputs: Size
    stride: Bytes
    record_bytes: Bytes
    offset: Bytes

    @property
    def label(self) -> str:
        """What messages call the group."""
        return self.name if self.layer is None else f"{self.name} of layer {self.layer}"

    @property
    def key(self) -> tuple[int | None, str]:
        """The layer and the name: what a site is identified by."""
        return self.layer, self.name

    @property
    def units(self) -> int:
        """The number of records."""
        return self.channels // self.block

    @property
    def bytes(self) -> int:
        """The size of all records together."""
        return self.units * self.record_bytes

    @property
    def end(self) -> int:
        """The offset behind the last record."""
        return self.offset + self.bytes

    @property
    def input_rows(self) -> int:
        """Rows of other matrices that come before a record's columns: those of a neuron."""
        return len(self.matrices) - 1 if self.name == "mlp.neuron" else 0

    @property
    def columns(self) -> int:
        """Columns of a record, and rows that are stored like columns."""
        return self.input_rows + self.block

    @property
    def rows(self) -> int:
        """The outputs that are no padding."""
        return self.matrices["down"] if self.input_rows else sum(self.matrices.values())

    def shape(self, matrix: str) -> tuple[int, int]:
        """The (rows, columns) of one of the matrices."""
        is_input = self.input_rows and matrix != "down"
        return self.matrices[matrix], self.rows if is_input else self.channels

    @property
    def scale_name(self) -> str:
        """The name of the channels' scales in rest.safetensors."""
        return "scale.head" if self.layer is None else f"scale.{self.layer}.{self.name}"

    def output_rows(self, matrix: str) -> slice:
        """Which of the matrices' rows, one matrix below the other, are ``matrix``."""
        start = 0
        for name, rows in self.matrices.items():
            if name == matrix:
                return slice(start, start + rows)
            start += rows
        raise KeyError(matrix)

    def offset_of(self, unit: int) -> int:
        """Where the record of a unit begins in records.bin."""
        return self.offset + unit * self.record_bytes


class Index(BaseModel):
    """Everything that index.json says; groups are in the order of their offsets.

    ``allocation_sha256`` is the checksum of allocation.json, None where the store has none.
    """

    model_config = _SETTINGS

    format: Literal["dipnet-store"] = "dipnet-store"
    version: Literal[1, 2] = 1
    weights: Weights
    family: Word
    activation: Word
    layers: Size
    context: Annotated[int, Field(ge=1, lt=2**63)]
    source: str
    neurons_permuted: bool
    records_bytes: Bytes
    rest_bytes: Bytes
    rest_sha256: Digest
    allocation_sha256: Digest | None = None
    groups: tuple[Group, ...]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _check_presence(self)
        _check_geometry(self)
        _check_shapes(self)
        return self

    @property
    def unit(self) -> Unit:
        """What a record of the MLP holds."""
        return "neuron" if self.version == VERSIONS["neuron"] else "column"

    @property
    def first_layer(self) -> tuple[Group, ...]:
        """The groups of layer 0: those of the others are like them."""
        return self.groups[: len(LAYER_GROUPS[self.unit])]

    @property
    def neurons(self) -> Group:
        """The group of layer 0 whose units are its neurons, or blocks of them."""
        return self.first_layer[-1]

    @cached_property
    def _positions(self) -> dict[tuple[int | None, str], int]:
        return {group.key: at for at, group in enumerate(self.groups)}

    def position(self, layer: int | None, name: str) -> int:
        """The number of a group: its position in the index, which its checksums contain."""
        return self._positions[layer, name]

    def group(self, layer: int | None, name: str) -> Group:
        """The group of a layer (None: of the head) by its name."""
        return self.groups[self.position(layer, name)]


def read_index(folder: str | Path) -> Index:
    """The index of the store in ``folder``, checked as a whole and against the files' sizes.

    Raises InputError, in one line, when the folder is no store, is of another version, or its index
    or the size of a file is wrong.
    """
    folder = Path(folder)
    index = parse_index(_read(folder), folder / INDEX_NAME)
    for name, expected in ((RECORDS_NAME, index.records_bytes), (REST_NAME, index.rest_bytes)):
        _check_size(folder / name, expected)
    return index


def parse_index(content: bytes, file: Path = Path(INDEX_NAME)) -> Index:
    """The index that the bytes of ``file`` hold; InputError names what is wrong with it."""
    try:
        _check_version(content, file)
        return Index.model_validate_json(content)
    except ValidationError as error:
        raise InputError(f"{file} is damaged: {complaint(error)}; {REMEDY}") from None


REMEDY = "pack the model again"


class _Head(BaseModel):
    """What must be understood before the rest can be."""

    model_config = _SETTINGS

    format: str
    version: int
    weights: str


def _check_version(content: bytes, file: Path) -> None:
    head = _Head.model_validate_json(content)
    if head.format != FORMAT:
        raise InputError(f"{file} is no index of a dipnet store: give the folder that pack made")
    if head.version not in VERSIONS.values():
        raise InputError(
            f"{file} is of version {str(head.version)[:20]} and this dipnet reads "
            f"{' and '.join(map(str, VERSIONS.values()))}: use the dipnet that packed it, or pack "
            "the model again"
        )
    if head.weights not in WEIGHTS:
        raise InputError(
            f"{file} has weights of an unknown kind {head.weights[:40]!r}; known: "
            f"{', '.join(WEIGHTS)}: pack the model again with --weights"
        )


def _read(folder: Path) -> bytes:
    file = folder / INDEX_NAME
    if not folder.is_dir():
        raise InputError(f"there is no folder {str(folder)!r}: give a store that dipnet pack made")
    if not file.is_file():
        partial = folder.name.endswith(".partial")
        remedy = "run dipnet pack again to finish it" if partial else "make one with dipnet pack"
        raise InputError(f"{str(folder)!r} is no store, it has no {INDEX_NAME}: {remedy}")
    try:
        with file.open("rb") as opened:
            content = opened.read(MAX_INDEX_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror or error}") from None
    if len(content) > MAX_INDEX_BYTES:
        raise InputError(f"{file} is larger than any index: {REMEDY}")
    return content


def _check_size(file: Path, expected: int) -> None:
    try:
        size = file.stat().st_size
    except OSError as error:
        raise InputError(
            f"{file} cannot be read ({error.strerror}): copy the store again, or {REMEDY}"
        ) from None
    if size != expected:
        raise InputError(
            f"{file} has {size} bytes, its index says {expected}: it was cut off or changed; copy "
            f"the store again, or {REMEDY}"
        )


def _check_presence(index: Index) -> None:
    """Every layer has its groups, in order, and then comes the head."""
    names = LAYER_GROUPS[index.unit]
    if len(index.groups) != len(names) * index.layers + 1:
        raise ValueError(f"{index.layers} layers need {len(names) * index.layers + 1} groups")
    for number, group in enumerate(index.groups):
        layer, place = divmod(number, len(names))
        head = layer == index.layers
        wanted = (None, "head") if head else (layer, names[place])
        if (group.layer, group.name) != wanted:
            raise ValueError(f"group {number} is {group.label}, out of its place")


def _check_geometry(index: Index) -> None:
    """Sizes follow from the shapes, and no record lies outside the file or on another."""
    end = 0
    for group in index.groups:
        _check_group(group, index.weights)
        if group.offset < end:
            raise ValueError(f"{group.label} overlaps the group before it")
        end = group.end
        if end > index.records_bytes:
            raise ValueError(f"{group.label} ends at {end}, behind the end of {RECORDS_NAME}")


def _check_group(group: Group, weights: Weights) -> None:
    if tuple(group.matrices) not in MATRICES[group.name]:
        raise ValueError(f"{group.label} cannot hold the matrices {', '.join(group.matrices)[:80]}")
    if group.channels % group.block:
        raise ValueError(f"{group.label}: blocks of {group.block} do not divide {group.channels}")
    if group.block != 1 and group.name != "mlp.hidden":
        raise ValueError(f"{group.label} cannot have blocks")
    if weights != "bf16" and group.channels > MAX_CHANNELS:
        raise ValueError(f"{group.label}: sums of more than {MAX_CHANNELS} channels overflow")
    if group.offset % GROUP_ALIGNMENT:
        raise ValueError(f"{group.label}: offset is no multiple of {GROUP_ALIGNMENT}")
    stride = column_stride(weights, padded_outputs(group.rows))
    expected = {
        "outputs": padded_outputs(group.rows),
        "stride": stride,
        "record_bytes": record_bytes(stride, group.columns),
    }
    for field, value in expected.items():
        if getattr(group, field) != value:
            raise ValueError(f"{group.label}: {field} is {getattr(group, field)}, must be {value}")


def _check_shapes(index: Index) -> None:
    """All layers are alike, and what one group gives is what the next one takes."""
    shapes = [_shape(group) for group in index.groups[:-1]]
    for number, shape in enumerate(shapes):
        if shape != shapes[number % len(index.first_layer)]:
            raise ValueError(f"{index.groups[number].label} has another shape than that of layer 0")
    reads, attention, mlp, hidden = *index.first_layer[:3], index.neurons
    whole = index.unit == "neuron"
    widths = {reads.channels, attention.rows, hidden.rows, mlp.rows if whole else mlp.channels}
    if len(widths) != 1:
        raise ValueError("the groups disagree about the model's width")
    if attention.channels != reads.matrices["q"]:
        raise ValueError("attn.out takes other channels than attn.in gives")
    if reads.matrices["k"] != reads.matrices["v"]:
        raise ValueError("k and v of attn.in differ in size")
    if {hidden.channels} != {rows for name, rows in mlp.matrices.items() if name != "down"}:
        raise ValueError(f"{hidden.name} takes other channels than its matrices give")


def _shape(group: Group) -> tuple[list[tuple[str, int]], int, int]:
    return list(group.matrices.items()), group.channels, group.block
