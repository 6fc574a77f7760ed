"""The products of one decoder layer for a token of each row: of kept weights where a site thins
them.

What Hugging Face's modules compute in a step, and what our own decode loop does, is this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from dipnet.kernels import gpu, steps
from dipnet.models.decoding.packed import PackedStack, stack
from dipnet.models.decoding.sites import Kept, SiteStep
from dipnet.models.decoding.stacked import Stacked
from dipnet.models.families import Decoder

Undo = list[Callable[[], None]]
ACTIVATIONS = {
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""The kernels' names of Hugging Face's activation functions."""


def columns(
    stacked: Stacked | PackedStack, x: Tensor, kept: Kept, block: int = 1, compact: bool = False
) -> Tensor:
    """(rows, inputs) -> (rows, outputs), of the inputs that are kept.

    With ``compact``, ``x`` are the listed inputs alone, 0 where a row drops one.
    """
    if kept.index is None:
        return stacked.product(kept.masked(x, block))
    if kept.mask is not None and not compact:
        x, compact = kept.gathered(x, block), True
    return gpu.columns_product(
        x,
        kept.index,
        stacked.by_input,
        count=kept.count,
        bias=stacked.bias,
        compact=compact,
        block=block,
    )


class Inputs:
    """Linear layers that share an input, which a site may thin (``site``, or None: all is read)."""

    def __init__(self, modules: Sequence[nn.Linear], site: SiteStep | None, undo: Undo) -> None:
        self.stacked = stack(modules, turned=site is not None)
        undo.append(self.stacked.undo)
        self.site = site

    def kept(self, x: Tensor) -> Kept | None:
        """The channels of (rows, inputs) ``x`` that are kept; None for all."""
        return None if self.site is None else self.site.decide(x)

    def product(self, x: Tensor, kept: Kept | None) -> Tensor:
        """(rows, inputs) -> (rows, outputs) of all the layers, side by side."""
        if kept is None or self.site is None:
            return self.stacked.product(x)
        return columns(self.stacked, x, kept, self.site.site.block)

    def __call__(self, x: Tensor) -> Tensor:
        """Decide, then multiply."""
        return self.product(x, self.kept(x))


class MLP:
    """One layer's MLP.

    Its input may be thinned (``mlp.in``), and its neurons: on what comes out of them (only their
    columns of ``down`` are skipped), on the gate or on the up projection, which is then computed
    whole, or before any of it is (``residual``: all that a neuron has is skipped).
    """

    def __init__(
        self, decoder: Decoder, layer: int, sites: Mapping[str, SiteStep], undo: Undo
    ) -> None:
        self.names = decoder.spec.input_matrices
        self.activation = ACTIVATIONS[decoder.spec.activation]
        self.neurons = sites.get("mlp.hidden") or sites.get("mlp.neuron")
        paths = dict.fromkeys(decoder.family.path(name) for name in self.names)
        modules = [decoder.module(layer, path) for path in paths]
        self.inputs = Inputs(modules, sites.get("mlp.in"), undo)
        down = decoder.holder(layer, "down")
        self.down = stack([down], turned=self.neurons is not None)
        undo.append(self.down.undo)

    @property
    def thinned(self) -> bool:
        """Whether a site thins it."""
        return self.neurons is not None or self.inputs.site is not None

    @property
    def scored_on(self) -> str | None:
        """What decides the neurons; None when all are computed."""
        return None if self.neurons is None else self.neurons.site.scored_on

    def part(self, matrix: str) -> tuple[Any, Tensor | None]:
        """The (outputs, inputs) weights and the bias of ``gate`` or ``up``, stacked in order."""
        stacked, number = self.inputs.stacked, self.names.index(matrix)
        bias = stacked.bias
        part = None if bias is None else bias.chunk(len(self.names))[number]
        return stacked.part(number, len(self.names)), part

    def __call__(self, x: Tensor, kept: Kept | None = None, neurons: Kept | None = None) -> Tensor:
        """(rows, width) -> (rows, width). ``kept`` are the input channels that are kept, if that
        has been decided, and ``neurons`` what a predictor has decided."""
        kept = self.inputs.kept(x) if kept is None else kept
        if self.neurons is None:
            return self.down.product(self._whole(x, kept))
        if neurons is not None:
            return columns(self.down, self._predicted(x, neurons), neurons, compact=True)
        if self.scored_on == "hidden":
            hidden = self._whole(x, kept)
            return columns(self.down, hidden, self.neurons.decide(hidden), self.neurons.site.block)
        return self._after_one(x)

    def _activated(self, x: Tensor) -> Tensor:
        return gpu.ACTIVATIONS[self.activation](x)

    def _whole(self, x: Tensor, kept: Kept | None) -> Tensor:
        """What comes out of all neurons, of kept input channels."""
        gated = len(self.names) > 1
        own = kept is not None and kept.own and self.inputs.stacked.separable
        if kept is not None and kept.index is not None and own and gated:
            gate, up = (self.part(name)[0].t() for name in ("gate", "up"))
            return gpu.gated_columns(x, kept.index, gate, up, self.activation, count=kept.count)
        pre = self.inputs.product(x, kept)
        return steps.gated(pre, self.activation) if gated else self._activated(pre)

    def _predicted(self, x: Tensor, kept: Kept) -> Tensor:
        """What comes out of the kept neurons, side by side; of all where there is no list."""
        if kept.index is None:
            return self._whole(x, None)
        up, bias = self.part("up")
        rows = partial(gpu.rows_product, x, kept.index, count=kept.count)
        if len(self.names) == 1:
            return kept.listed(rows(up, bias=bias, activation=self.activation))
        gate, gate_bias = self.part("gate")
        if bias is None:
            made = gpu.gated_rows(x, kept.index, gate, up, self.activation, count=kept.count)
            return kept.listed(made)
        made = rows(gate, bias=gate_bias, activation=self.activation)
        return kept.listed(made * rows(up, bias=bias))

    def _after_one(self, x: Tensor) -> Tensor:
        """One projection whole, which decides, and the kept rows of the others."""
        assert self.neurons is not None
        first, second = ("gate", "up") if self.scored_on == "gate" else ("up", "gate")
        (whole, whole_bias), (rows, bias) = self.part(first), self.part(second)
        factor = nn.functional.linear(x, whole, whole_bias)
        factor = self._activated(factor) if first == "gate" else factor
        kept = self.neurons.decide(factor)
        activation = self.activation if second == "gate" else "none"
        if not kept.own:
            factor = kept.masked(factor)
        if kept.index is None:
            other = nn.functional.linear(x, rows, bias)
            return self.down.product(gpu.ACTIVATIONS[activation](other) * factor)
        named: dict[str, Any] = {"bias": bias, "activation": activation, "factor": factor}
        made = gpu.rows_product(x, kept.index, rows, count=kept.count, **named)
        return columns(self.down, made, kept, compact=True)


class Block:
    """All products of one decoder layer. ``undo`` gets what gives its weights the order back."""

    def __init__(
        self, decoder: Decoder, layer: int, sites: Mapping[str, SiteStep], undo: Undo
    ) -> None:
        paths = dict.fromkeys(decoder.family.path(name) for name in "qkv")
        projections = [decoder.module(layer, path) for path in paths]
        self.qkv = Inputs(projections, sites.get("attn.in"), undo)
        self.heads = sites.get("attn.head")
        out = decoder.holder(layer, "o")
        self.out = Inputs([out], self.heads or sites.get("attn.out"), undo)
        self.mlp = MLP(decoder, layer, sites, undo)
