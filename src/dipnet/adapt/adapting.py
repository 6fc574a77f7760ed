"""One training of adapters: steps over a text, measured on what is held out of it, kept on disk."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor

from dipnet.adapt.adapter_settings import AdapterSettings
from dipnet.adapt.adapter_state import Course, State, StateFile
from dipnet.adapt.distillation import LossWeights, hidden_loss, token_loss
from dipnet.adapt.interrupting import Deferred
from dipnet.adapt.lora import AdaptedDecoder, Lora
from dipnet.adapt.processes import processes
from dipnet.adapt.stand_in import StandInAttachment
from dipnet.errors import InputError
from dipnet.eval.perplexity import perplexity
from dipnet.methods.base import Method
from dipnet.models.attach import Attachment

EVALUATIONS = 20
"""How often the held-out text is measured, and the state kept."""
WARM_UP = 0.05
"""Of the steps, those in which the learning rate rises."""
BETAS = (0.9, 0.99)
CLIPPED = 1.0
"""The largest norm of a step's gradient."""
DIVERGED = 2.0
"""A held-out perplexity so many times that before the first step is no training any more."""

Progress = Callable[[int, int, float | None, float], object]
"""Told steps made, steps planned, the loss since the last time and the held-out perplexity."""


class Adapting:
    """Trains adapters of a model under a method's masks.

    ``windows`` and ``held`` are (1, window) windows of the text: to train on, and to measure on.
    The model has adapters and masks on it inside ``with``, and is what it was afterwards.
    """

    def __init__(
        self,
        decoder: AdaptedDecoder,
        method: Method,
        settings: AdapterSettings,
        windows: Sequence[Tensor],
        held: Sequence[Tensor],
        file: StateFile,
    ) -> None:
        self.decoder = decoder
        self.model = decoder.model
        self.method = method
        self.settings = settings
        self.windows = windows
        self.held = torch.cat([each.flatten() for each in held])
        self.window = windows[0].shape[1]
        self.file = file
        self.processes = processes(self.model.device.type)
        self.weights = LossWeights(settings.kl, settings.cross_entropy, settings.hidden)
        self.needs_dense = bool(settings.kl or settings.hidden)
        self._ordered: tuple[int, list[int]] = (-1, [])

    def __enter__(self) -> Adapting:
        self._was_training = self.model.training
        self.model.eval()  # no dropout: what is learned is the model's own behaviour
        self.dense_perplexity = self._measure()
        self.derives = self.method.prepare(self.decoder, self.decoder.spec) is not self.method
        self.lora = Lora(self.decoder, self.settings.rank, self.settings.seed)
        self.decoder.lora = self.lora
        try:
            self.attachment = self._attach()
        except BaseException:
            self._restore()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.attachment.detach()
        self._restore()

    def _restore(self) -> None:
        self.decoder.lora = None
        self.lora.remove()
        self.model.train(self._was_training)

    def run(self, progress: Progress) -> Course:
        """Train from where the state on the disk is, or from the beginning; the best stays loaded.

        Raises InputError when the loss diverges, and KeyboardInterrupt after the step in which an
        interruption came: the state is on the disk then.
        """
        self._begin()
        if not self.course.history:
            self._record(None, progress)
        else:
            self._tell(progress)
        began = time.perf_counter()
        with Deferred() as interrupted, self._checkpointed():
            while self.course.step < self.settings.steps:
                self.losses.append(self._step(interrupted))
                self.course.step += 1
                measured = self.course.step in self._measured_at()
                if not (measured or interrupted.pending):
                    continue
                self._note_losses()
                self.course.seconds += time.perf_counter() - began
                if measured:
                    self._record(self._mean_loss(), progress)
                if interrupted.pending:
                    self._keep()
                    raise KeyboardInterrupt
                began = time.perf_counter()
        self.lora.load(self.best)
        return self.course

    def _begin(self) -> None:
        """The weights, the moments and the place of the state on the disk, or their beginnings."""
        self.optimizer = torch.optim.AdamW(
            self.lora.parameters.values(),
            lr=self.settings.rate,
            betas=BETAS,
            weight_decay=0.0,
            fused=self.model.device.type == "cuda",
        )
        self.losses: list[Tensor] = []
        state = self.file.read(self.model.device)
        if state is None:
            self.course, self.best = Course(), self.lora.state()
            return
        self.course, self.best = state.course, state.best
        self.lora.load(state.weights)
        for name, parameter in self.lora.parameters.items():
            moments = {moment: held[name] for moment, held in state.moments.items()}
            made = torch.tensor(float(self.course.step), device=self._step_device())
            if moments:
                self.optimizer.state[parameter] = {"step": made, **moments}

    def _step_device(self) -> torch.device:
        """Where AdamW counts its steps: the fused one on the GPU."""
        return self.model.device if self.model.device.type == "cuda" else torch.device("cpu")

    def _state(self) -> State:
        moments: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self.lora.parameters.items():
            for moment, value in self.optimizer.state[parameter].items():
                if moment != "step":
                    moments.setdefault(moment, {})[name] = value
        return State(self.lora.state(), self.best, moments, self.course)

    def _step(self, interrupted: Deferred) -> Tensor:
        """One step of the optimizer; its loss, () on the device."""
        if self.derives:  # what the method reads of the weights has moved with them
            self.attachment.detach()
            self.attachment = self._attach()
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate * _schedule(self.course.step / self.settings.steps)
        rows = self._rows(self.course.step)
        total = torch.zeros((), device=self.model.device)
        for part in torch.chunk(rows, self.settings.accumulate):
            loss = self._loss(part) * (len(part) / self.settings.batch)
            loss.backward()
            total += loss.detach()
        self._sum_over_processes(total, interrupted)
        torch.nn.utils.clip_grad_norm_(self.lora.parameters.values(), CLIPPED)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.course.tokens += self.settings.batch * self.window
        return total

    def _rows(self, step: int) -> Tensor:
        """(rows, window) this process's windows of a step: all of the text before any again."""
        first = step * self.settings.batch
        chosen = []
        for place in range(first, first + self.settings.batch)[self._share()]:
            epoch, at = divmod(place, len(self.windows))
            chosen.append(self.windows[self._order(epoch)[at]])
        return torch.cat(chosen).to(self.model.device)

    def _share(self) -> slice:
        return slice(self.processes.process_index, None, self.processes.num_processes)

    def _order(self, epoch: int) -> list[int]:
        """The windows' order in a pass over the text."""
        if self._ordered[0] != epoch:
            generator = torch.Generator().manual_seed(self.settings.seed + epoch)
            order = torch.randperm(len(self.windows), generator=generator).tolist()
            self._ordered = epoch, order
        return self._ordered[1]

    def _loss(self, rows: Tensor) -> Tensor:
        """(rows, window) tokens -> the loss of the masked model, () float32."""
        hidden = bool(self.settings.hidden)
        dense = None
        if self.needs_dense:
            with torch.no_grad(), self._dense(), self._precision():
                dense = self.model(input_ids=rows, use_cache=False, output_hidden_states=hidden)
        with self._precision():
            masked = self.model(input_ids=rows, use_cache=False, output_hidden_states=hidden)
        teacher = dense.logits if dense is not None and self.settings.kl else None
        loss = token_loss(masked.logits, teacher, rows, self.weights)
        if hidden and dense is not None:
            streams = hidden_loss(masked.hidden_states[1:], dense.hidden_states[1:])
            loss = loss + self.settings.hidden * streams
        return loss

    @contextmanager
    def _dense(self) -> Iterator[None]:
        """Calls inside are the dense model's: no adapters and no masks."""
        tokens = self.attachment.tokens
        masked, tokens.prefill = tokens.prefill, "dense"
        try:
            with self.lora.off():
                yield
        finally:
            tokens.prefill = masked

    def _precision(self) -> AbstractContextManager[object]:
        device, chosen = self.model.device.type, self.settings.precision
        if chosen == "bfloat16" or (chosen == "auto" and device == "cuda"):
            return torch.autocast(device, torch.bfloat16)
        return nullcontext()

    @contextmanager
    def _checkpointed(self) -> Iterator[None]:
        """Layers keep their inputs only, where that was asked for."""
        if not self.settings.checkpointing:
            yield
            return
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        layers: list[Any] = list(self.decoder.layers)
        dropouts = [getattr(layer, "dropout", None) for layer in layers]
        for layer in layers:  # Hugging Face computes again what is in training: only the layer is
            layer.training = True
            if isinstance(getattr(layer, "dropout", None), float):
                layer.dropout = 0.0
        try:
            yield
        finally:
            self.model.gradient_checkpointing_disable()
            for layer, dropout in zip(layers, dropouts, strict=True):
                layer.training = False
                if isinstance(dropout, float):
                    layer.dropout = dropout

    def _sum_over_processes(self, total: Tensor, interrupted: Deferred) -> None:
        """Add up gradients, loss and interruptions of all processes, in one exchange."""
        if self.processes.num_processes == 1:
            return
        pending = total.new_tensor(float(interrupted.pending))
        gradients = [each.grad for each in self.lora.parameters.values() if each.grad is not None]
        held = [*gradients, total, pending]
        summed = reduce(torch.cat([each.flatten() for each in held]), reduction="sum")
        for each, part in zip(held, summed.split([each.numel() for each in held]), strict=True):
            each.copy_(part.view_as(each))
        interrupted.pending = bool(pending)

    def _attach(self) -> Attachment:
        attachment = (
            Attachment(self.decoder, self.method)
            if self.settings.cache is None
            else StandInAttachment(self.decoder, self.method, self.settings.cache)
        )
        attachment.attach()
        return attachment

    def _measured_at(self) -> set[int]:
        count = min(EVALUATIONS, self.settings.steps)
        return {round(self.settings.steps * each / count) for each in range(1, count + 1)}

    def _measure(self) -> float:
        """The held-out perplexity of the model as it is."""
        rows = max(1, self.settings.batch // self.settings.accumulate)
        return perplexity(self.model, self.held, window=self.window, batch_size=rows).perplexity

    def _mean_loss(self) -> float:
        """The mean loss since the last measurement."""
        mean = math.fsum(self.course.losses) / len(self.course.losses)
        self.course.losses = []
        return mean

    def _note_losses(self) -> None:
        """Fetch the losses from the device, which waits for it.

        InputError when one is not finite: the state on the disk stays the last good one.
        """
        found = torch.stack(self.losses).tolist() if self.losses else []
        self.losses = []
        if not all(map(math.isfinite, found)):
            raise self._diverged("the loss is not finite")
        self.course.losses += found

    def _record(self, loss: float | None, progress: Progress) -> None:
        """Measure, and keep what is there if it is good."""
        try:
            found = self._measure()
        except InputError:  # the model's logits are not finite
            if not self.course.history:
                raise
            raise self._diverged("the logits are not finite") from None
        if self.processes.num_processes > 1:  # one figure for all, since they decide by it
            found = float(reduce(torch.tensor(found, device=self.model.device), reduction="mean"))
        if self.course.history and found > DIVERGED * self.course.history[0][2]:
            raise self._diverged(f"held-out perplexity is {found:,.0f}")
        if not self.course.history or found < self.course.best_perplexity:
            self.best, self.course.best = self.lora.state(), self.course.step
        self.course.history.append((self.course.step, loss, found))
        self._keep()
        self._tell(progress)

    def _tell(self, progress: Progress) -> None:
        _, loss, found = self.course.history[-1]
        progress(self.course.step, self.settings.steps, loss, found)

    def _keep(self) -> None:
        """The state on the disk, by one process."""
        if self.processes.is_main_process:
            self.file.write(self._state())
        self.processes.wait_for_everyone()

    def _diverged(self, what: str) -> InputError:
        kept = self.course.history[-1][0] if self.course.history else 0
        return InputError(
            f"{what} after {self.course.step} steps: the state after {kept} steps, which was good, "
            f"is kept; go on from it at a lower rate than {self.settings.rate:g} (repeat the "
            "command with it)"
        )


def _schedule(done: float) -> float:
    """The share of the learning rate when a share ``done`` of the steps is made."""
    return min(1.0, (done + 1e-3) / WARM_UP) * (1 + math.cos(math.pi * done)) / 2
