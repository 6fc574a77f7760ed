"""What a plan means for commands: the stores it is made with, and the options of ``run``."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

import typer

from dipnet.cli.methods import MethodRequest, parse_method
from dipnet.cli.progress import byte_progress
from dipnet.cli.streamed import STORES, Kind, Streaming

if TYPE_CHECKING:
    from dipnet.streaming.plan import Plan

BLOCKS = (1, 2, 4)
"""Neurons of a record that are tried; 8 cost a third of the perplexity (docs/results.md)."""

PlanFile = Annotated[
    Path | None,
    typer.Option(
        "--plan",
        metavar="FILE",
        help="Run as a plan says that dipnet plan wrote: its method and its budget",
        show_default=False,
        rich_help_panel=STORES,
    ),
]


class Stores:
    """A checkpoint packed with other sizes of records while a plan is made; none for a store.

    They are made in the cache folder when they are asked for. Those that are not kept are removed
    at the end of the ``with`` block, but for those that had been there before.
    """

    def __init__(self, model: str | None, store: Path) -> None:
        from dipnet.models.load import DEFAULT_MODEL
        from dipnet.store.index import read_index

        self._model = model or DEFAULT_MODEL
        self._store = store
        self._index = read_index(store)
        self._made: dict[int, Path] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for path in self._made.values():
            shutil.rmtree(path, ignore_errors=True)

    def makers(self) -> dict[int, Callable[[], Path]]:
        """What makes the store of each block beside the one there is."""
        from dipnet.streaming.packed import block_of, is_store

        neurons = self._index.neurons.channels
        if is_store(self._model):
            return {}
        others = [b for b in BLOCKS if b != block_of(self._index) and neurons % b == 0]
        return {block: partial(self._make, block) for block in others}

    def keep(self, block: int) -> None:
        """Let the store of this block stay."""
        self._made.pop(block, None)

    def _make(self, block: int) -> Path:
        from dipnet.streaming.packed import packed

        there = set(self._store.parent.iterdir())
        with byte_progress(f"packing {self._model} in blocks of {block}") as progress:
            path = packed(self._model, self._index.weights, progress, block)
        if path not in there:
            self._made[block] = path
        return path


def planned(
    file: Path, streaming: Streaming, method: str | None, density: float | None
) -> tuple[MethodRequest, Streaming]:
    """The method and the options of a plan; InputError when it contradicts those that are given."""
    from dipnet.streaming.plan import Settings, open_plan

    plan = open_plan(file)
    asked = None
    if method is not None or density is not None:
        asked = parse_method(method or plan.chosen.name).build(density)
    given = Settings(
        asked,
        streaming.memory,
        streaming.cache,
        policy=streaming.policy,
        weights=None if streaming.weights is None else streaming.weights.value,
    )
    plan.settings(given, prefix="--")
    return parse_method(plan.method), _as_planned(streaming, plan)


def _as_planned(streaming: Streaming, plan: Plan) -> Streaming:
    return replace(
        streaming,
        memory=None if plan.memory is None else str(plan.memory),
        cache=None if plan.cache is None else str(plan.cache),
        policy=plan.policy,
        weights=Kind(plan.weights),
        plan=plan,
    )
