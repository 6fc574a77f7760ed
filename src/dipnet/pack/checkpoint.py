"""A checkpoint's safetensors files, read in pieces: no tensor is ever held whole."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from dipnet.errors import InputError
from dipnet.models.compact import is_compact
from dipnet.models.load import DEMO_FOLDER, DEMO_MODELS, local_folder, shards

MAPPED_BYTES = 32 << 20
"""Bytes of a tensor that are mapped at a time: pages of a mapped file count as memory in use."""
FLOATING = ("BF16", "F16", "F32", "F64")
COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
"""Files beside the weights that a store takes along: the config and the tokenizer's."""
INDEX_SUFFIX = ".index.json"
RESERVED = ("index.json", "progress.json", "allocation.json")
"""Names that a store uses itself."""


class Checkpoint:
    """The tensors of a model: a bundled one, a local folder, or a hub id (which is downloaded).

    Raises InputError when the files are missing or damaged.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.folder = local_folder(name)
        self.files = shards(self.folder)
        self.compact = is_compact(self.files[0])
        self._file_of: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for file in self.files:
            self._list(file)

    @property
    def names(self) -> Collection[str]:
        """The names of the tensors."""
        return self._shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._shapes[name]

    def read(self, name: str, rows: slice, columns: slice | Tensor | None = None) -> Tensor:
        """Some rows of a tensor, and of those some columns, copied from the file.

        In the checkpoint's own dtype; a compact checkpoint's in float32.
        """
        pieces = []
        for start, stop in self._chunks(name, rows):
            with safe_open(self._file_of[name], framework="pt") as file:
                piece = file.get_slice(name)[start:stop]
                piece = piece.clone() if columns is None else piece[:, columns].clone()
                if self.compact and len(self.shape(name)) == 2:
                    piece = piece.float() * file.get_slice(f"{name}.scale")[start:stop]
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def side_files(self) -> list[Path]:
        """The config, the tokenizer's files and the like: what is copied as it is."""
        folders = [self.folder]
        if self.name in DEMO_MODELS:
            folders.append(DEMO_FOLDER / "tokenizer")
        found = {
            file.name: file
            for folder in folders
            for pattern in COPIED
            for file in sorted(folder.glob(pattern))
            if file.is_file() and not file.name.endswith(INDEX_SUFFIX)
        }
        return [file for name, file in sorted(found.items()) if name not in RESERVED]

    def fingerprint(self) -> list[list[str | int]]:
        """What tells these files from others of the same names."""
        stats = [(file.name, file.stat()) for file in (*self.files, *self.side_files())]
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]

    def _list(self, file: Path) -> None:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                if self.compact and name.endswith(".scale"):
                    continue
                stored = opened.get_slice(name)
                self._file_of[name] = file
                self._shapes[name] = tuple(stored.get_shape())
                if stored.get_dtype() not in FLOATING and not self.compact:
                    raise InputError(
                        f"{name!r} of {self.name!r} is stored as {stored.get_dtype()}: pack a "
                        "checkpoint in floating point, not a quantised one"
                    )

    def _chunks(self, name: str, rows: slice) -> Iterator[tuple[int, int]]:
        """Ranges of rows that are mapped one after the other."""
        row_bytes = 4 * torch.Size(self.shape(name)[1:]).numel()
        step = max(1, MAPPED_BYTES // row_bytes)
        for start in range(rows.start, rows.stop, step):
            yield start, min(start + step, rows.stop)
