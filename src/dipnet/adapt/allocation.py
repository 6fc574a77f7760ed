"""Search how a budget of weights is best divided among the sites of all layers.

A site's units are worth what the divergence from the dense model falls when it keeps a few more
of them (`allocation_marginals`). While a weight is worth more at one site than at another, the
division can be better: each step takes from the sites where weights are worth least and gives to
those where they are worth most, on another piece of the text. All sites are measured at once and
under each other's masks, so that what they do to one another counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dipnet.adapt.allocation_marginals import dense_logits, divergence, marginals
from dipnet.adapt.calibration import TextCalibration
from dipnet.errors import InputError
from dipnet.methods.allocation import Allocation
from dipnet.methods.base import Method, SiteKey
from dipnet.methods.dip import DIP
from dipnet.models.attach import check_dense, sparsify
from dipnet.models.families import default_window, describe
from dipnet.units import ModelSpec, check_density

STEPS = 40
BATCH = 8
RATE = 0.3
"""The largest change of a site's density in one step, in logits."""
MEMORY = 0.8
"""How much of the average of earlier steps stays."""
SPARED = 4
"""One window of so many is kept from the search, to compare its result with where it began."""
LEAST_WINDOWS = 2
SMALLEST = 0.02
"""Of its units, what a site keeps at least."""

Progress = Callable[[int, int, float], object]
"""Called with the steps done, the steps in all, and the divergence at the last one."""


@dataclass(frozen=True)
class Pieces:
    """The windows of a text, for the search and for the comparison: (n, window) integers."""

    searched: Tensor
    spared: Tensor
    batch: int

    @classmethod
    def of(
        cls, model: PreTrainedModel, tokens: Tensor, window: int | None, bos: int | None, batch: int
    ) -> Pieces:
        """Cut (n,) ``tokens``; InputError when they make too few windows."""
        size = default_window(model) if window is None else window
        windows = torch.cat(TextCalibration(model, tokens, size, bos).windows)
        if len(windows) < LEAST_WINDOWS or windows.shape[1] < size:
            raise InputError(
                f"the text has {len(tokens.flatten())} tokens, and {LEAST_WINDOWS} windows of "
                f"{size} are the least: give a longer text or a smaller window"
            )
        spared = torch.arange(len(windows)) % SPARED == 1
        return cls(windows[~spared], windows[spared], max(1, batch))

    def draws(self, seed: int) -> Iterator[Tensor]:
        """(batch, window) pieces of the searched windows without end, each used once a round."""
        generator = torch.Generator().manual_seed(seed)
        size = min(self.batch, len(self.searched))
        while True:
            order = torch.randperm(len(self.searched), generator=generator)
            for chosen in order.split(size):
                if len(chosen) == size:
                    yield self.searched[chosen.to(self.searched.device)]


def fit_allocation(
    model: PreTrainedModel,
    method: DIP,
    densities: Sequence[float],
    tokens: Tensor,
    *,
    attention: bool = False,
    window: int | None = None,
    bos: int | None = None,
    batch_size: int = BATCH,
    steps: int = STEPS,
    seed: int = 0,
    progress: Progress | None = None,
) -> Allocation:
    """The best division found of each of ``densities``, on (n,) ``tokens`` that are not test text.

    ``method`` says how units are scored; it brings no split and no allocation. With ``attention``
    the inputs of the attention projections are pruned too, and the budget is of all the linear
    weights. Windows begin with ``bos`` if given. Each density costs ``steps`` passes there and back
    over ``batch_size`` windows; where the search ends no better than it began, the beginning is
    kept: the usual split, alike in all layers. Raises InputError when the text is too short, a
    density is none, or the method says already how its density is divided.
    """
    check_dense(model)
    for density in densities:
        if check_density(density) == 1:
            raise InputError("at density 1 there is nothing to divide: give a lower density")
    if not densities or steps < 1:
        raise InputError("give a density and at least one step")
    told = (method.split, method.input_density, method.allocation, method.attention_density)
    if any(option is not None for option in told):
        raise InputError("the method says already how its density is divided: leave that out")
    pieces = Pieces.of(model, tokens, window, bos, batch_size)
    spec = describe(model)
    points, found = {}, []
    for number, density in enumerate(sorted(set(densities), reverse=True)):
        search = _Search(model, replace(method, density=density), density, spec, attention)
        counted = _counted(progress, number * steps, len(set(densities)) * steps)
        search.run(pieces, steps, seed, counted)
        points[density] = search.best
        found.append({"density": density, **search.divergences})
    about = {"tokens": pieces.searched.numel() + pieces.spared.numel(), "seed": seed}
    about |= {"steps": steps, "batch": pieces.batch, "window": pieces.searched.shape[1]}
    return Allocation.of(spec, points, {**about, "points": found})


def _counted(progress: Progress | None, before: int, total: int) -> Callable[[int, float], object]:
    """What a search tells: its steps among those of all densities."""
    if progress is None:
        return lambda done, value: None
    return lambda done, value: progress(before + done, total, value)


class _Search:
    """One density: ``best`` is what was found, ``divergences`` what it and the beginning have."""

    def __init__(
        self, model: PreTrainedModel, method: DIP, density: float, spec: ModelSpec, attention: bool
    ) -> None:
        self.model = model
        self.method = method
        self.density = density
        self.spec = spec
        begun = replace(method, attention_density=density if attention else None)
        sites = begun.sites(spec)
        weights = {(s.layer, s.name): s.units * s.weights_per_unit for s in sites}
        total = sum(weights.values())
        self.shares = {key: value / total for key, value in weights.items()}
        self.uniform = {(site.layer, site.name): site.density for site in sites}
        self.best = self.uniform
        self.divergences: dict[str, float] = {}

    def run(
        self, pieces: Pieces, steps: int, seed: int, progress: Callable[[int, float], object]
    ) -> None:
        """Step by step from the uniform division; the mean over the last half is the result."""
        at, averages = self.uniform, dict.fromkeys(self.uniform, 0.0)
        late: list[dict[SiteKey, float]] = []
        for step, batch in zip(range(steps), pieces.draws(seed), strict=False):
            found = marginals(self.model, self._under(at), batch)
            for key, value in found.density.items():
                worth = -value / self.shares[key]
                averages[key] = MEMORY * averages[key] + (1 - MEMORY) * worth
            at = self._moved(at, averages, RATE * (1 - step / steps))
            late += [at] if step >= steps // 2 else []
            progress(step + 1, found.divergence)
        mean = {key: sum(one[key] for one in late) / len(late) for key in self.uniform}
        held = {"uniform": self.uniform, "allocated": mean}
        self.divergences = {
            name: mean_divergence(self.model, self._under(each), pieces)
            for name, each in held.items()
        }
        if self.divergences["allocated"] < self.divergences["uniform"]:
            self.best = mean

    def _under(self, densities: Mapping[SiteKey, float]) -> DIP:
        """The method with these densities."""
        given = Allocation.of(self.spec, {self.density: densities}, {})
        return replace(self.method, allocation=given)

    def _moved(
        self, densities: Mapping[SiteKey, float], worth: Mapping[SiteKey, float], rate: float
    ) -> dict[SiteKey, float]:
        """A step towards weights that are worth the same at every site, in the same budget."""
        least = max(worth.values()) / math.e**2
        logs = {
            key: math.log(max(value, least)) if least > 0 else 0.0 for key, value in worth.items()
        }
        mean = sum(self.shares[key] * value for key, value in logs.items())
        logits = {
            key: _logit(density) + rate * max(-1.0, min(1.0, logs[key] - mean))
            for key, density in densities.items()
        }
        return self._in_budget(logits)

    def _in_budget(self, logits: Mapping[SiteKey, float]) -> dict[SiteKey, float]:
        """The densities of logits, all raised or lowered alike until they read the budget."""
        low, high = -50.0, 50.0
        for _ in range(60):
            middle = (low + high) / 2
            made = {key: _density(value + middle) for key, value in logits.items()}
            read = sum(self.shares[key] * density for key, density in made.items())
            low, high = (low, middle) if read > self.density else (middle, high)
        return made


def mean_divergence(model: PreTrainedModel, method: Method, pieces: Pieces) -> float:
    """KL(dense || sparse) in nats a token over the windows that were spared."""
    total = 0.0
    for batch in pieces.spared.split(pieces.batch):
        dense = dense_logits(model, batch)
        with sparsify(model, method, backend="reference"), torch.no_grad():
            logits = model(input_ids=batch, use_cache=False).logits
        total += float(divergence(logits, dense, batch)) * len(batch)
    return total / len(pieces.spared)


def _logit(density: float) -> float:
    inside = min(max((density - SMALLEST) / (1 - SMALLEST), 1e-4), 1 - 1e-4)
    return math.log(inside / (1 - inside))


def _density(logit: float) -> float:
    """The density of a logit: between the smallest and 1."""
    return SMALLEST + (1 - SMALLEST) / (1 + math.exp(-logit))
