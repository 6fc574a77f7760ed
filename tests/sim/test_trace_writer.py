"""A trace is written whole or not at all, and says what went wrong in one line."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dipnet.errors import InputError
from dipnet.sim.trace import TraceCache, TraceSite, open_trace
from dipnet.sim.trace_writer import TraceWriter
from tests.sim.recorded import SHAPE, SITES, random_masks, write


def writer(file: Path, **options: Any) -> TraceWriter:
    return TraceWriter(file, SHAPE, "dip", SITES, **options)


def add(made: TraceWriter, tokens: int) -> None:
    for site, mask in zip(SITES, random_masks(tokens), strict=True):
        made.add(site.key, mask)


def fail(file: Path, error: BaseException) -> None:
    with writer(file) as made:
        add(made, 5)
        made.end_tokens(5)
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError])
def test_an_interruption_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    file = write(tmp_path / "t", random_masks(3))
    before = file.read_bytes()
    with pytest.raises(error, match="of the caller"):
        fail(file, error("of the caller"))
    assert os.listdir(tmp_path) == ["t"]
    assert file.read_bytes() == before


@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace", "shutil.copyfileobj"])
def test_an_interruption_at_the_end_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "t", random_masks(3), scores=True)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("step", ["os.fsync", "shutil.copyfileobj"])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(step, full)
    with pytest.raises(InputError, match=r"^cannot write .*/t: No space left on device$"):
        write(tmp_path / "t", random_masks(3), scores=True)
    assert os.listdir(tmp_path) == []


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="it is a folder"):
        writer(tmp_path)
    with pytest.raises(InputError, match="does not exist; make it"):
        writer(tmp_path / "no" / "t")


def test_nothing_to_record(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is nothing to trace"), writer(tmp_path / "t"):
        pass
    with pytest.raises(InputError, match="wanda decides no masks, so there is nothing to trace"):
        TraceWriter(tmp_path / "t", SHAPE, "wanda", [])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"units": 9}, "do not fit its shape of 20 x 8"),
        ({"units": 0}, "sites.0.units: Input should be greater"),
        ({"density": 0.0}, "sites.0.density: Input should be greater"),
        ({"density": float("nan")}, "sites.0.density"),
        ({"layer": 7}, "the model has 2 layers"),
        ({"name": "mlp"}, "is no site"),
    ],
)
def test_what_no_reader_would_take_is_not_written(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    sites = [replace(SITES[0], **changes)]
    with pytest.raises(InputError, match=f"^cannot record a trace: .*{message}"):
        TraceWriter(tmp_path / "t", SHAPE, "dip", sites)


def test_a_cache_that_no_reader_would_take(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has 9 slots"):
        writer(tmp_path / "t", cache=TraceCache("lru", (9, 1, 1, 1), 0.5))


def add_to_one_site(file: Path) -> None:
    with writer(file) as made:
        made.add((0, "mlp.in"), np.ones((3, 8), np.bool_))
        made.end_tokens(3)


def test_masks_must_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="came for 0 of 3 tokens"):
        add_to_one_site(tmp_path / "t")
    with pytest.raises(ValueError, match=r"are \(tokens, 8\) bool"), writer(tmp_path / "t") as made:
        made.add((0, "mlp.in"), np.ones((3, 9), np.bool_))
    with pytest.raises(ValueError, match=r"are \(tokens, 8\) bool"), writer(tmp_path / "t") as made:
        made.add((0, "mlp.in"), np.ones((3, 8), np.uint8))
    scored = writer(tmp_path / "t", scores=True)
    with pytest.raises(ValueError, match="have the shape of its masks"), scored as made:
        made.add((0, "mlp.in"), np.ones((3, 8), np.bool_), np.ones((3, 7), np.float16))
    assert os.listdir(tmp_path) == []


def test_sequences_without_a_token_begin_nowhere(tmp_path: Path) -> None:
    with writer(tmp_path / "t") as made:
        for tokens in (0, 2, 0, 0, 3):
            made.start_sequence()
            add(made, tokens)
            made.end_tokens(tokens)
        made.start_sequence()
    assert open_trace(tmp_path / "t").starts.tolist() == [0, 2]


def test_the_header_has_room_for_every_recall(tmp_path: Path) -> None:
    names = ("attn.in", "attn.out", "mlp.in", "mlp.hidden")
    thinned = ({"q": 8, "k": 4, "v": 4}, {"o": 8}, {"gate": 20, "up": 20}, {"down": 8})
    units = (8, 8, 8, 20)
    sites = [
        TraceSite(0, name, width, 1, 0.5, matrices)
        for name, width, matrices in zip(names, units, thinned, strict=True)
    ]
    for share in (1e-17, 1e-6, 0.12345678901234567, 2 / 3, 1.0):
        with TraceWriter(tmp_path / "t", SHAPE, "dip", sites) as made:
            for site in sites:
                made.add(site.key, np.ones((1, site.units), np.bool_))
            made.end_tokens(1)
            made.recall = dict.fromkeys(names, share)
        assert open_trace(tmp_path / "t").recall == pytest.approx(made.recall, abs=1e-6)
