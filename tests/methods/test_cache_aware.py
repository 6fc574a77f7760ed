"""DIP with a cache and with blocks: scores and masks by hand, and what is refused."""

import pytest
import torch

from dipnet import DIP, WINA, GLUPruning
from dipnet.errors import InputError
from dipnet.methods.base import block_norms
from tests.test_units import GATED

SCORES = torch.tensor([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
LAST_FOUR = torch.arange(8) >= 4


def kept(method: DIP, resident: torch.Tensor | None = None) -> list[int]:
    site = method.sites(GATED)[0]  # mlp.in of 8 channels
    return method.select(site, SCORES, resident).nonzero().flatten().tolist()


@pytest.mark.parametrize("method", [DIP, WINA])
def test_a_lower_gamma_prefers_what_is_resident(method: type[DIP]) -> None:
    def half(gamma: float | None) -> DIP:
        return method(input_density=0.5, hidden_density=0.5, cache_aware=gamma)

    assert kept(half(0.5), LAST_FOUR) == [0, 1, 2, 4]  # 4, 3.5, 3, 2.5 | 4, 3, 2, 1
    assert kept(half(0.1), LAST_FOUR) == [4, 5, 6, 7]
    for plain in (half(1.0), half(None)):
        assert kept(plain, LAST_FOUR) == [0, 1, 2, 3]
    assert kept(half(0.1)) == [0, 1, 2, 3]  # all in memory


def test_every_token_by_the_same_residency() -> None:
    method = DIP(input_density=0.5, hidden_density=0.5, cache_aware=0.1)
    mask = method.select(method.sites(GATED)[0], SCORES.repeat(2, 3, 1), LAST_FOUR)
    assert torch.equal(mask, LAST_FOUR.expand(2, 3, 8))


def test_other_methods_take_a_residency_and_ignore_it() -> None:
    method = GLUPruning(0.8)
    site, scores = method.sites(GATED)[0], torch.rand(2, 20)
    nothing = torch.zeros(20, dtype=torch.bool)
    assert torch.equal(method.select(site, scores, nothing), method.select(site, scores))


def test_a_block_scores_by_its_norm() -> None:
    method = DIP(0.5, hidden_block=2)
    site = method.sites(GATED)[1]
    x = torch.zeros(3, 20)
    x[0, :4] = torch.tensor([3.0, -4.0, 0.0, -1.0])
    scores = method.score(site, x)
    assert scores.shape == (3, 10)
    assert scores[0, :3].tolist() == [5.0, 1.0, 0.0]
    assert torch.equal(block_norms(x.abs(), 1), x.abs())


def test_wina_weighs_the_channels_of_a_block() -> None:
    method = WINA(0.5, hidden_block=2, norms={(0, "mlp.hidden"): torch.arange(20.0)})
    scores = method.score(method.sites(GATED)[1], torch.ones(20))
    assert torch.allclose(scores[:2], torch.tensor([1.0, 13.0**0.5]))
    assert method.added_weights(GATED) == 3 * (8 + 20)  # a norm a channel, blocks or not


def test_a_nan_in_a_block_is_kept() -> None:
    method = DIP(0.5, hidden_block=2)
    site = method.sites(GATED)[1]
    x = torch.rand(20)
    x[13] = torch.nan
    assert method.select(site, method.score(site, x))[6]


def test_blocks_that_do_not_divide() -> None:
    with pytest.raises(InputError, match="a block of 3 does not divide the 20 neurons"):
        DIP(0.5, hidden_block=3).check_model(GATED)


@pytest.mark.parametrize("gamma", [0, -0.5, 1.5, float("nan"), True, "x"])
def test_gamma_is_in_0_1(gamma: object) -> None:
    with pytest.raises(InputError, match=r"cache_aware must be in \(0, 1\]"):
        DIP(0.5, cache_aware=gamma)


@pytest.mark.parametrize("block", [0, -1, 2.0, True, "2"])
def test_a_block_is_a_number_of_neurons(block: object) -> None:
    with pytest.raises(InputError, match="hidden_block must be a whole number from 1 up"):
        DIP(0.5, hidden_block=block)
