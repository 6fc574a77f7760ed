"""A token decoded with the KV cache is the same token in one evaluated sequence, masks included."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import dipnet
from tests.families import random_tokens
from tests.matrix import CLOSE, every_pair, linear_inputs, logits, sparse

TOKENS = random_tokens(2, 7)
PROMPT = 4
STEPS = TOKENS.split((PROMPT, 1, 1, 1), dim=1)


@every_pair
@pytest.mark.parametrize("prefill", ["sparse", "dense", 3])
def test_step_by_step(family: str, method: str, prefill: Any) -> None:
    options = {"prefill": prefill, "backend": "reference"}  # the only one with all inputs to see
    with sparse(family, method, **options) as model, linear_inputs(model) as decoded:
        stepwise = decode(model, STEPS)
        decoded_density = dipnet.usage(model).density()
    alike = PROMPT if prefill == "dense" else prefill
    with sparse(family, method, prefill=alike) as model, linear_inputs(model) as evaluated:
        torch.testing.assert_close(stepwise, logits(model, TOKENS), **CLOSE)
        assert decoded_density == dipnet.usage(model).density()
    for steps, whole in zip(decoded, evaluated, strict=True):
        assert torch.equal(kept(steps), kept(whole))


@pytest.mark.parametrize("family", ["llama", "mistral", "opt"])
@pytest.mark.parametrize(("prefill", "alike"), [("sparse", "sparse"), ("dense", 2), (3, 3)])
def test_in_chunks_of_any_size(family: str, prefill: Any, alike: Any) -> None:
    """What follows the first call is no prompt, however long; a number may end inside a chunk."""
    with sparse(family, "dip", prefill=prefill) as model:
        chunked = decode(model, TOKENS.split((2, 4, 1), dim=1))
    with sparse(family, "dip", prefill=alike) as model:
        torch.testing.assert_close(chunked, logits(model, TOKENS), **CLOSE)


def test_a_new_sequence_has_a_prompt_of_its_own() -> None:
    with sparse("llama", "dip", prefill="dense") as model:
        decode(model, STEPS)
        again = decode(model, TOKENS.split((2, 5), dim=1))
    with sparse("llama", "dip", prefill=2) as model:
        torch.testing.assert_close(again, logits(model, TOKENS), **CLOSE)


@every_pair
def test_generate(family: str, method: str) -> None:
    """Greedy, by Hugging Face's own loop, after a dense prompt."""
    prompt = TOKENS[:, :PROMPT]
    with sparse(family, method, prefill="dense") as model:
        made = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=3,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        assert dipnet.usage(model).density().tokens == 2 * 2  # the last token is never read
    with sparse(family, method, prefill=PROMPT) as model:
        evaluated = logits(model, made.sequences)[:, PROMPT - 1 : -1]
    # Hugging Face hands out logits in float32.
    torch.testing.assert_close(torch.stack(made.logits, dim=1), evaluated.float())


@torch.no_grad()
def decode(model: PreTrainedModel, parts: tuple[Tensor, ...]) -> Tensor:
    """Logits of all tokens, from a call for each of the (batch, tokens) parts."""
    outputs, cache = [], None
    for part in parts:
        output = model(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        outputs.append(output.logits)
    return torch.cat(outputs, dim=1)


def kept(calls: list[Tensor]) -> Tensor:
    """What was not pruned, (batch, tokens, n): OPT's MLP has the first two dimensions in one."""
    shaped = [inputs.reshape(len(TOKENS), -1, inputs.shape[-1]) for inputs in calls]
    return torch.cat(shaped, dim=1) != 0
