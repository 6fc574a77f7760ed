"""The search for a plan: bisection, the error of an increase, and what is chosen."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dipnet.adapt.plan import DENSITIES, GAMMAS, Choice, choose, evaluations, lowest
from dipnet.adapt.trials import Increase, Setup, Task, Trials, check_windows
from dipnet.errors import InputError
from dipnet.pack.packing import pack
from dipnet.sim.device import load_device
from tests.checkpoints import save_llama


@given(st.integers(1, 60), st.data())
def test_the_lowest_is_found_in_few_questions(count: int, data: st.DataObject) -> None:
    threshold = data.draw(st.integers(0, count))
    guess = data.draw(st.integers(0, count - 1))
    asked: list[int] = []

    def inside(at: int) -> bool:
        asked.append(at)
        return at >= threshold

    assert lowest(inside, guess, count) == (threshold if threshold < count else None)
    assert len(asked) == len(set(asked)) <= 2 * math.log2(count) + 2


def test_a_good_guess_costs_two_questions() -> None:
    asked: list[int] = []
    assert lowest(lambda at: asked.append(at) or at >= 17, 17, 34) == 17
    assert asked == [17, 16]


def test_an_increase_is_of_pairs() -> None:
    dense = [1.0, 5.0, 3.0]
    same = Increase.of([1.1, 5.1, 3.1], dense)
    assert same.mean == pytest.approx(math.expm1(0.1))
    assert same.at_most == pytest.approx(same.mean)
    other = Increase.of([1.0, 5.2], dense)  # mean 0.1, deviation 0.1 · √2, error 0.1
    assert other.mean == pytest.approx(math.expm1(0.1))
    assert other.at_most == pytest.approx(math.expm1(0.3))
    assert other.least == pytest.approx(math.expm1(-0.1))


def test_a_short_text_is_refused() -> None:
    check_windows(3, 64)
    with pytest.raises(InputError, match="2 windows of 64 tokens, and planning needs 3"):
        check_windows(2, 64)


@dataclass
class Stub:
    """Trials whose results are formulas: the needed density and the speed of a setup."""

    needed: Callable[[Setup], float]
    speed: Callable[[Setup, float | None], float]
    streaming: bool = True
    blocks: tuple[int, ...] = ()
    recall: object = None
    divided: bool = False
    asked: list[tuple[Setup, float]] = field(default_factory=list)

    @property
    def task(self) -> Any:
        group = SimpleNamespace(block=1)
        index = SimpleNamespace(activation="silu", neurons=group)
        blocks = dict.fromkeys(self.blocks)
        return SimpleNamespace(index=index, blocks=blocks, usual=Setup(1))

    dense = ()

    def trial(self, setup: Setup, density: float) -> Any:
        self.asked.append((setup, density))
        inside = density >= self.needed(setup)
        return SimpleNamespace(trace="trace" if inside else None, increase=Increase(0, 0, 0))

    def figures(self, setup: Setup, density: float | None = None) -> Any:
        return SimpleNamespace(tokens_per_second=self.speed(setup, density))

    def learn_recall(self, *_: object) -> None:
        self.recall = {}

    def forget(self, _: object) -> None:
        pass


def chosen(stub: Stub) -> Choice:
    return choose(stub)  # type: ignore[arg-type]


def faster_with_less(setup: Setup, density: float | None) -> float:
    """The dense model has 1; masks with γ find twice as much in memory."""
    return 1.0 if density is None else (2.0 if setup.gamma else 1.0) / density


def test_gamma_is_worth_its_density() -> None:
    """γ 0.5 needs 0.6 and γ 0.2 0.9, where plain masks need 0.5."""
    needed = {None: 0.5, 0.5: 0.6, 0.2: 0.9}
    found = chosen(
        Stub(lambda s: needed[s.gamma] - (0.05 if s.split == 2 else 0), faster_with_less)
    )
    assert (found.chosen.setup.gamma, found.chosen.setup.split) == (0.5, 2.0)
    assert found.chosen.density == 0.55
    first = {c.setup.gamma: c.density for c in found.candidates[1:4]}
    assert first == needed


def test_no_splits_where_an_allocation_divides() -> None:
    found = chosen(Stub(lambda s: 0.4 if s.split else 0.5, faster_with_less, divided=True))
    assert {candidate.setup.split for candidate in found.candidates} == {None}
    assert found.chosen.density == 0.5


def test_dense_when_nothing_keeps_the_bound() -> None:
    found = chosen(Stub(lambda _: 1.0, faster_with_less))
    assert found.chosen is found.dense
    assert len(found.candidates) == 1 + len(GAMMAS)
    assert all(c.figures is None and c.speed == 0 for c in found.candidates[1:])


def test_dense_when_sparsity_does_not_pay() -> None:
    found = chosen(Stub(lambda _: 0.2, lambda _, density: 1.0 if density is None else 0.9))
    assert found.chosen is found.dense
    assert all(c.figures for c in found.candidates[1:4])


def test_a_gain_that_is_none() -> None:
    speeds = {None: 1.0, 0.2: 1.005}
    found = chosen(Stub(lambda _: 0.2, lambda _, density: speeds.get(density, 0.5)))
    assert found.chosen is found.dense


def test_in_memory_there_is_no_cache_to_choose() -> None:
    stub = Stub(lambda _: 0.5, faster_with_less, streaming=False, blocks=(2, 4))
    found = chosen(stub)
    setups = {setup for setup, _ in stub.asked}
    assert {(s.gamma, s.policy, s.cache_split, s.block) for s in setups} == {
        (None, "lfu", "wanted", 1)
    }
    assert found.chosen.density == 0.5


def test_what_the_caches_do_is_tried() -> None:
    def speed(setup: Setup, density: float | None) -> float:
        gain = 1 + 0.5 * (setup.policy == "lru") + 0.5 * (setup.cache_split == "even")
        return faster_with_less(setup, density) * gain

    found = chosen(Stub(lambda _: 0.5, speed))
    assert (found.chosen.setup.policy, found.chosen.setup.cache_split) == ("lru", "even")


@pytest.mark.parametrize(("best", "tried"), [(1, {1, 2}), (2, {1, 2, 4}), (4, {1, 2, 4})])
def test_blocks_double_while_they_pay(best: int, tried: set[int]) -> None:
    def speed(setup: Setup, density: float | None) -> float:
        return faster_with_less(setup, density) * (1 - 0.1 * abs(setup.block - best))

    stub = Stub(lambda _: 0.5, speed, blocks=(2, 4))
    assert chosen(stub).chosen.setup.block == best
    assert {setup.block for setup, _ in stub.asked} == tried


def test_the_number_of_evaluations_is_announced() -> None:
    stub = Stub(lambda _: 0.6, faster_with_less, blocks=(2, 4))
    chosen(stub)
    assert len(set(stub.asked)) <= evaluations(streaming=True, blocks=2)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    save_llama(folder / "llama")
    pack(str(folder / "llama"), folder / "store", "int8")
    return folder / "store"


def task(store: Path, room: int | None, bound: float = 0.5) -> Task:
    tokens = torch.arange(3, 3 + 3 * 20)
    return Task(store, load_device("phone"), room, 64, bound, list(tokens.split(20)))


def test_trials_are_made_once_and_forgotten(store: Path, tmp_path: Path) -> None:
    started: list[str] = []
    trials = Trials(task(store, 4096), tmp_path, started.append)
    plain = Setup(1)
    first = trials.trial(plain, 0.5)
    assert trials.trial(Setup(1, policy="lru", cache_split="even"), 0.5) is first
    assert len(started) == 2  # and the dense model
    aware = trials.trial(Setup(1, gamma=0.2), 0.5)
    assert trials.trial(Setup(1, gamma=0.2, policy="lru"), 0.5) is not aware
    trials.forget(first)
    assert list(tmp_path.iterdir()) == [first.trace]
    assert trials.trial(plain, 0.5) is first


def test_figures_are_of_the_planned_caches(store: Path, tmp_path: Path) -> None:
    trials = Trials(task(store, 4096), tmp_path)
    plain, aware = Setup(1), Setup(1, gamma=0.2)
    dense = trials.figures(plain)
    found = trials.figures(plain, 0.5)
    assert dense.density == 1
    assert found.density == pytest.approx(0.5, abs=0.05)
    assert 0 < dense.cached <= 4096
    assert 0 < found.cached <= 4096
    assert found.hit_rate is not None
    assert trials.figures(aware, 0.5).hit_rate > found.hit_rate  # type: ignore[operator]
    whole = Trials(task(store, None), tmp_path)
    assert not whole.streaming
    assert whole.figures(plain, 0.5).bytes_per_token == 0


def test_what_is_hopeless_is_given_up(store: Path, tmp_path: Path) -> None:
    windows: list[int] = []
    trials = Trials(task(store, None, bound=-0.5), tmp_path, progress=windows.append)
    assert trials.trial(Setup(1), 0.5).trace is None
    assert list(tmp_path.iterdir()) == []


def test_guesses_are_learnt_from_decoding(store: Path, tmp_path: Path) -> None:
    trials = Trials(task(store, 4096), tmp_path)
    trials.learn_recall(Setup(1), 0.5)
    assert trials.recall is None or all(0 <= share <= 1 for share in trials.recall.values())


def test_densities_are_ordered() -> None:
    assert list(DENSITIES) == sorted(DENSITIES)
    assert 0 < DENSITIES[0] < DENSITIES[-1] < 1
