"""Progress bars on a terminal, and none where stderr is no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from dipnet.cli.console import err


def progress_bar(*columns: ProgressColumn, shown: bool = True) -> Progress:
    """A bar between a task's description and ``columns``, which goes when it is done."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *columns,
        console=err,
        transient=True,
        disable=not (shown and err.is_terminal),
    )


@contextmanager
def byte_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar in bytes; what is yielded moves it to (bytes done, bytes in all)."""
    bar = progress_bar(DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def step_progress(title: str, *, shown: bool = True) -> Iterator[Callable[[int, int, str], None]]:
    """A bar in steps of a fit; what is yielded moves it to (done, in all), and adds what is told
    of the last.
    """
    bar = progress_bar(
        TextColumn("{task.completed:,} of {task.total:,} steps{task.fields[told]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        shown=shown,
    )
    with bar:
        task = bar.add_task(title, total=0, told="")
        yield lambda done, total, told: bar.update(task, completed=done, total=total, told=told)


def window_progress() -> Progress:
    """A bar in windows of text."""
    return progress_bar(
        TextColumn("{task.completed:.0f}/{task.total:.0f} windows"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
