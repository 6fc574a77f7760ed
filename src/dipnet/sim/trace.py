"""Traces: which units each token wanted at each site, in a file (docs/trace-format.md).

A trace is a safetensors file, read in slices from the mapped file: memory does not grow with it.
Nothing in it is trusted: its sizes are checked against each other before any is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError, model_validator
from safetensors import SafetensorError, safe_open

from dipnet.cache import check_policy
from dipnet.errors import InputError, complaint
from dipnet.sim.shape import SETTINGS, ModelShape, Size, Word
from dipnet.store.geometry import round_up

FORMAT = "dipnet-trace"
VERSION = 1
KEY = "dipnet"
"""The file's metadata has everything but the tensors under this key."""
ROW_ALIGNMENT = 8
"""Rows are whole eight-byte words, so that the tensors behind them are aligned."""

Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
SITE_NAMES = ("attn.in", "attn.out", "attn.head", "mlp.in", "mlp.hidden", "mlp.neuron")


@dataclass(frozen=True)
class TraceSite:
    """A site as a trace describes it.

    ``matrices`` maps the matrices that its mask thins to the weights that a unit brings along in
    each; ``density`` is the share of its ``units`` that the method aimed to keep.
    """

    __pydantic_config__ = SETTINGS

    layer: Annotated[int, Field(ge=0, lt=2**31)]
    name: Word
    units: Size
    block: Size
    density: Share
    matrices: Mapping[str, Annotated[int, Field(ge=1, lt=2**62)]]

    @property
    def key(self) -> tuple[int, str]:
        """The layer and the name: what a site is identified by."""
        return self.layer, self.name

    @property
    def weights_per_unit(self) -> int:
        """Weights that one unit brings along, over all matrices."""
        return sum(self.matrices.values())


@dataclass(frozen=True)
class TraceCache:
    """The caches that a cache-aware method decided its masks with, empty at the first token.

    ``slots`` has one number for each site, in the order of the sites; ``gamma`` is what the scores
    of units that were not resident were multiplied with.
    """

    __pydantic_config__ = SETTINGS

    policy: Word
    slots: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...]
    gamma: Share


class Header(BaseModel):
    """What a trace says of itself, the JSON in its metadata."""

    model_config = {**SETTINGS, "frozen": True}

    format: Literal["dipnet-trace"] = "dipnet-trace"
    version: Literal[1] = 1
    model: ModelShape
    method: Annotated[str, Field(min_length=1, max_length=1000)]
    sites: Annotated[tuple[TraceSite, ...], Field(min_length=1)]
    cache: TraceCache | None
    recall: Mapping[str, Annotated[float, Field(ge=0, le=1)]] | None
    tokens: Annotated[int, Field(ge=1, lt=2**62)]
    added_weights: Annotated[int, Field(ge=0, lt=2**62)] = 0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len({site.key for site in self.sites}) != len(self.sites):
            raise ValueError("a site appears twice")
        for site in self.sites:
            _check_site(site, self.model)
        if self.cache is not None:
            _check_cache(self.cache, self.sites)
        if self.recall is not None and not set(self.recall) <= {s.name for s in self.sites}:
            raise ValueError("recall names sites that the trace lacks")
        return self


@dataclass(frozen=True)
class Layout:
    """Where the sites' bits lie in a row of bytes."""

    starts: tuple[int, ...]
    row_bytes: int

    @classmethod
    def of(cls, sites: Sequence[TraceSite]) -> Layout:
        """The layout of rows of these sites."""
        ends = list(accumulate(site_bytes(site) for site in sites))
        return cls((0, *ends[:-1]), round_up(ends[-1], ROW_ALIGNMENT))


def site_bytes(site: TraceSite) -> int:
    """Bytes of one token's mask at a site."""
    return -(-site.units // 8)


class Trace:
    """A trace that was opened; its masks stay in the file until they are asked for.

    ``starts`` are the (sequences,) int64 rows at which sequences begin, the first of them 0;
    ``added_weights`` the numbers that the method itself reads for a token.
    """

    def __init__(self, path: Path, header: Header, tensors: Any) -> None:
        self.path = path
        self.shape = header.model
        self.method = header.method
        self.sites = header.sites
        self.cache = header.cache
        self.recall = header.recall
        self.tokens = header.tokens
        self.added_weights = header.added_weights
        self.starts: NDArray[np.int64] = tensors.get_tensor("starts")
        self.has_scores = "scores" in set(tensors.keys())
        self._layout = Layout.of(self.sites)
        self._units = (0, *accumulate(site.units for site in self.sites))
        self._tensors = tensors

    def masks(self, site: int, start: int, stop: int) -> NDArray[np.bool_]:
        """(stop - start, units) bool: what the tokens ``start`` to ``stop`` wanted at a site."""
        at = self._layout.starts[site]
        packed = self._rows("masks", start, stop, at, at + site_bytes(self.sites[site]))
        units = self.sites[site].units
        return np.unpackbits(packed, axis=1, count=units, bitorder="little").view(np.bool_)

    def scores(self, site: int, start: int, stop: int) -> NDArray[np.float16]:
        """(stop - start, units) scores before any cache had its say; InputError without them."""
        if not self.has_scores:
            raise InputError(f"{self.path} has no scores: record it with --trace-scores")
        return self._rows("scores", start, stop, self._units[site], self._units[site + 1])

    def _rows(self, name: str, start: int, stop: int, left: int, right: int) -> NDArray[Any]:
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens {start} to {stop} of a trace of {self.tokens}")
        if start == stop:  # the library refuses slices of nothing
            return np.empty((0, right - left), np.uint8 if name == "masks" else np.float16)
        return self._tensors.get_slice(name)[start:stop, left:right]


def open_trace(path: str | Path) -> Trace:
    """The trace at ``path``, all of its sizes checked.

    Raises InputError, in one line, when it is no trace, of another version, cut off or damaged.
    """
    path = Path(path)
    if not path.is_file():
        found = "is no file" if path.exists() else "does not exist"
        raise InputError(f"the trace {path} {found}: record one with dipnet eval --trace FILE")
    tensors, header = _opened(path)
    with _damage(path):
        _check_tensors(header, tensors)
        return Trace(path, header, tensors)


def is_trace(path: str | Path) -> bool:
    """Whether a file says that it is a trace; it may still be damaged."""
    try:
        with safe_open(path, "np") as tensors:
            return KEY in (tensors.metadata() or {})
    except (SafetensorError, OSError):
        return False


def _opened(path: Path) -> tuple[Any, Header]:
    """The file's tensors and what it says of itself."""
    try:
        tensors = safe_open(path, "np")
        content = (tensors.metadata() or {}).get(KEY)
    except SafetensorError as error:
        raise InputError(
            f"{path} is no trace, or a damaged one ({_line(error)}): record it again with --trace"
        ) from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or _line(error)}") from None
    if content is None:
        raise InputError(
            f"{path} is no trace, it is another safetensors file: record one with dipnet eval "
            "--trace FILE"
        )
    with _damage(path):
        _check_version(content, path)
        return tensors, Header.model_validate_json(content)


class _Head(BaseModel):
    """What must be understood before the rest can be."""

    model_config = SETTINGS

    format: str
    version: int


def _check_version(content: str, path: Path) -> None:
    head = _Head.model_validate_json(content)
    if head.format != FORMAT:
        raise InputError(f"{path} is no trace: record one with dipnet eval --trace FILE")
    if head.version != VERSION:
        raise InputError(
            f"{path} is of version {str(head.version)[:20]} and this dipnet reads {VERSION}: "
            "record it again, or use the dipnet that recorded it"
        )


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Say of what is found wrong that the trace is damaged."""
    try:
        yield
    except InputError:
        raise
    except ValidationError as error:
        reason = complaint(error)
    except (ValueError, SafetensorError) as error:
        reason = _line(error)
    else:
        return
    raise InputError(f"the trace {path} is damaged: {reason}; record it again") from None


def _line(message: object) -> str:
    return " ".join(str(message).split())[:200]


def _check_site(site: TraceSite, shape: ModelShape) -> None:
    """A unit is so many channels of every matrix that the site thins."""
    label = f"{site.name} of layer {site.layer}"
    if site.name not in SITE_NAMES:
        raise ValueError(f"{label[:80]} is no site; known: {', '.join(SITE_NAMES)}")
    if site.layer >= shape.layers:
        raise ValueError(f"{label}: the model has {shape.layers} layers")
    if not site.matrices or not set(site.matrices) <= set(shape.matrices):
        raise ValueError(f"{label}: unknown matrices {', '.join(site.matrices)[:80]}")
    channels = site.units * site.block
    for matrix, weights in site.matrices.items():
        outputs, inputs = shape.matrices[matrix]
        columns = (inputs, outputs * site.block)
        rows = (outputs, inputs * site.block)
        if (channels, weights) not in (columns, rows):
            raise ValueError(
                f"{label}: {site.units} units of {site.block} with {weights} weights of {matrix} "
                f"each do not fit its shape of {outputs} x {inputs}"
            )


def _check_cache(cache: TraceCache, sites: Sequence[TraceSite]) -> None:
    check_policy(cache.policy)
    if len(cache.slots) != len(sites):
        raise ValueError(f"the cache has slots for {len(cache.slots)} of {len(sites)} sites")
    for slots, site in zip(cache.slots, sites, strict=True):
        if slots > site.units:
            raise ValueError(f"{site.name} of layer {site.layer} has {slots} slots")


def _check_tensors(header: Header, tensors: Any) -> None:
    """The tensors have the shapes that the header asks for."""
    names = set(tensors.keys())
    if not {"masks", "starts"} <= names:
        raise ValueError("it lacks the tensors masks and starts")
    layout = Layout.of(header.sites)
    _check_tensor(tensors, "masks", "U8", [header.tokens, layout.row_bytes])
    if "scores" in names:
        units = sum(site.units for site in header.sites)
        _check_tensor(tensors, "scores", "F16", [header.tokens, units])
    sequences = tensors.get_slice("starts").get_shape()[:1] or [1]
    _check_tensor(tensors, "starts", "I64", sequences)
    starts = tensors.get_tensor("starts")
    if not len(starts) or starts[0] or starts[-1] >= header.tokens or (np.diff(starts) <= 0).any():
        raise ValueError("starts must ascend from 0 and stay below the number of tokens")


def _check_tensor(tensors: Any, name: str, dtype: str, shape: list[int]) -> None:
    found = tensors.get_slice(name)
    kind, size = found.get_dtype(), found.get_shape()
    if (kind, size) != (dtype, shape):
        raise ValueError(f"{name} is {kind} of shape {size}, must be {dtype} of {shape}")
