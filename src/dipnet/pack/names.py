"""Where a model's tensors are in a checkpoint.

Names may differ from the model's in what stands before the decoder's: in an older checkpoint, or
when the text model is part of a larger one.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from dipnet.errors import InputError
from dipnet.models.families import Decoder
from dipnet.pack.checkpoint import Checkpoint
from dipnet.pack.rest import NeuronRows, RestTensor
from dipnet.store.index import Group


@dataclass(frozen=True)
class Part:
    """Where one matrix is in the checkpoint: some rows of a tensor."""

    tensor: str
    rows: slice


class TensorNames:
    """The names of a decoder's tensors in a checkpoint.

    Raises InputError when a tensor is missing there or has another shape than the config says.
    """

    def __init__(self, decoder: Decoder, checkpoint: Checkpoint) -> None:
        self._decoder = decoder
        self._checkpoint = checkpoint
        self._state = decoder.model.state_dict()
        self._prefix = _name_of(decoder.model, decoder.model.get_decoder()) + "."
        self._stored_prefix = self._find_prefix()
        self._head = _name_of(decoder.model, decoder.model.get_output_embeddings()) + "."

    @property
    def head_shape(self) -> tuple[int, int]:
        """The head's (outputs, inputs)."""
        outputs, inputs = self._state[f"{self._head}weight"].shape
        return outputs, inputs

    def parts(self, group: Group) -> tuple[Part, ...]:
        """Where the matrices of a group are."""
        if group.layer is None:
            return (Part(self._head_tensor(), slice(0, self.head_shape[0])),)
        return tuple(
            Part(
                self._stored(f"{self._linear(group.layer, matrix)}.weight"),
                self._decoder.rows(matrix),
            )
            for matrix in group.matrices
        )

    def rest(self) -> list[RestTensor]:
        """The tensors that belong to no group."""
        layers = range(self._decoder.spec.layers)
        matrices = self._decoder.spec.matrices
        grouped = {f"{self._linear(layer, m)}.weight" for layer in layers for m in matrices}
        grouped.add(f"{self._head}weight")
        modules = dict(self._decoder.model.named_modules())
        neurons = self._neuron_biases()
        return [
            RestTensor(
                name,
                self._stored(name),
                tuple(found.shape),
                table=isinstance(modules[name.rpartition(".")[0]], nn.Embedding),
                neurons=neurons.get(name),
            )
            for name, found in self._state.items()
            if name.startswith((self._prefix, self._head)) and name not in grouped
        ]

    def _neuron_biases(self) -> dict[str, NeuronRows]:
        """The biases of gate and up: which of their rows are the neurons of which layer."""
        found: dict[str, NeuronRows] = {}
        for layer in range(self._decoder.spec.layers):
            for matrix in self._decoder.spec.input_matrices:
                name = f"{self._linear(layer, matrix)}.bias"
                before = found[name].parts if name in found else ()
                found[name] = NeuronRows(layer, (*before, self._decoder.rows(matrix)))
        return found

    def _linear(self, layer: int, matrix: str) -> str:
        """The model's name of the linear layer that holds a matrix."""
        return f"{self._prefix}layers.{layer}.{self._decoder.family.path(matrix)}"

    def _find_prefix(self) -> str:
        """What stands before the decoder's tensors in the checkpoint."""
        anchor = f"layers.0.{self._decoder.family.path('up')}.weight"
        names = self._checkpoint.names
        if self._prefix + anchor in names:
            return self._prefix
        found = [name.removesuffix(anchor) for name in names if name.endswith(anchor)]
        if len(found) != 1:
            raise self._lacks(self._prefix + anchor)
        return found[0]

    def _head_tensor(self) -> str:
        """The tensor of the head; that of the embedding where both are one."""
        name = f"{self._head}weight"
        tied = getattr(self._decoder.model, "all_tied_weights_keys", None) or {}
        if name in tied:
            return self._stored(tied[name], name)
        stored = [n for n in self._checkpoint.names if n == name or n.endswith(f".{name}")]
        if len(stored) != 1:
            raise self._lacks(name)
        return self._checked(stored[0], name)

    def _stored(self, name: str, shaped_as: str | None = None) -> str:
        """The checkpoint's name of one of the model's tensors."""
        stored = name
        if name.startswith(self._prefix):
            stored = self._stored_prefix + name.removeprefix(self._prefix)
        if stored not in self._checkpoint.names:
            raise self._lacks(name)
        return self._checked(stored, shaped_as or name)

    def _checked(self, stored: str, name: str) -> str:
        found, expected = self._checkpoint.shape(stored), tuple(self._state[name].shape)
        if found != expected:
            raise InputError(
                f"{stored!r} has the shape {found} in the checkpoint {self._checkpoint.name!r}, "
                f"and its config says {expected}: correct config.json or download it again"
            )
        return stored

    def _lacks(self, name: str) -> InputError:
        return InputError(
            f"the checkpoint {self._checkpoint.name!r} lacks the weights {name!r}: download or "
            "convert it again"
        )


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    """The name of a module within a model."""
    return next(name for name, module in model.named_modules() if module is wanted)
