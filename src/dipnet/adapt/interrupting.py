"""An interruption that waits for the end of a step, so that nothing is left half changed."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self


class Deferred:
    """Inside ``with``, Ctrl-C sets ``pending``; the second one interrupts at once, as ever."""

    def __init__(self) -> None:
        self.pending = False
        self._before: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.pending = True
        self._restore()

    def _restore(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None
