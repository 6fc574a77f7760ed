"""The residual stream where predictors read it: one definition, captured as the model has it."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

import dipnet
from dipnet.models.attach import ATTACHED, Attachment
from dipnet.models.families import Decoder
from dipnet.models.residual import Residual
from dipnet.models.tokens import TokenState
from tests.families import every_family, random_tokens, shared, tiny
from tests.matrix import CLOSE, logits
from tests.predicted import predictors
from tests.reference import linear_layers

TOKENS = random_tokens(2, 7)


def seen_by(family: str, places: range) -> dict[int, Tensor]:
    """What a call over `TOKENS` shows at the places of a model."""
    decoder, tokens = Decoder(shared(family)), TokenState("sparse")
    residual = Residual(decoder, places, tokens)
    undo = residual.watch()
    logits(decoder.model, TOKENS)
    for remove in undo:
        remove()
    return {place: residual.at(place) for place in places}


@every_family
def test_an_even_place_is_what_enters_a_layer(family: str) -> None:
    with torch.no_grad():
        states = shared(family)(TOKENS, output_hidden_states=True).hidden_states
    seen = seen_by(family, range(4))
    for layer in range(2):
        assert torch.equal(seen[2 * layer], states[layer])


@every_family
def test_an_odd_place_is_what_the_mlp_adds_to(family: str) -> None:
    """What a layer puts out is the stream before its MLP, plus what the MLP gives."""
    model = shared(family)
    given: list[Tensor] = []
    layers = model.get_decoder().layers
    down = [{m[0][0]: s for s, m in linear_layers(x, model.config).items()}["down"] for x in layers]
    after = [getattr(layer, "post_feedforward_layernorm", None) for layer in layers]
    handles = [
        (norm or linear).register_forward_hook(lambda _m, _a, out: given.append(out))
        for norm, linear in zip(after, down, strict=True)
    ]
    with torch.no_grad():
        # The last state is normalised: leave it to the first layer.
        states = model(TOKENS, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    before = seen_by(family, range(4))[1].view(states[0].shape)
    made = before + given[0].view(before.shape)
    if family == "opt-350m":  # normalises after its blocks
        made = layers[0].final_layer_norm(made)
    torch.testing.assert_close(made, states[1], **CLOSE)


def attached(model: Any) -> Attachment:
    return getattr(model, ATTACHED)


def dejavu(look_ahead: int, family: str = "llama") -> dipnet.DejaVu:
    return dipnet.DejaVu(0.5, 0.5, look_ahead=look_ahead, predictors=predictors(family, look_ahead))


@pytest.mark.parametrize("look_ahead", [0, 1, 2])
def test_the_last_reader_lets_a_place_go(look_ahead: int) -> None:
    with dipnet.sparsify(shared("llama"), dejavu(look_ahead)) as model:
        residual = attached(model).residual
        most, see = 0, Residual.see

        def counting(self: Residual, place: int, x: Tensor) -> None:
            nonlocal most
            see(self, place, x)
            most = max(most, len(self._seen))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Residual, "see", counting)
            logits(model, TOKENS)
        assert residual._seen == {}
        assert most <= look_ahead + 1


@pytest.mark.parametrize(("prefill", "held"), [("dense", 0), (7, 0), (2, 1)])
def test_a_dense_prompt_is_not_watched(prefill: Any, held: int) -> None:
    with dipnet.sparsify(tiny("llama"), dejavu(1), prefill=prefill) as model:
        model(TOKENS)  # with gradients, for which places would be kept
        assert bool(attached(model).residual._seen) == held


def test_undone_it_holds_nothing() -> None:
    model = dipnet.sparsify(tiny("llama"), dejavu(1))
    model(TOKENS)
    held = weakref.ref(next(iter(attached(model).residual._seen.values())))
    dipnet.restore(model)
    gc.collect()
    assert held() is None


@pytest.mark.parametrize("look_ahead", [0, 1, 2])
@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(family: str, look_ahead: int, reentrant: bool) -> None:
    """A layer that is computed again reads what the layers before it saw in the call."""
    method = dejavu(look_ahead, family)

    def gradients(checkpoint: bool) -> dict[str, Tensor]:
        model = tiny(family).train()
        if hasattr(model.config, "dropout"):
            for module in model.modules():
                if hasattr(module, "dropout"):
                    module.dropout = 0.0
        if checkpoint:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        dipnet.sparsify(model, method)
        model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    expected = gradients(checkpoint=False)
    for name, gradient in gradients(checkpoint=True).items():
        torch.testing.assert_close(gradient, expected[name], **CLOSE)


@pytest.mark.parametrize("family", ["llama", "opt", "opt-350m"])
def test_right_in_front_it_is_the_stream_before_the_mlp(family: str) -> None:
    made = predictors(family, 0)
    seen: dict[int, Tensor] = {}
    scores = type(made).scores

    def spying(self: Any, kind: Any, layer: int, x: Tensor) -> Tensor:
        seen[layer] = x
        return scores(self, kind, layer, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(made), "scores", spying)
        method = dipnet.DejaVu(1.0, look_ahead=0, predictors=made)
        with dipnet.sparsify(shared(family), method) as model:
            logits(model, TOKENS)
    stream = seen_by(family, range(4))
    assert set(seen) == {0, 1}
    for layer, x in seen.items():
        assert torch.equal(x.flatten(0, -2), stream[2 * layer + 1].flatten(0, -2))
