"""The options that say which text is measured, and how: what `eval` and `simulate` share."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dipnet.cli.inputs import check_window, is_bundled
from dipnet.cli.streamed import source_of
from dipnet.errors import InputError

if TYPE_CHECKING:
    from dipnet.cache import CacheSettings
    from dipnet.eval.sweep import Setting
    from dipnet.eval.texts import Text
    from dipnet.models.load import LoadedModel


class Bos(StrEnum):
    """Whether each window begins with the BOS token."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


TextFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Text to measure on", show_default=False)
]
Dataset = Annotated[
    str | None,
    typer.Option(help="Or a dataset: hub id or local folder", show_default=False),
]
DatasetConfig = Annotated[str | None, typer.Option(help="Its configuration", show_default=False)]
DatasetSplit = Annotated[
    str | None, typer.Option(help="Its split; default: test", show_default=False)
]
Column = Annotated[str | None, typer.Option(help="Its column; default: text", show_default=False)]
Stride = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens between windows; default: no overlap", show_default=False),
]
Windows = Annotated[
    int | None, typer.Option(min=1, help="Measure the first so many", show_default=False)
]
BosOption = Annotated[
    Bos, typer.Option("--bos", help="Begin windows with BOS; auto: as the tokenizer does")
]


@dataclass(frozen=True)
class Source:
    """Where the text comes from: a file, a dataset, or neither for the bundled one."""

    file: Path | None
    dataset: str | None
    config: str | None
    split: str | None
    column: str | None


def measured_text(model: str | None, source: Source) -> Text:
    """The text to measure on: what the options say, or the bundled one for a bundled model."""
    from dipnet.eval.texts import bundled_text, read_text
    from dipnet.models.load import check_name

    if source.file and source.dataset:
        raise InputError("give either --text or --dataset, not both")
    if source.dataset:
        return _dataset_text(source.dataset, source)
    if source.config or source.split or source.column:
        raise InputError("--dataset-config, --split and --column go with --dataset: give that")
    if source.file:
        return read_text(source.file)
    if model is None or is_bundled(source_of(model)):
        return bundled_text("heldout")
    check_name(model)
    raise InputError(f"what shall {model!r} be measured on? give --text or --dataset")


def _dataset_text(name: str, source: Source) -> Text:
    from dipnet.eval.texts import dataset_text

    return dataset_text(
        name, config=source.config, split=source.split or "test", column=source.column or "text"
    )


def setting_of(
    loaded: LoadedModel,
    window: int | None,
    stride: int | None,
    dense_prompt: int,
    bos: Bos,
    batch_size: int,
    cache: CacheSettings | None,
) -> Setting:
    """How a text is measured, with what the options leave open."""
    from dipnet.eval.sweep import Setting
    from dipnet.eval.texts import bos_token

    tokens = check_window(loaded, window)
    token = bos_token(loaded.tokenizer, bos.value)
    return Setting(tokens, stride or tokens, dense_prompt, token, batch_size, cache)
