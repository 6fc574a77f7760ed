"""A sequence in a left-padded batch is the same sequence alone: masks know no neighbours."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import dipnet
from dipnet.models.usage import Density
from tests.families import random_tokens
from tests.matrix import CLOSE, every_pair, sparse

LONG, SHORT = random_tokens(8, seed=1), random_tokens(5, seed=2)
PADDING = len(LONG) - len(SHORT)
BATCH = torch.stack([LONG, torch.cat([torch.zeros(PADDING, dtype=torch.long), SHORT])])
ATTENDED = torch.ones_like(BATCH)
ATTENDED[1, :PADDING] = 0
NEW = 1


@every_pair
@pytest.mark.parametrize("prefill", ["sparse", "dense", 4])
def test_alone_or_beside_another(family: str, method: str, prefill: Any) -> None:
    # Gemma 2's eager attention makes NaN of padding in float64, dense or not.
    dtype, close = (torch.float32, {}) if family == "gemma2" else (torch.float64, CLOSE)
    with sparse(family, method, dtype, prefill=prefill) as model:
        together, both = decode(model, BATCH, ATTENDED)
    with sparse(family, method, dtype, prefill=prefill) as model:
        long, first = decode(model, LONG[None], ATTENDED[:1])
    with sparse(family, method, dtype, prefill=prefill) as model:
        short, second = decode(model, SHORT[None], ATTENDED[1:, PADDING:])
    torch.testing.assert_close(together[0], long[0], **close)
    torch.testing.assert_close(together[1, PADDING:], short[0], **close)
    assert_same_counts(both, first, second)


def assert_same_counts(both: Density, first: Density, second: Density) -> None:
    """The batch has read what its sequences read alone: padding counts for nothing."""
    assert both.tokens == first.tokens + second.tokens
    for site, kept in both.sites.items():
        alone = first.sites[site] * first.tokens + second.sites[site] * second.tokens
        assert kept * both.tokens == pytest.approx(alone)


@torch.no_grad()
def decode(model: PreTrainedModel, tokens: Tensor, attended: Tensor) -> tuple[Tensor, Density]:
    """Logits of all tokens, the last `NEW` of them decoded as ``generate`` does; the density."""
    positions = (attended.long().cumsum(dim=1) - 1).clamp(min=0)
    outputs, cache, start = [], None, 0
    for end in range(tokens.shape[1] - NEW, tokens.shape[1] + 1):
        output = model(
            tokens[:, start:end],
            attention_mask=attended[:, :end],
            position_ids=positions[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        cache, start = output.past_key_values, end
        outputs.append(output.logits)
    return torch.cat(outputs, dim=1), dipnet.usage(model).density()
