"""Decoding with heads and neurons left out is evaluation of the whole sequence with masks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, StaticCache

import dipnet
from dipnet.models.families import Decoder
from dipnet.models.skipping import gathering
from dipnet.units import kept_units
from tests.matrix import CLOSE
from tests.models.skipping.decoding import (
    CONFIGS,
    HEADS,
    LAYERS,
    NEURONS,
    WIDTH,
    Turns,
    decode,
    dejavu,
    evaluate,
    own,
    shared,
    tokens,
)

LENGTH, PROMPT = 256, 4
TOLERANCE = {"gemma2": {"rtol": 1e-4, "atol": 1e-4}}
"""Its softmax is in float32, whatever the weights are."""


def sparse(model: PreTrainedModel, method: Any, **options: Any) -> PreTrainedModel:
    return dipnet.sparsify(model, method, **{"backend": "skip", **options})


def close_for(family: str) -> dict[str, float]:
    return TOLERANCE.get(family, CLOSE)


@pytest.fixture(params=["exact", "fixed"])
def shapes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU, and with the fixed shapes of other devices."""
    if request.param == "fixed":
        monkeypatch.setattr(gathering, "AT_ONCE", ())


# --- the same as evaluation ---


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("batch", [1, 4])
def test_as_evaluated(family: str, batch: int) -> None:
    model, method, ids = shared(family), dejavu(family), tokens(batch, LENGTH)
    with sparse(model, method):
        decoded = decode(model, ids, prompt=PROMPT)
        density, read = dipnet.usage(model).density(), dipnet.usage(model).gathered
    with dipnet.sparsify(model, method, backend="reference"):
        torch.testing.assert_close(decoded, decode(model, ids, prompt=LENGTH), **close_for(family))
        assert dipnet.usage(model).density() == density
        assert not dipnet.usage(model).gathered
    assert_fewer_read(model, read, steps=LENGTH - PROMPT, alone=batch == 1)


def assert_fewer_read(model: PreTrainedModel, read: Any, *, steps: int, alone: bool) -> None:
    """One sequence has read exactly what it kept, several what any of them did."""
    spec = Decoder(model).spec
    size = spec.head_size * spec.width
    least = {
        **dict.fromkeys(spec.mlp_matrices, kept_units(0.33, NEURONS) * WIDTH),
        **dict.fromkeys("qo", kept_units(0.375, HEADS) * size),
    }
    for matrix in spec.matrices:
        dense = steps * LAYERS * spec.weights(matrix)
        kept = steps * LAYERS * least.get(matrix, size)
        assert kept <= read[matrix] < dense, matrix
        if alone and matrix in least:
            assert read[matrix] == kept


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "phi3", "gemma3", "opt"])
@pytest.mark.parametrize("kept_inputs", [1, 2, 3, 7, 16])
@pytest.mark.usefixtures("shapes")
def test_heads_that_wait_for_longer_than_inputs_are_kept(family: str, kept_inputs: int) -> None:
    """Each group waits for 18 tokens; a sliding window is shorter, too."""
    model, method, ids = shared(family), Turns(0.2, 0.125), tokens(2, 60)
    with sparse(model, method, kept_inputs=kept_inputs):
        decoded = decode(model, ids, prompt=PROMPT)
    torch.testing.assert_close(decoded, evaluate(model, method, ids), **CLOSE)


@pytest.mark.parametrize("family", ["llama", "phi3", "opt"])
@pytest.mark.parametrize("options", [{"head_density": None}, {"mlp_density": None}])
@pytest.mark.usefixtures("shapes")
def test_neurons_or_heads_alone(family: str, options: dict[str, Any]) -> None:
    model, method, ids = shared(family), dejavu(family, **options), tokens(2, 30)
    with sparse(model, method):
        decoded = decode(model, ids)
    torch.testing.assert_close(decoded, evaluate(model, method, ids), **CLOSE)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "opt"])
@pytest.mark.usefixtures("shapes")
def test_with_a_cache_of_fixed_size(family: str) -> None:
    model, method, ids = shared(family), Turns(0.2, 0.125), tokens(2, 40)
    cache = StaticCache(config=model.config, max_cache_len=44)
    with sparse(model, method, kept_inputs=5):
        first = decode(model, ids, cache, prompt=PROMPT)
        cache.reset()
        again = decode(model, ids, cache)
    expected = evaluate(model, method, ids)
    torch.testing.assert_close(first, expected, **CLOSE)
    torch.testing.assert_close(again, expected, **CLOSE)


@pytest.mark.parametrize("prefill", ["dense", 6])
def test_after_a_dense_prompt(prefill: Any) -> None:
    """A number may leave some of the decoded tokens dense."""
    model, method, ids = shared("llama"), dejavu("llama"), tokens(2, 20)
    with sparse(model, method, prefill=prefill):
        decoded = decode(model, ids, prompt=PROMPT)
    alike = PROMPT if prefill == "dense" else prefill
    torch.testing.assert_close(decoded, evaluate(model, method, ids, prefill=alike), **CLOSE)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_several_tokens_between_single_ones(family: str) -> None:
    """They read the keys of all heads: what is missing is made up for first."""
    model, method, ids = shared(family), Turns(0.2, 0.125), tokens(2, 30)
    cache, made = None, []
    with sparse(model, method), torch.no_grad():
        for part in ids.split((3, 1, 1, 1, 1, 5, 1, 1, 1, 2, *[1] * 13), dim=1):
            output = model(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            made.append(output.logits)
    torch.testing.assert_close(torch.cat(made, dim=1), evaluate(model, method, ids), **CLOSE)


def test_a_call_with_gradients_skips_nothing() -> None:
    model, method, ids = own("llama"), Turns(0.2, 0.125), tokens(2, 14)
    with sparse(model, method):
        with torch.no_grad():
            cache = model(ids[:, :3], use_cache=True).past_key_values
            for i in range(3, 13):
                model(ids[:, i : i + 1], past_key_values=cache)
        read = dipnet.usage(model).gathered.copy()
        last = model(ids[:, 13:], past_key_values=cache).logits
        last.sum().backward()
        # What was missing until then is all that was read.
        assert set(dipnet.usage(model).gathered - read) == {"k", "v"}
    assert all(parameter.grad is not None for parameter in model.parameters())
    torch.testing.assert_close(last[:, 0].detach(), evaluate(model, method, ids)[:, -1], **CLOSE)


# --- nothing else is read ---


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "opt"])
@pytest.mark.usefixtures("shapes")
def test_what_is_dropped_is_not_read(family: str) -> None:
    """NaN in all weights that the last token needs not: its logits are what they were."""
    model, method, ids = own(family), Turns(0.2, 0.125), tokens(1, 30)
    expected = evaluate(model, method, ids)[:, -1]
    with sparse(model, method), torch.no_grad():
        past = model(ids[:, :8], use_cache=True).past_key_values
        for i in range(8, 29):  # the groups are all due once in the first of these
            model(ids[:, i : i + 1], past_key_values=past)
        for layer in range(LAYERS):
            poison(Decoder(model), method, layer, position=29)
        last = model(ids[:, 29:], past_key_values=past).logits[:, 0]
    torch.testing.assert_close(last, expected, **CLOSE)


def poison(decoder: Decoder, method: Any, layer: int, position: int) -> None:
    """Put NaN into the rows and columns that nobody wants at a position."""
    sites = [site for site in method.sites(decoder.spec) if site.layer == layer]
    for site in sites:
        wanted = method.select(site, method.score(site, torch.tensor([position])))
        for operand in site.operands:
            units = wanted.unflatten(0, (-1, operand.shared_by)).any(dim=1)
            dropped = ~units.repeat_interleave(site.block)
            weight = decoder.matrix(layer, operand.matrix)
            (weight.t() if operand.matrix in ("down", "o") else weight)[dropped] = torch.nan


# --- sequences and their caches ---


def test_sequences_one_after_another_and_in_turns() -> None:
    model, method = shared("llama"), Turns(0.2, 0.125)
    first, second = tokens(1, 25, seed=1), tokens(3, 25, seed=2)
    expected = [evaluate(model, method, ids) for ids in (first, second)]
    with sparse(model, method, kept_inputs=6):
        for ids, logits in zip((first, second), expected, strict=True):
            torch.testing.assert_close(decode(model, ids), logits, **CLOSE)
        made: list[list[Tensor]] = [[], []]
        caches: list[Any] = [None, None]
        for i in range(25):
            for which, ids in enumerate((first, second)):
                with torch.no_grad():
                    part = ids[:, i : i + 1]
                    output = model(part, past_key_values=caches[which], use_cache=True)
                caches[which] = output.past_key_values
                made[which].append(output.logits)
    for parts, logits in zip(made, expected, strict=True):
        torch.testing.assert_close(torch.cat(parts, dim=1), logits, **CLOSE)


@pytest.mark.parametrize("family", ["llama", "mistral", "opt"])
def test_what_is_done_to_a_cache(family: str) -> None:
    """Copied, repeated, reordered, selected, cropped: what it lacks is what its tokens lack."""
    model, method = shared(family), Turns(0.2, 0.125)
    ids = tokens(2, 30)
    with sparse(model, method), torch.no_grad():
        past = model(ids[:, :2], use_cache=True).past_key_values
        for i in range(2, 8):
            model(ids[:, i : i + 1], past_key_values=past)
        other = copy.deepcopy(past)
        if family != "mistral":  # a sliding window cannot go back
            decode(model, ids[:, 9:14], other)
            other.crop(-5)
        other.batch_repeat_interleave(2)
        other.reorder_cache(torch.tensor([3, 2, 1, 0]))
        other.batch_select_indices(torch.tensor([1, 2]))
        swapped = decode(model, ids[:, 8:].flip(0), other)
        straight = decode(model, ids[:, 8:], past)
    expected = evaluate(model, method, ids)[:, 8:]
    torch.testing.assert_close(straight, expected, **CLOSE)
    torch.testing.assert_close(swapped, expected.flip(0), **CLOSE)


@pytest.mark.parametrize("family", ["qwen3", "opt"])
@pytest.mark.parametrize("search", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}])
def test_generate(family: str, search: dict[str, Any]) -> None:
    """Beams reorder the cache, and guesses that were wrong are cropped from it."""
    model, method, prompt = shared(family), dejavu(family), tokens(1, 6)
    options = {"max_new_tokens": 20, "do_sample": False, **search}
    mask = torch.ones_like(prompt)
    with sparse(model, method):
        made = model.generate(prompt, attention_mask=mask, **options)
        assert dipnet.usage(model).gathered
    with dipnet.sparsify(model, method, backend="reference"):
        assert torch.equal(model.generate(prompt, attention_mask=mask, **options), made)


def test_a_cache_that_lacks_something_is_good_for_nothing_else() -> None:
    model, method, ids = own("llama"), Turns(0.2, 0.125), tokens(1, 12)
    with sparse(model, method), torch.no_grad():
        past = model(ids[:, :4], use_cache=True).past_key_values
        model(ids[:, 4:5], past_key_values=past)
    with torch.no_grad(), pytest.raises(dipnet.InputError, match="lacks keys and values of heads"):
        model(ids[:, 5:6], past_key_values=past)
    with sparse(model, method), torch.no_grad():  # nothing was added to it
        last = decode(model, ids[:, 5:], past)
    torch.testing.assert_close(last, evaluate(model, method, ids)[:, 5:], **CLOSE)


def test_a_cache_that_was_reset_lacks_nothing() -> None:
    model, ids = own("llama"), tokens(1, 12)
    cache = StaticCache(config=model.config, max_cache_len=12)
    with sparse(model, Turns(0.2, 0.125)):
        decode(model, ids, cache)
    cache.reset()
    dense = decode(model, ids, cache)
    torch.testing.assert_close(dense, decode(model, ids, prompt=12), **CLOSE)


# --- undo ---


def test_undone() -> None:
    model = own("llama")
    before = {name: (id(p), p.stride(), p.clone()) for name, p in model.named_parameters()}
    attributes = [sorted(vars(module)) for module in model.modules()]
    with sparse(model, dejavu("llama")):
        decode(model, tokens(1, 6))
        assert list(model.state_dict()) == list(before)
    for name, parameter in model.named_parameters():
        identity, stride, values = before[name]
        assert (id(parameter), parameter.stride()) == (identity, stride)
        assert torch.equal(parameter, values)
    assert [sorted(vars(module)) for module in model.modules()] == attributes
    assert all(
        type(m).forward is nn.Linear.forward for m in model.modules() if type(m) is nn.Linear
    )


def test_a_copy_skips_by_itself() -> None:
    model, method, ids = own("llama"), dejavu("llama"), tokens(1, 12)
    sparse(model, method)
    other = copy.deepcopy(model)
    dipnet.restore(model)
    decoded = decode(other, ids)
    assert dipnet.usage(other).gathered
    torch.testing.assert_close(decoded, evaluate(model, method, ids), **CLOSE)


def test_inference_mode_leaves_weights_that_train() -> None:
    model = own("llama")
    with sparse(model, dejavu("llama")), torch.inference_mode():
        decode(model, tokens(1, 6))
    model(tokens(1, 6)).logits.sum().backward()
