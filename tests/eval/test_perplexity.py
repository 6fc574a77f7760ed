"""Perplexity against its definition, computed token by token."""

import math

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import dipnet
from dipnet.errors import InputError
from dipnet.eval.perplexity import count_windows, leading_tokens, perplexity
from tests.families import random_tokens, shared

TOKENS = random_tokens(40, seed=3)
BOS = 1


def log_probability(model: PreTrainedModel, before: list[int], token: int) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([before]), use_cache=False).logits[0, -1]
    return float(logits.log_softmax(dim=-1)[token])


def plain(
    model: PreTrainedModel, tokens: Tensor, window: int, stride: int, prompt: int, bos: int | None
) -> tuple[float, int]:
    """The mean negative log-likelihood and the number of tokens scored."""
    text = tokens.tolist()
    start = [] if bos is None else [bos]
    body = window - len(start)
    seen, losses = 0, []
    first = 0
    while True:
        end = min(first + body, len(text))
        for position in range(first, end):
            before = start + text[first:position]
            if position >= seen and position - first >= prompt and before:
                losses.append(-log_probability(model, before, text[position]))
        seen = end
        if end == len(text):
            return sum(losses) / len(losses), len(losses)
        first += min(stride, body)


@pytest.mark.parametrize("bos", [None, BOS])
@pytest.mark.parametrize(
    ("window", "stride", "prompt"),
    [(8, 8, 0), (8, 3, 0), (8, 8, 4), (8, 5, 6), (40, 40, 0), (64, 64, 0), (2, 1, 0), (13, 13, 0)],
)
def test_is_its_definition(window: int, stride: int, prompt: int, bos: int | None) -> None:
    model = shared("llama")
    expected, scored = plain(model, TOKENS, window, stride, prompt, bos)
    found = perplexity(model, TOKENS, window=window, stride=stride, prompt=prompt, bos=bos)
    assert found.tokens == scored
    assert found.nll == pytest.approx(expected, rel=1e-6)  # the loss is taken in float32
    assert found.perplexity == pytest.approx(math.exp(expected), rel=1e-5)


@pytest.mark.parametrize("batch_size", [2, 3, 100])
def test_batches_change_nothing(batch_size: int) -> None:
    model = shared("llama")
    with dipnet.sparsify(model, dipnet.DIP(0.5)):
        alone = perplexity(model, TOKENS, window=8, stride=5, bos=BOS)
        together = perplexity(model, TOKENS, window=8, stride=5, bos=BOS, batch_size=batch_size)
    assert together.nll == pytest.approx(alone.nll, rel=1e-6)
    assert (together.tokens, together.windows) == (alone.tokens, alone.windows)


def test_is_deterministic() -> None:
    runs = [perplexity(shared("llama"), TOKENS, window=8, batch_size=2).nll for _ in range(2)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 3), (5, 5)])
def test_leading_tokens_make_that_many_windows(window: int, stride: int, bos: bool) -> None:
    for windows in (1, 2, 3):
        tokens = leading_tokens(windows, window=window, stride=stride, bos=bos)
        assert count_windows(tokens, window=window, stride=stride, bos=bos) == windows
        assert count_windows(tokens + 1, window=window, stride=stride, bos=bos) >= windows


def test_progress_counts_every_window() -> None:
    done: list[int] = []
    found = perplexity(shared("llama"), TOKENS, window=8, batch_size=3, progress=done.append)
    assert sum(done) == found.windows == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1}, "at least 2 tokens"),
        ({"window": 8, "stride": 9}, "stride must be between 1 and the window of 8"),
        ({"window": 8, "stride": 0}, "stride must be"),
        ({"window": 8, "prompt": 8}, "0 to 7, got 8"),
        ({"window": 8, "prompt": 7, "bos": 1}, "0 to 6, got 7"),
    ],
)
def test_impossible_settings(options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        perplexity(shared("llama"), TOKENS, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [0, 1])
def test_too_short_a_text(length: int) -> None:
    with pytest.raises(InputError, match="too few to score any: give a longer text"):
        perplexity(shared("llama"), TOKENS[:length], window=8)
