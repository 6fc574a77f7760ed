"""A plan: how a packed model runs under a budget, and what that was expected to give.

A small JSON file that `dipnet plan` writes and `load` takes. Nothing in it is trusted;
docs/planning.md explains every field.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from dipnet.described import CLOSED, Bytes, Described, Digest, Size, Word
from dipnet.errors import InputError
from dipnet.methods.base import Method
from dipnet.methods.request import parse_method
from dipnet.sim.sizes import Split
from dipnet.store.geometry import Weights
from dipnet.store.index import Index
from dipnet.streaming.packed import block_of
from dipnet.units import parse_size, size_text

FORMAT = "dipnet-plan"
VERSION = 1
REMEDY = "make one with `dipnet plan MODEL --out FILE`"
SIZES = ("memory", "cache")
Policy = Literal["lfu", "lru"]

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Identity(BaseModel):
    """Which model a plan is for: its shapes, and the checksums of its store's small tensors and
    its store's own allocation, if it has one.
    """

    model_config = CLOSED

    source: Annotated[str, Field(max_length=4096)]
    family: Word
    layers: Size
    matrices: dict[Word, tuple[Size, Size]]
    rest_sha256: Digest
    allocation_sha256: Digest | None = None

    @classmethod
    def of(cls, index: Index) -> Self:
        """The identity of a store's model."""
        groups = [*index.first_layer, index.groups[-1]]
        return cls(
            source=index.source,
            family=index.family,
            layers=index.layers,
            matrices={name: group.shape(name) for group in groups for name in group.matrices},
            rest_sha256=index.rest_sha256,
            allocation_sha256=index.allocation_sha256,
        )

    @property
    def title(self) -> str:
        """A name for people."""
        width, neurons = self.matrices.get("down", (0, 0))
        return f"{self.source} ({self.family}, {self.layers} layers of {width} × {neurons})"

    @property
    def shape(self) -> tuple[Any, ...]:
        """What two models of one architecture have in common."""
        return self.family, self.layers, self.matrices


class Expected(BaseModel):
    """What a plan promises, on its device and for texts like its own.

    ``memory`` is the process's, in bytes; ``increase`` the perplexity's over the dense model's with
    the same weights, at most ``increase_at_most``; ``bytes_per_token`` are read from disk.
    """

    model_config = CLOSED

    tokens_per_second: Positive
    dense_tokens_per_second: Positive
    memory: Bytes
    perplexity: Positive
    dense_perplexity: Positive
    increase: float
    increase_at_most: float
    density: Share
    hit_rate: Share | None
    bytes_per_token: Annotated[float, Field(ge=0)]


class Measured(BaseModel):
    """The text that perplexity was measured on: in ``windows`` windows of ``window`` tokens."""

    model_config = CLOSED

    name: Annotated[str, Field(max_length=4096)]
    sha256: Digest
    windows: Size
    window: Size


@dataclass(frozen=True)
class Settings:
    """What `load` is told of a model's method and memory; None where that is left open."""

    method: Method | None = None
    memory: str | int | None = None
    cache: str | int | None = None
    context: int | None = None
    policy: str | None = None
    cache_split: Split | None = None
    weights: Weights | None = None


class Plan(BaseModel):
    """Settings of `load`, for one model in one form, and what they were chosen for.

    ``memory`` (of the process) or ``cache`` (of the records) are bytes, or neither: everything in
    memory. ``context`` are the tokens that memory was planned for, ``max_increase`` the bound on
    perplexity, ``device`` the name of what was simulated.
    """

    model_config = CLOSED

    format: Literal["dipnet-plan"] = "dipnet-plan"
    version: Literal[1] = 1
    model: Identity
    method: Annotated[str, Field(min_length=1, max_length=10_000)]
    weights: Weights
    block: Size
    memory: Bytes | None
    cache: Bytes | None
    policy: Policy
    cache_split: Split
    context: Size
    device: Word
    max_increase: Annotated[float, Field(ge=0)]
    text: Measured
    expected: Expected

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.memory is not None and self.cache is not None:
            raise ValueError("memory and cache cannot both be bounded")
        _ = self.chosen
        return self

    @cached_property
    def chosen(self) -> Method:
        """The method, with its densities; InputError when the text says none."""
        try:
            return parse_method(self.method).build(None)
        except TypeError:
            raise InputError(f"method {self.method!r} lacks its density") from None

    def check_store(self, index: Index, store: str | Path) -> None:
        """Raise InputError when ``index``, the store's, is not what the plan was made for."""
        found = Identity.of(index)
        again = "make a plan for it with `dipnet plan`"
        if found.shape != self.model.shape:
            raise InputError(
                f"the plan is for {self.model.title}, and {str(store)!r} holds {found.title}: "
                f"{again}"
            )
        block = block_of(index)
        if (index.weights, block) != (self.weights, self.block):
            raise InputError(
                f"the plan is for {self.weights} weights in blocks of {self.block}, and "
                f"{str(store)!r} holds {index.weights} in blocks of {block}: {again}, or pack the "
                f"model with --weights {self.weights} --block {self.block}"
            )
        if found.rest_sha256 != self.model.rest_sha256:
            raise InputError(
                f"the plan is for another model of the same shapes, {self.model.source}, than "
                f"{str(store)!r} holds ({found.source}): {again}"
            )
        if found.allocation_sha256 != self.model.allocation_sha256:
            raise InputError(
                f"the plan is for a store with another allocation, or without one, than "
                f"{str(store)!r}: {again}"
            )

    def settings(self, given: Settings, prefix: str = "") -> Settings:
        """The plan's settings, with what it leaves open as ``given``: the context.

        Raises InputError for one that contradicts the plan; ``prefix`` is what names have in the
        message.
        """
        for name in ("method", "memory", "cache", "policy", "cache_split", "weights"):
            asked = getattr(given, name)
            planned = self.chosen if name == "method" else getattr(self, name)
            if name in SIZES and asked is not None:
                asked = parse_size(asked)
            if asked is not None and asked != planned:
                raise InputError(
                    f"{prefix}{name} contradicts the plan, which says {self._said(name)}: leave "
                    "it out, or make another plan"
                )
        return Settings(
            method=self.chosen,
            memory=self.memory,
            cache=self.cache,
            context=given.context or self.context,
            policy=self.policy,
            cache_split=self.cache_split,
            weights=self.weights,
        )

    def _said(self, name: str) -> str:
        value = getattr(self, name)
        if name in SIZES:
            return "no bound" if value is None else size_text(value)
        return str(value)


def open_plan(path: str | Path) -> Plan:
    """The plan in a file; InputError, in one line, when it is none or says what cannot be."""
    return _FILES.read(Path(path))


_FILES = Described("plan", FORMAT, VERSION, Plan, REMEDY)
