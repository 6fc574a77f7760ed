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
    """A setting that was tried, and what it comes to.

    ``density`` None is the dense model. Without ``figures`` it does not keep the bound, and the
    setup does at no density that was worth a trial.
    """

    setup: Setup
    density: float | None
    increase: Increase
    figures: Figures | None

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
        self.usual = trials.task.usual
        self.streaming = trials.streaming
        self.found: list[Candidate] = []
        self.best: Candidate | None = None

    def run(self) -> Choice:
        dense = self._dense()
        for gamma in GAMMAS if self.streaming else GAMMAS[:1]:
            self._lowest(replace(self.usual, gamma=gamma))
        if self.best is not None:
            for split in self._splits():
                self._lower(replace(self.best.setup, split=split))
            if self.streaming:
                self._retake(replace(self.best.setup, policy="lru"))
                self._retake(replace(self.best.setup, cache_split="even"))
                self._blocks(self.best.setup.block)
        best = self.best
        pays = best is not None and best.speed > WORTHWHILE * dense.speed
        return Choice((dense, *self.found), best if pays and best else dense)

    def _dense(self) -> Candidate:
        _ = self.trials.dense
        figures = self.trials.figures(self.usual)
        return Candidate(self.usual, None, Increase(0.0, 0.0, 0.0), figures)

    def _lowest(self, setup: Setup) -> Candidate:
        """Add the setup at the lowest density that keeps the bound."""
        known = [DENSITIES.index(c.density) for c in self.found if c.density and c.figures]
        guess = known[-1] if known else FIRST_GUESS
        at = lowest(lambda at: self._inside(setup, at), guess, len(DENSITIES))
        return self._add(setup, DENSITIES[-1] if at is None else DENSITIES[at])

    def _lower(self, setup: Setup) -> None:
        """Add the setup at a lower density than the best one's: else it cannot be faster."""
        assert self.best is not None
        assert self.best.density is not None
        at = max(DENSITIES.index(self.best.density) - 1, 0)
        if self._inside(setup, at):
            at = lowest(lambda at: self._inside(setup, at), at, at + 1) or 0
        self._add(setup, DENSITIES[at])

    def _retake(self, setup: Setup) -> None:
        """Add the setup at the best one's density."""
        assert self.best is not None
        assert self.best.density is not None
        self._add(setup, self.best.density)

    def _inside(self, setup: Setup, at: int) -> bool:
        trial = self.trials.trial(setup, DENSITIES[at])
        if trial.trace is not None and self.trials.recall is None and self.streaming:
            self.trials.learn_recall(setup, DENSITIES[at])
        return trial.trace is not None

    def _add(self, setup: Setup, density: float) -> Candidate:
        """Put a candidate in the list, and keep it as the best if it is."""
        trial = self.trials.trial(setup, density)
        figures = None if trial.trace is None else self.trials.figures(setup, density)
        made = Candidate(setup, density, trial.increase, figures)
        self.found.append(made)
        if figures and (self.best is None or made.speed > WORTHWHILE * self.best.speed):
            self.best = made
        if self.best is not None and self.best.density is not None:
            self.trials.forget(self.trials.trial(self.best.setup, self.best.density))
        return made

    def _splits(self) -> Iterator[float]:
        """Other divisions of a density, where no allocation divides it."""
        if self.trials.divided:
            return
        relu = self.trials.task.index.activation == "relu"
        usual = RELU_SPLIT if relu else SMOOTH_SPLIT
        for factor in SPLIT_FACTORS:
            yield round(usual * factor, 1)

    def _blocks(self, usual: int) -> None:
        """Larger records as long as they are faster; smaller ones where larger ones are not."""
        for factor in (2, 0.5):
            block = int(usual * factor)
            while block in self.trials.task.blocks:
                assert self.best is not None
                made = self._lowest(replace(self.best.setup, block=block))
                if made is not self.best:
                    break
                block = int(block * factor)
            if self.best is not None and self.best.setup.block != usual:
                return
