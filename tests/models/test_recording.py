"""What is recorded is what was multiplied: masks read off the pruned inputs themselves."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

import dipnet
from dipnet import DIP, CacheSettings
from dipnet.errors import InputError
from dipnet.methods.base import Method
from dipnet.models.families import Decoder
from dipnet.models.recording import method_text, model_shape
from dipnet.sim.trace import Trace, open_trace
from tests.families import every_family, random_tokens, tiny
from tests.matrix import logits
from tests.predicted import predictors

TOKENS = random_tokens(2, 9)
METHOD = DIP(input_density=0.5, hidden_density=0.25)
PLACES = {
    "mlp.in": "up",
    "mlp.hidden": "down",
    "mlp.neuron": "down",
    "attn.in": "q",
    "attn.out": "o",
    "attn.head": "o",
}


@contextmanager
def seen(model: PreTrainedModel) -> Iterator[dict[tuple[int, str], list[Tensor]]]:
    """What reaches the linear layers of each site after pruning: (tokens, channels), in order."""
    decoder, inputs, handles = Decoder(model), {}, []
    for layer in range(decoder.spec.layers):
        for name, matrix in PLACES.items():
            found = inputs.setdefault((layer, name), [])

            def keep(_module: Any, args: tuple, found: list = found) -> None:
                found.append(args[0].reshape(-1, args[0].shape[-1]))

            handles.append(decoder.holder(layer, matrix).register_forward_pre_hook(keep))
    yield inputs
    for handle in handles:
        handle.remove()


def check(
    trace: Trace,
    inputs: dict[tuple[int, str], list[Tensor]],
    rows: Any = ...,
    *,
    zeros: bool = False,
) -> None:
    """The trace's masks are where the inputs are not zero, at the ``rows`` that are recorded.

    With ``zeros`` an MLP's kept neurons may be zero of themselves.
    """
    for number, site in enumerate(trace.sites):
        kept = (torch.cat(inputs[site.key]) != 0).view(-1, site.units, site.block).any(-1).numpy()
        recorded: NDArray[np.bool_] = trace.masks(number, 0, trace.tokens)
        assert (recorded >= kept[rows]).all()
        assert (recorded == kept[rows]).all() or (zeros and site.name.startswith("mlp"))
        assert recorded.any()


@every_family
def test_the_masks_are_those_that_prune(family: str, tmp_path: Path) -> None:
    method = DIP(input_density=0.5, hidden_density=0.25, attention_density=0.7, hidden_block=4)
    with dipnet.sparsify(tiny(family), method) as model, seen(model) as inputs:
        with dipnet.record(model, tmp_path / "t", name=family):
            logits(model, TOKENS)
            logits(model, TOKENS[:1, :5])
        spec, density = dipnet.describe(model), dipnet.usage(model).density()
    trace = open_trace(tmp_path / "t")
    assert trace.starts.tolist() == [0, 9, 18]
    assert trace.tokens == density.tokens == 23
    assert [site.key for site in trace.sites] == [(s.layer, s.name) for s in method.sites(spec)]
    assert [s.weights_per_unit for s in trace.sites] == [
        site.weights_per_unit for site in method.sites(spec)
    ]
    assert trace.shape.name == family
    assert trace.cache is trace.recall is None
    check(trace, inputs)


@pytest.mark.parametrize(
    "method", [dipnet.GLUPruning(0.8), dipnet.GatePruning(0.8), dipnet.UpPruning(0.8)]
)
def test_other_methods(method: Method, tmp_path: Path) -> None:
    with dipnet.sparsify(tiny("llama"), method) as model, seen(model) as inputs:
        with dipnet.record(model, tmp_path / "t"):
            logits(model, TOKENS)
        sites = list(dipnet.usage(model).sites.values())
    trace = open_trace(tmp_path / "t")
    expected = {o.matrix: o.weights_per_unit for o in sites[0].operands}
    assert trace.sites[0].matrices == expected
    neurons = {(layer, name): inputs[layer, "mlp.hidden"] for layer, name in inputs}
    check(trace, neurons)


@every_family
def test_neurons_and_heads(family: str, tmp_path: Path) -> None:
    method = dipnet.RandomMasks(0.3, 0.5)
    with dipnet.sparsify(tiny(family), method) as model, seen(model) as inputs:
        with dipnet.record(model, tmp_path / "t"):
            logits(model, TOKENS)
        spec = dipnet.describe(model)
    trace = open_trace(tmp_path / "t")
    assert trace.method == "random:mlp_density=0.3,head_density=0.5"
    heads, neurons = trace.sites[:2]
    assert (heads.key, heads.units, heads.block) == ((0, "attn.head"), spec.heads, spec.head_size)
    share = spec.weights("q") // spec.heads
    own = "qkvo" if spec.matrices["k"] == spec.matrices["q"] else "qo"  # the rest is a group's
    assert heads.matrices == dict.fromkeys(own, share)
    assert neurons.weights_per_unit * neurons.units == spec.mlp_weights
    check(trace, inputs, zeros=spec.activation == "relu")


def test_a_trace_names_the_predictors(tmp_path: Path) -> None:
    predictors("llama").save(tmp_path / "p")
    method = dipnet.DejaVu(0.5, predictors=tmp_path / "p")
    with dipnet.sparsify(tiny("llama"), method) as model, dipnet.record(model, tmp_path / "t"):
        logits(model, TOKENS)
    found = open_trace(tmp_path / "t").method
    assert found == f"dejavu:mlp_density=0.5,predictors={tmp_path / 'p'}"


def test_padding_and_dense_prompts_are_left_out(tmp_path: Path) -> None:
    attended = torch.ones_like(TOKENS)
    attended[1, :3] = 0
    model = dipnet.sparsify(tiny("llama"), METHOD, prefill=2)
    with dipnet.record(model, tmp_path / "t"), seen(model) as inputs, torch.no_grad():
        model(TOKENS, attention_mask=attended, use_cache=False)
    counted = attended.cumsum(dim=1) * attended > 2
    trace = open_trace(tmp_path / "t")
    assert trace.tokens == 7 + 4
    assert trace.starts.tolist() == [0, 7]
    check(trace, inputs, counted.flatten().numpy())


def test_decoding_after_a_dense_prompt(tmp_path: Path) -> None:
    model = dipnet.sparsify(tiny("llama"), METHOD, prefill="dense")
    with dipnet.record(model, tmp_path / "t"), seen(model) as inputs:
        for prompt in (TOKENS[:1], TOKENS[1:, :4]):
            model.generate(prompt, max_new_tokens=4, do_sample=False)
    trace = open_trace(tmp_path / "t")
    assert trace.tokens == 6  # the last token of a text goes through no layer
    assert trace.starts.tolist() == [0, 3]
    check(trace, inputs, [9, 10, 11, 16, 17, 18])


def test_a_sequence_goes_on_in_the_calls_that_follow(tmp_path: Path) -> None:
    model = dipnet.sparsify(tiny("llama"), METHOD)
    with dipnet.record(model, tmp_path / "t"), seen(model) as inputs:
        model.generate(TOKENS[:1], max_new_tokens=4, do_sample=False)
    trace = open_trace(tmp_path / "t")
    assert (trace.tokens, trace.starts.tolist()) == (12, [0])
    check(trace, inputs)


def test_recording_changes_nothing(tmp_path: Path) -> None:
    with dipnet.sparsify(tiny("llama"), METHOD) as model:
        expected = logits(model, TOKENS)
        with dipnet.record(model, tmp_path / "t", scores=True):
            assert torch.equal(logits(model, TOKENS), expected)
        assert torch.equal(logits(model, TOKENS), expected)
        assert open_trace(tmp_path / "t").tokens == TOKENS.numel()
        assert dipnet.usage(copy.deepcopy(model)).recorder is None


def test_scores_are_those_before_the_cache(tmp_path: Path) -> None:
    """The plain top-k of the scores is plain DIP's mask, whatever the cache prefers."""
    aware = DIP(input_density=0.5, hidden_density=0.25, cache_aware=0.2)
    model = dipnet.sparsify(tiny("llama"), aware, cache=CacheSettings(0.4, "lfu"))
    with dipnet.record(model, tmp_path / "t", scores=True), seen(model) as inputs:
        logits(model, TOKENS)
    trace = open_trace(tmp_path / "t")
    check(trace, inputs)
    with dipnet.sparsify(tiny("llama"), METHOD) as model, seen(model) as plain:
        logits(model, TOKENS)
    channels = torch.from_numpy(trace.scores(0, 0, trace.tokens).astype(np.float32))
    kept = torch.cat(plain[0, "mlp.in"]) != 0
    assert not (kept.numpy() == trace.masks(0, 0, trace.tokens)).all()
    assert (
        channels[kept]
        .view(18, -1)
        .min(1)
        .values.ge(channels[~kept].view(18, -1).max(1).values)
        .all()
    )


@pytest.mark.parametrize(("gamma", "share"), [(0.5, None), (1, 0.5), (None, 0.5)])
def test_masks_that_depend_on_no_cache(
    tmp_path: Path, gamma: float | None, share: float | None
) -> None:
    method = DIP(density=0.5, cache_aware=gamma)
    cache = None if share is None else CacheSettings(share)
    with dipnet.sparsify(tiny("llama"), method, cache=cache) as model:
        logits(model, TOKENS)
        with dipnet.record(model, tmp_path / "t"):
            logits(model, TOKENS)
    assert open_trace(tmp_path / "t").cache is None


def test_a_cache_aware_trace_names_its_cache(tmp_path: Path) -> None:
    method = DIP(density=0.5, cache_aware=0.25)
    with dipnet.sparsify(tiny("llama"), method, cache=CacheSettings(0.4, "lfu")) as model:
        with dipnet.record(model, tmp_path / "t"):
            logits(model, TOKENS)
        with (
            pytest.raises(InputError, match="they are not empty: sparsify or load the model anew"),
            dipnet.record(model, tmp_path / "warm"),
        ):
            logits(model, TOKENS)
    cache = open_trace(tmp_path / "t").cache
    assert cache is not None
    assert (cache.policy, cache.gamma) == ("lfu", 0.25)
    assert cache.slots == (10, 21, 10, 21)
    assert not (tmp_path / "warm").exists()


class Broken(RuntimeError):
    pass


def test_a_failed_call_spoils_the_trace(tmp_path: Path) -> None:
    with dipnet.sparsify(tiny("llama"), METHOD) as model:
        with pytest.raises(InputError, match="a forward call failed while it was recorded"):
            _record_with_a_failure(model, tmp_path / "t")
        assert list(tmp_path.iterdir()) == []
        with dipnet.record(model, tmp_path / "t"):
            logits(model, TOKENS)


def _record_with_a_failure(model: PreTrainedModel, file: Path) -> None:
    def fail(*_: object) -> None:
        raise Broken

    with dipnet.record(model, file):
        logits(model, TOKENS)
        handle = model.get_decoder().layers[1].register_forward_pre_hook(fail)
        with pytest.raises(Broken):
            logits(model, TOKENS)
        handle.remove()
        logits(model, TOKENS)


def test_an_interrupted_call_spoils_it_too(tmp_path: Path) -> None:
    """Torch calls no hook when Ctrl-C ends a call."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def go_on(model: PreTrainedModel) -> None:
        with dipnet.record(model, tmp_path / "t"):
            handle = model.get_decoder().layers[1].register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                logits(model, TOKENS)
            handle.remove()
            logits(model, TOKENS)

    with (
        dipnet.sparsify(tiny("llama"), METHOD) as model,
        pytest.raises(InputError, match="a forward call failed"),
    ):
        go_on(model)


def test_what_cannot_be_recorded(tmp_path: Path) -> None:
    model = tiny("llama")
    with pytest.raises(InputError, match="a dense model decides no masks"):
        dipnet.record(model, tmp_path / "t").__enter__()
    nothing = pytest.raises(InputError, match="dense decides no masks, so there is nothing to")
    with dipnet.sparsify(model, dipnet.Dense()), nothing:
        dipnet.record(model, tmp_path / "t").__enter__()
    with dipnet.sparsify(model, METHOD), dipnet.record(model, tmp_path / "t"):
        logits(model, TOKENS)
        with pytest.raises(InputError, match="being recorded already"):
            dipnet.record(model, tmp_path / "u").__enter__()
    with (
        dipnet.sparsify(model, METHOD),
        pytest.raises(InputError, match="there is nothing to trace"),
        dipnet.record(model, tmp_path / "u"),
    ):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["t"]


@pytest.mark.parametrize(
    ("method", "text"),
    [
        (DIP(0.5), "dip:density=0.5"),
        (
            DIP(input_density=0.5, hidden_density=0.25, cache_aware=0.2, hidden_block=2),
            "dip:input_density=0.5,hidden_density=0.25,cache_aware=0.2,hidden_block=2",
        ),
        (dipnet.Dense(), "dense"),
        (dipnet.TEAL(0.4), "teal:density=0.4"),
    ],
)
def test_methods_are_named_as_on_the_command_line(method: Method, text: str) -> None:
    from dipnet.cli.methods import parse_method

    assert method_text(method) == text
    assert parse_method(text).build(None) == method


def test_the_shape(tmp_path: Path) -> None:
    shape = model_shape(tiny("qwen3"))
    assert (shape.name, shape.family, shape.activation) == ("", "qwen3", "silu")
    assert shape.kv_width == 2 * 2 * 10
    assert shape.vocabulary == 61
    assert shape.matrices == dipnet.describe(tiny("qwen3")).matrices
    assert model_shape(tiny("qwen3"), str(tmp_path)).name == tmp_path.name
    assert model_shape(tiny("qwen3"), "Qwen/Qwen3").name == "Qwen/Qwen3"
