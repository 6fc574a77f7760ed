"""Plans that nobody searched for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dipnet.store.index import read_index
from dipnet.streaming.plan import Identity

METHOD = "dip:density=0.5,cache_aware=0.2"


def content(store: Path, **changes: Any) -> dict[str, Any]:
    """A plan for a store as JSON says it, with some fields changed."""
    expected = {
        "tokens_per_second": 100.0,
        "dense_tokens_per_second": 50.0,
        "memory": 1 << 29,
        "perplexity": 30.3,
        "dense_perplexity": 30.0,
        "increase": 0.01,
        "increase_at_most": 0.02,
        "density": 0.5,
        "hit_rate": 0.9,
        "bytes_per_token": 1000.0,
    }
    made = {
        "format": "dipnet-plan",
        "version": 1,
        "model": Identity.of(read_index(store)).model_dump(),
        "method": METHOD,
        "weights": "int8",
        "block": 1,
        "memory": None,
        "cache": 4096,
        "policy": "lru",
        "cache_split": "even",
        "context": 32,
        "device": "phone",
        "max_increase": 0.02,
        "text": {"name": "text.txt", "sha256": "0" * 64, "windows": 8, "window": 32},
        "expected": expected,
    }
    return made | changes
