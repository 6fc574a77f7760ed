"""One table of model families: where a Hugging Face decoder keeps the matrices that we thin.

A family is a few paths inside a decoder layer; no modelling code is copied. To add one, add a row
and name it in tests/families.py (docs/adding-a-family.md).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from dipnet.errors import InputError
from dipnet.registry import unknown
from dipnet.units import ATTENTION_MATRICES, MLP_MATRICES, ModelSpec


@dataclass(frozen=True)
class Family:
    """Where the parts of one decoder layer are.

    ``modules`` maps the path of a linear layer to the matrices stacked in its rows (a fused
    projection holds several). ``mlp`` is the module whose input is the MLP's input; ``activation``
    the module that applies the activation function; ``attention`` the attention module;
    ``mlp_norm`` the normalisation between attention and the MLP's input. ``rotary`` says what
    happens to a projected key before it is cached, beside the attention module's ``k_norm`` if it
    has one: rotated by its module's ``apply_rotary_pos_emb``, or nothing; None when not known.
    """

    modules: Mapping[str, tuple[str, ...]]
    mlp: str
    activation: str
    attention: str = "self_attn"
    mlp_norm: str = "post_attention_layernorm"
    rotary: bool | None = None

    def path(self, matrix: str) -> str:
        """The path of the linear layer that holds ``matrix``."""
        return next(path for path, held in self.modules.items() if matrix in held)


_ATTENTION = {
    "self_attn.q_proj": ("q",),
    "self_attn.k_proj": ("k",),
    "self_attn.v_proj": ("v",),
    "self_attn.o_proj": ("o",),
}
_GATED_MLP = {"mlp.gate_proj": ("gate",), "mlp.up_proj": ("up",), "mlp.down_proj": ("down",)}
_LLAMA = Family({**_ATTENTION, **_GATED_MLP}, mlp="mlp", activation="mlp.act_fn", rotary=True)
_GEMMA = replace(_LLAMA, mlp_norm="pre_feedforward_layernorm")
_PHI3 = Family(
    {
        "self_attn.qkv_proj": ("q", "k", "v"),
        "self_attn.o_proj": ("o",),
        "mlp.gate_up_proj": ("gate", "up"),
        "mlp.down_proj": ("down",),
    },
    mlp="mlp",
    activation="mlp.activation_fn",
    rotary=True,
)
_OPT = Family(
    {
        "self_attn.q_proj": ("q",),
        "self_attn.k_proj": ("k",),
        "self_attn.v_proj": ("v",),
        "self_attn.out_proj": ("o",),
        "fc1": ("up",),
        "fc2": ("down",),
    },
    mlp="fc1",
    activation="activation_fn",
    mlp_norm="final_layer_norm",
    rotary=False,
)

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "phi3": _PHI3,
    "opt": _OPT,
}
"""By the ``model_type`` of the text model's Hugging Face config, less a ``_text`` ending."""


def family_name(config: PretrainedConfig) -> str:
    """The name of the family of a Hugging Face config; InputError lists those that exist."""
    name = str(getattr(config, "model_type", "")).removesuffix("_text")
    if name not in FAMILIES:
        raise unknown(
            "model family", name, FAMILIES, " To add one, a row of a table: docs/adding-a-family.md"
        )
    return name


class Decoder:
    """A Hugging Face decoder seen through its family's row of the table.

    Raises InputError when the family is unknown or a module is not where the table says.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        name = family_name(model.config)
        self.model = model
        self.family = FAMILIES[name]
        self.layers = cast(nn.ModuleList, model.get_decoder().layers)
        if not self.layers:
            raise InputError("this model has no layers: check num_hidden_layers in its config.json")
        self.sizes = _outputs(model.config.get_text_config())
        self.spec = self._spec(name)

    def module(self, layer: int, path: str) -> Any:
        """The module at ``path`` in a decoder layer."""
        try:
            return self.layers[layer].get_submodule(path)
        except AttributeError:
            raise InputError(
                f"layer {layer} of this {type(self.model).__name__} has no module {path!r}: "
                "the family table does not fit this version of transformers "
                "(docs/adding-a-family.md)"
            ) from None

    def holder(self, layer: int, matrix: str) -> Any:
        """The linear layer that holds ``matrix``, alone or with others."""
        return self.module(layer, self.family.path(matrix))

    def residual_module(self, place: int) -> Any:
        """The module whose input is the residual stream at a place (`units.residual_place`).

        OPT-350M normalises after its blocks: there it is what the MLP itself reads.
        """
        layer, before_mlp = divmod(place, 2)
        if not before_mlp:
            return self.layers[layer]
        norm_first = getattr(self.model.config, "do_layer_norm_before", True)
        return self.module(layer, self.family.mlp_norm if norm_first else self.family.mlp)

    def rows(self, matrix: str) -> slice:
        """The rows of its linear layer that are ``matrix``."""
        start = 0
        for held in self.family.modules[self.family.path(matrix)]:
            if held == matrix:
                break
            start += self.sizes[held]
        return slice(start, start + self.sizes[matrix])

    def matrix(self, layer: int, name: str) -> Tensor:
        """The (outputs, inputs) weights of one matrix: a view of the parameter."""
        weight = self.holder(layer, name).weight
        if not weight.is_floating_point() or weight.shape[-1] != self.spec.matrices[name][1]:
            raise InputError(
                f"the weights of {self.family.path(name)!r} are quantised, and this method has to "
                "read them: load the model in floating point"
            )
        return cast(Tensor, weight)[self.rows(name)]

    def _spec(self, name: str) -> ModelSpec:
        held = {matrix for group in self.family.modules.values() for matrix in group}
        order = (*ATTENTION_MATRICES, *MLP_MATRICES)
        matrices = {matrix: self._shape(matrix) for matrix in order if matrix in held}
        linear = sum(rows * columns for rows, columns in matrices.values())
        return ModelSpec(
            family=name,
            layers=len(self.layers),
            activation=_activation(self.model.config.get_text_config()),
            matrices=matrices,
            other_weights=_read_per_token(self.model) - len(self.layers) * linear,
            heads=self.model.config.get_text_config().num_attention_heads,
        )

    def _shape(self, matrix: str) -> tuple[int, int]:
        """The matrix's (outputs, inputs), checked to be the same in every layer."""
        path = self.family.path(matrix)
        rows = sum(self.sizes[held] for held in self.family.modules[path])
        columns = self.module(0, path).in_features
        for layer in range(len(self.layers)):
            module = self.module(layer, path)
            shape = (module.out_features, module.in_features)
            if shape != (rows, columns):
                raise InputError(
                    f"layer {layer}: {path!r} has the shape {shape}, the config says "
                    f"{(rows, columns)}; layers of different sizes are not supported"
                )
        return self.sizes[matrix], cast(int, columns)


def describe(model: PreTrainedModel) -> ModelSpec:
    """The shapes of a loaded model; InputError when its family is unknown."""
    return Decoder(model).spec


def context_length(model: PreTrainedModel) -> int:
    """The longest sequence, in tokens, that a model takes; no limit where its config has none."""
    config = model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", sys.maxsize))


def default_window(model: PreTrainedModel) -> int:
    """The window that texts are read in: the model's context, at most 2048 tokens."""
    return min(context_length(model), 2048)


def _outputs(config: PretrainedConfig) -> dict[str, int]:
    """The number of output rows of each matrix, from a text model's config."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    neurons = getattr(config, "intermediate_size", None) or config.ffn_dim
    return {
        "q": heads * head_size,
        "k": kv_heads * head_size,
        "v": kv_heads * head_size,
        "o": config.hidden_size,
        "gate": neurons,
        "up": neurons,
        "down": config.hidden_size,
    }


def _activation(config: PretrainedConfig) -> str:
    """The name of the MLP's activation function; families spell the field differently."""
    fields = ("hidden_activation", "hidden_act", "activation_function")
    return next(str(getattr(config, name)) for name in fields if getattr(config, name, None))


def _read_per_token(model: PreTrainedModel) -> int:
    """Weights of the text model and its head that one token reads: one row of an embedding."""
    modules = [*model.get_decoder().modules(), *model.get_output_embeddings().modules()]
    return sum(map(_own_weights, modules))


def _own_weights(module: nn.Module) -> int:
    if isinstance(size := getattr(module, "embedding_dim", None), int):  # a table in a file, too
        return size
    own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
    return own + int(getattr(module, "packed_weights", 0))  # of columns, which are no parameters
