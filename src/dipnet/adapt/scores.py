"""Fit what DIP multiplies magnitudes with before it compares them: factors, one a channel.

`column_norms` knows the weights: what a channel adds to the layer's products is its magnitude times
the norm of its columns (WINA). `learned` begins there and goes on with a text: where a channel's
score is near the boundary, the divergence from the dense model says whether it should have been
higher or lower (`allocation_marginals`), and Adam follows that on its logarithm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dipnet.adapt.allocation import Pieces, Progress, mean_divergence
from dipnet.adapt.allocation_marginals import marginals
from dipnet.errors import InputError
from dipnet.methods.allocation import Shapes
from dipnet.methods.base import SiteKey
from dipnet.methods.dip import DIP
from dipnet.methods.factors import Factors
from dipnet.methods.wina import WINA, column_norms
from dipnet.models.attach import check_dense
from dipnet.models.families import Decoder

STEPS = 100
BATCH = 8
RATE = 0.02
"""The largest change of a factor's logarithm in one step, about."""


def norm_scores(model: PreTrainedModel, method: DIP) -> Factors:
    """The L2 norms of the columns at each of the method's sites, with a geometric mean of 1."""
    check_dense(model)
    decoder = Decoder(model)
    method.check_model(decoder.spec)
    found: dict[SiteKey, Tensor] = {}
    for site in method.sites(decoder.spec):
        names = (operand.matrix for operand in site.operands)
        norms = column_norms(decoder, site.layer, *names).clamp_min(torch.finfo(torch.float32).tiny)
        found[site.layer, site.name] = (norms.log() - norms.log().mean()).exp().cpu()
    return Factors(Shapes.of(decoder.spec), found, {"kind": "norm"})


def fit_scores(
    model: PreTrainedModel,
    method: DIP,
    tokens: Tensor,
    *,
    window: int | None = None,
    bos: int | None = None,
    batch_size: int = BATCH,
    steps: int = STEPS,
    seed: int = 0,
    progress: Progress | None = None,
) -> Factors:
    """Factors learned for ``method``, at its density, on (n,) ``tokens`` that are not test text.

    Windows begin with ``bos`` if given; each step is a pass there and back over ``batch_size`` of
    them. Where learning ends no better than it began, on the windows that were spared, what it
    began with is returned: the norms. Raises InputError when the text is too short, or the method
    has scores of its own or drops neurons in blocks.
    """
    check_dense(model)
    if (
        method.scores is not None
        or isinstance(method, WINA)
        or method.hidden_block not in (None, 1)
    ):
        raise InputError(
            "scores are fitted for a method without any, channel by channel: leave out scores and "
            "hidden_block"
        )
    begun = norm_scores(model, method)
    pieces = Pieces.of(model, tokens, window, bos, batch_size)
    logs = {
        key: values.log().to(model.device).requires_grad_(True)
        for key, values in begun.values.items()
    }
    learner = torch.optim.Adam(logs.values(), lr=RATE, betas=(0.9, 0.99))
    slower = torch.optim.lr_scheduler.CosineAnnealingLR(learner, steps)
    for step, batch in zip(range(steps), pieces.draws(seed), strict=False):
        found = marginals(model, replace(method, scores=_factors(begun, logs)), batch)
        for key, values in logs.items():
            values.grad = found.scores[key]
        learner.step()
        slower.step()
        if progress:
            progress(step + 1, steps, found.divergence)
    made = _factors(begun, logs)
    divergences = {
        name: mean_divergence(model, replace(method, scores=scores), pieces)
        for name, scores in (("magnitude", None), ("norm", begun), ("learned", made))
    }
    best = made if divergences["learned"] < divergences["norm"] else begun
    about = {"kind": "learned", "density": method.density, "steps": steps, "seed": seed}
    return Factors(best.model, best.values, {**about, "divergence": divergences})


def _factors(begun: Factors, logs: Mapping[SiteKey, Tensor]) -> Factors:
    return Factors(begun.model, {key: values.detach().exp() for key, values in logs.items()})
