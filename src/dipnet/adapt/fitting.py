"""One fit of predictors: a text in a stream, a bounded sample of it, and the banks that learn."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dipnet.adapt.bank import Bank
from dipnet.adapt.calibration import TextCalibration
from dipnet.adapt.collect import Collector, Sample, calls
from dipnet.adapt.fit_settings import FitSettings
from dipnet.adapt.quality import MEASURED_AT_ONCE
from dipnet.errors import InputError
from dipnet.methods.predictors import Kind, Predictor

HELD_OUT_EVERY = 20
"""One window in so many is held out: 5 % of the text, as in the paper."""
HELD_OUT_SHARE = 1 / 8
"""Of what the sample holds, what is held out at most."""
REFILL_SHARE = 1 / 4
"""Of the sample, what new tokens replace at a time."""
EVALUATIONS = 10
"""How often the held-out text is measured in a fit."""
WARM_UP = 0.05
"""Of the steps, those in which the learning rate rises."""
TOKENS_A_CALL = {"cuda": 8192}
"""Tokens of a forward call by device; elsewhere `FEW_TOKENS`."""
FEW_TOKENS = 1024
SCORES_AT_ONCE = {"cuda": 2**28}
"""Scores of a bank by device: a GPU trains many layers at once. Elsewhere a bank is one layer."""

Progress = Callable[[str, int, int], object]
"""Told what is being done ("collecting" or "training"), and how much of how much is."""


@dataclass
class Course:
    """How a fit went: steps made of those planned, and seconds of its two parts."""

    steps: int = 0
    planned: int = 0
    collecting: float = 0.0
    training: float = 0.0


class Fit:
    """Collects and trains until the text is used up, or nothing gets better.

    ``held`` is the held-out sample; ``course`` says how it went.
    """

    def __init__(
        self,
        calibration: TextCalibration,
        settings: FitSettings,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self.settings = settings
        self.device = device
        self.progress = progress
        self.decoder = calibration.decoder
        self.spec = calibration.spec
        self.kept = settings.kept(self.spec)
        rules = settings.rules(self.spec)
        self.collector = Collector(self.decoder, rules, settings.look_ahead, device)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.window = calibration.windows[0].shape[1]
        self.course = Course()
        self._divide(calibration.windows)

    def _divide(self, windows: list[Tensor]) -> None:
        """Set the held-out windows apart; the others, in random order, fill the sample in turns."""
        if len(windows) < HELD_OUT_EVERY:
            raise InputError(
                f"the text is too short to fit predictors on: it has {len(windows)} windows of "
                f"{self.window} tokens, and {HELD_OUT_EVERY} are needed, since one in so many is "
                "held out; give more text or a shorter window"
            )
        room = max(2, self.settings.room(self.collector.bytes_per_token) // self.window)
        first = HELD_OUT_EVERY // 2
        self._held_out = windows[first::HELD_OUT_EVERY][: max(1, int(room * HELD_OUT_SHARE))]
        rest = [each for at, each in enumerate(windows) if at % HELD_OUT_EVERY != first]
        order = torch.randperm(len(rest), generator=self.generator).tolist()
        refill = max(1, int(room * REFILL_SHARE))
        starts = [0, *range(room, len(rest), refill)]
        self._rounds = [
            [rest[at] for at in order[start:end]]
            for start, end in zip(starts, [*starts[1:], len(rest)], strict=True)
        ]
        self.tokens = len(rest) * self.window

    def run(self) -> dict[Kind, list[Predictor]]:
        """Collect and train; returns for each kind every layer's best on the held-out text."""
        self.held = Sample(len(self._held_out) * self.window)
        sample = Sample(len(self._rounds[0]) * self.window)
        self._collect(self._held_out, self.held)
        self._collect(self._rounds[0], sample)
        self.collector.check_labels(sample)
        banks = self._banks(sample)
        self._train(banks, sample)
        return {
            kind: [one for bank in banks if bank.kind == kind for one in bank.predictors()]
            for kind in self.kept
        }

    def _collect(self, windows: list[Tensor], sample: Sample) -> None:
        """Add what the model does on some windows to a sample, where it replaces the oldest."""
        began = time.perf_counter()
        done, total = 0, len(windows) * self.window
        for call in calls(windows, TOKENS_A_CALL.get(self.decoder.model.device.type, FEW_TOKENS)):
            sample.add(self.collector.see(call))
            done += call.numel()
            self.progress("collecting", done, total)
        self.collector.check_finite()  # waits for the device
        self.course.collecting += time.perf_counter() - began

    def _banks(self, sample: Sample) -> list[Bank]:
        """The banks of all layers, each of as many as its device takes at a time."""
        made = []
        scores = SCORES_AT_ONCE.get(self.device.type, 1)
        for kind in self.kept:
            units = self.spec.neurons if kind == "mlp" else self.spec.heads
            size = max(1, scores // (max(self.settings.batch, MEASURED_AT_ONCE) * units))
            rows = self.collector.rows(kind)
            for start in range(0, self.spec.layers, size):
                layers = range(start, min(start + size, self.spec.layers))
                read = rows[layers.start : layers.stop]
                rank = self.settings.rank_of(kind, self.spec)
                made.append(Bank(kind, layers, read, sample, rank, self.settings, self.generator))
        return made

    def _train(self, banks: list[Bank], sample: Sample) -> None:
        """Train on one filling of the sample after another."""
        course, batch = self.course, self.settings.batch
        epochs = self.settings.passes(self.tokens)
        visits = [epochs * len(each) * self.window for each in self._rounds]
        rounds = [max(1, count // batch) for count in visits]
        course.planned = sum(rounds)
        every = max(1, course.planned // EVALUATIONS)
        for number, steps in enumerate(rounds):
            if number:
                self._collect(self._rounds[number], sample)
            began = time.perf_counter()
            for tokens in self._batches(sample, steps):
                rate = self.settings.rate * _schedule(course.steps / course.planned)
                for bank in banks:
                    if bank.stale < self.settings.patience:
                        bank.step(sample, tokens, rate)
                course.steps += 1
                if course.steps % every == 0 or course.steps == course.planned:
                    self._evaluate(banks)
                    if all(bank.stale >= self.settings.patience for bank in banks):
                        break
            course.training += time.perf_counter() - began
            if all(bank.stale >= self.settings.patience for bank in banks):
                break

    def _batches(self, sample: Sample, steps: int) -> Iterator[Tensor]:
        """(batch,) tokens of the sample, so many times: all of them before any comes again."""
        batch = min(self.settings.batch, sample.tokens)
        while steps > 0:
            order = torch.randperm(sample.tokens, generator=self.generator).to(self.device)
            whole = order[: len(order) // batch * batch].view(-1, batch)[:steps]
            yield from whole
            steps -= len(whole)

    def _evaluate(self, banks: list[Bank]) -> None:
        """Measure what still trains on the held-out text, and keep what is better than before."""
        for bank in banks:
            if bank.stale >= self.settings.patience:
                continue
            losses = bank.measure(self.held, self.kept[bank.kind])
            for layer, loss in zip(bank.layers, losses, strict=True):
                if not math.isfinite(loss):
                    raise InputError(
                        f"the loss of layer {layer}'s {bank.kind} predictor is {loss} after "
                        f"{self.course.steps} steps: train at a lower rate than "
                        f"{self.settings.rate:g}"
                    )
        self.progress("training", self.course.steps, self.course.planned)


def _schedule(done: float) -> float:
    """The share of the learning rate when a share ``done`` of the steps is made."""
    return min(1.0, (done + 1e-3) / WARM_UP) * (1 + math.cos(math.pi * done)) / 2
