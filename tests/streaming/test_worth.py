"""Guesses go on where tokens with them are faster."""

from __future__ import annotations

import pytest

from dipnet.streaming.worth import PERIOD, TRIED, Worth


def ways(worth: Worth, guessing: float, alone: float, tokens: int) -> list[bool]:
    """What each token did when it takes so many seconds with a guess and without."""
    chosen = []
    for _ in range(tokens):
        chosen.append(worth.ask())
        worth.token(guessing if chosen[-1] else alone)
    return chosen


@pytest.mark.parametrize("pays", [True, False])
def test_both_ways_are_tried_and_the_faster_goes_on(pays: bool) -> None:
    slow, fast = 2.0, 1.0
    tried = [True] * TRIED + [False] * TRIED
    times = (fast, slow) if pays else (slow, fast)
    chosen = ways(Worth(), *times, 2 * PERIOD)
    assert chosen == 2 * (tried + [pays] * (PERIOD - 2 * TRIED))


def test_a_machine_that_changes() -> None:
    worth = Worth()
    assert ways(worth, 1.0, 2.0, PERIOD)[-1]
    assert not ways(worth, 3.0, 2.0, PERIOD)[-1]


def test_one_slow_token_decides_nothing() -> None:
    worth = Worth()
    worth.ask()
    worth.token(1000.0)
    assert ways(worth, 1.0, 2.0, PERIOD)[-2]


def test_calls_that_cannot_guess_do_not_count() -> None:
    """A prompt, or a model that is held whole."""
    worth = Worth()
    for _ in range(10 * TRIED):
        worth.token(1.0)
    assert ways(worth, 1.0, 2.0, TRIED + 1) == [True] * TRIED + [False]


def test_always() -> None:
    worth = Worth()
    worth.always()
    assert ways(worth, 2.0, 1.0, 2 * PERIOD) == [True] * 2 * PERIOD
