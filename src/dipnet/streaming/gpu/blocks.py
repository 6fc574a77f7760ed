"""One decoder layer as our decode loop computes it, from records on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dipnet.kernels import gpu, steps
from dipnet.models.decoding.blocks import ACTIVATIONS
from dipnet.models.families import Decoder
from dipnet.streaming.gpu.groups import DeviceGroup


class StoredInputs:
    """Linear layers that share an input: the group decides itself what it keeps."""

    site = None

    def __init__(self, decoder: Decoder, group: DeviceGroup) -> None:
        self.group = group
        self.bias = _bias(decoder, group)

    def product(self, x: Tensor, _kept: object = None) -> Tensor:
        """(rows, inputs) -> (rows, outputs) of all the layers, side by side."""
        made = self.group.step(x)
        return made if self.bias is None else made + self.bias

    __call__ = product


class StoredMLP:
    """One layer's MLP, thinned at its input and at its neurons by the groups themselves."""

    neurons = None
    scored_on = None

    def __init__(self, decoder: Decoder, reads: DeviceGroup, hidden: DeviceGroup) -> None:
        self.inputs = StoredInputs(decoder, reads)
        self.down = StoredInputs(decoder, hidden)
        self.gated = decoder.spec.gated
        self.activation = ACTIVATIONS[decoder.spec.activation]

    def __call__(self, x: Tensor, _kept: object = None, _neurons: object = None) -> Tensor:
        """(rows, width) -> (rows, width)."""
        pre = self.inputs(x)
        if self.gated:
            return self.down(steps.gated(pre, self.activation))
        return self.down(gpu.ACTIVATIONS[self.activation](pre))


class StoredBlock:
    """All products of one decoder layer: what `decoding.token` asks of a block."""

    heads = None

    def __init__(self, decoder: Decoder, groups: Sequence[DeviceGroup]) -> None:
        reads, out, mlp, hidden = groups
        self.qkv = StoredInputs(decoder, reads)
        self.out = StoredInputs(decoder, out)
        self.mlp = StoredMLP(decoder, mlp, hidden)


def _bias(decoder: Decoder, group: DeviceGroup) -> Tensor | None:
    """The (rows,) biases of a group's linear layers, side by side; None where there are none."""
    layer = group.group.layer
    assert layer is not None, "the head belongs to no layer"
    found = []
    for matrix in group.group.matrices:
        bias = decoder.holder(layer, matrix).bias
        if bias is None:
            return None
        found.append(bias.data[decoder.rows(matrix)])
    return torch.cat(found)
