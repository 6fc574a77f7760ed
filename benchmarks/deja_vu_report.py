"""The tables and the picture of deja_vu.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from dipnet.eval.plot import WORST, Point, as_png, finish, legend, line_styles, pareto

PARTS = {"mlp": "MLPs alone", "heads": "heads alone", "both": "MLPs and heads"}
BOUNDS = ("oracle", "random", "CETT")
"""Lines that no program can have, or that know nothing."""
LOSSES = (0.01, 0.05)
"""How much worse perplexity may be: PPL-1 % and PPL-5 % (Sparsing Law, arXiv 2411.02335)."""
GOAL = 0.2


@dataclass(frozen=True)
class ModelResults:
    """One model's figures, without the model: they cross from one process to another."""

    model: str
    machine: str
    dense: dict[str, Any]
    limit_share: float
    fits: dict[str, dict[str, Any]]
    recalls: dict[str, dict[str, list[dict[str, float]]]]
    rows: list[dict[str, Any]]

    def of(self, part: str, line: str | None = None) -> list[dict[str, Any]]:
        """The rows of a part, of one line or of all."""
        return [row for row in self.rows if row["part"] == part and line in (None, row["line"])]

    def worse(self, row: dict[str, Any]) -> float:
        """By what share a row's perplexity is above the dense model's."""
        return float(row["perplexity"]) / float(self.dense["perplexity"]) - 1

    def names(self, part: str) -> list[str]:
        """The lines of a part, in order."""
        return list(dict.fromkeys(row["line"] for row in self.of(part)))


def sparsity(row: dict[str, Any], *, counted: bool = True) -> float:
    """The share of all weights that a token does not read; with what the method adds, or not."""
    density = row["density"]
    return float(1 - density["total"] + (0 if counted else density["added"]))


def highest_sparsity(points: Sequence[tuple[float, float]], loss: float) -> float | None:
    """The highest sparsity at which perplexity is at most a share ``loss`` above dense.

    ``points`` are (sparsity, share above dense), joined by straight lines; None when even the least
    sparse of them is worse.
    """
    ordered = sorted(points)
    best = None
    for (x, y), (x2, y2) in zip(ordered, [*ordered[1:], (math.nan, math.inf)], strict=True):
        if y <= loss:
            best = x if y2 <= loss or y2 == math.inf else x + (x2 - x) * (loss - y) / (y2 - y)
    return best


def line_sparsity(
    result: ModelResults, part: str, line: str, loss: float, *, counted: bool = True
) -> float | None:
    """`highest_sparsity` of a line; with heads and MLPs pruned, the best of the heads' densities.

    A method that keeps every unit is the dense model, and reads what it adds: a point of each line.
    """
    rows = result.of(part, line)
    found = []
    for heads in {row["heads"] for row in rows} if part == "both" else {None}:
        some = [row for row in rows if heads in (None, row["heads"])]
        points = [(sparsity(row, counted=counted), result.worse(row)) for row in some]
        if part != "both":
            points.append((-rows[0]["density"]["added"] if counted else 0.0, 0.0))
        found.append(highest_sparsity(points, loss))
    return max((each for each in found if each is not None), default=None)


def tables(result: ModelResults) -> str:
    """All tables of a model, in Markdown."""
    dense = result.dense
    parts = [
        f"### {result.model}",
        f"dense perplexity **{dense['perplexity']:.2f}** ({dense['tokens']} tokens scored), "
        f"{result.machine}",
        _losses_table(result),
        *(f"{PARTS[part]}:\n\n{_grid(result, part)}" for part in PARTS),
        _layers_table(result),
        _recall_table(result),
    ]
    return "\n\n".join(parts)


def _losses_table(result: ModelResults) -> str:
    names = list(dict.fromkeys(name for part in PARTS for name in result.names(part)))
    head = [f"{said}, PPL-{100 * loss:g} %" for said in PARTS.values() for loss in LOSSES]
    rows = []
    for name in names:
        cells = []
        for part in PARTS:
            for loss in LOSSES:
                cells.append(_reached(result, part, name, loss))
        rows.append([name, *cells])
    return _markdown(["line", *head], rows)


def _reached(result: ModelResults, part: str, name: str, loss: float) -> str:
    if not result.of(part, name):
        return ""
    counted = line_sparsity(result, part, name, loss)
    if counted is None or counted <= 0:
        return "none"
    free = line_sparsity(result, part, name, loss, counted=False)
    added = result.of(part, name)[0]["density"]["added"] > 0.001
    return f"{counted:.3f} ({free:.3f})" if added else f"{counted:.3f}"


def _grid(result: ModelResults, part: str) -> str:
    """A part's lines over its densities; over the MLPs' where heads are pruned too."""
    swept = "heads" if part == "heads" else "mlp"
    fixed = "heads" if part == "both" else None
    rows = result.of(part)
    columns = list(dict.fromkeys(row[swept] for row in rows))
    lines: dict[tuple[Any, str], dict[float, dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault((fixed and row[fixed], row["line"]), {})[row[swept]] = row
    shown = [
        [
            name if heads is None else f"{_share(heads)} of heads, {name}",
            *(_cell(result, found.get(column)) for column in columns),
        ]
        for (heads, name), found in sorted(lines.items(), key=lambda each: -(each[0][0] or 0))
    ]
    return _markdown(["line", *map(_share, columns)], shown)


def _cell(result: ModelResults, row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    worse = result.worse(row)
    return f"{100 * worse:+.1f} % at {sparsity(row):.3f}" if worse < WORST - 1 else "×4 and more"


def _share(value: float) -> str:
    return f"{value:.3f}".rstrip("0")


def _layers_table(result: ModelResults) -> str:
    """The layers' densities, where the scores divide them."""
    rows = []
    for row in result.of("mlp", "look-ahead 1"):
        layers = [f"{share:.3f}" for share in row["density"]["mlp_by_layer"]]
        rows.append([f"{row['mlp']:g}", *layers])
    layers = range(len(result.rows[0]["density"]["mlp_by_layer"]))
    return "Look-ahead 1, the layers' densities:\n\n" + _markdown(["mean", *map(str, layers)], rows)


def _recall_table(result: ModelResults) -> str:
    """Recall at the deployed k by layer: what could be had at most, then every fit."""
    first = next(iter(result.recalls.values()))
    parts = []
    for kind, layers in first.items():
        rows = [
            ["wanted", *(f"{each['wanted']:.3f}" for each in layers)],
            ["recall at most", *(f"{each['bound']:.3f}" for each in layers)],
        ]
        for name, kinds in result.recalls.items():
            if kinds[kind][0]["density"] != layers[0]["density"]:
                rows.append([f"{name}: kept", *(f"{each['density']:.3f}" for each in kinds[kind])])
            rows.append([f"{name}: recall", *(f"{each['recall']:.3f}" for each in kinds[kind])])
        said = f"Recall, {kind}, {layers[0]['density']:.3f} kept in every layer unless said:\n\n"
        head = ["", *(str(each["layer"]) for each in layers)]
        parts.append(said + _markdown(head, rows))
    return "\n\n".join(parts)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(results: Sequence[ModelResults]) -> bytes:
    """A PNG: a row a model, a column a part; perplexity against total sparsity."""
    figure = Figure(figsize=(5.2 * len(PARTS), 4.4 * len(results)), dpi=110, layout="constrained")
    styles = line_styles(row["line"] for result in results for row in result.rows)
    for number, result in enumerate(results):
        for column, (part, said) in enumerate(PARTS.items()):
            if not result.names(part):
                continue
            place = number * len(PARTS) + column + 1
            axes = figure.add_subplot(len(results), len(PARTS), place)
            dense = result.dense["perplexity"]
            axes.axhline(dense, color="0.35", linestyle=(0, (5, 3)), linewidth=1.2)
            for name in result.names(part):
                line = _front(result, part, name)
                axes.plot(
                    [1 - point.density for point in line],
                    [point.perplexity for point in line],
                    color=styles[name][0],
                    marker=styles[name][1],
                    markersize=4,
                    linewidth=1.4,
                    linestyle=":" if name in BOUNDS else "-",
                    label=name,
                )
            finish(axes, f"{result.model}, {said}", "share of all weights that a token leaves out")
            axes.set_ylim(0.99 * dense, 2 * dense)
    legend(figure)
    return as_png(figure)


def _front(result: ModelResults, part: str, name: str) -> list[Point]:
    """A line's points; of heads and MLPs together those that none of its own beats."""
    points = [
        Point(name, row["density"]["total"], row["perplexity"], comparable=True)
        for row in result.of(part, name)
    ]
    return pareto(points) if part == "both" else sorted(points, key=lambda each: each.density)


def summary(results: Sequence[ModelResults]) -> dict[str, Any]:
    """The last line: what was aimed at, and the share of the physical limit."""
    return {
        "benchmark": "deja_vu",
        "machine": results[0].machine,
        "dense_evaluation_share_of_limit": {each.model: each.limit_share for each in results},
        "above_dense_at_a_fifth_of_the_neurons": {
            each.model: {
                row["line"]: round(each.worse(row), 4)
                for row in each.of("mlp")
                if row["mlp"] == GOAL
            }
            for each in results
        },
    }
