"""The training loop: shuffled windows, mixed precision, a schedule that ends on time."""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from dipnet.eval.perplexity import perplexity
from training.checkpoint import save_checkpoint
from training.models import build_model, token_losses
from training.optimizer import (
    LEARNING_RATE,
    WEIGHT_DECAY,
    Schedule,
    build_optimizer,
    set_rate,
)
from training.text import TrainingError

Report = Callable[[str], None]


@dataclass
class Settings:
    """What one training run uses."""

    steps: int = 10_000
    max_seconds: float = 3600.0
    batch: int = 256
    micro_batch: int = 256
    warmup_steps: int = 200
    learning_rate: float = LEARNING_RATE
    weight_decay: float = WEIGHT_DECAY
    compile: bool = True
    seed: int = 0
    report_every: int = 50
    evaluate_seconds: float = 60.0


class Windows:
    """Shuffled windows over all tokens; each pass starts at another offset."""

    def __init__(self, tokens: np.ndarray, context: int, device: torch.device, seed: int) -> None:
        if len(tokens) < 2 * context + 1:
            raise TrainingError(f"{len(tokens)} tokens are too few for windows of {context}")
        self.tokens = torch.from_numpy(tokens.astype(np.int32)).to(device)
        self.context = context
        self.generator = torch.Generator().manual_seed(seed)
        self.span = torch.arange(context + 1, device=device)
        self.starts = torch.empty(0, dtype=torch.long, device=device)

    def _next_pass(self) -> torch.Tensor:
        offset = int(torch.randint(self.context, (1,), generator=self.generator))
        count = (len(self.tokens) - 1 - offset) // self.context
        order = torch.randperm(count, generator=self.generator)
        return (order * self.context + offset).to(self.tokens.device)

    def batch(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and targets of ``size`` windows."""
        while len(self.starts) < size:
            self.starts = torch.cat([self.starts, self._next_pass()])
        chosen, self.starts = self.starts[:size], self.starts[size:]
        rows = self.tokens[chosen[:, None] + self.span].long()
        return rows[:, :-1], rows[:, 1:]


class Trainer:
    """One model, its optimisers and its data."""

    def __init__(
        self,
        config: PreTrainedConfig,
        tokens: np.ndarray,
        settings: Settings,
        device: torch.device,
    ) -> None:
        self.settings, self.device = settings, device
        self.unique = len(tokens)
        self.model: PreTrainedModel = build_model(config, device, settings.seed)
        self.data = Windows(tokens, config.max_position_embeddings, device, settings.seed)
        self.optimizer = build_optimizer(self.model, settings.learning_rate, settings.weight_decay)
        self.loss = torch.compile(self._mean_loss) if settings.compile else self._mean_loss
        self.step_number = 0
        self.seconds = 0.0
        self.losses: list[float] = []

    def _mean_loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return token_losses(self.model, inputs, targets).mean()

    def _backward(self) -> torch.Tensor:
        """Accumulate the gradient of one batch; return its mean loss."""
        parts = max(1, self.settings.batch // self.settings.micro_batch)
        total = torch.zeros((), device=self.device)
        for _ in range(parts):
            inputs, targets = self.data.batch(self.settings.batch // parts)
            with torch.autocast(self.device.type, torch.bfloat16, self.device.type == "cuda"):
                loss = self.loss(inputs, targets) / parts
            loss.backward()
            total += loss.detach()
        return total

    def _step(self, factor: float) -> torch.Tensor:
        set_rate(self.optimizer, self.settings.learning_rate * factor)
        loss = self._backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step_number += 1
        return loss

    def warm_up(self) -> None:
        """Compile on one batch whose gradient is thrown away."""
        self._backward().item()
        self.model.zero_grad(set_to_none=True)

    def held_out_loss(self, tokens: torch.Tensor) -> float:
        """Return the mean loss in nats on held-out (n,) tokens."""
        self.model.eval()
        with torch.autocast(self.device.type, torch.bfloat16, self.device.type == "cuda"):
            result = perplexity(
                self.model,
                tokens,
                window=self.data.context,
                batch_size=self.settings.micro_batch,
            )
        self.model.train()
        return result.nll

    def about(self) -> dict[str, Any]:
        """Describe the run so far."""
        settings = self.settings
        batch_tokens = settings.batch * self.data.context
        tokens = self.step_number * batch_tokens
        is_gpu = self.device.type == "cuda"
        return {
            "parameters": self.model.num_parameters(),
            "steps": self.step_number,
            "tokens_per_step": batch_tokens,
            "tokens_seen": tokens,
            "unique_tokens": self.unique,
            "passes": round(tokens / self.unique, 2),
            "seconds": round(self.seconds, 1),
            "final_training_loss": round(self.losses[-1], 4) if self.losses else None,
            "optimizer": "AdamW",
            "learning_rate": settings.learning_rate,
            "weight_decay": settings.weight_decay,
            "seed": settings.seed,
            "device": torch.cuda.get_device_name() if is_gpu else platform.machine(),
            "torch": torch.__version__,
        }

    def run(self, held_out: dict[str, torch.Tensor], out: Path, report: Report) -> None:
        """Train until the schedule ends; save at every evaluation and at the end."""
        settings = self.settings
        begin = time.perf_counter()
        self.warm_up()
        compiled = time.perf_counter() - begin
        report(f"first batch took {compiled:.1f} s; {self.model.num_parameters()} parameters")
        schedule = Schedule(
            settings.steps, max(1.0, settings.max_seconds - compiled), settings.warmup_steps
        )
        start = evaluated = reported = time.perf_counter()
        recent: list[torch.Tensor] = []
        while (progress := schedule.progress(self.step_number, time.perf_counter() - start)) < 1:
            factor = schedule.factor(self.step_number, time.perf_counter() - start)
            recent.append(self._step(factor))
            if self.step_number % settings.report_every == 0:
                self.losses.append(torch.stack(recent).mean().item())
                now = time.perf_counter()
                rate = len(recent) * settings.batch * self.data.context / (now - reported)
                report(
                    f"step {self.step_number} ({progress:.1%}) loss {self.losses[-1]:.4f} "
                    f"rate x{factor:.3f} {rate / 1e3:.0f} k tokens/s {now - start:.0f} s"
                )
                recent, self.seconds = [], now - begin
                if now - evaluated > settings.evaluate_seconds:
                    self._evaluate_and_save(held_out, out, report)
                    evaluated = time.perf_counter()
                reported = time.perf_counter()
        self.seconds = time.perf_counter() - begin
        self._evaluate_and_save(held_out, out, report)

    def _evaluate_and_save(
        self, held_out: dict[str, torch.Tensor], out: Path, report: Report
    ) -> None:
        for name, tokens in held_out.items():
            nats = self.held_out_loss(tokens)
            report(f"held-out {name}: {nats:.4f} nats, perplexity {np.exp(nats):.2f}")
        save_checkpoint(self.model, out, self.about())
