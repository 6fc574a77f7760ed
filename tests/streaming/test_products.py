"""The native products are the reference's: to the bit for integers, whatever computes them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from dipnet import _native
from dipnet.store.geometry import WEIGHTS, Weights
from dipnet.streaming.reference import Floats
from tests.streaming.records import Records, Site, instruction_sets, write

SHAPES = [(1, 1, 1), (7, 33, 1), (96, 130, 4), (70, 4300, 1), (321, 257, 3), (64, 9000, 64)]
"""Channels, rows, block: padding, several tiles, several chunks, one block that is all."""
BAD = (np.nan, np.inf, -np.inf)


@pytest.fixture(params=instruction_sets())
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    best = _native.instruction_set()
    _native.use_instruction_set(request.param)
    yield request.param
    _native.use_instruction_set(best)


def random_masks(tokens: int, units: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Every density, nothing and everything among them."""
    masks = rng.random((tokens, units)) < rng.random((tokens, 1))
    masks[0] = tokens > 1
    masks[-1] = rng.random(units) < 0.5
    if tokens > 2:
        masks[1], masks[2] = False, np.arange(units) == units // 2
    return masks


def activations(tokens: int, channels: int, rng: np.random.Generator) -> Floats:
    """Many magnitudes, so that every class has members."""
    spread = 10.0 ** rng.uniform(-4, 1, (tokens, channels))
    return (rng.standard_normal((tokens, channels)) * spread).astype(np.float32)


def check(records: Records, found: Floats, x: Floats, masks: NDArray[np.bool_]) -> None:
    expected = records.expected(x, masks)
    if records.kind != "bf16":
        np.testing.assert_array_equal(found, expected)
        return
    keep = np.repeat(masks, records.block, axis=1)
    halves = records.columns.view("<u2").astype(np.uint32) << 16
    weights = np.abs(halves.view(np.float32)[:, : records.rows]).astype(np.float64)
    sizes = np.abs(x * keep).astype(np.float64) @ weights
    bound = (keep.sum(1, keepdims=True) + 1) * 2.0**-24 * sizes
    assert (np.abs(found - expected) <= bound + 1e-37).all()


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize(("channels", "rows", "block"), SHAPES)
def test_shapes(
    tmp_path: Path, instructions: str, kind: Weights, channels: int, rows: int, block: int
) -> None:
    rng = np.random.default_rng(channels)
    records = write(tmp_path / "records", kind, channels, rows, block, zeros=True)
    for tokens in (1, 2, 70 if rows < 1000 else 3):
        for slots in {0, records.units // 3, records.units}:
            policy = ("lru", "lfu")[tokens % 2]
            site = Site(records, slots, policy, threads=1 + slots % 2)
            for _ in range(3):
                x = activations(tokens, channels, rng)
                masks = random_masks(tokens, records.units, rng)
                check(records, site.multiply(x, masks), x, masks)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_every_count_of_columns(tmp_path: Path, instructions: str, kind: Weights) -> None:
    """Passes of 16 columns, quads of 4, and what is left of them."""
    records = write(tmp_path / "records", kind, 70, 256)
    site, rng = Site(records, 70), np.random.default_rng(0)
    for k in range(71):
        mask = rng.permutation(70)[None] < k
        x = rng.standard_normal((1, 70)).astype(np.float32)
        check(records, site.multiply(x, mask), x, mask)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("bad", BAD)
def test_not_finite(tmp_path: Path, instructions: str, kind: Weights, bad: float) -> None:
    """A kept NaN or infinity is never silent; a dropped one is nothing."""
    records = write(tmp_path / "records", kind, 20, 40)
    site = Site(records, 10)
    x = np.ones((3, 20), np.float32)
    x[1, 5] = bad
    masks = np.ones((3, 20), np.bool_)
    masks[2, 5], x[2, 5] = False, bad
    found = site.multiply(x, masks)
    assert np.isfinite(found[[0, 2]]).all()
    if kind == "bf16":
        assert not np.isfinite(found[1]).any()
    else:
        assert np.isnan(found[1]).all()


@pytest.mark.parametrize("kind", WEIGHTS)
def test_extremes(tmp_path: Path, instructions: str, kind: Weights) -> None:
    """Zeros, denormals, one channel that dwarfs the others, and what overflows."""
    records = write(tmp_path / "records", kind, 40, 130)
    site, rng = Site(records, 40), np.random.default_rng(1)
    masks = np.ones((1, 40), np.bool_)
    usual = rng.standard_normal((1, 40)).astype(np.float32)
    outlier = usual.copy()
    outlier[0, 7] = 1e30
    for x in (0 * usual, -0 * usual, np.float32(1e-41) * usual, np.float32(1e-35) * usual, outlier):
        check(records, site.multiply(x, masks), x, masks)
    huge = np.full((1, 40), 3e38, np.float32)
    assert not np.isfinite(site.multiply(huge, masks)).any()


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_scales_of_zero(tmp_path: Path, instructions: str, kind: Weights) -> None:
    records = write(tmp_path / "records", kind, 9, 64)
    assert records.scales is not None
    records.scales[:] = 0
    site, masks = Site(records, 4), np.ones((2, 9), np.bool_)
    x = np.ones((2, 9), np.float32)
    assert not site.multiply(x, masks).any()
    x[1, 3] = np.nan
    assert np.isnan(site.multiply(x, masks)[1]).all()


@pytest.mark.parametrize("kind", WEIGHTS)
def test_threads_backends_and_the_cache_change_no_bit(
    tmp_path: Path, instructions: str, kind: Weights
) -> None:
    records = write(tmp_path / "records", kind, 300, 1100, 2)
    made = []
    for slots, policy, backend, threads in (
        (150, "lru", "pread", 1),
        (0, "lfu", "auto", 2),
        (17, "lru", "auto", 1),
        (80, "lfu", "pread", 2),
    ):
        rng, site = np.random.default_rng(2), Site(records, slots, policy, backend, threads)
        outputs = []
        for tokens in (1, 5, 1, 1, 70):
            x = activations(tokens, 300, rng)
            outputs.append(site.multiply(x, random_masks(tokens, 150, rng)))
        made.append(np.concatenate(outputs))
    for other in made[1:]:
        np.testing.assert_array_equal(other, made[0])


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_token_beside_others_is_the_token_alone(tmp_path: Path, kind: Weights) -> None:
    records = write(tmp_path / "records", kind, 200, 300)
    rng, site = np.random.default_rng(3), Site(records, 60)
    x, masks = activations(70, 200, rng), random_masks(70, 200, rng)
    together = site.multiply(x, masks)
    alone = [site.multiply(x[t : t + 1], masks[t : t + 1]) for t in (0, 1, 2, 3, 69)]
    np.testing.assert_array_equal(together[[0, 1, 2, 3, 69]], np.concatenate(alone))
