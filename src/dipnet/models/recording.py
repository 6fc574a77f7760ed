"""Record what a model's masks want: ``with dipnet.record(model, path): ...`` writes a trace."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from dipnet.errors import InputError
from dipnet.methods.base import Method
from dipnet.models.attach import ATTACHED
from dipnet.models.caching import CacheState
from dipnet.models.families import describe
from dipnet.models.usage import Usage
from dipnet.sim.shape import ModelShape
from dipnet.sim.trace import TraceCache, TraceSite
from dipnet.sim.trace_writer import TraceWriter
from dipnet.units import Site


class Attached(Protocol):
    """What `sparsify` and `load` attach to a model, as far as a recording asks."""

    usage: Usage
    method: Method

    def caching(self) -> CacheState | None:
        """The caches that masks may depend on; None when everything is in memory."""

    def guesses(self) -> Mapping[str, tuple[int, int]]:
        """For each site's name the records read ahead so far, and how many of them were wanted."""


@contextmanager
def record(
    model: PreTrainedModel, path: str | Path, *, scores: bool = False, name: str | None = None
) -> Iterator[None]:
    """Write a trace of what the model does inside the ``with`` block (docs/trace-format.md).

    The model was sparsified, or loaded from a store. The tokens that masks are decided for and
    that `usage` counts are in the trace: no dense prompt, no padding. ``scores`` records the
    scores, too: two bytes a unit and token, where a mask takes an eighth of one. ``name`` is what
    the trace calls the model. The file appears at ``path`` when the block ends without an error.

    Raises InputError when the model is dense or being recorded, the file cannot be written, no
    token was recorded, or a forward call failed inside the block. A cache-aware method's trace
    names its caches, so these must be empty when the recording begins.
    """
    attached: Attached | None = getattr(model, ATTACHED, None)
    if attached is None:
        raise InputError(
            "a dense model decides no masks, so there is nothing to trace: sparsify it first, or "
            "load it from a store with a method"
        )
    if attached.usage.recorder is not None:
        raise InputError("the model is being recorded already: end that recording first")
    before = attached.guesses()
    method, sites = method_text(attached.method), list(attached.usage.sites.values())
    shape, cache = model_shape(model, name), _cache(attached, sites)
    added = attached.method.added_weights(attached.usage.spec)
    described = trace_sites(sites)
    with TraceWriter(
        path, shape, method, described, cache, scores=scores, added_weights=added
    ) as writer:
        recorder = attached.usage.recorder = Recorder(writer, scores=scores)
        try:
            yield
        finally:
            attached.usage.recorder = None
        recorder.check()
        writer.recall = _recall(before, attached.guesses())


class Recorder:
    """Hands the masks of each forward call to a trace's writer when the call has ended."""

    def __init__(self, writer: TraceWriter, *, scores: bool) -> None:
        self._writer = writer
        self._scores = scores
        self._rows: list[int] = []
        self._begins = False
        self._running = False
        self._failed = False

    def begin(self, counted: Tensor | None, shape: tuple[int, int], past: Any) -> None:
        """A call over (batch, tokens) begins; ``counted`` is None for all of them, else a bool.

        ``past`` is the key/value cache or None: with an empty one, sequences begin.
        """
        self._failed |= self._running  # Ctrl-C ended the call before this one: no hook saw it
        self._running = True
        batch, tokens = shape
        self._rows = [tokens] * batch if counted is None else counted.sum(dim=1).tolist()
        self._begins = past is None or int(past.get_seq_length()) == 0

    def add(self, site: Site, mask: Tensor, scores: Tensor, counted: Tensor | None) -> None:
        """The (..., units) mask and scores of a site; (...) ``counted`` tokens are recorded."""
        if self._failed:
            return
        kept = _rows_of(mask, counted).numpy()
        made: NDArray[np.float16] | None = None
        if self._scores:
            made = _rows_of(scores.detach().half(), counted).numpy()
        self._writer.add((site.layer, site.name), kept, made)

    def end(self, *, complete: bool) -> None:
        """The call has ended: write its tokens, unless an error ended it."""
        self._running = False
        self._failed |= not complete
        if self._failed:
            return
        ahead = 0
        for rows in self._rows:
            if self._begins:
                self._writer.start_sequence(ahead)
            ahead += rows
        self._writer.end_tokens(ahead)

    def check(self) -> None:
        """Raise InputError when the masks of a call are missing."""
        if self._failed:
            raise InputError(
                "a forward call failed while it was recorded, and the trace would lack its tokens: "
                "record again"
            )


def method_text(method: Method) -> str:
    """A method as the command line writes it: ``dip:density=0.5``, without other defaults."""
    options = []
    for field in fields(method):
        value = getattr(method, field.name)
        default = field.default if field.default is not MISSING else None
        told = field.name == "density" or value != default
        if isinstance(value, float | int | str) and told:
            options.append(f"{field.name}={str(value).lower() if value is True else value}")
    return ":".join([method.name, ",".join(options)]) if options else method.name


def model_shape(model: PreTrainedModel, name: str | None = None) -> ModelShape:
    """What a simulation knows of a model; ``name`` instead of what its config calls it."""
    attached: Attached | None = getattr(model, ATTACHED, None)
    # A streamed model's weights are no parameters any more: what was attached knows their shapes.
    spec = describe(model) if attached is None else attached.usage.spec
    called = name or str(getattr(model.config, "name_or_path", "") or "")
    return ModelShape(
        name=Path(called).name if called and Path(called).exists() else called,
        family=spec.family,
        activation=spec.activation,
        layers=spec.layers,
        matrices=dict(spec.matrices),
        other_weights=spec.other_weights,
        vocabulary=int(model.config.get_text_config().vocab_size),
        kv_width=spec.matrices["k"][0] + spec.matrices["v"][0],
    )


def trace_sites(sites: Iterable[Site]) -> tuple[TraceSite, ...]:
    """Sites as a trace describes them."""
    return tuple(
        TraceSite(
            layer=site.layer,
            name=site.name,
            units=site.units,
            block=site.block,
            density=site.density,
            matrices={op.matrix: op.weights_per_unit for op in site.operands if op.shared_by == 1},
        )
        for site in sites
    )


def _cache(attached: Attached, sites: list[Site]) -> TraceCache | None:
    """The caches of a cache-aware method; None where masks are the same with any cache."""
    gamma = cast(float | None, getattr(attached.method, "cache_aware", None))
    state = attached.caching()
    if gamma is None or gamma == 1 or state is None:
        return None
    if state.warm:
        raise InputError(
            "a cache-aware method's masks depend on what the caches held before, and they are not "
            "empty: sparsify or load the model anew, then record"
        )
    slots = tuple(state.slots[site.layer, site.name] for site in sites)
    return TraceCache(state.policy, slots, float(gamma))


def _recall(
    before: Mapping[str, tuple[int, int]], after: Mapping[str, tuple[int, int]]
) -> dict[str, float] | None:
    """The share of the records read ahead that were wanted; None when none was."""
    found = {}
    for name, now in after.items():
        guessed, useful = (a - b for a, b in zip(now, before[name], strict=True))
        if guessed > 0:  # what was read ahead just before the recording may have come of use in it
            found[name] = min(1.0, useful / guessed)
    return found or None


def _rows_of(values: Tensor, counted: Tensor | None) -> Tensor:
    """(..., units) -> (counted tokens, units) in memory."""
    rows = values.reshape(-1, values.shape[-1])
    return (rows if counted is None else rows[counted.reshape(-1)]).cpu()
