"""What the parts of adapt.py come to: shares of gaps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CACHED = ("none", "plain", "cached")
"""The adapters that are measured with a cache: none, trained without it, and with its stand-in."""


def table(
    found: dict[str, Any], densities: Sequence[float], before: dict[str, Any]
) -> list[dict[str, Any]]:
    """Perplexities by density, and the share of the gap to each reference that is closed.

    The gap is that of the masked model in what was found ``before``: by plain DIP, say.
    """
    rows = []
    references = {name: found[name]["perplexity"] for name in ("dense", "dense adapted")}
    for density in densities:
        worst = before[f"masked {density:g}"]["perplexity"]
        row = {"density": density, "before": worst}
        for name in ("masked", "adapted"):
            row[name] = found[f"{name} {density:g}"]["perplexity"]
            for end, reference in references.items():
                closed = (worst - row[name]) / (worst - reference)
                row[f"{name}_closes_to_{end.replace(' ', '_')}"] = closed
        rows.append(row)
    return rows


def cached_table(found: dict[str, Any], gamma: float) -> dict[str, Any]:
    """What γ costs with each kind of adapters: above the dense model, above the best without a
    preference, and above the same adapters without one."""
    dense = found["cache dense"]["perplexity"]
    best = found["cache plain 1"]["perplexity"]
    rows = {}
    for label in CACHED:
        without, here = found[f"cache {label} 1"], found[f"cache {label} {gamma:g}"]
        rows[label] = {
            "without_preference": without,
            "with_preference": here,
            "above_dense": here["perplexity"] - dense,
            "cost_of_preference": here["perplexity"] - best,
            "cost_of_preference_here": here["perplexity"] - without["perplexity"],
        }
    shrunk = {
        name: 1 - rows["cached"][name] / rows["plain"][name]
        for name in ("above_dense", "cost_of_preference", "cost_of_preference_here")
    }
    return {"dense": dense, "rows": rows, "gap_shrinks_by": shrunk}
