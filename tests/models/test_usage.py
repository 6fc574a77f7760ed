"""Density by hand: what is counted, and what is not."""

import dataclasses

import pytest
import torch

import dipnet
from dipnet import DIP, GatePruning, GLUOracle, GLUPruning, Wanda
from dipnet.methods.base import Method
from dipnet.models.families import describe
from dipnet.models.usage import Density
from tests.families import random_tokens, shared
from tests.matrix import calibrated, linear_inputs, logits

TOKENS = random_tokens(2, 6)
SPEC = describe(shared("llama"))  # 24 channels, 52 neurons


def density_of(method: Method, family: str = "llama") -> Density:
    model = shared(family)
    with dipnet.sparsify(model, method):
        logits(model, TOKENS)
        return dipnet.usage(model).density()


@pytest.mark.parametrize(
    ("method", "mlp"),
    [
        (GLUPruning(0.8), (2 + 21 / 52) / 3),  # 0.4 * 52 = 20.8 neurons
        (GatePruning(0.5), (1 + 2 * 13 / 52) / 3),
        (GLUOracle(0.25), 13 / 52),
        (DIP(input_density=0.5, hidden_density=0.25), (2 * 12 / 24 + 13 / 52) / 3),
        (DIP(input_density=0.01, hidden_density=0.01), (2 * 1 / 24 + 1 / 52) / 3),
        (DIP(1.0), 1.0),
        (dipnet.Dense(), 1.0),
    ],
)
def test_share_of_the_mlp(method: Method, mlp: float) -> None:
    density = density_of(method)
    assert density.mlp == pytest.approx(mlp)
    assert density.mlp_by_layer == pytest.approx((mlp, mlp))


def test_without_a_gate() -> None:
    assert density_of(GLUPruning(0.75), "opt").mlp == pytest.approx((1 + 30 / 60) / 2)


def test_sites() -> None:
    sites = density_of(DIP(input_density=0.5, hidden_density=0.25, attention_density=0.75)).sites
    expected = {"attn.in": 18 / 24, "attn.out": 18 / 24, "mlp.in": 12 / 24, "mlp.hidden": 13 / 52}
    assert sites == {f"{n}.{site}": share for n in range(2) for site, share in expected.items()}


def test_attention_counts_apart() -> None:
    assert density_of(DIP(0.5)).attention == 1
    assert density_of(DIP(0.5, attention_density=0.75)).attention == pytest.approx(0.75)


def test_heads_share_the_keys_and_values_of_their_group() -> None:
    """Four heads of ten channels in two groups; all four matrices are of known sizes."""
    spec = describe(shared("qwen3"))
    q, k, v, o = (spec.weights(matrix) for matrix in "qkvo")
    model = shared("qwen3")
    for heads in range(1, 5):
        with dipnet.sparsify(model, dipnet.DejaVuOracle(head_density=heads / 4)):
            with linear_inputs(model) as inputs:
                logits(model, TOKENS)
            density = dipnet.usage(model).density()
        kept = [x[0].unflatten(-1, (4, 10)).any(-1) for x in inputs if x[0].shape[-1] == 40]
        assert len(kept) == 2  # the output projection of each layer
        groups = [mask.unflatten(-1, (2, 2)).any(-1).double().mean().item() for mask in kept]
        read = [heads / 4 * (q + o) + share * (k + v) for share in groups]
        expected = [weights / spec.attention_weights for weights in read]
        assert density.attention_by_layer == pytest.approx(expected)
        assert density.sites == {f"{layer}.attn.head": heads / 4 for layer in (0, 1)}
        assert density.mlp == 1


def test_heads_of_their_own() -> None:
    density = density_of(dipnet.DejaVuOracle(0.2, 1 / 3), "opt")
    assert density.attention == pytest.approx(1 / 3)
    assert density.mlp == pytest.approx(12 / 60)


def test_padding_and_dense_prompts_count_no_head() -> None:
    attended = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    model = shared("qwen3")
    with dipnet.sparsify(model, dipnet.DejaVuOracle(head_density=0.25), prefill=2):
        logits(model, TOKENS, attention_mask=attended)
        density = dipnet.usage(model).density()
    assert density.tokens == 1 + 3
    spec = describe(model)
    read = spec.weights("q", "o") / 4 + spec.weights("k", "v") / 2
    assert density.attention == pytest.approx(read / spec.attention_weights)


def test_layers_that_stay_dense_are_dense() -> None:
    density = density_of(dipnet.DejaVuOracle(0.25, 1 / 3, dense_first=1))
    assert density.mlp_by_layer == pytest.approx((1, 13 / 52))
    assert density.attention_by_layer[0] == 1
    assert density.attention_by_layer[1] < 0.6


def test_by_layer() -> None:
    """The second layer keeps everything: its thresholds are below every score."""
    fitted = calibrated("llama", "teal")
    open_layer = {key: -1.0 if key[0] else cut for key, cut in fitted.thresholds.items()}
    density = density_of(dataclasses.replace(fitted, thresholds=open_layer))
    mlp, attention = density.mlp_by_layer[0], density.attention_by_layer[0]
    assert density.mlp_by_layer == (mlp, 1)
    assert density.attention_by_layer == (attention, 1)
    assert density.mlp == (mlp + 1) / 2
    assert density.attention == (attention + 1) / 2
    weights = SPEC.mlp_weights + SPEC.attention_weights
    read = mlp * SPEC.mlp_weights + attention * SPEC.attention_weights
    assert density.total_by_layer == pytest.approx((read / weights, 1))


def test_total_is_a_share_of_all_that_a_token_reads() -> None:
    density = density_of(GLUOracle(0.25))
    pruned = 2 * 3 * 39 * 24  # layers, matrices, neurons, channels
    assert density.total == pytest.approx(1 - pruned / SPEC.weights_per_token)
    assert density.added == 0


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("cats", 2),
        ("teal", 8),
        ("wina", 2 * (24 + 24 + 24 + 52)),
        ("wanda", 2 * 234),
        ("dejavu", 2 * (2 * (5 * 24 + 5) + 52 * 6 + 3 * 6)),
        ("dejavu-heads", 5 * 24 + 5 + 3 * 6),
        ("dejavu-oracle", 0),
        ("cett", 0),
        ("random", 0),
    ],
)
def test_what_the_method_reads_itself_is_in_the_total(name: str, numbers: int) -> None:
    density = density_of(calibrated("llama", name))
    assert density.added == pytest.approx(numbers / SPEC.weights_per_token)
    linear = density.mlp * SPEC.mlp_weights + density.attention * SPEC.attention_weights
    read = 2 * linear + SPEC.other_weights + numbers
    assert density.total == pytest.approx(read / SPEC.weights_per_token)


def test_a_static_method() -> None:
    """k of n in every row: 0.6 * 24 = 14.4 and 0.6 * 52 = 31.2."""
    mlp = (2 * 14 / 24 + 31 / 52) / 3
    assert density_of(calibrated("llama", "wanda")).mlp == pytest.approx(mlp)
    two_of_four = calibrated("llama", "wanda-2:4")
    assert isinstance(two_of_four, Wanda)
    assert density_of(two_of_four).mlp == 0.5


def test_counts_add_up_and_are_reset() -> None:
    model = shared("llama")
    with dipnet.sparsify(model, calibrated("llama", "cats")):
        usage = dipnet.usage(model)
        apart = []
        for tokens in TOKENS:
            logits(model, tokens[None])
            apart.append(usage.density())
            usage.reset()
        logits(model, TOKENS)
        both = usage.density()
    assert [density.tokens for density in apart] == [6, 6]
    assert both.tokens == 12
    assert both.mlp == pytest.approx((apart[0].mlp + apart[1].mlp) / 2)
    assert apart[0].mlp != apart[1].mlp


def test_before_any_token_it_is_the_dense_models() -> None:
    model = shared("llama")
    with dipnet.sparsify(model, DIP(0.5)):
        density = dipnet.usage(model).density()
    assert (density.tokens, density.mlp, density.total) == (0, 1, 1)


@pytest.mark.parametrize(("prefill", "tokens"), [("sparse", 12), ("dense", 0), (2, 8), (9, 0)])
def test_dense_tokens_are_not_counted(prefill: str | int, tokens: int) -> None:
    model = shared("llama")
    with dipnet.sparsify(model, GLUOracle(0.25), prefill=prefill):
        logits(model, TOKENS)
        density = dipnet.usage(model).density()
    assert density.tokens == tokens
    assert density.mlp == pytest.approx(0.25 if tokens else 1)


@pytest.mark.parametrize("prefill", ["sparse", 2])
def test_padding_is_not_counted(prefill: str | int) -> None:
    attended = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    model = shared("llama")
    with dipnet.sparsify(model, GLUOracle(0.25), prefill=prefill):
        logits(model, TOKENS, attention_mask=attended)
        density = dipnet.usage(model).density()
    assert density.tokens == {"sparse": 3 + 5, 2: 1 + 3}[prefill]
    assert density.mlp == pytest.approx(0.25)
