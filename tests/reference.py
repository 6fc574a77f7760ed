"""The tools of an independent reference: layers in plain loops, one token after another.

Nothing of dipnet computes here. A kept set is found with an explicit sort, the kept rows and
columns are really gathered, and every weight that is gathered is counted: what a method leaves out
is never read. Attention, norms and embeddings stay Hugging Face's own. The methods' references,
written with these tools, are in `tests/matrix.py`.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Rule = Callable[["PlainLayer", Any, Tensor], Tensor]
"""(layer, method, (d,) input of the MLP) -> (d,) output of the MLP."""

Choice = Callable[["PlainLayer", Any, str, Tensor], list[int]]
"""(layer, method, site, (n,) input of attention projections) -> the kept channels."""

HeadChoice = Callable[["PlainLayer", Any, Tensor], list[int]]
"""(layer, method, (n,) input of the output projection) -> the kept query heads."""

MLP = ("gate", "up", "down")
ATTENTION = ("q", "k", "v", "o")


def silu(z: Tensor) -> Tensor:
    return z / (1 + torch.exp(-z))


def tanh_gelu(z: Tensor) -> Tensor:
    return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def relu(z: Tensor) -> Tensor:
    return torch.where(z < 0, 0.0, z)


ACTIVATIONS = {"opt": relu, "gemma2": tanh_gelu, "gemma3_text": tanh_gelu}


class PlainLayer:
    """The matrices of one decoder layer, each apart; ``read`` counts the weights gathered."""

    def __init__(self, number: int, layer: nn.Module, config: Any) -> None:
        self.number = number
        self.activation = ACTIVATIONS.get(config.model_type, silu)
        self.weights: dict[str, Tensor] = {}
        self.biases: dict[str, Tensor | None] = {}
        self.read: Counter[str] = Counter()
        self.stream: dict[int, Tensor] = {}
        self.token = 0
        heads = config.num_attention_heads
        self.head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.group = heads // (getattr(config, "num_key_value_heads", None) or heads)
        for module, matrices in linear_layers(layer, config).items():
            sizes = [rows for _, rows in matrices]
            parts = module.weight.detach().split(sizes)
            biases = module.bias.detach().split(sizes) if module.bias is not None else [None] * 3
            for (matrix, _), part, bias in zip(matrices, parts, biases, strict=False):
                self.weights[matrix], self.biases[matrix] = part, bias

    @property
    def gated(self) -> bool:
        return "gate" in self.weights

    @property
    def input_matrices(self) -> list[str]:
        return ["gate", "up"] if self.gated else ["up"]

    def apply(
        self, matrix: str, values: Tensor, inputs: list[int] | None = None, outputs: Any = None
    ) -> Tensor:
        """The kept rows of ``matrix`` times the values of its kept columns."""
        weight, bias = self.weights[matrix], self.biases[matrix]
        if outputs is not None:
            weight, bias = weight[outputs], None if bias is None else bias[outputs]
        if inputs is not None:
            weight = weight[:, inputs]
        self.read[matrix] += weight.numel()
        product = weight @ values
        return product if bias is None else product + bias

    def hidden(
        self, values: Tensor, inputs: list[int] | None = None, outputs: Any = None
    ) -> Tensor:
        """The intermediate activation of the kept neurons, from the kept inputs."""
        up = self.apply("up", values, inputs, outputs)
        if not self.gated:
            return self.activation(up)
        return up * self.activation(self.apply("gate", values, inputs, outputs))

    def down(self, hidden: Tensor, neurons: list[int]) -> Tensor:
        """The MLP's output from the ``neurons`` of the full intermediate activation."""
        return self.apply("down", hidden[neurons], inputs=neurons)

    def residual(self, place: int) -> Tensor:
        """(d,) the residual stream of the token that is computed, at a place."""
        return self.stream[place].reshape(-1, self.stream[place].shape[-1])[self.token]

    @property
    def position(self) -> int:
        """The position of the token that is computed in its sequence; without padding."""
        return self.token % self.stream[0].shape[1]

    def attend(self, x: Tensor, heads: list[int]) -> Tensor:
        """The output projection of some heads; their rows of q, k and v are counted, too."""
        row, size = self.weights["q"].shape[1], self.head_size
        self.read["q"] += len(heads) * size * row
        for matrix in "kv":
            self.read[matrix] += len({head // self.group for head in heads}) * size * row
        kept = [head * size + i for head in heads for i in range(size)]
        return self.apply("o", x[kept], inputs=kept)

    def uncounted(self) -> PlainLayer:
        """The same layer, whose reads go unseen."""
        other = copy.copy(self)
        other.read = Counter()
        return other


def linear_layers(layer: nn.Module, config: Any) -> dict[nn.Module, list[tuple[str, int]]]:
    """Each linear layer of a decoder layer, with the (matrix, rows) stacked in it."""
    d, heads = config.hidden_size, config.num_attention_heads
    size = getattr(config, "head_dim", None) or d // heads
    q, kv = heads * size, (getattr(config, "num_key_value_heads", None) or heads) * size
    at, mlp = layer.self_attn, getattr(layer, "mlp", None)
    if config.model_type == "phi3":
        f = config.intermediate_size
        return {
            at.qkv_proj: [("q", q), ("k", kv), ("v", kv)],
            at.o_proj: [("o", d)],
            mlp.gate_up_proj: [("gate", f), ("up", f)],
            mlp.down_proj: [("down", d)],
        }
    attention = {at.q_proj: [("q", q)], at.k_proj: [("k", kv)], at.v_proj: [("v", kv)]}
    if config.model_type == "opt":
        f = config.ffn_dim
        rest = {at.out_proj: [("o", d)], layer.fc1: [("up", f)], layer.fc2: [("down", d)]}
        return {**attention, **rest}
    f = config.intermediate_size
    gated = {mlp.gate_proj: [("gate", f)], mlp.up_proj: [("up", f)], mlp.down_proj: [("down", d)]}
    return {**attention, at.o_proj: [("o", d)], **gated}


def install(
    model: PreTrainedModel,
    method: Any,
    rule: Rule,
    choice: Choice,
    heads: HeadChoice | None = None,
) -> list[PlainLayer]:
    """Let a model (a copy of one's own) compute its linear layers by the reference's loops.

    With ``heads``, attention is pruned by heads and ``choice`` is not asked.
    """
    layers: list[PlainLayer] = []
    stream: dict[int, Tensor] = {}
    for number, layer in enumerate(model.get_decoder().layers):
        plain = PlainLayer(number, layer, model.config)
        plain.stream = stream
        layers.append(plain)
        _watch(layer, 2 * number, stream)
        _watch(before_mlp(layer, model.config), 2 * number + 1, stream)
        for module, matrices in linear_layers(layer, model.config).items():
            names = [matrix for matrix, _ in matrices]
            if names[0] in ATTENTION and heads is None:
                module.forward = _projections(plain, method, choice, names)
            elif names == ["o"]:
                module.forward = _attending(plain, method, heads)
        mlp = _tokenwise(plain, lambda x, plain=plain: rule(plain, method, x))
        if plain.gated:
            layer.mlp.forward = mlp
        else:  # OPT's MLP is no module: its first two steps let the input through
            layer.fc1.forward = layer.activation_fn.forward = lambda x: x
            layer.fc2.forward = mlp
    return layers


def _projections(plain: PlainLayer, method: Any, choice: Choice, matrices: list[str]) -> Any:
    site = "attn.out" if matrices == ["o"] else "attn.in"

    def project(x: Tensor) -> Tensor:
        kept = choice(plain, method, site, x)
        return torch.cat([plain.apply(matrix, x[kept], inputs=kept) for matrix in matrices])

    return _tokenwise(plain, project)


def _attending(plain: PlainLayer, method: Any, heads: HeadChoice) -> Any:
    """q, k and v are computed for all by the model itself, and counted where they are used."""
    return _tokenwise(plain, lambda x: plain.attend(x, heads(plain, method, x)))


def _tokenwise(
    plain: PlainLayer, function: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    def loop(x: Tensor) -> Tensor:
        outputs = []
        for number, token in enumerate(x.flatten(0, -2)):
            plain.token = number
            outputs.append(function(token))
        return torch.stack(outputs).unflatten(0, x.shape[:-1])

    return loop


def _watch(module: nn.Module, place: int, stream: dict[int, Tensor]) -> None:
    def keep(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        stream[place] = args[0] if args else kwargs["hidden_states"]

    module.register_forward_pre_hook(keep, with_kwargs=True)


def before_mlp(layer: nn.Module, config: Any) -> nn.Module:
    """The module whose input is the residual stream in front of the MLP."""
    if config.model_type == "opt":
        return layer.final_layer_norm if config.do_layer_norm_before else layer.fc1
    if config.model_type.startswith("gemma"):
        return layer.pre_feedforward_layernorm
    return layer.post_attention_layernorm


# --- choosing ---


def top(scores: Tensor, density: float) -> list[int]:
    """The highest scores, as many as ``density`` says; the lowest index wins a tie."""
    values = scores.tolist()
    k = max(1, min(len(values), round(density * len(values))))
    return sorted(sorted(range(len(values)), key=lambda i: -values[i])[:k])


def exceeding(scores: Tensor, threshold: float) -> list[int]:
    return [i for i, score in enumerate(scores.tolist()) if score > threshold]
