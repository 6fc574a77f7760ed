"""Linear layers that read one input, as one matrix in one piece of memory.

Their parameters become views of it, so that weights are stored once, whichever way a product wants
to read them; a prompt's product takes the view as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Stacked:
    """Linear layers on top of each other, (outputs, inputs).

    ``turned`` says that an input channel's weights are a run of memory, instead of an output's.
    """

    def __init__(self, modules: Sequence[nn.Linear], turned: bool) -> None:
        self.modules: list[Any] = list(modules)
        self.turned = turned
        sizes = [module.out_features for module in modules]
        ends = torch.tensor(sizes).cumsum(0).tolist()
        self.parts = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
        self.joined = turned or len(modules) > 1
        self.weight = self._join() if self.joined else self.modules[0].weight.data
        self.bias = self._biases()

    @property
    def separable(self) -> bool:
        """Whether the kernels can read the layers apart, and need not add anything to each."""
        return self.bias is None

    @property
    def inputs(self) -> int:
        """Channels that the layers read."""
        return self.weight.shape[1]

    @property
    def by_input(self) -> Tensor:
        """(inputs, outputs): the units of a product of kept input channels."""
        return self.weight.t()

    def part(self, number: int, of: int) -> Tensor:
        """(outputs, inputs) of one of so many equal parts: the units of a product of outputs."""
        rows = self.weight.shape[0] // of
        return self.weight[number * rows : (number + 1) * rows]

    def product(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs): all weights are read."""
        return nn.functional.linear(x, self.weight, self.bias)

    def undo(self) -> None:
        """The parameters in memory of their own, as they were."""
        for module in self.modules if self.joined else ():
            module.weight.data = module.weight.data.clone(memory_format=torch.contiguous_format)

    def _join(self) -> Tensor:
        first = self.modules[0].weight
        outputs, inputs = self.parts[-1].stop, first.shape[1]
        # outside of inference mode, else they could never be trained again
        with torch.inference_mode(False), torch.no_grad():
            shape = (inputs, outputs) if self.turned else (outputs, inputs)
            memory = first.new_empty(shape)
            joined = memory.t() if self.turned else memory
            for module, part in zip(self.modules, self.parts, strict=True):
                joined[part] = module.weight
                module.weight.data = joined[part]  # what it was is free again
        return joined

    def _biases(self) -> Tensor | None:
        biases = [module.bias for module in self.modules]
        if biases[0] is None:
            return None
        return biases[0].detach() if len(biases) == 1 else torch.cat(biases).detach()
