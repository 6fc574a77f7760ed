"""Tokens through a streamed model: a padded batch as a prompt, then token after token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import dipnet
from dipnet.methods.base import Method
from dipnet.store.index import read_index
from dipnet.streaming.attach import Streamed, streamed
from dipnet.streaming.budget import CACHED
from tests.families import random_tokens

TOKENS = random_tokens(2, 9, seed=3)
PADDING = 3
ATTENDED = torch.ones_like(TOKENS)
ATTENDED[1, :PADDING] = 0
PROMPT = 6


def cache_bytes(store: Path, share: float) -> int:
    """Bytes of caches that hold about a share of the records that can be streamed."""
    return int(share * sum(g.bytes for g in read_index(store).groups if g.name in CACHED))


def load(
    store: Path, method: Method | None = None, share: float | None = None, **options: Any
) -> PreTrainedModel:
    """`dipnet.load`, with prompts that are pruned like any token and caches of a share."""
    if share is not None:
        options["cache"] = cache_bytes(store, share)
    return dipnet.load(store, method, **{"prefill": "sparse", **options})


@torch.no_grad()
def decode(model: PreTrainedModel, tokens: Tensor = TOKENS, attended: Tensor = ATTENDED) -> Tensor:
    """(batch, tokens, vocabulary) logits, the first `PROMPT` tokens as a prompt.

    What padding itself gives is left out: it is zero.
    """
    positions = (attended.long().cumsum(dim=1) - 1).clamp(min=0)
    made, cache = [], None
    steps = [PROMPT, *[1] * (tokens.shape[1] - PROMPT)]
    for ids, at in zip(tokens.split(steps, 1), positions.split(steps, 1), strict=True):
        end = sum(each.shape[1] for each in made) + ids.shape[1]
        output = model(
            ids,
            attention_mask=attended[:, :end],
            position_ids=at,
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        made.append(output.logits)
    return torch.cat(made, dim=1) * attended.unsqueeze(-1)


def decode_alone(model: PreTrainedModel) -> Tensor:
    """The first sequence only, one token a call after its prompt: what looks ahead."""
    return decode(model, TOKENS[:1], ATTENDED[:1])


def attachment(model: PreTrainedModel) -> Streamed:
    found = streamed(model)
    assert isinstance(found, Streamed)
    return found
