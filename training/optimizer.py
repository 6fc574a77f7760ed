"""The optimiser and the learning-rate schedule."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.1


def build_optimizer(
    model: PreTrainedModel, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW; vectors (norms and biases) do not decay.

    Muon was tried first and learns faster, but the inputs of its MLPs are harder to prune: DIP at
    half the weights cost about three times as much perplexity. Most models that people use were
    trained with AdamW, and that is what the demo stands for.
    """
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    fused = next(model.parameters()).is_cuda
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=fused)


@dataclass(frozen=True)
class Schedule:
    """Warm up, then fall linearly to zero by the last step or the last second."""

    steps: int
    seconds: float
    warmup_steps: int

    def progress(self, step: int, elapsed: float) -> float:
        """Return how much of the budget is spent, from 0 to 1."""
        return min(1.0, max(step / self.steps, elapsed / self.seconds))

    def factor(self, step: int, elapsed: float) -> float:
        """Return the share of the peak learning rate to use."""
        warmup = min(1.0, (step + 1) / max(1, self.warmup_steps))
        return warmup * (1.0 - self.progress(step, elapsed))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set every group's learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
