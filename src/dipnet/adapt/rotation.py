"""Rotate a model's residual stream, so that few channels hold most of what MLPs read.

A root-mean-square norm only scales: turn the stream by an orthogonal matrix, turn every matrix
that reads or writes it, move the norms' gains into the matrices that read, and the model computes
what it computed (SliceGPT, https://arxiv.org/abs/2401.15024). In the basis of the principal
components of what the MLPs read, the largest channels of an input hold more of it than in the basis
that training happened to take, and a mask that keeps as many of them loses less (La RoSA,
https://arxiv.org/abs/2507.01299, has a basis for each layer). One basis serves all layers here: to
change it between them would be a product for every token. What is rotated is an ordinary
checkpoint, and no token reads more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dipnet.adapt.adapter_state import AGAIN, write_errors
from dipnet.adapt.calibration import TextCalibration
from dipnet.errors import InputError
from dipnet.files import whole_folder
from dipnet.models.attach import check_dense
from dipnet.models.families import Decoder, default_window

FAMILIES = ("llama", "mistral", "phi3", "qwen2", "qwen3")
"""Those that norm by the root mean square, in front of each block, and never add to the stream what
is not a block's output."""
FIRST_NORM, LAST_NORM = "input_layernorm", "norm"
WRITING = ("o", "down")


@dataclass(frozen=True)
class Rotation:
    """The share of the MLPs' inputs' squares that the largest half of a token's channels holds."""

    before: float
    after: float


def rotate(
    model: PreTrainedModel, tokens: Tensor, *, window: int | None = None, bos: int | None = None
) -> Rotation:
    """Rotate a model into the principal components of what its MLPs read over (n,) ``tokens``.

    Its weights change, and its logits do not, but for rounding. An output head that shares its
    weights with the embedding gets its own: the norm before it has moved into it. Windows begin
    with ``bos`` if given. Raises InputError when the family cannot be rotated, the text is too
    short, or the model is sparsified.
    """
    check_dense(model)
    decoder = Decoder(model)
    if decoder.spec.family not in FAMILIES:
        raise InputError(
            f"models of the family {decoder.spec.family} cannot be rotated: their norms do more "
            f"than scale; families that can: {', '.join(FAMILIES)}"
        )
    size = default_window(model) if window is None else window
    windows = TextCalibration(model, tokens, size, bos).windows
    basis = _basis(decoder, windows)
    before = _held(decoder, windows[:1])
    with torch.no_grad():
        _apply(decoder, basis)
    return Rotation(before, _held(decoder, windows[:1]))


def save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a checkpoint to the new ``folder``, whole or not at all; InputError when that fails."""
    with write_errors(folder.absolute().parent, AGAIN), whole_folder(folder) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)


def _basis(decoder: Decoder, windows: list[Tensor]) -> Tensor:
    """(width, width) float64, columns: the principal components, the largest first."""
    width = decoder.spec.width
    total = torch.zeros(width, width, dtype=torch.float64, device=decoder.model.device)
    for read in _normed(decoder, windows):
        total += (read.T @ read).double()
    return torch.linalg.eigh(total)[1].flip(1)


def _held(decoder: Decoder, windows: list[Tensor]) -> float:
    """The mean share of squares that the largest half of the channels holds."""
    shares = []
    for read in _normed(decoder, windows):
        squares = read.square()
        largest = squares.topk(squares.shape[1] // 2, dim=1).values
        shares.append(float((largest.sum(dim=1) / squares.sum(dim=1)).mean()))
    return sum(shares) / len(shares)


def _normed(decoder: Decoder, windows: list[Tensor]) -> Iterator[Tensor]:
    """What every MLP reads of every window, without the norm's gain: (tokens, width) float32."""
    seen: list[Tensor] = []

    def see(norm: Any, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().flatten(0, -2).float()
        seen.append(x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + norm.variance_epsilon))

    handles = [
        decoder.module(layer, decoder.family.mlp_norm).register_forward_pre_hook(see)
        for layer in range(decoder.spec.layers)
    ]
    try:
        for window in windows:
            with torch.no_grad():
                decoder.model.get_decoder()(input_ids=window, use_cache=False)
            yield from seen
            seen.clear()
    finally:
        for handle in handles:
            handle.remove()


def _apply(decoder: Decoder, basis: Tensor) -> None:
    """Turn everything that reads or writes the stream."""
    model, inner = decoder.model, decoder.model.get_decoder()
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False
    _set(embedding.weight, embedding.weight.double() @ basis.to(embedding.weight.device))
    _turn_reading([head], getattr(inner, LAST_NORM), basis)
    for layer in range(decoder.spec.layers):
        first, second = (
            decoder.module(layer, name) for name in (FIRST_NORM, decoder.family.mlp_norm)
        )
        _turn_reading(_holders(decoder, layer, ("q", "k", "v")), first, basis)
        _turn_reading(_holders(decoder, layer, decoder.spec.input_matrices), second, basis)
        for name in WRITING:
            _turn_writing(decoder.holder(layer, name), basis)


def _holders(decoder: Decoder, layer: int, matrices: tuple[str, ...]) -> list[Any]:
    """The linear layers that hold the matrices, each once."""
    paths = dict.fromkeys(decoder.family.path(matrix) for matrix in matrices)
    return [decoder.module(layer, path) for path in paths]


def _turn_reading(modules: list[Any], norm: Any, basis: Tensor) -> None:
    """Layers that read what ``norm`` makes of the stream: its gain moves into them."""
    gain = norm.weight.double()
    for module in modules:
        weight = module.weight.double() * gain.to(module.weight.device)
        _set(module.weight, weight @ basis.to(weight.device))
    _set(norm.weight, torch.ones_like(gain))


def _turn_writing(module: Any, basis: Tensor) -> None:
    """A layer whose outputs are added to the stream."""
    turned = basis.to(module.weight.device).T
    _set(module.weight, turned @ module.weight.double())
    if module.bias is not None:
        _set(module.bias, turned @ module.bias.double())


def _set(parameter: Tensor, value: Tensor) -> None:
    parameter.data.copy_(value)
