"""Where the command line writes, and what it keeps from the terminal."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

PIPE_WIDTH = 120
"""Columns of a table that goes to a file or another program."""

out = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
err = Console(highlight=False, stderr=True)


def complain(kind: str, message: str) -> None:
    """Print one line on stderr: ``dipnet: kind: message``."""
    line = Text.assemble(("dipnet: ", "bold"), (f"{kind}: ", "bold red"), " ".join(message.split()))
    err.print(line, soft_wrap=True)


def note(message: str) -> None:
    """Print a remark on stderr."""
    err.print(Text(f"dipnet: {message}", style="dim"), soft_wrap=True)


@contextmanager
def interruptible(file: Path) -> Iterator[None]:
    """What writes ``file`` at its end: an interruption says that it did not."""
    try:
        yield
    except KeyboardInterrupt:
        note(f"nothing was written to {file}")
        raise


def titled_table(title: str, left: Iterable[str], right: Iterable[str]) -> Table:
    """An empty table with columns of words (``left``), then columns of figures (``right``)."""
    made = Table(
        title=title,
        title_style="bold",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 0, 0, 1),
    )
    for column in left:
        made.add_column(column)
    for column in right:
        made.add_column(column, justify="right")
    return made


def json_text(value: Any) -> str:
    """One JSON object as text."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def print_json(value: Any) -> None:
    """Print one JSON object on stdout."""
    sys.stdout.write(json_text(value))


def stream(text: str) -> None:
    """Write a piece of text on stdout at once, as it is."""
    sys.stdout.write(text)
    sys.stdout.flush()


def quiet_libraries() -> None:
    """Keep Hugging Face's bars and advice to developers from the terminal, but never errors."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.simplefilter("ignore")
    import huggingface_hub
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()
