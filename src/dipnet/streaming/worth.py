"""Whether guesses pay: tokens are timed with and without them, and the faster way goes on.

What a guess gains depends on the disk, the processor and the model: reads hide behind attention,
but to make the guess takes time as well, and wrong ones keep the disk busy. Results are the same.
"""

from __future__ import annotations

from collections import deque
from statistics import median

TRIED = 8
"""Tokens in a row that try one way."""
PERIOD = 128
"""Tokens from one trial of both ways to the next."""


class Worth:
    """Says for every token whether to guess; is told how long the token took."""

    def __init__(self) -> None:
        self.guessing = True
        self._asked = False
        self._always = False
        self._tokens = 0
        self._took = {way: deque[float](maxlen=TRIED) for way in (True, False)}

    def ask(self) -> bool:
        """Whether this token guesses; it counts as one that could."""
        self._asked = True
        return self.guessing

    def always(self) -> None:
        """Guess for every token from here: for measurements of what that takes."""
        self._always = self.guessing = True

    def token(self, seconds: float) -> None:
        """A call has taken so many ``seconds``; calls in which nobody asked do not count."""
        if not self._asked or self._always:
            return
        self._asked = False
        at = self._tokens % PERIOD
        if at < 2 * TRIED:
            self._took[self.guessing].append(seconds)
        self._tokens += 1
        self.guessing = self._choice(self._tokens % PERIOD)

    def _choice(self, at: int) -> bool:
        if at < 2 * TRIED:
            return at < TRIED
        return median(self._took[True]) <= median(self._took[False])
