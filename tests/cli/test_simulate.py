"""``dipnet simulate``: from a model and from a trace, its tables, pictures and errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Run

PNG = b"\x89PNG\r\n\x1a\n"
Error = Callable[..., str]


@pytest.fixture
def trace(run: Run, llama: str, text: str, tmp_path: Path) -> str:
    file = tmp_path / "dip.trace"
    result = run(
        *("eval", llama, "--text", text, "--method", "dip", "--density", "0.5"),
        *("--windows", "1", "--trace", str(file)),
    )
    assert result.code == 0, result.err
    return str(file)


@pytest.fixture
def aware(run: Run, llama: str, text: str, tmp_path: Path) -> str:
    file = tmp_path / "aware.trace"
    result = run(
        *("eval", llama, "--text", text, "--method", "dip:cache_aware=0.5", "--density", "0.5"),
        *("--cache", "0.5", "--windows", "1", "--trace", str(file)),
    )
    assert result.code == 0, result.err
    return str(file)


def test_a_model(run: Run, llama: str, text: str, tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    arguments = (
        *("simulate", llama, "--text", text, "--windows", "1", "--memory", "75%,80%"),
        *("--density", "0.5,0.7", "--gamma", "1,0.5", "--policy", "lru", "--plot", str(plot)),
    )
    found = run(*arguments, "--json").json
    assert found["schema"] == "dipnet.simulate/1"
    assert (found["stretched"], found["weights"], found["context"]) == (False, "int4", 64)
    masked = [row for row in found["rows"] if row["method"] == "dip"]
    settings = {(row["memory"], row["gamma"], row["density_asked"]) for row in masked}
    assert len(settings) == len(masked) == 2 * 2 * 2
    assert {row["gamma"] for row in masked} == {None, 0.5}
    assert len(found["rows"]) == 2 + len(masked)
    assert all(row["memory_used"] <= row["memory"] for row in found["rows"])
    assert all(row["tokens_per_second"] > 0 and row["perplexity"] > 0 for row in found["rows"])
    assert plot.read_bytes().startswith(PNG)
    assert run(*arguments, "--json").json == found


def test_a_table_for_people(run: Run, llama: str, text: str) -> None:
    result = run(
        *("simulate", llama, "--text", text, "--windows", "1", "--memory", "80%"),
        *("--policy", "none", "--policy", "lfu,belady", "--method", "dip:cache_aware=0.5"),
    )
    assert result.code == 0, result.err
    rows = [line.split() for line in result.out.splitlines()]
    assert ["lfu", "belady", "none"].count("lfu") == 1
    assert any("dip:cache_aware=0.5" in row and "lfu" in row for row in rows)
    assert (
        "– dip:cache_aware=0.5: masks that prefer what is in memory need lru or lfu" in result.out
    )


def test_a_trace(run: Run, trace: str) -> None:
    found = run(
        *("simulate", trace, "--memory", "80%", "--device", "phone,laptop-nvme"),
        *("--flash-speed", "500MB/s,1GB/s", "--policy", "none,lru,lfu,belady", "--json"),
    ).json
    assert found["source"] == f"trace {trace}"
    rows = [row for row in found["rows"] if row["method"] == "dip:density=0.5"]
    assert len(rows) == 4 * 2 * 2
    assert all(row["perplexity"] is None for row in found["rows"])
    by_policy = {row["policy"]: row["hit_rate"] for row in rows}
    assert by_policy["belady"] >= max(by_policy["lru"], by_policy["lfu"]) > by_policy["none"] == 0
    speeds = {(row["device"], row["flash_bandwidth"]) for row in rows}
    assert speeds == {(name, speed) for name in ("phone", "laptop-nvme") for speed in (500e6, 1e9)}


def test_a_trace_and_its_model_agree(run: Run, llama: str, text: str, trace: str) -> None:
    options = ("--memory", "80%", "--json")
    (_, replayed) = run("simulate", trace, *options).json["rows"]
    (_, evaluated) = run("simulate", llama, "--text", text, "--windows", "1", *options).json["rows"]
    assert evaluated.pop("perplexity") > 0
    assert replayed.pop("perplexity") is None
    differing = {key for key in replayed if replayed[key] != evaluated[key]}
    assert differing == {"method", "density_asked"}


def test_what_is_stretched_says_so(run: Run, trace: str) -> None:
    result = run("simulate", trace, "--shape", "phi-3-medium", "--memory", "4GiB")
    assert result.code == 0, result.err
    assert "Stretched: masks, hit rates and perplexities are those of" in result.out
    assert "They are no measurement of phi-3-medium" in result.out
    found = run("simulate", trace, "--shape", "phi-3-medium", "--memory", "4GiB", "--json").json
    assert found["stretched"]
    assert found["simulated"] == "phi-3-medium"
    assert 3 * 2**30 < found["rows"][1]["memory_used"] <= 4 * 2**30


def test_a_trace_with_a_cache(run: Run, aware: str) -> None:
    _, row = run("simulate", aware, "--json").json["rows"]
    assert (row["gamma"], row["policy"]) == (0.5, "lru")
    assert 0 < row["hit_rate"] < 1


@pytest.mark.parametrize("options", [("--memory", "80%"), ("--policy", "lfu")])
def test_a_trace_with_a_cache_is_not_swept(
    error: Error, aware: str, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert "a cache (lru) decided the masks of this trace" in error("simulate", aware, *options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--memory", "much"), "no size in memory"),
        (("--memory", "120%"), "no share of a model"),
        (("--memory", "1KiB"), "is too little for"),
        (("--memory", "9GB"), "of memory is more than phone has"),
        (("--device", "fone"), "Did you mean 'phone'?"),
        (("--flash-speed", "fast"), "'fast' is no speed: write 1GB/s"),
        (("--flash-speed", "0GB/s"), "is no speed"),
        (("--flash-speed", "1GB/h"), "is no speed"),
        (("--policy", "lru,fifo"), "unknown cache policy 'fifo'"),
        (("--shape", "phi"), "unknown shape 'phi'"),
        (("--density", "0.5"), "--density has no effect on"),
        (("--gamma", "0.5"), "--gamma has no effect on"),
        (("--windows", "1"), "--windows has no effect on"),
        (("--plot", "p.png"), "a trace knows no perplexity"),
    ],
)
def test_a_trace_with_options_that_make_no_sense(
    error: Error,
    trace: str,
    options: tuple[str, ...],
    reason: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    capsys.readouterr()
    assert reason in error("simulate", trace, *options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--density", "half"), "--density takes numbers such as 0.5,0.67, not 'half'"),
        (("--density", "1.5"), "density must be in (0, 1]"),
        (("--method", "gate", "--gamma", "0.5"), "--gamma has no effect on gate"),
        (("--gamma", "2"), "cache_aware must be in (0, 1]"),
        (("--plot", "p.jpg"), "--plot draws a PNG: name the file p.png"),
        (("--method", "dip:cache_aware=0.5", "--policy", "belady"), "need lru or lfu"),
        (("--method", "wanda"), "must be calibrated on text first"),
        (("--memory", "10KiB"), "is too little for"),
    ],
)
def test_a_model_with_options_that_make_no_sense(
    error: Error, llama: str, text: str, options: tuple[str, ...], reason: str
) -> None:
    arguments = ("simulate", llama, "--text", text, "--windows", "1")
    assert reason in error(*arguments, *options)


def test_a_file_that_is_no_trace(error: Error, text: str) -> None:
    assert text in error("simulate", text)


def test_a_device_file_with_nonsense(error: Error, trace: str, tmp_path: Path) -> None:
    from dipnet.sim.device import load_device

    device = load_device("phone").model_dump()
    device["flash"]["bandwidth"] = -1
    file = tmp_path / "device.json"
    file.write_text(json.dumps(device))
    assert "flash.bandwidth" in error("simulate", trace, "--device", str(file))


def test_no_packed_models(error: Error, run: Run, llama: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    assert run("pack", llama, str(store)).code == 0
    assert "is a packed model: give its checkpoint, or a trace" in error("simulate", str(store))


def test_nothing_is_drawn_after_an_error(error: Error, llama: str, tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    error("simulate", llama, "--plot", str(plot))  # no text
    assert list(tmp_path.iterdir()) == []
