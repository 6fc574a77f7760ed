"""What a simulation found, as a table for the terminal and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from dipnet.sim.scenario import Needs
from dipnet.sim.sweep import Outcome
from dipnet.units import size_text

SCHEMA = "dipnet.simulate/1"
DASH = "–"
LEFT = ("memory", "device", "method")
RIGHT = ("γ", "density", "policy", "hits", "MiB/token", "tokens/s", "perplexity")


@dataclass(frozen=True)
class Simulation:
    """The rows, and where their masks come from.

    ``model`` is the one whose masks they are, and whose perplexity; ``simulated`` the one whose
    bytes are counted. ``text`` is what was evaluated, or the trace's file. ``refusals`` maps a
    method to the reason why rows of it are missing.
    """

    model: str
    simulated: str
    text: str
    rows: Sequence[Outcome]
    needs: Needs
    refusals: Sequence[tuple[str, str]] = ()

    @property
    def stretched(self) -> bool:
        """Whether the masks are those of another model than the one that is simulated."""
        return self.model != self.simulated

    @property
    def title(self) -> str:
        """One line on what was simulated."""
        scenario, tokens = self.rows[0].scenario, self.rows[0].figures.tokens
        return (
            f"{self.simulated}, {scenario.weights} ({size_text(self.needs.total)} with "
            f"{scenario.context} tokens of keys and values), {self.text}: {tokens} tokens"
        )

    @property
    def remark(self) -> str | None:
        """What must be said of a simulation of a model that is not there."""
        if not self.stretched:
            return None
        return (
            f"Stretched: masks, hit rates and perplexities are those of {self.model}, laid over "
            f"the shape of {self.simulated} by depth and by the cached share of each site. They "
            f"are no measurement of {self.simulated}"
        )


def table(simulation: Simulation) -> Table:
    """The rows for a terminal; a dash where something was not measured."""
    made = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    for column in LEFT:
        made.add_column(column, no_wrap=column not in ("device", "method"), overflow="fold")
    for column in RIGHT:
        made.add_column(column, justify="right", no_wrap=True)
    for row in simulation.rows:
        made.add_row(*_cells(row))
    return made


def _cells(row: Outcome) -> list[str]:
    figures, scenario = row.figures, row.scenario
    return [
        size_text(scenario.memory),
        f"{row.device.name}, {row.device.flash.bandwidth / 1e9:.3g} GB/s",
        row.asked.label,
        DASH if row.asked.gamma is None else f"{row.asked.gamma:g}",
        f"{figures.density:.3f}",
        scenario.policy,
        DASH if figures.hit_rate is None else f"{figures.hit_rate:.3f}",
        f"{figures.bytes_per_token / 2**20:.4g}",
        f"{figures.tokens_per_second:.4g}",
        DASH if row.perplexity is None else f"{row.perplexity:.2f}",
    ]


def as_json(simulation: Simulation) -> dict[str, Any]:
    """All figures, and what they are figures of."""
    scenario = simulation.rows[0].scenario
    devices = {(row.device.name, row.device.flash.bandwidth): row.device for row in simulation.rows}
    return {
        "schema": SCHEMA,
        "model": simulation.model,
        "simulated": simulation.simulated,
        "stretched": simulation.stretched,
        "remark": simulation.remark,
        "source": simulation.text,
        "weights": scenario.weights,
        "context": scenario.context,
        "bytes": {
            "pinned": simulation.needs.pinned,
            "keys": simulation.needs.keys,
            "records": simulation.needs.records,
        },
        "devices": [device.model_dump(exclude={"engine"}) for device in devices.values()],
        "refusals": [{"method": name, "reason": why} for name, why in simulation.refusals],
        "rows": [_row_json(row) for row in simulation.rows],
    }


def _row_json(row: Outcome) -> dict[str, Any]:
    figures = row.figures
    return {
        "memory": row.scenario.memory,
        "device": row.device.name,
        "flash_bandwidth": row.device.flash.bandwidth,
        "method": row.asked.label,
        "density_asked": row.asked.density,
        "gamma": row.asked.gamma,
        "policy": row.scenario.policy,
        "density": figures.density,
        "memory_used": figures.used,
        "cached": figures.cached,
        "hit_rate": figures.hit_rate,
        "hit_rates": figures.hit_rates,
        "bytes_per_token": figures.bytes_per_token,
        "tokens_per_second": figures.tokens_per_second,
        "tokens": figures.tokens,
        "perplexity": row.perplexity,
    }
