"""Perplexity of a model over a long text, window by window.

Knows tokens and logits; knows no method: whatever is attached to the model is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from dipnet.errors import InputError
from dipnet.models.attach import attached_prefill
from dipnet.models.families import context_length, default_window

LOGIT_ROWS = 256
"""Positions whose logits are held in float32 at a time: 128 MB at a vocabulary of 128 k."""


@dataclass(frozen=True)
class Perplexity:
    """The mean negative log-likelihood of the scored tokens, in nats, and how it was measured.

    ``window`` and ``stride`` are in tokens; with a stride shorter than the window each token is
    scored once, with at least ``window - stride`` tokens before it. ``prompt`` leading tokens of
    each window are context only; ``bos`` says that each window begins with that token.
    """

    nll: float
    tokens: int
    windows: int
    window: int
    stride: int
    prompt: int
    bos: bool

    @property
    def perplexity(self) -> float:
        """The exponential of the mean negative log-likelihood."""
        return math.exp(self.nll)


@dataclass(frozen=True)
class _Window:
    """Tokens first..end of the text, of which those from ``scored`` on are scored."""

    first: int
    scored: int
    end: int


def perplexity(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    window: int | None = None,
    stride: int | None = None,
    prompt: int = 0,
    bos: int | None = None,
    batch_size: int = 1,
    progress: Callable[[int], object] | None = None,
) -> Perplexity:
    """Measure ``model`` on (n,) or (1, n) integer ``tokens`` in windows of ``window`` tokens,
    by default its context (at most 2048).

    Without ``stride`` the windows do not overlap, and the first token of each is not scored unless
    it follows ``bos``, which takes one of the window's places. ``progress`` is called with the
    number of windows done. Raises InputError when the text has no token to score, a window is
    longer than the model's context, a sparsified model would process whole windows dense, or the
    logits are not finite.
    """
    window = default_window(model) if window is None else window
    stride = window if stride is None else stride
    tokens = tokens.flatten()
    _check_call(model, window, batch_size)
    plan = _plan(len(tokens), window, stride, prompt, bos is not None)
    if not plan:
        raise InputError(
            f"the text has {len(tokens)} tokens, too few to score any: give a longer text"
        )
    total, scored = 0.0, 0
    for batch in _batches(plan, batch_size):
        losses = _losses(model, tokens, batch, bos)
        total += float(losses.double().sum())
        scored += losses.numel()
        if not math.isfinite(total):
            raise InputError(
                f"the model's logits are not finite in the window at token {batch[0].first}: "
                "NaN or overflow in its activations; try another dtype (--dtype float32)"
            )
        if progress:
            progress(len(batch))
    return Perplexity(total / scored, scored, len(plan), window, stride, prompt, bos is not None)


def _check_call(model: PreTrainedModel, window: int, batch_size: int) -> None:
    context = context_length(model)
    if window > context:
        raise InputError(f"a window of {window} tokens is longer than the context of {context}")
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    if attached_prefill(model) == "dense":
        raise InputError(
            "with prefill='dense' a whole window counts as prompt and nothing is pruned: "
            "sparsify with prefill='sparse', or with the number of tokens that are prompt"
        )


def count_windows(
    length: int, *, window: int, stride: int, prompt: int = 0, bos: bool = False
) -> int:
    """How many windows `perplexity` makes of a text of ``length`` tokens."""
    return len(_plan(length, window, stride, prompt, bos))


def leading_tokens(windows: int, *, window: int, stride: int, bos: bool = False) -> int:
    """How many tokens the first ``windows`` windows of a text hold together."""
    body = window - bos
    return body + (windows - 1) * min(stride, body)


def _plan(length: int, window: int, stride: int, prompt: int, bos: bool) -> list[_Window]:
    """The windows of a text, the last one shorter; those with nothing to score are left out."""
    body = window - bos
    _check(body, stride, window, prompt)
    first_scored = max(prompt, int(not bos))
    plan, done = [], 0
    for first in range(0, length, min(stride, body)):
        end = min(first + body, length)
        scored = max(done, first + first_scored)
        if scored < end:
            plan.append(_Window(first, scored, end))
        done = end
        if end == length:
            break
    return plan


def _check(body: int, stride: int, window: int, prompt: int) -> None:
    if window < 2:
        raise InputError(f"a window needs at least 2 tokens, got {window}")
    if not 0 < stride <= window:
        raise InputError(f"stride must be between 1 and the window of {window}, got {stride}")
    if not 0 <= prompt < body:
        raise InputError(
            f"the dense prompt must leave a token of the window to score: 0 to {body - 1}, "
            f"got {prompt}"
        )


def _batches(plan: list[_Window], batch_size: int) -> Iterator[list[_Window]]:
    """Runs of at most ``batch_size`` windows that have the same shape."""
    batch: list[_Window] = []
    for window in plan:
        if batch and (len(batch) == batch_size or _shape(window) != _shape(batch[0])):
            yield batch
            batch = []
        batch.append(window)
    yield batch


def _shape(window: _Window) -> tuple[int, int]:
    return window.end - window.first, window.scored - window.first


def _losses(
    model: PreTrainedModel, tokens: Tensor, batch: list[_Window], bos: int | None
) -> Tensor:
    """(scored tokens of the batch,) negative log-likelihoods in nats, float32."""
    rows = torch.stack([tokens[w.first : w.end] for w in batch]).to(model.device)
    scored = batch[0].scored - batch[0].first
    if bos is not None:
        rows = functional.pad(rows, (1, 0), value=bos)
        scored += 1
    with torch.no_grad():
        logits = model(input_ids=rows, use_cache=False).logits[:, scored - 1 : -1].flatten(0, 1)
    targets = rows[:, scored:].flatten()
    return torch.cat(
        [
            functional.cross_entropy(part.float(), target, reduction="none")
            for part, target in zip(
                logits.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True
            )
        ]
    )
