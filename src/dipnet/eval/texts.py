"""The texts that are measured and fitted on: files, datasets, the bundled ones; and their tokens.

Knows no model: a tokenizer is all it needs.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from dipnet.errors import InputError
from dipnet.models.load import DEMO_FOLDER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Bundled = Literal["heldout", "calibration"]
BosRule = Literal["auto", "on", "off"]
ROW_SEPARATOR = "\n\n"
"""What joins a dataset's rows to one text, as is customary for WikiText-2."""


@dataclass(frozen=True)
class Text:
    """A text and where it came from."""

    name: str
    content: str

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of the text in UTF-8, as hex digits."""
        return hashlib.sha256(self.content.encode()).hexdigest()


@dataclass(frozen=True)
class TokenText:
    """A text and the (n,) tokens of it that are used."""

    text: Text
    tokens: Tensor

    def first(self, count: int) -> TokenText:
        """The same text, of which only the first ``count`` tokens are used."""
        return TokenText(self.text, self.tokens[:count])

    def as_json(self) -> dict[str, Any]:
        """Name, SHA-256 of the whole text, and the number of tokens used."""
        return {"name": self.text.name, "sha256": self.text.sha256, "tokens": len(self.tokens)}


def read_text(path: Path) -> Text:
    """The text of a UTF-8 file; InputError when there is none."""
    try:
        content = path.read_bytes().decode()  # bytes: newlines stay as they are
    except FileNotFoundError:
        raise InputError(f"there is no text file {path}: check the path") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder: give a text file in it") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text (byte {error.start}): convert it, for instance with iconv"
        ) from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    return _not_empty(Text(str(path), content))


def bundled_text(which: Bundled) -> Text:
    """One of the public-domain texts that come with the demo models."""
    return Text(f"bundled {which} text", read_text(DEMO_FOLDER / "text" / f"{which}.txt").content)


def dataset_text(
    name: str, *, config: str | None = None, split: str = "test", column: str = "text"
) -> Text:
    """The rows of one column of a dataset, joined by blank lines.

    ``name`` is a hub id, or a local folder of data files or of ``Dataset.save_to_disk``. Raises
    InputError when `datasets` is not installed or the dataset, split or column does not exist.
    """
    rows = _load_dataset(name, config, split)
    if column not in rows.column_names:
        raise InputError(
            f"dataset {name!r} has no column {column!r}; it has: {', '.join(rows.column_names)} "
            "(--column)"
        )
    parts = [name, *([config] if config else []), split, column]
    return _not_empty(Text(":".join(parts), ROW_SEPARATOR.join(map(str, rows[column]))))


def _load_dataset(name: str, config: str | None, split: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise InputError(
            "reading a dataset needs the datasets library: pip install 'dipnet[datasets]'"
        ) from None
    datasets.disable_progress_bars()
    try:
        if (Path(name) / "dataset_dict.json").is_file():
            return datasets.load_from_disk(name)[split]
        if (Path(name) / "dataset_info.json").is_file():
            return datasets.load_from_disk(name)
        return datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError) as e:
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0].rstrip(".")
        raise InputError(
            f"cannot load split {split!r} of dataset {name!r}: {reason} (give a hub id and be "
            "online, or a local folder; see --dataset-config and --split)"
        ) from None


def _not_empty(text: Text) -> Text:
    if not text.content.strip():
        raise InputError(f"the text of {text.name} is empty: give one with some words in it")
    return text


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """The (n,) int64 tokens of a text of any length, without special tokens."""
    encoded = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.long)


def bos_token(tokenizer: PreTrainedTokenizerBase, rule: BosRule = "auto") -> int | None:
    """The token that begins every window, or None.

    "auto" follows the tokenizer: its BOS when it puts one before plain text. Raises InputError
    when BOS is asked for and the tokenizer has none.
    """
    if rule not in get_args(BosRule):
        raise InputError(f"bos is one of {', '.join(get_args(BosRule))}, not {rule!r}")
    bos: int | None = tokenizer.bos_token_id
    if rule == "off":
        return None
    if rule == "on":
        if bos is None:
            raise InputError("the tokenizer has no BOS token: use --bos auto or off")
        return bos
    begins = tokenizer("a")["input_ids"][:1]
    return bos if bos is not None and begins == [bos] else None
