"""Packed models on the command line: run, eval, info."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dipnet.cli import run as cli_run
from dipnet.pack.packing import pack
from tests.checkpoints import CONTEXT, WORDS, save_llama
from tests.cli.conftest import Run

Error = Callable[..., str]
PROMPT = ("--prompt", WORDS)
SHORT = (*PROMPT, "--max-new-tokens", "6")


@pytest.fixture(scope="module")
def store(llama: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("packed") / "llama.dipnet"
    pack(llama, folder, "int8")
    return str(folder)


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("DIPNET_CACHE", str(folder))
    return folder


AWARE = ("--method", "dip:cache_aware=0.5")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--memory", "4GiB"), "--memory is for packed models"),
        (("--cache", "4MiB"), "--cache is for packed models"),
        (("--policy", "lru"), "--policy is for packed models"),
        (("--no-look-ahead",), "--no-look-ahead is for packed models"),
        (AWARE, "cache_aware has no effect when everything is in memory"),
    ],
)
def test_options_that_a_checkpoint_does_not_have(
    error: Error, llama: str, options: tuple[str, ...], message: str
) -> None:
    found = error("run", llama, *SHORT, *options)
    assert message in found
    if options != AWARE:
        assert f"`dipnet pack {llama} OUT`, or add --weights int4" in found


@pytest.mark.parametrize("command", ["run", "eval"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "mps"), "a packed model"),  # eval takes no device, run a GPU
        (("--dtype", "float32"), "--dtype has no effect on a packed model"),
        (("--memory", "1GiB", "--cache", "1MiB"), "give either --memory"),
        (("--memory", "much"), "'much' is no size"),
        (("--cache", "0.5"), "'0.5' is no size"),
        (("--policy", "fifo"), "unknown cache policy 'fifo'"),
        (("--memory", "1MiB"), "the smallest that works is"),
        (("--weights", "int4"), "holds its weights as int8"),
        (AWARE, "cache_aware has no effect when everything is in memory"),
    ],
)
def test_options_that_make_no_sense(
    error: Error, store: str, text: str, command: str, options: tuple[str, ...], message: str
) -> None:
    needs = SHORT if command == "run" else ("--text", text)
    assert message in error(command, store, *needs, *options)


def test_methods_that_a_store_cannot_run(error: Error, store: str, text: str) -> None:
    assert "gate cannot run from a store" in error("run", store, *SHORT, "--method", "gate")
    message = error("run", store, *SHORT, "--method", "teal")
    assert "teal is fitted on a text with the dense model" in message
    assert "--calibration has no effect" in error("run", store, *SHORT, "--calibration", text)
    for option in ("--calibration", "--fit-split"):
        message = error("eval", store, "--text", text, option, text)
        assert f"{option} needs the dense model" in message
    assert "teal is fitted" in error("eval", store, "--text", text, "--method", "teal")
    assert "--density has no effect on a store" in error("info", store, "--density", "0.5")


def test_sizes_and_shares_are_told_apart(error: Error, llama: str, text: str) -> None:
    message = error("eval", llama, "--text", text, "--cache", "4MiB")
    assert "a checkpoint's cache is a share" in message


def test_a_damaged_store(error: Error, store: str, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(store, tmp_path / "copy"))
    (copy / "index.json").unlink()
    assert "is no store, it has no index.json" in error("run", str(copy), *SHORT)


def test_run(run: Run, store: str) -> None:
    arguments = ("run", store, *SHORT, "--cache", "4KiB")
    shown, found = run(*arguments), run(*arguments, "--json").json
    assert (shown.code, shown.out) == (0, found["text"] + "\n")
    for words in ("Where a token's time went", "waiting for disk", "read ahead", "mlp.in"):
        assert words in shown.err
    assert found["model"]["dtype"] == "int8"
    assert found["streaming"] == {
        "memory": None,
        "cache": 4096,
        "policy": "lfu",
        "look_ahead": True,
    }
    decoding = found["decoding"]
    assert decoding["tokens"] == 5  # the first comes from the prompt
    names = ("selection", "guessing", "disk", "kernels", "other")
    parts = [decoding["seconds"][name] for name in names]
    assert sum(parts) == pytest.approx(found["decode_seconds"])
    assert decoding["bytes_per_token"] > 0
    site = decoding["sites"]["mlp.in"]
    assert site["hits"] + site["misses"] == 5 * 2 * found["density"]["sites"]["0.mlp.in"] * 16


def test_the_cache_and_the_guesses_change_no_text(run: Run, store: str) -> None:
    small = ("--cache", "4KiB", "--json")
    texts = {
        run("run", store, *SHORT, *options).json["text"]
        for options in (("--json",), small, (*small, "--no-look-ahead", "--policy", "lru"))
    }
    assert len(texts) == 1


def test_the_context_is_what_the_text_needs(
    run: Run, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dipnet.streaming.load as loading

    seen: list[Any] = []
    original = loading.load
    monkeypatch.setattr(loading, "load", lambda *a, **k: seen.append(k) or original(*a, **k))
    found = run("run", store, *SHORT, "--json").json
    run("run", store, *PROMPT, "--max-new-tokens", "500")
    assert [k["context"] for k in seen] == [found["prompt_tokens"] + 6, CONTEXT]


def test_weights_pack_once(run: Run, llama: str, cache_folder: Path) -> None:
    arguments = ("run", llama, *SHORT, "--weights", "int8", "--cache", "4KiB", "--json")
    first = run(*arguments).json
    (made,) = cache_folder.iterdir()
    stamp = (made / "index.json").stat().st_mtime_ns
    assert run(*arguments).json["text"] == first["text"]
    assert [*cache_folder.iterdir()] == [made]
    assert (made / "index.json").stat().st_mtime_ns == stamp
    assert first["model"]["name"] == str(made)


def test_a_changed_checkpoint_is_packed_anew(run: Run, tmp_path: Path, cache_folder: Path) -> None:
    folder = save_llama(tmp_path / "model")
    arguments = ("run", str(folder), *SHORT, "--weights", "int4")
    assert run(*arguments).code == 0
    (folder / "model.safetensors").touch()
    assert run(*arguments).code == 0
    assert len([*cache_folder.iterdir()]) == 2


def test_eval(run: Run, store: str, text: str) -> None:
    arguments = ("eval", store, "--text", text, "--density", "0.5", "--windows", "2")
    both = ("--method", "dip", *AWARE, "--method", "gate")
    found = run(*arguments, *both, "--cache", "8KiB", "--json").json
    assert found["store"] == {"cache": 8192, "policy": "lfu", "memory": None}
    dense, dip, aware, gate = found["rows"]
    assert 0 < dense["store"]["hit_rate"] < 1
    assert dip["store"]["bytes_per_token"] < dense["store"]["bytes_per_token"]
    assert aware["store"]["hit_rate"] > dip["store"]["hit_rate"]
    assert "cannot run from a store" in gate["reason"]
    held = run(*arguments, "--json").json
    assert held["rows"][1]["perplexity"] == dip["perplexity"]
    assert held["rows"][1]["store"] == {
        "hit_rates": {"mlp.in": 1.0, "mlp.hidden": 1.0},
        "hit_rate": 1.0,
        "bytes_per_token": 0.0,
        "own_allocation": False,
    }
    shown = run(*arguments, "--cache", "8KiB").out
    assert "MiB/token" in shown
    assert "lfu cache of 8 KiB" in shown


def test_eval_needs_a_text(error: Error, store: str) -> None:
    assert "give --text or --dataset" in error("eval", store)


def test_info(run: Run, store: str) -> None:
    found = run("info", store, "--json").json
    assert (found["schema"], found["weights"]) == ("dipnet.store-info/1", "int8")
    assert found["context_of_smallest"] == CONTEXT
    shown = run("info", store)
    assert "mlp.hidden" in shown.out
    assert "the smallest that works is --memory" in shown.out


def dipnet(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "dipnet", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_smallest_budget_works_and_holds(error: Error, store: str) -> None:
    """In processes of their own: this one holds what other tests have left."""
    arguments = ("run", store, *SHORT, "--json")
    _, refusal = dipnet(*arguments, "--memory", "1MiB").communicate()
    smallest = refusal.split("the smallest that works is ")[1].split(" MiB")[0]
    out, err = dipnet(*arguments, "--memory", f"{smallest}MiB").communicate()
    assert json.loads(out)["peak_memory_bytes"] <= int(smallest) << 20, err


def test_ctrl_c_while_it_writes(store: str) -> None:
    arguments = ("run", store, *PROMPT, "--max-new-tokens", "500", "--cache", "0B")
    running = dipnet(*arguments)
    assert running.stdout is not None
    assert running.stdout.read(1)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert err.strip().splitlines()[-1] == "dipnet: interrupted"
    assert "Traceback" not in err


def test_a_read_error_keeps_the_text(
    run: Run, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(store, tmp_path / "copy"))
    original = cli_run.stream

    def damage(text: str) -> None:
        original(text)
        if text.strip():
            size = (copy / "records.bin").stat().st_size
            (copy / "records.bin").write_bytes(bytes(size))

    monkeypatch.setattr(cli_run, "stream", damage)
    result = run("run", str(copy), *PROMPT, "--max-new-tokens", "40", "--cache", "0B")
    assert result.code == 2
    assert result.out.strip()
    assert result.out.endswith("\n")
    assert "is damaged, its checksum does not fit" in result.err
    assert result.err.count("\n") == 1
