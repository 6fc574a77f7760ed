"""The histogram's threshold against the exact quantile of the sorted scores."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dipnet.adapt.histogram import ScoreHistogram

BIN = 2**-8
"""The width of a bin, relative to the scores in it."""

scores = st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=200)
densities = st.floats(0.001, 1, exclude_max=True)


def histogram(*parts: torch.Tensor) -> ScoreHistogram:
    made = ScoreHistogram()
    for part in parts:
        made.add(part)
    return made


def exact(values: list[float], density: float) -> float:
    """The smallest of the highest scores that make up ``density`` of all."""
    return sorted(values, reverse=True)[math.ceil(density * len(values)) - 1]


@given(scores, densities)
def test_it_is_the_quantile_to_within_a_bin(values: list[float], density: float) -> None:
    threshold = histogram(torch.tensor(values)).threshold(density)
    quantile = exact(values, density)
    assert threshold == pytest.approx(quantile, rel=BIN, abs=2.0**-126)


@given(scores, densities, densities)
def test_a_higher_density_has_no_higher_threshold(
    values: list[float], one: float, other: float
) -> None:
    made = histogram(torch.tensor(values))
    assert made.threshold(max(one, other)) <= made.threshold(min(one, other))


@given(st.lists(st.floats(0, 1, width=32), min_size=1))
def test_every_score_exceeds_that_of_density_one(values: list[float]) -> None:
    made = histogram(torch.tensor(values))
    assert (torch.tensor(values) > made.threshold(1.0)).all()


@pytest.mark.parametrize("density", [0.51, 0.7, 0.99])
def test_zeros_are_never_kept_for_the_sake_of_the_density(density: float) -> None:
    """Half of these are zero, as in a ReLU model: the other half is all there is to keep."""
    values = torch.cat([torch.zeros(500), torch.linspace(0.1, 1, 500)])
    assert histogram(values).threshold(density) == 0


def test_the_share_that_exceeds_it() -> None:
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).abs()
    made = histogram(values)
    for density in (0.01, 0.1, 0.5, 0.9, 0.99):
        share = (values > made.threshold(density)).double().mean().item()
        assert share == pytest.approx(density, abs=2e-4)


@given(scores, st.floats(0, 2.0**101))
def test_a_share_is_right_to_within_a_bin(values: list[float], threshold: float) -> None:
    share = histogram(torch.tensor(values)).share(threshold)
    above = [value > threshold * (1 + BIN) for value in values]
    nearly = [value >= threshold * (1 - BIN) - 2.0**-126 for value in values]
    assert sum(above) / len(values) <= share + 1e-9
    assert share <= sum(nearly) / len(values) + 1e-9


@pytest.mark.parametrize("density", [0.01, 0.3, 0.7, 0.99])
def test_a_share_is_the_inverse_of_a_threshold(density: float) -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0)).exp()
    made = histogram(values)
    assert made.share(made.threshold(density)) == pytest.approx(density, abs=1e-6)
    assert made.share(-1.0) == made.share(0.0) == 1


def test_parts_add_up() -> None:
    values = torch.rand(4, 6, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(histogram(*values).counts, histogram(values).counts)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_and_views(dtype: torch.dtype) -> None:
    values = torch.rand(60, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert histogram(values.T).threshold(0.3) == pytest.approx(
        exact(values.flatten().tolist(), 0.3), rel=BIN
    )
