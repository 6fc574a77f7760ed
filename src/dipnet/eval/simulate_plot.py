"""The pictures of a simulation: perplexity against throughput, and against memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dipnet.eval.plot import (
    BOUNDS,
    WORST,
    as_png,
    finish,
    legend,
    line_styles,
    mark_best,
)
from dipnet.sim.sweep import DENSE, Outcome
from dipnet.units import size_text

Key = TypeVar("Key", str, int)
COLUMNS = 3
"""Panels side by side."""
BOUND_POLICIES = ("belady",)
"""Policies that know the future: drawn, but never the best choice."""


@dataclass(frozen=True)
class Point:
    """One row in a panel; ``bound`` says that no program can have it."""

    line: str
    x: float
    perplexity: float
    bound: bool


@dataclass(frozen=True)
class Panel:
    """Some rows as points, and what the axis below them is."""

    title: str
    below: str
    points: Sequence[Point]
    more: bool
    """Whether more is better on the axis below."""


def draw(rows: Sequence[Outcome]) -> bytes:
    """A PNG: a panel for each memory and device, then one over the memories for each device.

    The rows have perplexities, the dense model's among them.
    """
    panels = [*throughput_panels(rows), *memory_panels(rows)]
    across = min(COLUMNS, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(5.6 * across, 4.6 * down), dpi=150, layout="constrained")
    styles = line_styles(point.line for panel in panels for point in panel.points)
    for number, panel in enumerate(panels):
        _draw_panel(figure.add_subplot(down, across, number + 1), panel, styles)
    legend(figure)
    return as_png(figure)


def front(panel: Panel) -> list[Point]:
    """The points that no program has one better in both directions than."""
    real = [point for point in panel.points if not point.bound]
    return [point for point in real if not any(_beats(panel, other, point) for other in real)]


def _beats(panel: Panel, one: Point, other: Point) -> bool:
    """Whether the first point is as good in both directions, and better in one."""
    ahead = one.x - other.x if panel.more else other.x - one.x
    below = other.perplexity - one.perplexity
    return min(ahead, below) >= 0 and max(ahead, below) > 0


def throughput_panels(rows: Sequence[Outcome]) -> list[Panel]:
    """Perplexity against tokens/s, for each device and memory."""
    return [
        Panel(f"{size_text(memory)}, {device}", "tokens/s", _throughputs(found), more=True)
        for device, devices in _by(rows, _device).items()
        for memory, found in _by(devices, _memory).items()
    ]


def _throughputs(rows: Sequence[Outcome]) -> list[Point]:
    several = _several(rows)
    return [
        Point(_line(row, several), row.figures.tokens_per_second, _perplexity(row), _bound(row))
        for row in rows
    ]


def memory_panels(rows: Sequence[Outcome]) -> list[Panel]:
    """In which memory a method keeps up with the dense model, and at which perplexity."""
    if len({row.scenario.memory for row in rows}) == 1:
        return []
    return [_memory_panel(device, found) for device, found in _by(rows, _device).items()]


def _memory_panel(device: str, rows: Sequence[Outcome]) -> Panel:
    pacer = _pacer(rows)
    pace = pacer.figures.tokens_per_second
    several = _several(rows)
    best: dict[tuple[str, int], Point] = {}
    for row in rows:
        point = Point(
            _line(row, several), row.scenario.memory / 2**20, _perplexity(row), _bound(row)
        )
        key = point.line, row.scenario.memory
        enough = row.figures.tokens_per_second >= pace
        if enough and (key not in best or point.perplexity < best[key].perplexity):
            best[key] = point
    return Panel(
        f"at least {pace:.3g} tokens/s, {device}:\ndense with {size_text(_memory(pacer))}",
        "memory, MiB",
        list(best.values()),
        more=False,
    )


def _pacer(rows: Sequence[Outcome]) -> Outcome:
    """The dense model in the largest memory that it does not fit, where there is one."""
    dense = [row for row in rows if row.asked.label == DENSE]
    streaming = [row for row in dense if row.figures.bytes_per_token > 0]
    return max(streaming or dense, key=_memory)


def _by(rows: Iterable[Outcome], key: Callable[[Outcome], Key]) -> dict[Key, list[Outcome]]:
    found: dict[Key, list[Outcome]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def _several(rows: Iterable[Outcome]) -> bool:
    """Whether there is more than one policy to tell apart."""
    return len({row.scenario.policy for row in rows if row.asked.label != DENSE}) > 1


def _memory(row: Outcome) -> int:
    return row.scenario.memory


def _device(row: Outcome) -> str:
    return f"{row.device.name}, {row.device.flash.bandwidth / 1e9:.3g} GB/s"


def _line(row: Outcome, several: bool) -> str:
    """The name of the row's line, with its policy where there are several."""
    named = row.asked.label != DENSE and several
    return f"{row.asked.line}, {row.scenario.policy}" if named else row.asked.line


def _bound(row: Outcome) -> bool:
    return row.scenario.policy in BOUND_POLICIES or row.asked.label in BOUNDS


def _perplexity(row: Outcome) -> float:
    assert row.perplexity is not None, "a trace has none, and is not drawn"
    return row.perplexity


def _draw_panel(axes: Axes, panel: Panel, styles: dict[str, tuple[str, str]]) -> None:
    for name in dict.fromkeys(point.line for point in panel.points):
        line = sorted((p for p in panel.points if p.line == name), key=lambda p: p.x)
        color, marker = styles[name]
        axes.plot(
            [p.x for p in line],
            [p.perplexity for p in line],
            color=color,
            marker=marker,
            markersize=5,
            linewidth=1.6,
            linestyle=":" if line[0].bound else "-",
            label=f"{name} (bound)" if line[0].bound else name,
        )
    mark_best(axes, [(point.x, point.perplexity) for point in front(panel)])
    finish(axes, panel.title, panel.below)
    best = min((point.perplexity for point in panel.points), default=1.0)
    axes.set_ylim(top=min(axes.get_ylim()[1], WORST * best))
