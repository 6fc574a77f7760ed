"""A step never waits for the device, so that a CUDA graph holds it whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import StaticCache

import dipnet
from dipnet.methods.dejavu import DejaVu
from tests.models.skipping.decoding import Turns, dejavu, evaluate, own, tokens

pytestmark = pytest.mark.cuda
LENGTH, PROMPT = 40, 4
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "opt"])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("kind", ["dejavu", "turns"])
def test_replayed(family: str, batch: int, kind: str) -> None:
    """One graph, replayed for every token; "turns" asks for its positions, and cannot be in it."""
    model = own(family).cuda()
    method = dejavu(family) if kind == "dejavu" else Turns(0.2, 0.125)
    ids = tokens(batch, LENGTH).cuda()
    expected = evaluate(model, method, ids)
    with dipnet.sparsify(model, method, backend="skip", kept_inputs=5), torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=LENGTH)
        made = [model(ids[:, :PROMPT], past_key_values=cache).logits]
        if isinstance(method, DejaVu):
            made += replay(model, ids, cache)
        else:
            made += [one(model, ids, i, cache) for i in range(PROMPT, LENGTH)]
    torch.testing.assert_close(torch.cat(made, dim=1), expected, **CLOSE)


def one(model: Any, ids: torch.Tensor, i: int, cache: Any) -> torch.Tensor:
    return model(ids[:, i : i + 1], past_key_values=cache).logits


def replay(model: Any, ids: torch.Tensor, cache: Any) -> list[torch.Tensor]:
    """The logits of all tokens after the prompt, by replays of the third one's graph."""
    made = []
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # first, what is made once
        made += [one(model, ids, i, cache) for i in (PROMPT, PROMPT + 1)]
    torch.cuda.current_stream().wait_stream(stream)
    token, position = ids[:, PROMPT + 2 : PROMPT + 3].clone(), torch.tensor([[PROMPT + 2]]).cuda()
    mask = torch.zeros(1, 1, 1, LENGTH, dtype=torch.float64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mask.copy_(torch.where(torch.arange(LENGTH, device="cuda") <= position, 0.0, -torch.inf))
        logits = model(
            token,
            position_ids=position.expand(len(ids), -1),
            attention_mask=mask.expand(len(ids), -1, -1, -1),
            past_key_values=cache,
        ).logits
        position.add_(1)
    for i in range(PROMPT + 2, LENGTH):
        token.copy_(ids[:, i : i + 1])
        graph.replay()
        made.append(logits.clone())
    return made
