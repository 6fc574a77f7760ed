"""Scores and selection on their own: small tensors, masks known by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dipnet import CATS, GLUOracle, GLUPruning, Wanda
from dipnet.errors import InputError
from dipnet.methods.base import magnitude
from tests.matrix import calibrated
from tests.test_units import GATED

ORACLE = GLUOracle(0.25)
SITE = ORACLE.sites(GATED)[0]


def test_scores_are_magnitudes_in_float32_or_better() -> None:
    x = torch.tensor([[-2.0, 1.0, -0.0]])
    assert torch.equal(ORACLE.score(SITE, x), torch.tensor([[2.0, 1.0, 0.0]]))
    assert magnitude(x.bfloat16()).dtype == torch.float32
    assert magnitude(x.double()).dtype == torch.float64


@given(st.integers(0, 10_000))
def test_every_token_keeps_its_own_top_k(seed: int) -> None:
    scores = torch.rand(2, 3, 20, generator=torch.Generator().manual_seed(seed))
    mask = ORACLE.select(SITE, scores)
    assert (mask.sum(-1) == 5).all()
    assert (scores.masked_fill(~mask, 9).amin(-1) > scores.masked_fill(mask, -1).amax(-1)).all()


def test_a_threshold_keeps_what_exceeds_it() -> None:
    method = CATS(0.5, thresholds={(0, "mlp.hidden"): 0.5})
    mask = method.select(method.sites(GATED)[0], torch.tensor([[0.4, 0.5, 0.6], [9.0, 9.0, 9.0]]))
    assert mask.tolist() == [[False, False, True], [True, True, True]]


def test_scoring_takes_no_gradient() -> None:
    x = torch.randn(2, 20, requires_grad=True)
    assert not ORACLE.score(SITE, x).requires_grad


# --- Wanda ---

WEIGHT = torch.tensor([[1.0, -2, 3, -4, 5, 0.1, 0.2, 9], [8.0, 7, 6, 5, 4, 3, 2, 1]])


def test_wanda_compares_weights_within_a_row() -> None:
    mask = Wanda(0.5).mask(WEIGHT, torch.ones(8))
    assert mask.tolist() == [
        [False, False, True, True, True, False, False, True],
        [True, True, True, True, False, False, False, False],
    ]


def test_wanda_weighs_by_the_norm_of_the_input() -> None:
    norms = torch.tensor([100.0, 1, 1, 1, 1, 1, 1, 1])
    assert Wanda(0.125).mask(WEIGHT, norms)[:, 0].tolist() == [True, True]


def test_two_of_every_four() -> None:
    mask = Wanda(pattern="2:4").mask(WEIGHT, torch.ones(8))
    assert mask.tolist() == [
        [False, False, True, True, True, False, False, True],
        [True, True, False, False, True, True, False, False],
    ]


@pytest.mark.parametrize("family", ["llama", "phi3", "opt"])
def test_every_group_of_four_keeps_two(family: str) -> None:
    for mask in calibrated(family, "wanda-2:4").masks.values():
        assert (mask.unflatten(1, (-1, 4)).sum(-1) == 2).all()


def test_2_4_needs_inputs_in_fours() -> None:
    with pytest.raises(InputError, match="inputs in fours; a matrix has 6"):
        Wanda(pattern="2:4").mask(WEIGHT[:, :6], torch.ones(6))


def test_a_method_is_immutable() -> None:
    with pytest.raises(AttributeError):
        GLUPruning(0.8).density = 0.9
