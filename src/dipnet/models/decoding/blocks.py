"""The products of one decoder layer for one token: of kept weights where a site thins them.

What Hugging Face's modules compute in a step, and what our own decode loop does, is this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from dipnet.kernels import gpu, steps
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


class Inputs:
    """Linear layers that share an input, which a site may thin (``site``, or None: all is read)."""

    def __init__(self, modules: Sequence[nn.Linear], site: SiteStep | None, undo: Undo) -> None:
        self.stacked = Stacked(modules, turned=site is not None)
        undo.append(self.stacked.undo)
        self.site = site

    def kept(self, x: Tensor) -> Kept | None:
        """The channels of (1, inputs) ``x`` that are kept; None for all."""
        return None if self.site is None else self.site.decide(x)

    def product(self, x: Tensor, kept: Kept | None, compact: bool = False) -> Tensor:
        """(1, inputs) -> (1, outputs) of all the layers, side by side.

        With ``compact``, ``x`` are the kept inputs alone.
        """
        if kept is None or self.site is None:
            return self.stacked.product(x)
        return gpu.columns_product(
            x,
            kept.index,
            self.stacked.by_input,
            count=kept.count,
            bias=self.stacked.bias,
            compact=compact,
            block=self.site.site.block,
        )

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
        self.down = Stacked([down], turned=self.neurons is not None)
        undo.append(self.down.undo)

    @property
    def thinned(self) -> bool:
        """Whether a site thins it."""
        return self.neurons is not None or self.inputs.site is not None

    @property
    def scored_on(self) -> str | None:
        """What decides the neurons; None when all are computed."""
        return None if self.neurons is None else self.neurons.site.scored_on

    def part(self, matrix: str) -> tuple[Tensor, Tensor | None]:
        """The (outputs, inputs) weights and the bias of ``gate`` or ``up``, stacked in order."""
        stacked, number = self.inputs.stacked, self.names.index(matrix)
        rows = stacked.weight.shape[0] // len(self.names)
        part = slice(number * rows, (number + 1) * rows)
        return stacked.weight[part], None if stacked.bias is None else stacked.bias[part]

    def __call__(self, x: Tensor, kept: Kept | None = None, neurons: Kept | None = None) -> Tensor:
        """(1, width) -> (1, width). ``kept`` are the input channels that are kept, if that has been
        decided, and ``neurons`` what a predictor has decided."""
        kept = self.inputs.kept(x) if kept is None else kept
        if self.neurons is None:
            return self.down.product(self._whole(x, kept))
        if neurons is not None:
            return self._down(self._predicted(x, neurons), neurons, compact=True)
        if self.scored_on == "hidden":
            hidden = self._whole(x, kept)
            return self._down(hidden, self.neurons.decide(hidden), compact=False)
        hidden, neurons = self._after_one(x)
        return self._down(hidden, neurons, compact=True)

    def _down(self, hidden: Tensor, kept: Kept, compact: bool) -> Tensor:
        return gpu.columns_product(
            hidden,
            kept.index,
            self.down.by_input,
            count=kept.count,
            bias=self.down.bias,
            compact=compact,
            block=self.neurons.site.block if self.neurons else 1,
        )

    def _activated(self, x: Tensor) -> Tensor:
        return gpu.ACTIVATIONS[self.activation](x)

    def _whole(self, x: Tensor, kept: Kept | None) -> Tensor:
        """What comes out of all neurons, of kept input channels."""
        gated = len(self.names) > 1
        if kept is not None and gated and self.inputs.stacked.bias is None:
            gate, up = (self.part(name)[0].t() for name in ("gate", "up"))
            return gpu.gated_columns(x, kept.index, gate, up, self.activation, count=kept.count)
        pre = self.inputs.product(x, kept)
        return steps.gated(pre, self.activation) if gated else self._activated(pre)

    def _predicted(self, x: Tensor, kept: Kept) -> Tensor:
        """What comes out of the kept neurons, side by side."""
        up, bias = self.part("up")
        if len(self.names) == 1:
            return gpu.rows_product(
                x, kept.index, up, count=kept.count, bias=bias, activation=self.activation
            )
        gate, gate_bias = self.part("gate")
        if bias is None:
            return gpu.gated_rows(x, kept.index, gate, up, self.activation, count=kept.count)
        rows = partial(gpu.rows_product, x, kept.index, count=kept.count)
        return rows(gate, bias=gate_bias, activation=self.activation) * rows(up, bias=bias)

    def _after_one(self, x: Tensor) -> tuple[Tensor, Kept]:
        """One projection whole, which decides, and the other's kept rows."""
        assert self.neurons is not None
        first, second = ("gate", "up") if self.scored_on == "gate" else ("up", "gate")
        (whole, whole_bias), (rows, bias) = self.part(first), self.part(second)
        factor = nn.functional.linear(x, whole, whole_bias)
        factor = self._activated(factor) if first == "gate" else factor
        kept = self.neurons.decide(factor)
        activation = self.activation if second == "gate" else "none"
        made = gpu.rows_product(
            x, kept.index, rows, count=kept.count, bias=bias, activation=activation, factor=factor
        )
        return made, kept


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
