"""sparsify and restore: exact undo, whatever happens in between."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

import dipnet
from dipnet.errors import InputError
from dipnet.units import ModelSpec
from tests.families import FAMILIES, random_tokens, shared, tiny
from tests.matrix import CALIBRATION, METHODS, WINDOW, calibrated, every_pair, logits, sparse

TOKENS = random_tokens(2, 5)
LLAMA_METHODS = pytest.mark.parametrize("method", METHODS)


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """All that sparsify could leave behind: classes, attributes, hooks, parameter objects."""
    return {
        "classes": [type(module) for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "hooks": [
            (len(hooks), name)
            for module in model.modules()
            for name, hooks in vars(module).items()
            if "hooks" in name
        ],
        "parameters": [(name, id(p)) for name, p in model.named_parameters(remove_duplicate=False)],
        "keys": list(model.state_dict()),
    }


@every_pair
def test_undo_is_exact(family: str, method: str) -> None:
    model = shared(family)
    before, dense = fingerprint(model), logits(model, TOKENS)
    with sparse(family, method):
        logits(model, TOKENS)
        assert list(model.state_dict()) == before["keys"]
        assert isinstance(model, before["classes"][0])
        assert type(model).__name__ == before["classes"][0].__name__
    assert fingerprint(model) == before
    assert torch.equal(logits(model, TOKENS), dense)


@LLAMA_METHODS
def test_undone_when_the_block_fails(method: str) -> None:
    before = fingerprint(shared("llama"))
    with pytest.raises(ZeroDivisionError), sparse("llama", method):
        _ = 1 / 0
    assert fingerprint(shared("llama")) == before


def test_without_a_with() -> None:
    model = tiny("llama")
    before = fingerprint(model)
    assert dipnet.sparsify(model, dipnet.DIP(0.5)) is model
    dipnet.restore(model)
    assert fingerprint(model) == before


def test_with_gives_the_model() -> None:
    with sparse("llama", "dip") as model:
        assert model is shared("llama")


def test_restore_of_a_dense_model_changes_nothing() -> None:
    before = fingerprint(shared("llama"))
    dipnet.restore(shared("llama"))
    assert fingerprint(shared("llama")) == before


def test_restored_inside_its_block() -> None:
    model = tiny("llama")
    before = fingerprint(model)
    with dipnet.sparsify(model, dipnet.DIP(0.5)):
        dipnet.restore(model)
    assert fingerprint(model) == before


def test_again_and_again() -> None:
    model = tiny("llama")
    first = logits(dipnet.sparsify(model, dipnet.DIP(0.5)), TOKENS)
    dipnet.restore(model)
    dipnet.sparsify(model, dipnet.GLUOracle(0.5))
    dipnet.restore(model)
    assert torch.equal(logits(dipnet.sparsify(model, dipnet.DIP(0.5)), TOKENS), first)


@LLAMA_METHODS
def test_nested_is_an_error_and_leaves_the_first(method: str) -> None:
    with sparse("llama", method) as model:
        before, expected = fingerprint(model), logits(model, TOKENS)
        with pytest.raises(InputError, match=r"already: call dipnet\.restore\(model\) first"):
            dipnet.sparsify(model, dipnet.DIP(0.5))
        assert fingerprint(model) == before
        assert torch.equal(logits(model, TOKENS), expected)


@pytest.mark.parametrize(
    "method", [dipnet.GatePruning(0.5), dipnet.CATS(0.5), dipnet.GLUPruning(0.4)]
)
def test_refused(method: Any) -> None:
    before = fingerprint(shared("opt"))
    with pytest.raises(InputError):
        dipnet.sparsify(shared("opt"), method)
    assert fingerprint(shared("opt")) == before


@dataclass(frozen=True)
class Failing(dipnet.Wanda):
    """Fails when half of it is attached: the second layer's mask has another shape."""

    def weight_mask(self, layer: int, matrix: str) -> Tensor | None:
        return torch.ones(1 + layer, 1) if matrix == "up" else None

    def check(self, spec: ModelSpec) -> None:
        """Nobody notices before."""


def test_failing_half_way() -> None:
    before = fingerprint(shared("llama"))
    with pytest.raises(RuntimeError, match="must match"):
        dipnet.sparsify(shared("llama"), Failing())
    assert fingerprint(shared("llama")) == before


# --- a method fitted on another model ---


def of_another_shape(**changes: Any) -> LlamaForCausalLM:
    config = FAMILIES["llama"]()
    for name, value in changes.items():
        setattr(config, name, value)
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("method", ["cats", "teal", "wanda"])
def test_calibrated_on_a_model_with_fewer_layers(method: str) -> None:
    model = of_another_shape(num_hidden_layers=3)
    with pytest.raises(InputError, match="calibrate"):
        dipnet.sparsify(model, calibrated("llama", method))


@pytest.mark.parametrize("method", ["cats", "teal", "wanda"])
def test_calibrated_at_another_density(method: str) -> None:
    changed = dataclasses.replace(calibrated("llama", method), density=0.77)
    with pytest.raises(InputError, match="calibrate it again"):
        dipnet.sparsify(shared("llama"), changed)


def test_masks_of_a_model_of_another_size() -> None:
    model = of_another_shape(hidden_size=48)
    before = fingerprint(model)
    with pytest.raises(InputError, match="calibrate"):
        dipnet.sparsify(model, calibrated("llama", "wanda"))
    assert fingerprint(model) == before


# --- calibrating ---


@pytest.mark.parametrize("method", ["cats", "teal", "wanda"])
def test_calibration_leaves_the_model_as_it_was(method: str) -> None:
    model = tiny("llama")
    before, dense = fingerprint(model), logits(model, TOKENS)
    dipnet.calibrate(model, METHODS[method].method, CALIBRATION, window=WINDOW)
    assert fingerprint(model) == before
    assert torch.equal(logits(model, TOKENS), dense)


@pytest.mark.parametrize("method", ["cats", "teal", "wanda"])
def test_a_sparsified_model_is_not_calibrated_on(method: str) -> None:
    model = dipnet.sparsify(tiny("llama"), dipnet.DIP(0.5))
    before = fingerprint(model)
    with pytest.raises(InputError, match="restore"):
        dipnet.calibrate(model, METHODS[method].method, CALIBRATION, window=WINDOW)
    assert fingerprint(model) == before


# --- other models and copies ---


@LLAMA_METHODS
def test_a_second_model_is_unaffected(method: str) -> None:
    other = tiny("llama")
    before, dense = fingerprint(other), logits(other, TOKENS)
    with sparse("llama", method):
        assert fingerprint(other) == before
        assert torch.equal(logits(other, TOKENS), dense)


@LLAMA_METHODS
def test_a_copy_of_a_sparsified_model_is_a_model_of_its_own(method: str) -> None:
    model = tiny("llama")
    before, dense = fingerprint(model), logits(model, TOKENS)
    dipnet.sparsify(model, calibrated("llama", method))
    expected = logits(model, TOKENS)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, TOKENS), expected)
    dipnet.restore(twin)
    assert torch.equal(logits(twin, TOKENS), dense)
    assert torch.equal(logits(model, TOKENS), expected)
    dipnet.restore(model)
    assert fingerprint(model) == before


@pytest.mark.parametrize("family", ["llama", "phi3", "opt"])
@pytest.mark.parametrize("method", ["dip-attention", "wanda"])
def test_saved_while_sparsified(family: str, method: str, tmp_path: Path) -> None:
    with sparse(family, method) as model:
        model.save_pretrained(tmp_path)
        sparse_weights = model.state_dict()
    keys = set(load_file(tmp_path / "model.safetensors"))
    shared(family).save_pretrained(tmp_path / "dense")
    assert keys == set(load_file(tmp_path / "dense" / "model.safetensors"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(loaded) is type(shared(family))
    # What a static method prunes is saved as the model has it: zero.
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, sparse_weights[name])


def test_hidden_states_are_still_at_hand() -> None:
    with sparse("llama", "dip") as model, torch.no_grad():
        assert len(model(TOKENS, output_hidden_states=True).hidden_states) == 3


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3", "opt"])
@pytest.mark.parametrize("prefill", ["sparse", "dense", 3])
@pytest.mark.parametrize("method", ["dip", "dejavu", "random"])
def test_generate_with_a_static_cache(family: str, method: str, prefill: Any) -> None:
    def generate(**arguments: Any) -> list[list[int]]:
        made = model.generate(TOKENS, max_new_tokens=4, do_sample=False, **arguments)
        return made.tolist()

    attended = torch.ones_like(TOKENS)
    with sparse(family, method, prefill=prefill) as model:
        expected = generate(attention_mask=attended)
        assert generate(attention_mask=attended, cache_implementation="static") == expected


def test_the_decoder_alone_after_a_call_of_the_model() -> None:
    """What one call knew of its tokens is nothing to the next."""
    model = dipnet.sparsify(tiny("llama"), dipnet.DIP(0.5), prefill=2)
    logits(model, TOKENS)
    other = random_tokens(1, 7)
    assert model.get_decoder()(other).last_hidden_state.shape == (1, 7, 24)
