"""Fit a method on text: what it asks of the dense model is gathered here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from dipnet.adapt.blocks import WalkedBlock, walk_blocks
from dipnet.adapt.histogram import ScoreHistogram
from dipnet.errors import InputError
from dipnet.methods.base import Method, SiteKey
from dipnet.models.attach import Attachment, check_dense
from dipnet.models.families import Decoder, context_length, default_window
from dipnet.units import ModelSpec, Site

AnyMethod = TypeVar("AnyMethod", bound=Method)


def calibrate(
    model: PreTrainedModel,
    method: AnyMethod,
    tokens: Tensor,
    window: int | None = None,
    bos: int | None = None,
) -> AnyMethod:
    """Fit ``method`` on text; returns the fitted method and leaves the model as it was.

    ``tokens`` is a (n,) or (1, n) integer tensor; it is cut into windows of ``window`` tokens (by
    default the context, at most 2048), each beginning with ``bos`` if given. A method that has
    nothing to fit comes back unchanged. Raises InputError when the text is too short, the window
    does not fit the model's context, the method cannot work on the model, or it is sparsified.
    """
    check_dense(model)
    calibration = TextCalibration(
        model, tokens, default_window(model) if window is None else window, bos
    )
    method.check_model(calibration.spec)
    return method.calibrated(calibration)


def check_window(model: PreTrainedModel, window: int) -> None:
    """Raise InputError when a window does not fit the model's context."""
    context = context_length(model)
    if not 2 <= window <= context:
        raise InputError(f"window must be from 2 to the context of {context}, got {window}")


class TextCalibration:
    """What a method may learn from a text, measured in the dense model."""

    def __init__(
        self, model: PreTrainedModel, tokens: Tensor, window: int, bos: int | None = None
    ) -> None:
        self.decoder = Decoder(model)
        check_window(model, window)
        self.windows = whole_windows(tokens.flatten().to(model.device), window, bos)

    @property
    def spec(self) -> ModelSpec:
        """The model's shapes."""
        return self.decoder.spec

    @property
    def weights(self) -> Decoder:
        """Read access to the model's matrices."""
        return self.decoder

    def scores(self, method: Method, masked: bool = False) -> Mapping[SiteKey, ScoreHistogram]:
        """The distribution of ``method``'s scores at each of its sites, in the dense model; or
        ``masked``, in the one that it thins.
        """
        observer = _Observer(method, masked, {})
        attachment = Attachment(self.decoder, observer)
        attachment.attach()
        try:
            with torch.no_grad():
                for window in self.windows:
                    self.decoder.model(input_ids=window, use_cache=False)
        finally:
            attachment.detach()
        return observer.histograms

    def blocks(self, tokens: int) -> Iterator[WalkedBlock]:
        """The blocks in order of computation, over about ``tokens`` tokens of the text."""
        count = max(1, tokens // self.windows[0].shape[1])
        return walk_blocks(self.decoder.model, self.windows[:count])


@dataclass(frozen=True)
class _Observer(Method):
    """Wraps a method: scores as it does, keeps all units or what it keeps, counts the scores."""

    method: Method
    masked: bool
    histograms: dict[SiteKey, ScoreHistogram]

    def sites(self, spec: ModelSpec) -> tuple[Site, ...]:
        return self.method.sites(spec)

    def score(self, site: Site, x: Tensor) -> Tensor:
        return self.method.score(site, x)

    def select(self, site: Site, scores: Tensor, resident: Tensor | None = None) -> Tensor:
        self.histograms.setdefault((site.layer, site.name), ScoreHistogram()).add(scores)
        if self.masked:
            return self.method.select(site, scores)
        return torch.ones_like(scores, dtype=torch.bool)


def whole_windows(tokens: Tensor, window: int, bos: int | None) -> list[Tensor]:
    """(n,) tokens -> whole (1, window) windows, in order; a short text is one shorter window."""
    if bos is not None:
        bodies = whole_windows(tokens, window - 1, None)
        return [functional.pad(body, (1, 0), value=bos) for body in bodies]
    if len(tokens) < 2:
        raise InputError("the calibration text is empty: give at least a few hundred words")
    whole = tokens[: len(tokens) // window * window] if len(tokens) >= window else tokens
    return list(whole.view(-1, min(window, len(tokens))).split(1))
