"""What the skips of neurons and of heads share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dipnet.models.families import Decoder
from dipnet.models.skipping.gathering import Columns, rows_product
from dipnet.models.tokens import TokenState
from dipnet.models.usage import Usage
from dipnet.units import Site, kept_units

BACKENDS = ("auto", "reference", "skip", "gpu")


class Deciding(Protocol):
    """The mask of one site: a hook on the module where the reference applies it."""

    site: Site

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], /) -> tuple | None:
        """Torch's forward pre-hook: the reference."""

    def decide(self, x: Tensor) -> Tensor:
        """(..., n) any activation of the layer -> (..., units) bool, decided and counted."""


@dataclass(frozen=True)
class Skipping:
    """What all skips of a model have in common.

    ``kept_inputs`` is the number of tokens whose missing keys and values can be made up for, and
    ``strict`` says that skipping was asked for by name.
    """

    decoder: Decoder
    tokens: TokenState
    usage: Usage
    kept_inputs: int
    strict: bool

    def stepping(self) -> bool:
        """Whether the running call is one that skips: a pruned token for each sequence."""
        tokens = self.tokens
        pruned = tokens.running and not tokens.all_dense and tokens.dense is None
        return pruned and tokens.single and not torch.is_grad_enabled()


class Skip:
    """One site, of which the dropped units are not computed in a step; else as the reference.

    A step begins before the first linear layer that the site thins, in ``_begin``, and ends with
    the last. Whatever is hooked is a method or a partial, as in `models.attach`.
    """

    def __init__(self, skipping: Skipping, mask: Deciding) -> None:
        self.skipping = skipping
        self.mask = mask
        self.site = mask.site
        self.most = kept_units(self.site.density, self.site.units)
        decoder, layer = skipping.decoder, self.site.layer
        names = [operand.matrix for operand in self.site.operands]
        self.holders = {name: decoder.holder(layer, name) for name in names}
        self.parts = {name: decoder.rows(name) for name in names}
        self.last = Columns(self.holders[names[-1]])
        self.step: Any = None

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        raise NotImplementedError

    def _made(self, held: tuple[str, ...], module: nn.Linear, x: Tensor) -> Tensor:
        """What a linear layer that holds these matrices puts out in a step."""
        raise NotImplementedError

    def _end(self, step: Any, x: Tensor) -> Tensor:
        """What the last linear layer puts out in a step."""
        raise NotImplementedError

    def attach(self) -> list[Callable[[], None]]:
        """Hook and replace; returns what undoes it."""
        decoder, layer, last = self.skipping.decoder, self.site.layer, self.last.module
        family = decoder.family
        first = decoder.module(layer, family.mlp if "down" in self.holders else family.attention)
        begin = first.register_forward_pre_hook(self._begin, with_kwargs=True)
        prune = last.register_forward_pre_hook(self._prune, with_kwargs=True)
        undo = [self.last.undo, begin.remove, prune.remove, _replace(last, self._last)]
        for path, held in family.modules.items():
            module = decoder.module(layer, path)
            if held[0] in self.holders and module is not last:
                undo.append(_replace(module, partial(self._forward, held)))
        return undo

    def _prune(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        return self.mask(module, args, kwargs) if self.step is None else None

    def _forward(self, held: tuple[str, ...], module: nn.Linear, x: Tensor) -> Tensor:
        return nn.Linear.forward(module, x) if self.step is None else self._made(held, module, x)

    def _last(self, module: nn.Linear, x: Tensor) -> Tensor:
        if self.step is None:
            return nn.Linear.forward(module, x)
        step, self.step = self.step, None
        return self._end(step, x)

    def _rows(self, matrix: str, x: Tensor, index: Tensor) -> Tensor:
        """(..., inputs) -> (..., channels of the units at ``index``): their rows of a matrix."""
        module, part, block = self.holders[matrix], self.parts[matrix], self.site.block
        bias = None if module.bias is None else module.bias[part]
        made = rows_product(x, module.weight[part], bias, index, block)
        self.skipping.usage.count_gathered(matrix, made.shape[-1] * x.shape[-1])
        return made

    def _columns(self, matrix: str, x: Tensor, index: Tensor) -> Tensor:
        """(..., channels of the units at ``index``) -> (..., outputs): their columns."""
        made = self.last.product(x, index, self.site.block)
        self.skipping.usage.count_gathered(matrix, x.shape[-1] * made.shape[-1])
        return made


def _replace(module: nn.Module, forward: Callable[..., Tensor]) -> Callable[[], None]:
    """Let a module compute ``forward(module, x)``; returns what undoes it."""
    module.forward = partial(forward, module)
    return partial(delattr, module, "forward")
