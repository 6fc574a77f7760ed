"""What commands start from: the loaded model, the texts, and methods made ready on them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dipnet.cli.console import quiet_libraries
from dipnet.errors import InputError

if TYPE_CHECKING:
    from dipnet.eval.texts import Text, TokenText
    from dipnet.models.load import LoadedModel

MAX_WINDOW = 2048
SPLIT_WINDOWS = 32
"""Windows of text on which a split is fitted: perplexity is flat between neighbouring splits."""


def load(name: str | None, device: str, dtype: str) -> LoadedModel:
    """The model of a command's arguments, the bundled one by default."""
    quiet_libraries()
    from dipnet.models.load import DEFAULT_MODEL, load_model

    return load_model(name or DEFAULT_MODEL, device=device, dtype=dtype)


def is_bundled(loaded: LoadedModel) -> bool:
    """Whether the model comes with dipnet, and with texts to measure and fit on."""
    from dipnet.models.load import DEMO_MODELS

    return loaded.name in DEMO_MODELS


def tokens_of(loaded: LoadedModel, text: Text) -> TokenText:
    """The text with the model's tokens."""
    from dipnet.eval.texts import TokenText, tokenize

    return TokenText(text, tokenize(loaded.tokenizer, text.content))


def calibration_text(loaded: LoadedModel, file: Path | None) -> TokenText | None:
    """The text that methods are fitted on: ``file``, or the bundled one for a bundled model."""
    from dipnet.adapt.ready import CALIBRATION_TOKENS
    from dipnet.eval.texts import bundled_text, read_text

    if file is None and not is_bundled(loaded):
        return None
    text = read_text(file) if file else bundled_text("calibration")
    return tokens_of(loaded, text).first(CALIBRATION_TOKENS)


def split_text(loaded: LoadedModel, file: Path, window: int) -> TokenText:
    """The text that splits are fitted on: as many windows of it as are enough."""
    from dipnet.eval.texts import read_text

    return tokens_of(loaded, read_text(file)).first(SPLIT_WINDOWS * window)


def check_window(loaded: LoadedModel, window: int | None) -> int:
    """The window's tokens: as given, else the context, at most 2048."""
    if window is not None and window > loaded.context:
        raise InputError(
            f"--window {window} is longer than the context of {loaded.name!r}, "
            f"{loaded.context} tokens: give that or less"
        )
    return window or min(loaded.context, MAX_WINDOW)
