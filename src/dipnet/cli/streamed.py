"""Packed models on the command line: which options they take, loading, where the time went."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dipnet.cli.console import err
from dipnet.cli.methods import MethodRequest
from dipnet.cli.options import FLAG
from dipnet.cli.progress import byte_progress
from dipnet.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from dipnet.eval.streamed import StoreSetting
    from dipnet.methods.base import Method
    from dipnet.models.load import LoadedModel
    from dipnet.models.tokens import Prefill
    from dipnet.pack.plan import Block
    from dipnet.streaming.plan import Plan
    from dipnet.streaming.stats import Stats


class Records(StrEnum):
    """What a record of the MLP holds."""

    COLUMN = "column"
    NEURON = "neuron"


class Kind(StrEnum):
    """How weights are packed."""

    INT4 = "int4"
    INT8 = "int8"
    BF16 = "bf16"


STORES = "Packed models"
"""The panel of their options in the help."""
DEFAULT_POLICY = "lfu"

Memory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Bound on the whole process's memory, with --device cuda on the GPU's: 4GiB, 800MB",
        show_default=False,
        rich_help_panel=STORES,
    ),
]
Policy = Annotated[
    str | None,
    typer.Option(
        "--policy",
        "--cache-policy",
        help="What a cache evicts: lru or lfu; default: lfu",
        show_default=False,
        rich_help_panel=STORES,
    ),
]
NoLookAhead = Annotated[
    bool,
    typer.Option(
        "--no-look-ahead",
        metavar=FLAG,
        help="Read no records ahead on a guess; the text is the same",
        rich_help_panel=STORES,
    ),
]
Weights = Annotated[
    Kind | None,
    typer.Option(
        help="Pack a checkpoint first, once, into ~/.cache/dipnet or $DIPNET_CACHE",
        show_default=False,
        rich_help_panel=STORES,
    ),
]


@dataclass(frozen=True)
class Streaming:
    """What the options say of a packed model."""

    memory: str | None = None
    cache: str | None = None
    policy: str | None = None
    look_ahead: bool = True
    weights: Kind | None = None
    plan: Plan | None = None
    device: str = "cpu"

    @property
    def bounded(self) -> bool:
        """Whether not everything may be in memory."""
        return self.memory is not None or self.cache is not None

    def streams(self, name: str | None, device: str, dtype: str, *, shares: bool = False) -> bool:
        """Whether the model runs from a store, its own or one that --weights makes.

        ``shares`` says that a checkpoint may have a cache too. Raises InputError when options do
        not fit the model, or each other.
        """
        from dipnet.cache import check_policy
        from dipnet.models.load import DEFAULT_MODEL
        from dipnet.streaming.budget import parse_size
        from dipnet.streaming.packed import is_store

        model = name or DEFAULT_MODEL
        if self.memory is not None and self.cache is not None:
            raise InputError(
                "give either --memory (of the whole process) or --cache (of the records)"
            )
        if not is_store(model) and self.weights is None:
            self._check_unused(model, shares)
            return False
        for size in (self.memory, self.cache):
            if size is not None:
                parse_size(size)
        check_policy(self.policy or DEFAULT_POLICY)
        for option, value in (("--device", device), ("--dtype", dtype)):
            if value != "auto":
                raise InputError(f"{option} has no effect on a packed model: leave it out")
        return True

    def open(self, name: str | None, method: Method | None = None) -> Path:
        """The store to run from; a checkpoint is packed first, for a method if there is one."""
        from dipnet.models.load import DEFAULT_MODEL
        from dipnet.streaming.methods import unit_for
        from dipnet.streaming.packed import store_of

        model = name or DEFAULT_MODEL
        if self.weights is None:
            return store_of(model, None)
        block: Block = self.plan.block if self.plan else "auto"
        with byte_progress(f"packing {model}") as progress:
            return store_of(model, self.weights.value, progress, block, unit_for(method))

    def _check_unused(self, model: str, shares: bool) -> None:
        given = {
            "--memory": self.memory is not None,
            "--cache": self.cache is not None and not shares,
            "--policy": self.policy is not None and not shares,
            "--no-look-ahead": not self.look_ahead,
        }
        for option in (option for option, used in given.items() if used):
            raise InputError(
                f"{option} is for packed models, and {model!r} is none: pack it first with "
                f"`dipnet pack {model} OUT`, or add --weights int4"
            )

    def check(self, requests: Iterable[MethodRequest]) -> None:
        """Raise InputError for a cache-aware method when everything is in memory."""
        aware = [request.label for request in requests if "cache_aware" in request.options]
        if aware and not self.bounded:
            raise InputError(
                f"{', '.join(aware)}: cache_aware has no effect when everything is in memory; "
                "give a packed model and --memory or --cache"
            )

    def load(
        self, store: Path, method: Method, context: int, prefill: Prefill = "dense"
    ) -> LoadedModel:
        """The model of a store, inside its bounds."""
        from dipnet.models.load import LoadedModel, load_tokenizer
        from dipnet.store.index import read_index
        from dipnet.streaming.load import load

        weights = read_index(store).weights
        check_fitted(method)
        tokenizer = load_tokenizer(str(store))
        with err.status("reading what is always in memory"):
            model = load(
                store,
                method,
                memory=self.memory,
                cache=self.cache,
                context=context,
                policy=self.policy,
                prefill=prefill,
                look_ahead=None if self.look_ahead else False,
                plan=self.plan,
                device=self.device,
            )
        return LoadedModel(str(store), model, tokenizer, weights)

    def setting(self, store: Path, context: int) -> StoreSetting:
        """How an evaluation holds the store: one cache size for all of its rows."""
        from dipnet.eval.streamed import StoreSetting
        from dipnet.streaming.budget import parse_size
        from dipnet.streaming.load import measured_needs

        memory = None if self.memory is None else parse_size(self.memory)
        cache = None if self.cache is None else parse_size(self.cache)
        if memory is not None:
            cache = measured_needs(store, context).left(memory)
        return StoreSetting(cache, self.policy or DEFAULT_POLICY, memory)

    def as_json(self) -> dict[str, Any]:
        """The options as they were given, sizes in bytes."""
        from dipnet.streaming.budget import parse_size

        return {
            "memory": None if self.memory is None else parse_size(self.memory),
            "cache": None if self.cache is None else parse_size(self.cache),
            "policy": self.policy or DEFAULT_POLICY,
            "look_ahead": self.look_ahead,
        }


def shapes_of(store: Path) -> LoadedModel:
    """A store's tokenizer, and its model without any weights."""
    from dipnet.models.load import LoadedModel, empty_model, load_config, load_tokenizer
    from dipnet.store.index import read_index

    weights = read_index(store).weights
    empty = empty_model(load_config(str(store)))
    return LoadedModel(str(store), empty, load_tokenizer(str(store)), weights)


def source_of(name: str | None) -> str | None:
    """What a store was packed from; the name of anything else."""
    from dipnet.store.index import read_index
    from dipnet.streaming.packed import is_store

    return read_index(name).source if name and is_store(name) else name


def check_fitted(method: Method) -> Method:
    """The method; InputError when it would have to be fitted on a packed model."""
    if method.needs_calibration:
        raise InputError(
            f"{method.name} is fitted on a text with the dense model, which a store does not hold: "
            "calibrate it on the checkpoint in Python and hand it to dipnet.load, take dip, or "
            "dip-threshold:fitted=FILE of dipnet fit thresholds"
        )
    return method


def decoding_json(stats: Stats, seconds: float) -> dict[str, Any]:
    """Where the time of decoding went: seconds, bytes, records by site."""
    return {
        "tokens": stats.calls,
        "seconds": {**_parts(stats, seconds), "disk_busy": stats.disk_busy},
        "bytes_per_token": stats.bytes_read / max(1, stats.calls),
        "reads_per_token": stats.reads / max(1, stats.calls),
        "disk_bytes_per_second": stats.disk_rate,
        "sites": {
            name: {**asdict(site), "hit_rate": site.hit_rate} for name, site in stats.sites.items()
        },
    }


def show_decoding(stats: Stats, seconds: float) -> None:
    """Print where the time of decoded tokens went, on stderr."""
    from rich.table import Table

    tokens = max(1, stats.calls)
    times = Table.grid(padding=(0, 2))
    times.add_column()
    for _ in range(2):
        times.add_column(justify="right")
    for name, value in _parts(stats, seconds).items():
        times.add_row(
            f"[dim]{LABELS[name]}[/]",
            f"{value / tokens * 1e3:.2f} ms",
            f"{value / seconds if seconds else 0:.1%}",
        )
    if stats.kernels:  # on a GPU nothing waits, and time is not divided
        err.print("\n[bold]Where a token's time went[/]")
        err.print(times)
    err.print()
    err.print(_reads(stats, tokens))


LABELS = {
    "selection": "selection",
    "guessing": "guessing",
    "disk": "waiting for disk",
    "kernels": "kernels",
    "other": "everything else",
}


def _parts(stats: Stats, seconds: float) -> dict[str, float]:
    """The decoding's seconds by what they went to; together they are all of them."""
    known = {name: getattr(stats, name) for name in LABELS if name != "other"}
    return {**known, "other": max(0.0, seconds - sum(known.values()))}


def _reads(stats: Stats, tokens: int) -> Table:
    from rich.table import Table

    from dipnet.streaming.budget import size_text

    rates = {name: site.hit_rate for name, site in stats.sites.items()}
    guessed = sum(site.guessed for site in stats.sites.values())
    useful = sum(site.useful for site in stats.sites.values())
    early = sum(site.early for site in stats.sites.values())
    rate = f" at {size_text(stats.disk_rate)}/s" if stats.disk_rate else ""
    rows = {
        "in memory": ", ".join(f"{n} {r:.1%}" for n, r in rates.items() if r is not None) or "all",
        "read": f"{size_text(stats.bytes_read / tokens)} a token, in "
        f"{stats.reads / tokens:,.0f} reads{rate}",
        "read ahead": f"{guessed:,} records"
        + (f", {useful:,} of them useful, {early:,} there in time" if guessed else ""),
    }
    grid = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        grid.add_row(f"[dim]{name}[/]", value)
    return grid
