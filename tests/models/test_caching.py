"""A cache for every site: masks, hits and misses against a plain loop with a cache of its own."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import dipnet
from dipnet import DIP, WINA, CacheSettings, CacheSlots
from dipnet.errors import InputError
from tests.families import random_tokens, shared, tiny
from tests.matrix import CLOSE, all_channels, column_norms, logits
from tests.reference import PlainLayer, install

TOKENS = random_tokens(2, 9)
AWARE = DIP(input_density=0.5, hidden_density=0.25, cache_aware=0.3)


class PlainCache:
    """Least recently or least often used, over lists; which slot holds a unit does not matter."""

    def __init__(self, slots: int, policy: str) -> None:
        self.slots, self.policy = slots, policy
        self.held: list[int] = []
        self.last: dict[int, int] = {}
        self.count: dict[int, int] = {}
        self.now = self.hits = self.misses = 0

    def use(self, wanted: list[int]) -> None:
        self.now += 1
        for unit in wanted:
            self.last[unit] = self.now
            self.count[unit] = self.count.get(unit, 0) + 1
        missed = [unit for unit in wanted if unit not in self.held]
        self.hits += len(wanted) - len(missed)
        self.misses += len(missed)
        worth = self.last if self.policy == "lru" else self.count
        victims = sorted(set(self.held) - set(wanted), key=lambda unit: (worth[unit], unit))
        for unit in sorted(missed, key=lambda unit: (-worth[unit], unit)):
            if len(self.held) < self.slots:
                self.held.append(unit)
            elif victims and (self.policy == "lru" or worth[unit] >= worth[victims[0]]):
                self.held[self.held.index(victims.pop(0))] = unit
            else:
                return


class PlainRun:
    """DIP's MLP in loops, every layer with two caches; ``cache`` holds them by layer and site."""

    def __init__(self, settings: CacheSettings) -> None:
        self.settings = settings
        self.caches: dict[str, PlainCache] = {}

    def __call__(self, layer: PlainLayer, method: Any, x: Tensor) -> Tensor:
        weights = [1.0, 1.0]
        if isinstance(method, WINA):
            weights = [column_norms(layer, *layer.input_matrices), column_norms(layer, "down")]
        scores = (x.abs() * weights[0]).tolist()
        channels = self.keep(f"{layer.number}.mlp.in", method, scores, method.input_density)
        hidden = layer.hidden(x[channels], inputs=channels)
        block = method.hidden_block or 1
        parts = (hidden.abs() * weights[1]).split(block)
        norms = [sum(value * value for value in part.tolist()) ** 0.5 for part in parts]
        blocks = self.keep(f"{layer.number}.mlp.hidden", method, norms, method.hidden_density)
        return layer.down(hidden, [b * block + i for b in blocks for i in range(block)])

    def keep(self, site: str, method: Any, scores: list[float], density: float) -> list[int]:
        n = len(scores)
        slots = round(self.settings.share * n)
        cache = self.caches.setdefault(site, PlainCache(slots, self.settings.policy))
        gamma = method.cache_aware or 1
        weighed = [s if unit in cache.held else s * gamma for unit, s in enumerate(scores)]
        wanted = sorted(sorted(range(n), key=lambda unit: -weighed[unit])[: round(density * n)])
        cache.use(wanted)
        return wanted


@pytest.mark.parametrize("family", ["phi3", "opt"])
@pytest.mark.parametrize(
    "settings",
    [CacheSettings(0.4, "lru"), CacheSettings(0.4, "lfu"), CacheSettings(0), CacheSettings(1)],
    ids=["lru", "lfu", "nothing", "everything"],
)
@pytest.mark.parametrize(
    "method",
    [
        AWARE,
        DIP(input_density=0.5, hidden_density=0.25, cache_aware=0.3, hidden_block=4),
        DIP(input_density=0.5, hidden_density=0.25),
        WINA(input_density=0.5, hidden_density=0.25, cache_aware=0.3, hidden_block=2),
    ],
    ids=["dip", "blocks", "not aware", "wina"],
)
def test_against_plain_loops(family: str, settings: CacheSettings, method: DIP) -> None:
    run, model = PlainRun(settings), tiny(family)
    layers = install(model, method, run, all_channels)
    expected = logits(model, TOKENS)
    with dipnet.sparsify(shared(family), method, cache=settings) as sparse:
        torch.testing.assert_close(logits(sparse, TOKENS), expected, **CLOSE)
        counted, density = dipnet.usage(sparse).cache(), dipnet.usage(sparse).density()
    assert counted.hits == {site: cache.hits for site, cache in run.caches.items()}
    assert counted.misses == {site: cache.misses for site, cache in run.caches.items()}
    read = sum(layer.read[matrix] for layer in layers for matrix in ("gate", "up", "down"))
    weights = sum(layer.weights[m].numel() for layer in layers for m in layer.weights if len(m) > 1)
    assert density.mlp == pytest.approx(read / weights / TOKENS.numel())


def test_slots_are_a_sites_own() -> None:
    """Given one by one they are what a share makes of them; a site without a cache has no hits."""
    model, share = shared("llama"), CacheSettings(0.4)
    with dipnet.sparsify(model, AWARE, cache=share):
        expected, counts = logits(model, TOKENS), dipnet.usage(model).cache()
        slots = {
            key: share.make(site.units).slots for key, site in dipnet.usage(model).sites.items()
        }
    with dipnet.sparsify(model, AWARE, cache=CacheSlots(slots)):
        assert torch.equal(logits(model, TOKENS), expected)
        assert dipnet.usage(model).cache() == counts
    with dipnet.sparsify(model, AWARE, cache=CacheSlots({(0, "mlp.in"): 1})):
        logits(model, TOKENS)
        assert set(dipnet.usage(model).cache().hits) == {"0.mlp.in"}


def test_with_all_in_memory_there_is_nothing_to_prefer() -> None:
    plain = DIP(input_density=0.5, hidden_density=0.25)
    with dipnet.sparsify(shared("llama"), plain) as model:
        expected = logits(model, TOKENS)
    with dipnet.sparsify(shared("llama"), AWARE, cache=CacheSlots({})) as model:
        assert torch.equal(logits(model, TOKENS), expected)


@torch.no_grad()
def decode(model: Any, parts: tuple[Tensor, ...]) -> Tensor:
    outputs, cache = [], None
    for part in parts:
        output = model(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        outputs.append(output.logits)
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
@pytest.mark.parametrize("prefill", ["sparse", 3])
def test_step_by_step_is_the_whole_sequence(family: str, prefill: Any) -> None:
    sequence, settings = TOKENS[:1], CacheSettings(0.4)
    runs = []
    for compute in (logits, lambda model, x: decode(model, x.split((4, 1, 2, 1, 1), dim=1))):
        model = shared(family)
        with dipnet.sparsify(model, AWARE, cache=settings, prefill=prefill):
            outputs = compute(model, sequence)
            runs.append((outputs, dipnet.usage(model).cache()))
    torch.testing.assert_close(runs[0][0], runs[1][0], **CLOSE)
    assert runs[0][1] == runs[1][1]
    assert set(runs[0][1].hits) == {"0.mlp.in", "0.mlp.hidden", "1.mlp.in", "1.mlp.hidden"}


def test_a_batch_is_its_rows_one_after_the_other() -> None:
    """In a layer, that is: so only the first layer's counts are those of rows on their own."""
    model = shared("llama")
    with dipnet.sparsify(model, AWARE, cache=CacheSettings(0.4)):
        together = logits(model, TOKENS)
        counted = dipnet.usage(model).cache()
    with dipnet.sparsify(model, AWARE, cache=CacheSettings(0.4)):
        apart = torch.cat([logits(model, row[None]) for row in TOKENS])
        assert dipnet.usage(model).cache() == counted
    torch.testing.assert_close(together, apart, **CLOSE)


def test_padding_and_dense_prompts_do_not_use_the_cache() -> None:
    model, row = shared("llama"), TOKENS[:1]
    padded = torch.cat([torch.zeros_like(row), row], dim=1)
    attended = (torch.arange(18) >= 9).long()[None]
    with dipnet.sparsify(model, AWARE, cache=CacheSettings(0.4)):
        expected = logits(model, row)
        counted = dipnet.usage(model).cache()
    with dipnet.sparsify(model, AWARE, cache=CacheSettings(0.4)), torch.no_grad():
        positions = (attended.cumsum(-1) - 1).clamp(min=0)
        output = model(padded, attention_mask=attended, position_ids=positions).logits[:, 9:]
        assert dipnet.usage(model).cache() == counted
        torch.testing.assert_close(output, expected, **CLOSE)
    with dipnet.sparsify(model, AWARE, cache=CacheSettings(0.4), prefill="dense"):
        logits(model, row)
        cached = dipnet.usage(model).cache()
        assert (cached.hits, cached.misses, cached.hit_rate) == ({}, {}, None)


@pytest.mark.parametrize("changes", [{"cache_aware": 1.0}, {}], ids=["gamma 1", "no gamma"])
def test_gamma_1_is_plain_dip(changes: dict[str, float]) -> None:
    model = shared("llama")
    with dipnet.sparsify(model, DIP(0.5)):
        expected = logits(model, TOKENS)
    with dipnet.sparsify(model, DIP(0.5, **changes), cache=CacheSettings(0.5)):
        assert torch.equal(logits(model, TOKENS), expected)


def test_everything_in_memory_is_plain_dip() -> None:
    model = shared("llama")
    with dipnet.sparsify(model, DIP(0.5)):
        expected = logits(model, TOKENS)
    with dipnet.sparsify(model, DIP(0.5, cache_aware=0.2)):
        assert torch.equal(logits(model, TOKENS), expected)


def test_preferring_what_is_cached_raises_the_hit_rate() -> None:
    model, rates = shared("llama"), []
    for gamma in (1.0, 0.5, 0.1):
        method = DIP(input_density=0.4, hidden_density=0.4, cache_aware=gamma)
        with dipnet.sparsify(model, method, cache=CacheSettings(0.5)):
            logits(model, random_tokens(1, 40))
            rates.append(dipnet.usage(model).cache().hit_rate)
    assert rates == sorted(set(rates))


def test_the_hit_rate_is_of_weights() -> None:
    model = shared("llama")
    with dipnet.sparsify(model, AWARE, cache=CacheSettings(0.5)):
        logits(model, TOKENS)
        cached = dipnet.usage(model).cache()
        dipnet.usage(model).reset()
        assert dipnet.usage(model).cache().hit_rate is None
    size = {"mlp.in": 2 * 52, "mlp.hidden": 24}
    hits = sum(n * size[site[2:]] for site, n in cached.hits.items())
    misses = sum(n * size[site[2:]] for site, n in cached.misses.items())
    assert cached.hit_rate == pytest.approx(hits / (hits + misses))
    assert cached.hits["0.mlp.in"] + cached.misses["0.mlp.in"] == 18 * 12


def test_a_copy_of_the_model_has_caches_of_its_own() -> None:
    model = tiny("llama")
    with dipnet.sparsify(model, AWARE, cache=CacheSettings(0.4)):
        logits(model, TOKENS)
        other = copy.deepcopy(model)
        assert torch.equal(logits(model, TOKENS), logits(other, TOKENS))
        assert dipnet.usage(other).cache() == dipnet.usage(model).cache()


def test_without_sites_or_a_cache_there_are_no_hits() -> None:
    model = shared("llama")
    for method, cache in [(dipnet.Dense(), CacheSettings(0.5)), (AWARE, None)]:
        with dipnet.sparsify(model, method, cache=cache):
            logits(model, TOKENS)
            assert dipnet.usage(model).cache().hit_rate is None


def test_what_is_no_cache() -> None:
    with pytest.raises(InputError, match=r"cache is a dipnet\.CacheSettings such as .*, not 0\.5"):
        dipnet.sparsify(shared("llama"), AWARE, cache=0.5)


def test_no_recomputation_with_a_cache() -> None:
    model = tiny("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with dipnet.sparsify(model, AWARE, cache=CacheSettings(0.5)):
        loss = model(TOKENS, labels=TOKENS).loss
        with pytest.raises(InputError, match="turn gradient checkpointing off"):
            loss.backward()
