"""The loss of a masked model beside the dense one that it shall behave like.

Knows logits and hidden states; knows no model and no method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

CHUNK = 2**24
"""Logits that are held in float32 at a time."""


@dataclass(frozen=True)
class LossWeights:
    """How much each part of the loss counts."""

    kl: float
    cross_entropy: float
    hidden: float


class _TokenLoss(Function):
    """The part of the loss that logits decide, with its gradient made on the way.

    A vocabulary's logits are the largest activation of a small model: they are kept once, in their
    own dtype, and the float32 of a softmax lives for a chunk of rows.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor | None, targets: Tensor, weights: LossWeights
    ) -> Tensor:
        total = student.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(student)
        size = max(1, CHUNK // student.shape[1])
        for start in range(0, len(student), size):
            rows = slice(start, start + size)
            dense = None if teacher is None else teacher[rows]
            loss, gradient[rows] = _loss_and_gradient(student[rows], dense, targets[rows], weights)
            total += loss
        ctx.save_for_backward(gradient.div_(len(student)))
        return total / len(student)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0].to(gradient.dtype), None, None, None


def _loss_and_gradient(
    student: Tensor, teacher: Tensor | None, targets: Tensor, weights: LossWeights
) -> tuple[Tensor, Tensor]:
    """(rows, vocabulary) logits -> the sum of the rows' losses, and its gradient."""
    logs = torch.log_softmax(student.float(), dim=-1)
    gradient = logs.exp() * (weights.kl + weights.cross_entropy)
    loss = logs.new_zeros(())
    if teacher is not None:
        dense_logs = torch.log_softmax(teacher.float(), dim=-1)
        dense = dense_logs.exp()
        loss = loss + weights.kl * torch.sum(dense * (dense_logs - logs))
        gradient -= weights.kl * dense
    if weights.cross_entropy:
        loss = loss - weights.cross_entropy * logs.gather(1, targets[:, None]).sum()
        gradient.scatter_add_(
            1, targets[:, None], gradient.new_full((len(targets), 1), -weights.cross_entropy)
        )
    return loss, gradient


def token_loss(
    student: Tensor, teacher: Tensor | None, tokens: Tensor, weights: LossWeights
) -> Tensor:
    """The mean loss of the next tokens, in nats: () float32.

    ``student`` and ``teacher`` are the (batch, tokens, vocabulary) logits of ``tokens``
    (batch, tokens), ``teacher`` None where the divergence does not count. The divergence is summed
    over the vocabulary: KL(dense || masked). Each window's last token predicts nothing that the
    text could confirm, and is left out.
    """
    rows = student[:, :-1].flatten(0, 1)
    dense = None if teacher is None else teacher[:, :-1].flatten(0, 1)
    loss: Tensor = _TokenLoss.apply(rows, dense, tokens[:, 1:].flatten(), weights)
    return loss


def hidden_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """How far residual streams are apart: () float32, averaged over layers and tokens.

    The squared distance of a token's (..., width) stream from the dense one's, over that one's
    squared norm: a layer or a token of large activations counts no more than others.
    """
    errors = []
    for masked, dense in zip(student, teacher, strict=True):
        norm = dense.float().square().sum(-1)
        distance = (masked.float() - dense.float()).square().sum(-1)
        errors.append((distance / norm.clamp(min=torch.finfo(norm.dtype).tiny)).mean())
    return torch.stack(errors).mean()
