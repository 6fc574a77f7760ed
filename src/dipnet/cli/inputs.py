"""What commands start from: the loaded model, and the texts that they measure and fit on.

Texts are read by the model's name, before the model is loaded; they get its tokens afterwards.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dipnet.cli.console import quiet_libraries
from dipnet.errors import InputError

if TYPE_CHECKING:
    from dipnet.eval.texts import Text, TokenText
    from dipnet.models.load import LoadedModel

SPLIT_WINDOWS = 32
"""Windows of text on which a split is fitted: each candidate costs an evaluation of them."""
MOST_CHARACTERS = 16
"""Characters of a text that are read for every token that is wanted of it: four are usual."""


def load(name: str | None, device: str, dtype: str) -> LoadedModel:
    """The model of a command's arguments, the bundled one by default."""
    quiet_libraries()
    from dipnet.models.load import DEFAULT_MODEL, load_model

    return load_model(name or DEFAULT_MODEL, device=device, dtype=dtype)


def load_checkpoint(name: str | None, device: str, dtype: str) -> LoadedModel:
    """As `load`; InputError for a store, which never holds the dense model."""
    from dipnet.streaming.packed import is_store

    if name is not None and is_store(name):
        raise InputError(
            f"{name!r} is a packed model: fit on the checkpoint that it was packed from; the "
            "packed model takes the file, too"
        )
    return load(name, device, dtype)


def fit_inputs(
    model: str | None, text: Path | None, count: int, device: str, dtype: str
) -> tuple[LoadedModel, TokenText]:
    """The model, and the first tokens of the text that is fitted on.

    Raises InputError when there is no text.
    """
    quiet_libraries()
    from dipnet.eval.texts import TokenText, tokenize

    content = calibration_text(model, text)
    if content is None:
        raise InputError(f"what shall be fitted on for {model!r}? give --text")
    loaded = load_checkpoint(model, device, dtype)
    read = tokenize(loaded.tokenizer, content.content[: count * MOST_CHARACTERS])
    return loaded, TokenText(content, read).first(count)


def is_bundled(name: str | None) -> bool:
    """Whether a model comes with dipnet, and with texts to measure and fit on."""
    from dipnet.models.load import DEMO_MODELS

    return name is None or name in DEMO_MODELS


def calibration_text(name: str | None, file: Path | None) -> Text | None:
    """The text that methods are fitted on: ``file``, or the bundled one for a bundled model."""
    from dipnet.eval.texts import bundled_text, read_text

    if file:
        return read_text(file)
    return bundled_text("calibration") if is_bundled(name) else None


def tokens_of(loaded: LoadedModel, text: Text) -> TokenText:
    """The text with the model's tokens."""
    from dipnet.eval.texts import TokenText, tokenize

    return TokenText(text, tokenize(loaded.tokenizer, text.content))


def calibration_tokens(loaded: LoadedModel, text: Text | None) -> TokenText | None:
    """As much of the calibration text as is enough, where there is one."""
    from dipnet.adapt.ready import CALIBRATION_TOKENS

    return tokens_of(loaded, text).first(CALIBRATION_TOKENS) if text else None


def split_tokens(loaded: LoadedModel, text: Text, window: int) -> TokenText:
    """As many windows of the text that splits are fitted on as are enough."""
    return tokens_of(loaded, text).first(SPLIT_WINDOWS * window)


def check_window(loaded: LoadedModel, window: int | None) -> int:
    """The window's tokens: as given, else the context, at most 2048."""
    from dipnet.models.families import default_window

    if window is not None and window > loaded.context:
        raise InputError(
            f"--window {window} is longer than the context of {loaded.name!r}, "
            f"{loaded.context} tokens: give that or less"
        )
    return window or default_window(loaded.model)
