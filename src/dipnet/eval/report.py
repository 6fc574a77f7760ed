"""What an evaluation found, as a table for the terminal and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

import dipnet
from dipnet.eval.streamed import StoreSetting
from dipnet.eval.sweep import Measured, Row, Setting
from dipnet.eval.texts import TokenText
from dipnet.models.families import describe
from dipnet.models.load import LoadedModel

SCHEMA = "dipnet.eval/1"
DASH = "–"
COLUMNS = (
    "asked",
    "MLP",
    "attention",
    "all weights",
    "perplexity",
    "× dense",
    "tokens",
    "seconds",
)
"""The density asked for; the shares of weights read of each part; the rest."""
CACHE_COLUMN = "hits"
"""The share of the weights asked for that a cache held, where there is one."""
READ_COLUMN = "MiB/token"
"""What a token of a packed model reads from disk."""
OWN_ALLOCATION = ", the store's allocation"
"""Stands behind a method whose density is divided by what its store brought."""


@dataclass(frozen=True)
class Report:
    """An evaluation: the model, the texts, the setting and the rows; the dense row is first."""

    loaded: LoadedModel
    text: TokenText
    setting: Setting
    windows: int
    seed: int
    rows: Sequence[Row]
    calibration: TokenText | None = None
    split_text: TokenText | None = None
    held: StoreSetting | None = None
    """How a packed model was held; None for a checkpoint."""

    @property
    def dense(self) -> Measured:
        """The dense model's figures."""
        measured = self.rows[0].measured
        assert measured is not None, "the dense model can always be measured"
        return measured

    @property
    def title(self) -> str:
        """One line on what was measured, and how."""
        bos = ", each after BOS" if self.setting.bos is not None else ""
        stride = self.setting.stride
        step = f", stride {stride}" if stride != self.setting.window else ""
        prompt = f", {self.setting.prompt} dense" if self.setting.prompt else ""
        cache = self.setting.cache
        held = f", {cache.policy} cache of {cache.share:g}" if cache else ""
        if self.held:
            held = f", {self.held.title}"
        return (
            f"{self.loaded.name} ({self.loaded.dtype}, {self.loaded.device}) on "
            f"{self.text.text.name}: {self.windows} windows of {self.setting.window} tokens"
            f"{step}{prompt}{bos}{held}"
        )


def table(report: Report) -> Table:
    """The rows for a terminal; a dash where nothing could be measured."""
    made = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    made.add_column("method", overflow="fold")  # the name of a file may be in it: figures stay
    extra = _extra_columns(report)
    for column in (*COLUMNS, *extra):
        made.add_column(column, justify="right", no_wrap=True)
    for row in report.rows:
        cells = _cells(row, report.dense.perplexity.perplexity)
        made.add_row(_name(row), *cells, *(cell(row) for cell in extra.values()))
    return made


def _extra_columns(report: Report) -> dict[str, Callable[[Row], str]]:
    """The columns that not every report has, and their cells."""
    if report.held:
        return {CACHE_COLUMN: _hits, READ_COLUMN: _read}
    return {CACHE_COLUMN: _hits} if report.setting.cache else {}


def _name(row: Row) -> str:
    used = row.measured and row.measured.store
    return row.label + OWN_ALLOCATION if used and used.own_allocation else row.label


def _cells(row: Row, dense: float) -> list[str]:
    asked = DASH if row.density is None else f"{row.density:g}"
    if row.measured is None:
        return [asked, *[DASH] * (len(COLUMNS) - 1)]
    measured = row.measured
    return [
        asked,
        f"{measured.density.mlp:.3f}",
        f"{measured.density.attention:.3f}",
        f"{measured.density.total:.3f}",
        f"{measured.perplexity.perplexity:.2f}",
        f"{measured.perplexity.perplexity / dense:.3f}",
        f"{measured.perplexity.tokens}",
        f"{measured.seconds:.1f}",
    ]


def _hits(row: Row) -> str:
    counted = row.measured and (row.measured.store or row.measured.cache)
    return f"{counted.hit_rate:.3f}" if counted and counted.hit_rate is not None else DASH


def _read(row: Row) -> str:
    used = row.measured and row.measured.store
    return f"{used.bytes_per_token / 2**20:.3f}" if used else DASH


def reasons(rows: Sequence[Row]) -> list[str]:
    """One line for each row that could not be measured."""
    return [
        f"{row.label}{'' if row.density is None else f' at {row.density:g}'}: {row.reason}"
        for row in rows
        if row.measured is None
    ]


def as_json(report: Report) -> dict[str, Any]:
    """All figures, and everything needed to repeat them."""
    setting = report.setting
    return {
        "schema": SCHEMA,
        "versions": versions(),
        "model": model_json(report.loaded),
        "seed": report.seed,
        "text": report.text.as_json(),
        "calibration": report.calibration and report.calibration.as_json(),
        "split_text": report.split_text and report.split_text.as_json(),
        "window": setting.window,
        "stride": setting.stride,
        "windows": report.windows,
        "bos": setting.bos,
        "dense_prompt": setting.prompt,
        "batch_size": setting.batch_size,
        "cache": setting.cache and asdict(setting.cache),
        "store": report.held and asdict(report.held),
        "tokens_scored": report.dense.perplexity.tokens,
        "rows": [_row_json(row, report.dense.perplexity.perplexity) for row in report.rows],
    }


def versions() -> dict[str, str]:
    """The versions of what computed the figures."""
    return {
        "dipnet": dipnet.__version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def model_json(loaded: LoadedModel) -> dict[str, Any]:
    """Which model it was, and what it ran on."""
    spec = describe(loaded.model)
    return {
        "name": loaded.name,
        "family": spec.family,
        "dtype": loaded.dtype,
        "device": loaded.device,
        "context": loaded.context,
        "weights_per_token": spec.weights_per_token,
        "mlp_share": spec.layers * spec.mlp_weights / spec.weights_per_token,
    }


def _row_json(row: Row, dense: float) -> dict[str, Any]:
    asked = {"method": row.label, "density_asked": row.density, "reason": row.reason}
    if row.measured is None:
        return asked
    measured = row.measured
    return {
        **asked,
        "parameters": measured.parameters,
        "density": asdict(measured.density),
        "cache": measured.cache and asdict(measured.cache),
        "store": measured.store and asdict(measured.store),
        "perplexity": measured.perplexity.perplexity,
        "nll": measured.perplexity.nll,
        "ratio_to_dense": measured.perplexity.perplexity / dense,
        "tokens": measured.perplexity.tokens,
        "windows": measured.perplexity.windows,
        "seconds": measured.seconds,
        "fit_seconds": measured.fit_seconds,
    }
