"""Which settings of a model are fastest on a device while perplexity stays inside a bound.

For each γ the lowest density that keeps the bound is found by bisection, since perplexity falls
and time grows with density. From the fastest one, what else there is to choose is changed one thing
at a time: how the density is divided, what the caches evict and how they share memory, the size of
the neurons' records. The dense model is always a candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from dipnet.adapt.trials import Increase, Setup, Trials
from dipnet.methods.dip import RELU_SPLIT, SMOOTH_SPLIT
from dipnet.sim.scenario import Figures
from dipnet.streaming.budget import CACHED

GAMMAS = (None, 0.5, 0.2)
DENSITIES = tuple(number / 40 for number in range(6, 40))
"""Between two of them perplexity changes by less than its error on a text of usual length."""
FIRST_GUESS = DENSITIES.index(0.7)
SPLIT_FACTORS = (2**-0.5, 2**0.5)
"""Other splits, relative to the usual one."""
WORTHWHILE = 1.01
"""A simulated gain that is taken for one."""


@dataclass(frozen=True)
class Candidate:
    """A setting that was tried, and what it comes to; `remark` says why it is no choice.

    ``density`` None is the dense model. Without ``figures`` nothing that was tried kept the bound.
    """

    setup: Setup
    density: float | None
    increase: Increase
    figures: Figures | None
    remark: str = ""

    @property
    def speed(self) -> float:
        """Tokens a second; 0 where the bound was not kept."""
        return self.figures.tokens_per_second if self.figures else 0.0


@dataclass(frozen=True)
class Choice:
    """All candidates, the dense model first, and the one that was chosen."""

    candidates: tuple[Candidate, ...]
    chosen: Candidate

    @property
    def dense(self) -> Candidate:
        """The dense model."""
        return self.candidates[0]


def choose(trials: Trials) -> Choice:
    """The fastest setting that keeps the bound; costs about `evaluations` of the text at most."""
    return _Search(trials).run()


def evaluations(*, streaming: bool, blocks: int) -> int:
    """About how often the text is evaluated, the dense model included.

    ``streaming`` is False when everything is in memory; ``blocks`` is how many sizes of records
    there are to try.
    """
    splits = 2 * len(SPLIT_FACTORS)
    if not streaming:
        return 1 + 5 + splits
    return 1 + 5 + 3 * (len(GAMMAS) - 1) + splits + 2 + 3 * blocks


def lowest(inside: Callable[[int], bool], guess: int, count: int) -> int | None:
    """The lowest of ``count`` numbers that is inside, when all above one that is are; or None.

    Steps from ``guess`` are doubled until both sides are known; then it bisects.
    """
    step, low, high = 1, -1, count
    at = guess
    while low < at < high:
        if inside(at):
            high = at
            at = max(at - step, low + 1) if low < 0 else (low + high) // 2
        else:
            low = at
            at = min(at + step, high - 1) if high == count else (low + high) // 2
        step *= 2
    return high if high < count else None


class _Search:
    def __init__(self, trials: Trials) -> None:
        self.trials = trials
        task = trials.task
        self.block = task.index.groups[3].block
        self.found: list[Candidate] = []

    def run(self) -> Choice:
        dense = self._dense()
        self.best = dense
        for gamma in GAMMAS if self._streaming else GAMMAS[:1]:
            self._lowest(Setup(self.block, gamma), self._guess())
        if self.best.density is not None:
            for setup in self._splits():
                self._lower(setup)
            if self._streaming:
                self._caches()
        if self._streaming:
            self._blocks()
        return Choice(tuple(self.found), self.best)

    @property
    def _streaming(self) -> bool:
        """Whether any record is read from disk."""
        index, spec = self.trials.task.index, self.trials.task.shapes[0]
        slots = self.trials.slots(Setup(self.block), None, index, spec)
        return any(slots[g.key] < g.units for g in index.groups if g.name in CACHED)

    def _dense(self) -> Candidate:
        setup = Setup(self.block)
        _ = self.trials.dense
        made = Candidate(setup, None, Increase(0.0, 0.0, 0.0), self.trials.figures(setup))
        self.found.append(made)
        return made

    def _guess(self) -> int:
        known = [c.density for c in self.found if c.density is not None and c.figures]
        return DENSITIES.index(known[-1]) if known else FIRST_GUESS

    def _lowest(self, setup: Setup, guess: int) -> Candidate:
        """The setup at the lowest density that keeps the bound."""
        at = lowest(lambda at: self._inside(setup, at), guess, len(DENSITIES))
        return self._take(setup, DENSITIES[-1] if at is None else DENSITIES[at])

    def _lower(self, setup: Setup) -> None:
        """The setup, where it can have a lower density than the best: else it cannot be faster."""
        assert self.best.density is not None
        at = DENSITIES.index(self.best.density) - 1
        if at >= 0 and self._inside(setup, at):
            at = lowest(lambda at: self._inside(setup, at), at, at + 1) or 0
        self._take(setup, DENSITIES[max(at, 0)])

    def _inside(self, setup: Setup, at: int) -> bool:
        trial = self.trials.trial(setup, DENSITIES[at])
        if trial.trace is not None and self.trials.recall is None and self._streaming:
            self.trials.learn_recall(setup, DENSITIES[at])
        return trial.trace is not None

    def _take(self, setup: Setup, density: float) -> Candidate:
        """Put a candidate in the list, and keep it as the best if it is."""
        trial = self.trials.trial(setup, density)
        figures = None if trial.trace is None else self.trials.figures(setup, density)
        made = Candidate(setup, density, trial.increase, figures)
        self.found.append(made)
        if made.speed > WORTHWHILE * self.best.speed or (
            made.speed > self.best.speed and self.best.density is not None
        ):
            self.best = made
        self._forget()
        return made

    def _forget(self) -> None:
        """Only the best one's trace is needed again."""
        best = self.best
        kept = None if best.density is None else self.trials.trial(best.setup, best.density)
        self.trials.forget(kept)

    def _splits(self) -> Iterator[Setup]:
        relu = self.trials.task.index.activation == "relu"
        usual = RELU_SPLIT if relu else SMOOTH_SPLIT
        for factor in SPLIT_FACTORS:
            yield replace(self.best.setup, split=round(usual * factor, 1))

    def _caches(self) -> None:
        """The best with other rules for its caches, at its own density."""
        for change in ({"policy": "lru"}, {"cache_split": "even"}):
            best = self.best
            assert best.density is not None
            self._take(replace(best.setup, **change), best.density)

    def _blocks(self) -> None:
        """Larger records while they are faster, else smaller ones."""
        for larger in (True, False):
            block = self.best.setup.block
            improved = True
            while improved:
                block = block * 2 if larger else block // 2
                if block not in self.trials.task.blocks:
                    break
                made = self._lowest(replace(self.best.setup, block=block), self._guess())
                improved = made is self.best
