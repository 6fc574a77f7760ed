"""Which MLP neurons fire together: an order in which they are neighbours, to share records."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dipnet.adapt.calibration import TextCalibration
from dipnet.errors import InputError
from dipnet.models.attach import check_dense
from dipnet.models.families import Decoder, default_window

SAMPLED_TOKENS = 1024
"""Tokens on which neurons are compared: a sketch of 2 KB for each neuron."""
SEEDS = 64
"""Neurons that are compared with all others at a time: one matrix product."""


def fit_orders(
    model: PreTrainedModel, tokens: Tensor, block: int, bos: int | None = None
) -> dict[int, Tensor]:
    """For every layer an order of its MLP neurons: (neurons,) int64, as ``pack`` takes them.

    Each ``block`` neighbours of the order are neurons whose magnitudes rise and fall together over
    (n,) ``tokens``, of which about a thousand are used, in windows that begin with ``bos`` if
    given. Raises InputError when the blocks do not divide the neurons, the text is too short, or
    the model is sparsified.
    """
    check_dense(model)
    calibration = TextCalibration(model, tokens, default_window(model), bos)
    neurons = calibration.spec.matrices["down"][1]
    if block < 1 or neurons % block:
        raise InputError(f"blocks of {block} do not divide the {neurons} neurons of a layer")
    magnitudes = _magnitudes(calibration.decoder, calibration.windows)
    return {layer: group_by_correlation(found, block) for layer, found in enumerate(magnitudes)}


def group_by_correlation(magnitudes: Tensor, block: int) -> Tensor:
    """(tokens, neurons) magnitudes -> an order in which each ``block`` neighbours correlate.

    Greedily: the most active neuron that has no block yet, and the ``block - 1`` others without
    one whose magnitudes correlate most with its own.
    """
    values = magnitudes.float()
    values = values - values.mean(dim=0)
    values /= values.norm(dim=0).clamp_min(1e-12)
    waiting = magnitudes.float().square().sum(dim=0).argsort(descending=True, stable=True)
    free = torch.ones(len(waiting), dtype=torch.bool, device=values.device)
    blocks = []
    while len(waiting):
        seeds = waiting[:SEEDS]
        correlations = values[:, seeds].T @ values
        for seed, row in zip(seeds.tolist(), correlations, strict=True):
            if free[seed]:
                row.masked_fill_(~free, -torch.inf)
                row[seed] = torch.inf
                chosen = row.topk(block).indices
                free[chosen] = False
                blocks.append(chosen)
        waiting = waiting[free[waiting]]
    return torch.cat(blocks).cpu()


def _magnitudes(decoder: Decoder, windows: list[Tensor]) -> list[Tensor]:
    """For every layer the (tokens, neurons) magnitudes of its MLP's hidden activation, in half."""
    found: list[list[Tensor]] = [[] for _ in decoder.layers]
    handles = [
        decoder.holder(layer, "down").register_forward_pre_hook(
            lambda _module, args, kept=kept: kept.append(_sketch(args[0]))
        )
        for layer, kept in enumerate(found)
    ]
    used = windows[: max(1, -(-SAMPLED_TOKENS // windows[0].shape[1]))]
    try:
        with torch.no_grad():
            for window in used:
                decoder.model.get_decoder()(input_ids=window, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(kept)[:SAMPLED_TOKENS] for kept in found]


def _sketch(hidden: Tensor) -> Tensor:
    """(..., neurons) -> (tokens, neurons) magnitudes, in bfloat16 to hold every layer's at once."""
    return hidden.detach().abs().flatten(0, -2).bfloat16()
