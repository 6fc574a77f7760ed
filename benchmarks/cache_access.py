"""The native cache: microseconds an access, and units a second, against the plain reference.

Half of a site's units are wanted each time, drifting slowly, as tokens of a text want them. Ends
with one JSON line.
"""

import json
import platform
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dipnet.cache import POLICIES, make_cache

UNITS = (5120, 17920)  # Phi-3-Medium's channels and neurons
SHARES = (0.25, 0.5, 0.9)
WARM, MEASURED = 100, 200  # accesses
DRIFT = 0.9  # correlation of a unit's activation with that at the token before


def drifting_wants(units: int) -> list[NDArray[np.bool_]]:
    rng = np.random.default_rng(0)
    state, masks = rng.normal(size=units), []
    for _ in range(WARM + MEASURED):
        state = DRIFT * state + (1 - DRIFT**2) ** 0.5 * rng.normal(size=units)
        masks.append(np.abs(state) > np.median(np.abs(state)))
    return masks


def best_us(cache: object, masks: Sequence[NDArray[np.bool_]], rounds: int) -> tuple[float, float]:
    """The shortest mean time of an access in microseconds, and the hit rate."""
    best, hits = float("inf"), 0
    for _ in range(rounds):
        for mask in masks[:WARM]:
            cache.access(mask)
        start = time.perf_counter()
        hits = sum(cache.access(mask)[0] for mask in masks[WARM:])
        best = min(best, (time.perf_counter() - start) / MEASURED)
    return best * 1e6, hits / sum(int(mask.sum()) for mask in masks[WARM:])


def measure(units: int, share: float, policy: str) -> dict[str, float | int | str]:
    masks, slots = drifting_wants(units), round(share * units)
    native, hit_rate = best_us(make_cache(units, slots, policy, "native"), masks, rounds=10)
    reference, _ = best_us(make_cache(units, slots, policy, "reference"), masks, rounds=1)
    return {
        "units": units,
        "share": share,
        "policy": policy,
        "hit_rate": round(hit_rate, 3),
        "native_us": round(native, 1),
        "reference_us": round(reference, 1),
        "million_units_a_second": round(units / native),
    }


def main() -> None:
    rows = [measure(n, share, policy) for n in UNITS for share in SHARES for policy in POLICIES]
    for row in rows:
        print(" ".join(f"{name}={value}" for name, value in row.items()))
    print(json.dumps({"benchmark": "cache_access", "machine": platform.processor(), "rows": rows}))


if __name__ == "__main__":
    main()
