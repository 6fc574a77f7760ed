"""A token of each row through Hugging Face's own code, with a layer's products in place of its
linear layers.

Only calls of one token a row are changed (`Decoding.stepping`); what a compiler sees of them are
the kernels' operators, without a graph break. Of skipped heads the queries, keys and values are
computed here all the same: only our own loop can complete them later.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from dipnet.models.decoding.blocks import Block
from dipnet.models.families import Decoder

if TYPE_CHECKING:
    from dipnet.models.decoding.decoding import Decoding


class LayerModules:
    """The modules of one decoder layer whose forward is another in a step.

    What is put in place is a method or a partial, never a closure, as in `models.attach`.
    """

    def __init__(self, decoding: Decoding, decoder: Decoder, layer: int, block: Block) -> None:
        self.decoding = decoding
        self.decoder = decoder
        self.layer = layer
        self.block = block
        self._made: Tensor | None = None

    def attach(self) -> list[Callable[[], None]]:
        """Replace what has a site; returns what undoes it."""
        decoder, layer, block = self.decoder, self.layer, self.block
        undo = []
        if block.qkv.site is not None:
            paths = dict.fromkeys(decoder.family.path(name) for name in "qkv")
            modules = [decoder.module(layer, path) for path in paths]
            for module, part in zip(modules, block.qkv.stacked.parts, strict=True):
                undo.append(_replace(module, partial(self._projection, part)))
        if block.out.site is not None:
            undo.append(_replace(decoder.holder(layer, "o"), self._out))
        if block.mlp.thinned:
            undo += self._attach_mlp()
        return undo

    def _attach_mlp(self) -> list[Callable[[], None]]:
        family = self.decoder.family
        mlp = self.decoder.module(self.layer, family.mlp)
        if not hasattr(mlp, "in_features"):
            return [_replace(mlp, self._mlp)]
        down = self.decoder.holder(self.layer, "down")  # no module holds the MLP: its linear layers
        return [_replace(mlp, self._first), _replace(down, self._last)]

    def _projection(self, part: slice, module: Any, x: Tensor) -> Tensor:
        """One of the projections that read attention's input: the first computes them all."""
        if not self.decoding.stepping:
            return _plain(module, x)
        if part.start == 0:
            self._made = self.block.qkv(x.flatten(0, -2))
        assert self._made is not None, "the projections are computed in order"
        made = self._made[:, part].view(*x.shape[:-1], -1)
        if part.stop == self._made.shape[-1]:
            self._made = None
        return made

    def _out(self, module: Any, x: Tensor) -> Tensor:
        if not self.decoding.stepping:
            return _plain(module, x)
        out, flat = self.block.out, x.flatten(0, -2)
        heads = self.block.heads
        kept = out.kept(flat) if heads is None else self.decoding.predicted(heads, x)
        return out.product(flat, kept).view(*x.shape[:-1], -1)

    def _mlp(self, module: Any, x: Tensor) -> Tensor:
        if not self.decoding.stepping:
            return _plain(module, x)
        return self._computed(x)

    def _computed(self, x: Tensor) -> Tensor:
        mlp = self.block.mlp
        predicted = mlp.neurons if mlp.scored_on == "residual" else None
        neurons = None if predicted is None else self.decoding.predicted(predicted, x)
        return mlp(x.flatten(0, -2), neurons=neurons).view(*x.shape[:-1], -1)

    def _first(self, module: Any, x: Tensor) -> Tensor:
        """The whole MLP in its first linear layer; what the second is given says nothing."""
        if not self.decoding.stepping:
            return _plain(module, x)
        self._made = self._computed(x)
        return x

    def _last(self, module: Any, x: Tensor) -> Tensor:
        if not self.decoding.stepping:
            return _plain(module, x)
        made, self._made = self._made, None
        assert made is not None, "the first layer comes before the second"
        return made


def _plain(module: Any, x: Tensor) -> Tensor:
    """What a module computes without us."""
    made: Tensor = type(module).forward(module, x)
    return made


def _replace(module: nn.Module, forward: Callable[..., Tensor]) -> Callable[[], None]:
    """Let a module compute ``forward(module, x)``; returns what undoes it."""
    module.forward = partial(forward, module)
    return partial(delattr, module, "forward")
