"""A NaN always reaches the logits: no mask hides it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from tests.families import random_tokens
from tests.matrix import every_pair, logits, sparse
from tests.reference import linear_layers

TOKENS = random_tokens(2, 5)
ROW, TOKEN = 1, 2


@contextmanager
def nan_at(module: nn.Module, channel: int = 3) -> Iterator[None]:
    """Put a NaN into one channel of one token of the module's input, before any mask."""

    def poison(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        x = (args[0] if args else kwargs["hidden_states"]).clone()
        x.view(*TOKENS.shape, -1)[ROW, TOKEN, channel] = torch.nan
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    handle = module.register_forward_pre_hook(poison, prepend=True, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@every_pair
@pytest.mark.parametrize("place", ["residual", "attention", "o", "mlp", "down"])
def test_it_reaches_the_logits(family: str, method: str, place: str) -> None:
    with sparse(family, method) as model:
        block = model.get_decoder().layers[0]
        linear = {m[0][0]: module for module, m in linear_layers(block, model.config).items()}
        module = {
            "residual": block,
            "attention": block.self_attn,
            "o": linear["o"],
            "mlp": getattr(block, "mlp", None) or linear["up"],
            "down": linear["down"],
        }[place]
        with nan_at(module):
            nans = logits(model, TOKENS).isnan()
    assert nans[ROW, TOKEN].all()
    assert not nans[:ROW].any()
