"""Which way the sequences of a batch take to a site's weights."""

from __future__ import annotations

import pytest

from dipnet.models.decoding import sharing
from dipnet.models.decoding.sharing import MOST_ROWS, OF_HEADS, kept_together, way

LARGE = 4096, 2.3e8
"""The units and bytes of gate and up of a model with 8 billion weights."""


def test_one_sequence_reads_its_own() -> None:
    assert {way(1, density, *LARGE) for density in (0.01, 0.5, 1.0)} == {"own"}


@pytest.mark.parametrize(("rows", "density", "share"), [(1, 0.3, 0.3), (2, 0.5, 0.75), (8, 1, 1)])
def test_what_is_kept_together(rows: int, density: float, share: float) -> None:
    assert kept_together(rows, density) == pytest.approx(share)


@pytest.mark.parametrize(
    ("rows", "density", "taken"),
    [(2, 0.25, "own"), (4, 0.1, "own"), (2, 0.5, "whole"), (4, 0.5, "whole"), (8, 0.25, "whole")],
)
def test_what_is_read_less_is_taken(rows: int, density: float, taken: str) -> None:
    """Lists of the rows' own read what two of them keep twice."""
    assert way(rows, density, *LARGE) == taken


@pytest.mark.parametrize(
    ("rows", "density", "taken"),
    [(1, 0.5, "own"), (2, 0.1, "union"), (4, 0.1, "union"), (2, 0.5, "whole"), (4, 0.5, "whole")],
)
def test_skipped_heads_share_or_read_everything(rows: int, density: float, taken: str) -> None:
    """What one row lacks is completed for all of them: there are no lists of their own."""
    assert way(rows, density, 56, 4.1e8, OF_HEADS) == taken


def test_a_shared_list_where_it_costs_little(monkeypatch: pytest.MonkeyPatch) -> None:
    assert way(MOST_ROWS, 0.12, *LARGE) == "whole"
    for name in ("OF_LIST", "OF_UNIT"):
        monkeypatch.setattr(sharing, name, 0.0)
    monkeypatch.setattr(sharing, "READ_SHARED", sharing.READ_WHOLE)
    assert way(MOST_ROWS, 0.12, *LARGE) == "union"
