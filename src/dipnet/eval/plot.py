"""The picture of an evaluation: perplexity against the share of the MLP's weights read."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from dipnet.eval.sweep import Row

matplotlib.use("Agg")

# Okabe and Ito's colours, which colour-blind readers tell apart; the markers differ too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#000000")
MARKERS = "osD^vPX*<>"
TICKS = (1, 1.2, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8)
BOUNDS = ("glu-oracle", "dejavu-oracle", "cett")
"""Methods that know what no program can know: drawn, but never the best choice."""
WORST = 4
"""Perplexities above so many times the dense model's are left to the table."""
ALL = 0.9999
"""A share of attention's weights above this is all of them; a threshold may drop an odd zero."""


@dataclass(frozen=True)
class Panel:
    """One model's rows, the dense row first."""

    title: str
    rows: Sequence[Row]


@dataclass(frozen=True)
class Point:
    """One measured row: the share of the MLP's weights read, and the perplexity.

    ``comparable`` is false for a row that no program could have (a bound), or that prunes attention
    too, which the axis does not show.
    """

    label: str
    density: float
    perplexity: float
    comparable: bool


def draw(panels: Sequence[Panel]) -> bytes:
    """A PNG with one panel a model, side by side."""
    figure = Figure(figsize=(6.4 * len(panels), 4.8), dpi=150, layout="constrained")
    styles = line_styles(point.label for panel in panels for point in _points(panel.rows)[1:])
    for number, panel in enumerate(panels):
        _draw_panel(figure.add_subplot(1, len(panels), number + 1), panel, styles)
    legend(figure)
    return as_png(figure)


def as_png(figure: Figure) -> bytes:
    """The picture as a file: the same bytes for the same figures."""
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    return image.getvalue()


def pareto(points: Iterable[Point]) -> list[Point]:
    """The points that no other point beats in both density and perplexity."""
    best, kept = float("inf"), []
    for point in sorted(points, key=lambda p: (p.density, p.perplexity)):
        if point.perplexity < best:
            best = point.perplexity
            kept.append(point)
    return kept


def legend(figure: Figure) -> None:
    """One legend for all panels, beside them."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(
        entries.values(), entries.keys(), loc="outside right upper", frameon=False, fontsize=9
    )


def line_styles(labels: Iterable[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each label, in order of appearance."""
    return {
        label: (COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)])
        for i, label in enumerate(dict.fromkeys(labels))
    }


def _points(rows: Iterable[Row]) -> list[Point]:
    measured = [(row.label, row.measured) for row in rows if row.measured is not None]
    thinned = {label for label, found in measured if found.density.attention < ALL}
    return [
        Point(
            f"{label} (attention too)" if label in thinned else label,
            round(found.density.mlp, 3),
            found.perplexity.perplexity,
            comparable=label not in BOUNDS and label not in thinned,
        )
        for label, found in measured
    ]


def _draw_panel(axes: Axes, panel: Panel, styles: dict[str, tuple[str, str]]) -> None:
    dense, *points = _points(panel.rows)
    axes.axhline(dense.perplexity, color="0.35", linestyle=(0, (5, 3)), linewidth=1.2)
    for label in dict.fromkeys(point.label for point in points):
        line = sorted((p for p in points if p.label == label), key=lambda p: p.density)
        _draw_line(axes, line, styles[label], bound=label in BOUNDS)
    best = pareto(p for p in points if p.comparable)
    mark_best(axes, [(p.density, p.perplexity) for p in best])
    axes.annotate(
        f"dense {dense.perplexity:.1f}",
        (0.01, dense.perplexity),
        xycoords=("axes fraction", "data"),
        xytext=(2, -4),
        textcoords="offset points",
        va="top",
        color="0.35",
        fontsize=9,
    )
    finish(axes, panel.title, "share of the MLP's weights read")
    # What is several times worse than dense would squeeze all that matters into a corner.
    axes.set_ylim(top=min(axes.get_ylim()[1], WORST * dense.perplexity))


def _draw_line(axes: Axes, line: list[Point], style: tuple[str, str], *, bound: bool) -> None:
    color, marker = style
    axes.plot(
        [p.density for p in line],
        [p.perplexity for p in line],
        color=color,
        marker=marker,
        markersize=5,
        linewidth=1.6,
        linestyle=":" if bound else "--" if ":" in line[0].label else "-",
        label=f"{line[0].label} (bound)" if bound else line[0].label,
    )


def mark_best(axes: Axes, best: Sequence[tuple[float, float]]) -> None:
    """Rings around the points that nothing beats."""
    axes.scatter(
        [x for x, _ in best],
        [y for _, y in best],
        s=130,
        facecolors="none",
        edgecolors="0.25",
        linewidths=1.1,
        zorder=3,
        label="no method better in both",
    )


def finish(axes: Axes, title: str, below: str) -> None:
    """Titles, a light grid, and a logarithmic axis of perplexities."""
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(below)
    axes.set_ylabel("perplexity (log scale)")
    _log_ticks(axes)
    axes.grid(visible=True, color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _log_ticks(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.margins(y=0.08)
    axes.yaxis.set_major_locator(LogLocator(subs=TICKS, numticks=20))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
