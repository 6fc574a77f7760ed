"""Decoding that computes what the masks keep, and nothing else.

For a method whose masks are known before the block that they thin (Deja Vu's predictors): where a
call brings one token for each sequence, kept neurons' rows of ``gate`` and ``up`` and columns of
``down`` are gathered, and the rows of ``q``, ``k``, ``v`` and the columns of ``o`` of kept heads.
In a batch what any sequence keeps is gathered, and what a sequence drops is then multiplied by
zero, so that every sequence has the values of the reference (`models.attach`). Everything else, a
prompt for one, runs as there.

A skipped head leaves no keys and values of the token. They are made up for, exactly, from what
attention read for the token, when a head of the group is next used, or in turn before that is
forgotten (`pending`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from dipnet.methods.base import Method, TopK
from dipnet.models.families import Decoder
from dipnet.models.skipping.base import Deciding, Skipping
from dipnet.models.skipping.heads import HeadSkip
from dipnet.models.skipping.neurons import NeuronSkip
from dipnet.units import Site

KEPT_INPUTS = 16
"""Tokens whose missing keys and values can be made up for, unless one says otherwise."""
EARLY = ("residual", "position")
"""What is known before the block: the scores that allow to skip read one of these."""
KINDS = {"mlp.neuron": NeuronSkip, "attn.head": HeadSkip}
"""What can be skipped, by the site's name."""


def attach_skip(skipping: Skipping, mask: Deciding) -> list[Callable[[], None]]:
    """Skip what a site's mask drops; returns what undoes it."""
    return KINDS[mask.site.name](skipping, mask).attach()


def why_not(decoder: Decoder, method: Method, sites: Sequence[Site]) -> str | None:
    """Why nothing can be skipped, as the end of a sentence; None when it can."""
    return _why_not_masks(method, sites) or _why_not_model(decoder, sites)


def _why_not_masks(method: Method, sites: Sequence[Site]) -> str | None:
    if not sites:
        return f"has nothing to skip: {method.name} decides no masks"
    for site in sites:
        if site.name not in KINDS or site.scored_on not in EARLY or _in_blocks(site):
            return (
                f"needs neurons and heads that are chosen before their block, and {method.name} "
                f"decides {site.name} on {site.scored_on}"
            )
    if type(method).select is not TopK.select:
        return f"needs a fixed number of kept units, which {method.name} does not have"
    return None


def _in_blocks(site: Site) -> bool:
    return site.name == "mlp.neuron" and site.block > 1


def _why_not_model(decoder: Decoder, sites: Sequence[Site]) -> str | None:
    if decoder.family.rotary is None and any(site.name == "attn.head" for site in sites):
        return (
            f"does not know what models of the family {decoder.spec.family} do to a key "
            "(docs/adding-a-family.md)"
        )
    for layer in {site.layer for site in sites}:
        for path in decoder.family.modules:
            module = decoder.module(layer, path)
            plain = type(module) is nn.Linear and "forward" not in vars(module)
            if not plain or not module.weight.is_floating_point():
                return f"gathers from plain linear layers, and {path!r} of layer {layer} is none"
    return None
