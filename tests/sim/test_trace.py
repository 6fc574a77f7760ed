"""Traces come back as they were written, by anyone's reader, or are refused in one line."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dipnet.errors import InputError
from dipnet.sim.trace import TraceCache, TraceSite, is_trace, open_trace
from dipnet.sim.trace_writer import TraceWriter
from tests.sim.recorded import SHAPE, SITES, random_masks, write

CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "format": (lambda c: c.update(format="zip"), "is no trace"),
    "version": (lambda c: c.update(version=2), "of version 2 and this dipnet reads 1"),
    "no version": (lambda c: c.pop("version"), "version: Field required"),
    "no sites": (lambda c: c.update(sites=[]), "sites: Tuple should have at least 1 item"),
    "tokens": (lambda c: c.update(tokens=6), r"masks is U8 of shape \[7, 8\], must be U8 of \[6"),
    "no tokens": (lambda c: c.update(tokens=0), "tokens: Input should be greater"),
    "truth": (lambda c: c.update(tokens=True), "tokens: Input should be a valid integer"),
    "endless": (lambda c: c.update(tokens=10**400), "tokens"),
    "twice": (lambda c: c["sites"].__setitem__(1, c["sites"][0]), "a site appears twice"),
    "units": (lambda c: c["sites"][0].update(units=9), "do not fit its shape of 20 x 8"),
    "block": (lambda c: c["sites"][1].update(block=4), "do not fit its shape of 8 x 20"),
    "layer": (lambda c: c["sites"][0].update(layer=2), "the model has 2 layers"),
    "name": (lambda c: c["sites"][0].update(name="mlp"), "is no site; known: attn.in"),
    "matrix": (lambda c: c["sites"][0].update(matrices={"x": 20}), "unknown matrices x"),
    "density": (lambda c: c["sites"][0].update(density=1.5), "sites.0.density: Input should be"),
    "nan": (lambda c: c["sites"][0].update(density=float("nan")), "sites.0.density"),
    "shape": (
        lambda c: c["model"]["matrices"].update(q=[8, 9]),
        "disagree about the model's width",
    ),
    "no q": (lambda c: c["model"]["matrices"].pop("q"), "must be q, k, v, o, up and down"),
    "zero": (lambda c: c["model"]["matrices"].update(q=[0, 8]), "model.matrices.q.0: Input"),
    "policy": (lambda c: c["cache"].update(policy="mru"), "unknown cache policy 'mru'"),
    "slots": (lambda c: c["cache"].update(slots=[1]), "slots for 1 of 4 sites"),
    "many slots": (lambda c: c["cache"].update(slots=[9] * 4), "mlp.in of layer 0 has 9 slots"),
    "gamma": (lambda c: c["cache"].update(gamma=0), "cache.gamma: Input should be greater"),
    "recall": (lambda c: c.update(recall={"mlp.in": 2}), "recall.mlp.in: Input should be less"),
    "whose": (lambda c: c.update(recall={"attn.in": 0.5}), "recall names sites that the trace"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace with everything in it; leave it as it is."""
    file = tmp_path_factory.mktemp("trace") / "sound.trace"
    cache = TraceCache("lfu", (1, 2, 8, 0), 0.5)
    write(file, random_masks(7), cache=cache, scores=True, recall={"mlp.in": 0.75})
    return file


def rewrite(
    sound: Path,
    to: Path,
    change: Callable[[dict[str, Any]], object],
    **tensors: NDArray[Any] | None,
) -> Path:
    """A copy with a changed description, and other tensors; None drops one."""
    with safe_open(sound, "np") as file:
        content = json.loads(file.metadata()["dipnet"])
    change(content)
    kept = {name: t for name, t in (load_file(sound) | tensors).items() if t is not None}
    save_file(kept, to, metadata={"dipnet": json.dumps(content)})
    return to


def same(_content: dict[str, Any]) -> None:
    """Change nothing."""


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    masks, cache = random_masks(7), TraceCache("lfu", (1, 2, 8, 0), 0.5)
    file = write(tmp_path / "t", masks, starts=(0, 3), cache=cache, recall={"mlp.in": 2 / 3})
    trace = open_trace(file)
    assert (trace.shape, trace.method, trace.sites) == (SHAPE, "dip:density=0.5", SITES)
    assert (trace.cache, trace.tokens, trace.has_scores) == (cache, 7, False)
    assert trace.recall == {"mlp.in": 0.666667}
    assert trace.starts.tolist() == [0, 3]
    for number, mask in enumerate(masks):
        assert (trace.masks(number, 0, 7) == mask).all()
        assert (trace.masks(number, 2, 5) == mask[2:5]).all()
        assert trace.masks(number, 5, 5).shape == (0, SITES[number].units)
    with pytest.raises(IndexError, match="tokens 0 to 8 of a trace of 7"):
        trace.masks(0, 0, 8)
    with pytest.raises(InputError, match="has no scores: record it with --trace-scores"):
        trace.scores(0, 0, 1)


def test_scores_come_back(sound: Path) -> None:
    trace = open_trace(sound)
    for number, site in enumerate(SITES):
        scores = trace.scores(number, 2, 7)
        assert (scores.dtype, scores.shape) == (np.float16, (5, site.units))
        # `write` gives the n-th unit wanted the score n + 1, the others 0
        ranks = trace.masks(number, 2, 7) * (np.arange(site.units) + 1)
        assert (scores == ranks.astype(np.float16)).all()


def test_any_safetensors_reader_finds_the_documented_bits(tmp_path: Path) -> None:
    """Bit by bit, with nothing of ours: docs/trace-format.md."""
    masks = random_masks(5)
    tensors = load_file(write(tmp_path / "t", masks, starts=(0, 2)))
    assert tensors["starts"].tolist() == [0, 2]
    at = 0
    for mask in masks:
        for token, row in enumerate(mask):
            for unit, wanted in enumerate(row):
                byte = int(tensors["masks"][token, at + unit // 8])
                assert byte >> (unit % 8) & 1 == int(wanted)
        at += (mask.shape[1] + 7) // 8
    assert tensors["masks"].shape == (5, 8)
    assert not tensors["masks"][:, at:].any()
    head = int.from_bytes((tmp_path / "t").read_bytes()[:8], "little")
    assert head % 8 == 0, "tensors are aligned"


@pytest.mark.parametrize("change", CHANGES)
def test_a_wrong_description(sound: Path, tmp_path: Path, change: str) -> None:
    edit, message = CHANGES[change]
    file = rewrite(sound, tmp_path / "t", edit)
    with pytest.raises(InputError, match=message) as error:
        open_trace(file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)
    assert is_trace(file)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("masks", None, "lacks the tensors masks and starts"),
        ("masks", np.zeros((7, 8), np.int8), r"masks is I8 of shape \[7, 8\], must be U8"),
        ("masks", np.zeros((7, 4), np.uint8), r"must be U8 of \[7, 8\]"),
        ("masks", np.zeros(56, np.uint8), r"must be U8 of \[7, 8\]"),
        ("scores", np.zeros((7, 8), np.float16), r"must be F16 of \[7, 36\]"),
        ("starts", None, "lacks the tensors masks and starts"),
        ("starts", np.array([0], np.int32), "starts is I32"),
        ("starts", np.array(0), r"starts is I64 of shape \[\]"),
        ("starts", np.array([[0]]), r"starts is I64 of shape \[1, 1\]"),
        ("starts", np.array([], np.int64), "starts must ascend from 0"),
        ("starts", np.array([1]), "starts must ascend from 0"),
        ("starts", np.array([0, 7]), "starts must ascend from 0"),
        ("starts", np.array([0, 3, 3]), "starts must ascend from 0"),
        ("starts", np.array([0, -(2**63), 2**62]), "starts must ascend from 0"),
    ],
)
def test_wrong_tensors(
    sound: Path, tmp_path: Path, name: str, tensor: NDArray[Any] | None, message: str
) -> None:
    file = rewrite(sound, tmp_path / "t", same, **{name: tensor})
    with pytest.raises(InputError, match=message):
        open_trace(file)


def test_keys_that_a_later_version_adds_are_ignored(sound: Path, tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["new"] = content["sites"][0]["new"] = content["model"]["new"] = 1

    file = rewrite(sound, tmp_path / "t", change, more=np.zeros(3))
    assert (open_trace(file).masks(1, 0, 7) == open_trace(sound).masks(1, 0, 7)).all()


def test_what_is_no_trace(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with pytest.raises(InputError, match="does not exist: record one with dipnet eval --trace"):
        open_trace(file)
    with pytest.raises(InputError, match="is no file"):
        open_trace(tmp_path)
    for content in (b"", b"PK\3\4", b"{}", b"\xff" * 64, b"\0" * 64):
        file.write_bytes(content)
        with pytest.raises(InputError, match="is no trace, or a damaged one"):
            open_trace(file)
        assert not is_trace(file)
    save_file({"weight": np.zeros(3)}, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match="is no trace, it is another safetensors file"):
        open_trace(file)
    save_file({"weight": np.zeros(3)}, file, metadata={"dipnet": "[]"})
    with pytest.raises(InputError, match="is damaged"):
        open_trace(file)
    assert not is_trace(tmp_path / "nothing")


def read_all(file: Path) -> None:
    """Read everything that a damaged trace may still offer; it is refused, or all there."""
    try:
        trace = open_trace(file)
    except InputError as error:
        message = str(error)
    else:
        message = ""
    assert "\n" not in message
    assert len(message) < 1000
    if message:
        return
    for number, site in enumerate(trace.sites):
        assert trace.masks(number, 0, trace.tokens).shape == (trace.tokens, site.units)
    assert trace.starts[0] == 0
    assert trace.starts[-1] < trace.tokens


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_bytes(sound: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(sound.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, len(content) - 1))
        content[where] = data.draw(st.integers(0, 255))
    file = tmp_path / "changed"
    file.write_bytes(content)
    read_all(file)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_truncated(sound: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = sound.read_bytes()
    file = tmp_path / "cut"
    file.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(InputError, match="is no trace, or a damaged one"):
        open_trace(file)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**31, 2**63, 10**400])
    | st.floats()
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_description(sound: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Some value of the description, at any depth, is replaced by anything that JSON can say."""

    def change(content: dict[str, Any]) -> None:
        holder: Any = content
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            key = data.draw(st.sampled_from(keys))
            inner = holder[key]
            if not isinstance(inner, dict | list) or not inner or data.draw(st.booleans()):
                holder[key] = data.draw(JSON)
                return
            holder = inner

    read_all(rewrite(sound, tmp_path / "t", change))


@settings(max_examples=40)
@given(
    widths=st.lists(st.integers(1, 40), min_size=1, max_size=2),
    pieces=st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_masks(
    tmp_path_factory: pytest.TempPathFactory, widths: list[int], pieces: list[int], seed: int
) -> None:
    """Whatever the units of the sites, and however the tokens come."""
    rng, file = np.random.default_rng(seed), tmp_path_factory.mktemp("any") / "t"
    sites = [TraceSite(0, "mlp.in", 8, 1, 0.5, {"gate": 20, "up": 20})]
    sites += [
        TraceSite(layer, "mlp.hidden", 20 // block, block, 0.5, {"down": 8 * block})
        for layer, block in enumerate(rng.choice([1, 2, 4, 5, 10, 20], len(widths)).tolist())
    ]
    masks = [rng.random((sum(pieces), site.units)) < 0.5 for site in sites]
    with TraceWriter(file, SHAPE, "dip", sites) as writer:
        start = 0
        for piece in pieces:
            for site, mask in zip(sites, masks, strict=True):
                middle = start + int(rng.integers(0, piece + 1))
                writer.add(site.key, mask[start:middle])
                writer.add(site.key, mask[middle : start + piece])
            writer.start_sequence()
            writer.end_tokens(piece)
            start += piece
    trace = open_trace(file)
    begins = {sum(pieces[:number]) for number, piece in enumerate(pieces) if piece}
    assert trace.starts.tolist() == sorted(begins)
    for number, mask in enumerate(masks):
        assert (trace.masks(number, 0, trace.tokens) == mask).all()


def test_memory_does_not_grow_with_the_trace(tmp_path: Path) -> None:
    def peak(tokens: int) -> int:
        file = tmp_path / f"{tokens}"
        tracemalloc.start()
        with TraceWriter(file, SHAPE, "dip", SITES) as writer:
            for _ in range(0, tokens, 100):
                for site in SITES:
                    writer.add(site.key, np.ones((100, site.units), np.bool_))
                writer.end_tokens(100)
        trace = open_trace(file)
        wanted = 0
        for start in range(0, tokens, 100):
            wanted += int(trace.masks(0, start, start + 100).sum())
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert wanted == tokens * SITES[0].units
        return used

    peak(100)  # what is imported or cached once
    assert peak(40_000) < peak(1_000) + 30_000
