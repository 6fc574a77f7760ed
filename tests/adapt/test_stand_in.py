"""The parallel stand-in for a cache: exact after enough rounds, near after a few."""

import pytest
import torch
from torch import Tensor

import dipnet
from dipnet.adapt.stand_in import SPAN, StandIn, StandInAttachment, resident_before
from dipnet.cache import CacheSettings, make_cache
from dipnet.methods.base import Method
from dipnet.models.attach import usage
from dipnet.models.caching import SiteCache
from dipnet.models.families import Decoder, describe
from dipnet.units import Site
from tests.families import random_tokens, tiny

GAMMA = 0.2
METHOD = dipnet.DIP(0.5, cache_aware=GAMMA)
CACHE = CacheSettings(0.6)


def hidden_site(method: Method = METHOD) -> Site:
    return method.sites(describe(tiny("llama")))[1]


def drifting_scores(tokens: int, units: int) -> Tensor:
    """(tokens, units) magnitudes of which some stay for a while, as activations' do."""
    generator = torch.Generator().manual_seed(3)
    slow = torch.randn(tokens // 8 + 1, units, generator=generator).repeat_interleave(8, 0)
    return (slow[:tokens] + torch.randn(tokens, units, generator=generator)).abs()


def true_masks(site: Site, scores: Tensor, cache: CacheSettings) -> tuple[Tensor, int]:
    made = cache.make(site.units)
    return SiteCache(site, METHOD, made).select(scores, None)


@pytest.mark.parametrize("tokens", [1, 5, SPAN, SPAN + 1, 3 * SPAN - 1])
@pytest.mark.parametrize("slots", [0, 9, 20, 30])
def test_lru_is_what_the_cache_holds(tokens: int, slots: int) -> None:
    """Token by token, for any wanted units of no more than the slots."""
    generator = torch.Generator().manual_seed(tokens)
    order = torch.rand(tokens, 30, generator=generator).argsort(-1)
    wanted = order < torch.randint(0, slots + 1, (tokens, 1), generator=generator)
    cache = make_cache(30, slots, "lru")
    found = resident_before(wanted, slots, "lru")
    for at in range(tokens):
        assert found[at].tolist() == cache.resident.tolist(), at
        cache.access(wanted[at].numpy())


def test_lfu_is_the_units_used_most() -> None:
    wanted = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 1], [0, 1, 0, 1], [0, 0, 1, 0]]).bool()
    found = resident_before(wanted, 2, "lfu")
    expected = [[0, 0, 0, 0], [1, 0, 0, 1], [1, 0, 0, 1], [0, 1, 0, 1]]
    assert found.int().tolist() == expected


def test_with_a_round_for_each_token_the_masks_are_the_caches() -> None:
    site = hidden_site()
    scores = drifting_scores(24, site.units)
    expected, hits = true_masks(site, scores, CACHE)
    mask, found = StandIn(site, METHOD, CACHE, rounds=24).select(scores.view(2, 12, -1), None)
    assert torch.equal(mask.flatten(0, 1), expected)
    assert int(found) == hits


@pytest.mark.parametrize(("policy", "hits_apart"), [("lru", 0.02), ("lfu", 0.04)])
def test_one_round_hits_as_the_cache_does(policy: str, hits_apart: float) -> None:
    """And more rounds come nearer to its masks, from those that know of no cache."""
    site = hidden_site()
    scores = drifting_scores(600, site.units)
    cache = CacheSettings(0.6, policy)
    expected, hits = true_masks(site, scores, cache)
    wanted = int(expected.sum())
    agreements = [float((METHOD.select(site, scores) & expected).sum()) / wanted]
    for rounds in (1, 4, 16):
        mask, found = StandIn(site, METHOD, cache, rounds).select(scores, None)
        assert int(found) / wanted == pytest.approx(hits / wanted, abs=hits_apart)
        agreements.append(float((mask & expected).sum()) / wanted)
    assert agreements == sorted(agreements)
    assert agreements[-1] > agreements[0] + 0.1


def test_masks_of_a_batch_are_those_of_evaluation() -> None:
    """On a model, with the rounds it takes: the logits and the hits of `sparsify(cache=)`."""
    tokens = random_tokens(2, 8)
    model = tiny("llama")
    with torch.no_grad():
        with dipnet.sparsify(model, METHOD, cache=CACHE) as attached:
            expected, counted = attached(tokens).logits, usage(attached)
        attachment = StandInAttachment(Decoder(model), METHOD, CACHE, rounds=16)
        attachment.attach()
        found = model(tokens).logits
        assert attachment.usage.cache() == counted.cache()
        assert attachment.usage.density() == counted.density()
        attachment.detach()
    assert torch.equal(found, expected)


def test_a_layer_may_be_computed_again() -> None:
    """Gradient checkpointing gives the gradients of a plain pass, and counts nothing twice."""
    tokens = random_tokens(2, 8)
    gradients, hits = [], []
    for checkpointing in (False, True):
        model = tiny("llama").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        attachment = StandInAttachment(Decoder(model), METHOD, CACHE)
        attachment.attach()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        gradients.append(model.get_decoder().layers[0].mlp.up_proj.weight.grad)
        hits.append(attachment.usage.cache().hits)
    torch.testing.assert_close(gradients[1], gradients[0])
    assert hits[1] == hits[0]
