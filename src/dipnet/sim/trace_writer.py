"""Writes a trace row by row: whole, or not at all."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from dipnet.errors import InputError, complaint
from dipnet.files import check_writable, whole_file
from dipnet.sim.shape import ModelShape
from dipnet.sim.trace import KEY, Header, Layout, TraceCache, TraceSite
from dipnet.store.geometry import round_up

MOST_TOKENS = 2**62 - 1
LENGTH_BYTES = 8
"""Of the header's length, which a safetensors file begins with."""
ROWS_AT_ONCE = 256
"""Tokens whose rows are put together at a time: they need not all be in memory twice."""


class TraceWriter:
    """Records a trace at ``path``, which appears there when the ``with`` block ends without error.

    The masks of some tokens come site by site, in one or more pieces (``add``); when all are there
    ``end_tokens`` writes the tokens' rows. ``start_sequence`` says which token begins a sequence;
    the first always does. ``recall`` may be set before the end. With ``scores`` every ``add``
    brings them too. ``added_weights`` are the numbers that the method itself reads for a token.
    Raises InputError when the file cannot be written, what it would say of itself is inconsistent,
    or no token was recorded.
    """

    def __init__(
        self,
        path: str | Path,
        shape: ModelShape,
        method: str,
        sites: Sequence[TraceSite],
        cache: TraceCache | None = None,
        *,
        scores: bool = False,
        added_weights: int = 0,
    ) -> None:
        self.path = Path(path)
        self.recall: Mapping[str, float] | None = None
        self.tokens = 0
        self._header = _header(shape, method, sites, cache, added_weights)
        self._layout = Layout.of(self._header.sites)
        self._sites = {site.key: site for site in self._header.sites}
        self._scored = scores
        self._starts = [0]
        self._clear()
        check_writable(self.path)

    def __enter__(self) -> Self:
        with _writing(self.path), ExitStack() as opened:
            self._file = opened.enter_context(whole_file(self.path))
            self._spool = opened.enter_context(tempfile.TemporaryFile(dir=self.path.parent))
            opened.push(self._end)
            self._room = round_up(len(self._longest_head()), LENGTH_BYTES)
            self._file.write(bytes(LENGTH_BYTES + self._room))
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is not None:
            self._opened.__exit__(*error)
            return
        with _writing(self.path):
            self._opened.close()

    def start_sequence(self, ahead: int = 0) -> None:
        """A sequence begins with the next token to be written, or so many tokens after it."""
        if self.tokens + ahead > self._starts[-1]:
            self._starts.append(self.tokens + ahead)

    def add(
        self,
        key: tuple[int, str],
        mask: NDArray[np.bool_],
        scores: NDArray[np.float16] | None = None,
    ) -> None:
        """The (tokens, units) masks of a site, for the tokens after those that it had before.

        ``scores`` of the same shape are asked for when the trace has any. Raises ValueError when
        they have another shape than the site.
        """
        units = self._sites[key].units
        if mask.dtype != np.bool_ or mask.shape[1:] != (units,):
            raise ValueError(f"masks of {key} are (tokens, {units}) bool, not {mask.shape}")
        self._masks[key].append(np.packbits(mask, axis=1, bitorder="little"))
        if self._scored:
            if scores is None or scores.shape != mask.shape:
                raise ValueError(f"scores of {key} have the shape of its masks, {mask.shape}")
            self._scores[key].append(scores.astype("<f2", copy=False))

    def end_tokens(self, tokens: int) -> None:
        """Write the rows of the ``tokens`` whose masks came; ValueError unless they all did."""
        masks = self._joined(self._masks, tokens)
        scores = self._joined(self._scores, tokens) if self._scored else []
        self._clear()
        with _writing(self.path):
            for start in range(0, tokens, ROWS_AT_ONCE):
                part = slice(start, min(tokens, start + ROWS_AT_ONCE))
                self._file.write(self._rows(masks, part).data)
                if scores:
                    row = np.concatenate([each[part] for each in scores], axis=1)
                    self._spool.write(row.data)
        self.tokens += tokens

    def _clear(self) -> None:
        self._masks: dict[tuple[int, str], list[NDArray]] = {key: [] for key in self._sites}
        self._scores: dict[tuple[int, str], list[NDArray]] = {key: [] for key in self._sites}

    def _joined(
        self, pieces: Mapping[tuple[int, str], list[NDArray]], tokens: int
    ) -> list[NDArray]:
        """The pieces of every site as one array of ``tokens`` rows."""
        joined = []
        for key, parts in pieces.items():
            came = sum(map(len, parts))
            if came != tokens:
                raise ValueError(f"masks of {key} came for {came} of {tokens} tokens")
            if tokens:
                joined.append(parts[0] if len(parts) == 1 else np.concatenate(parts))
        return joined

    def _rows(self, masks: Sequence[NDArray[np.uint8]], part: slice) -> NDArray[np.uint8]:
        """(tokens, row_bytes) of some of the tokens."""
        rows = np.zeros((part.stop - part.start, self._layout.row_bytes), np.uint8)
        for packed, left in zip(masks, self._layout.starts, strict=True):
            rows[:, left : left + packed.shape[1]] = packed[part]
        return rows

    def _end(self, *error: Any) -> None:
        """Append what follows the masks, and write the header that was left out."""
        if error[0] is not None:
            return
        if not self.tokens:
            raise InputError(
                "there is nothing to trace, the masks of no token were decided: give a longer "
                "text, or prune the prompt too"
            )
        if self._scored:
            self._spool.seek(0)
            shutil.copyfileobj(self._spool, self._file)
        starts = [start for start in self._starts if start < self.tokens]
        self._file.write(np.array(starts, "<i8").data)
        head = self._head(self.tokens, len(starts), self.recall)
        self._file.seek(0)
        self._file.write(self._room.to_bytes(LENGTH_BYTES, "little") + head.ljust(self._room))

    def _longest_head(self) -> bytes:
        """A header that is no shorter than any that this recording may end with."""
        recall = {site.name: 1 / 3 for site in self._header.sites}
        return self._head(MOST_TOKENS, MOST_TOKENS, recall)

    def _head(self, tokens: int, sequences: int, recall: Mapping[str, float] | None) -> bytes:
        """The safetensors header of so many tokens and sequences, without its length."""
        rounded = None if recall is None else {name: round(s, 6) for name, s in recall.items()}
        header = self._header.model_copy(update={"tokens": tokens, "recall": rounded})
        units = sum(site.units for site in self._header.sites)
        tensors = {"masks": ("U8", 1, [tokens, self._layout.row_bytes])}
        if self._scored:
            tensors["scores"] = ("F16", 2, [tokens, units])
        tensors["starts"] = ("I64", 8, [sequences])
        entries: dict[str, Any] = {"__metadata__": {KEY: header.model_dump_json()}}
        end = 0
        for name, (dtype, item, shape) in tensors.items():
            begin, end = end, end + item * math.prod(shape)
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        return json.dumps(entries, separators=(",", ":")).encode()


def _header(
    shape: ModelShape,
    method: str,
    sites: Sequence[TraceSite],
    cache: TraceCache | None,
    added_weights: int,
) -> Header:
    """What the trace will say of itself, but for what is known at its end."""
    if not sites:
        raise InputError(
            f"{method} decides no masks, so there is nothing to trace: take a method such as dip"
        )
    try:
        return Header(
            model=shape,
            method=method,
            sites=tuple(sites),
            cache=cache,
            recall=None,
            tokens=1,
            added_weights=added_weights,
        )
    except ValidationError as error:
        raise InputError(f"cannot record a trace: {complaint(error)}") from None


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Say in one line that the file cannot be written."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
