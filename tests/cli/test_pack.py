"""`dipnet pack` and `dipnet check`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dipnet.store.index import read_index
from tests.cli.conftest import Run

Error = Callable[..., str]


def test_pack_and_check(run: Run, llama: str, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    packed = run("pack", llama, store)
    assert packed.code == 0, packed.err
    assert "mlp.hidden" in packed.out
    checked = run("check", store)
    assert checked.code == 0, checked.err
    assert "records are intact" in checked.out


def test_json(run: Run, opt: str, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    packed = run("pack", opt, store, "--weights", "int8", "--block", "4", "--json").json
    assert packed["schema"] == "dipnet.pack/1"
    assert packed["weights"] == "int8"
    assert [row["block"] for row in packed["groups"]] == [1, 1, 1, 4, 1]
    files = (tmp_path / "store" / name for name in ("records.bin", "rest.safetensors"))
    assert packed["bytes"] == sum(file.stat().st_size for file in files)
    checked = run("check", store, "--json").json
    assert (checked["schema"], checked["intact"]) == ("dipnet.check/1", True)
    assert checked["records"] == 2 * (16 + 16 + 16 + 12) + 16
    assert checked["groups"] == packed["groups"]


def test_calibration(run: Run, llama: str, text: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    packed = run("pack", llama, str(store), "--block", "4", "--calibration", text)
    assert packed.code == 0, packed.err
    assert "dense model is loaded into memory" in packed.err
    assert read_index(store).neurons_permuted


def test_whole_neurons(run: Run, error: Error, llama: str, text: str, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    packed = run("pack", llama, store, "--weights", "int8", "--unit", "neuron", "--json").json
    assert packed["unit"] == "neuron"
    assert [row["group"] for row in packed["groups"]] == [
        *("attn.in", "attn.out", "mlp.neuron", "head")
    ]
    assert [row["columns"] for row in packed["groups"]] == [1, 1, 3, 1]
    checked = run("check", store, "--json").json
    assert (checked["intact"], checked["records"]) == (True, 2 * (16 + 16 + 48) + 16)
    info = run("info", store, "--json").json
    assert info["streamed_bytes"] == packed["groups"][2]["bytes"]
    assert "The records of mlp.neuron" in run("info", store).out
    other = str(tmp_path / "other")
    for options in (("--block", "2"), ("--calibration", text)):
        message = error("pack", llama, other, "--unit", "neuron", *options)
        assert "of one neuron" in message or "a record of a whole neuron" in message
    content = bytearray((tmp_path / "store" / "records.bin").read_bytes())
    content[-700] ^= 4
    (tmp_path / "store" / "records.bin").write_bytes(content)
    assert "is damaged, 1 of" in error("check", store)


def test_an_allocation(
    run: Run, error: Error, llama: str, opt: str, allocation: str, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    packed = run("pack", llama, str(store), "--allocation", allocation)
    assert packed.code == 0, packed.err
    assert "The store's own allocation divides" in packed.out
    assert (store / "allocation.json").read_text() == Path(allocation).read_text()
    checked = run("check", str(store), "--json").json
    assert checked["allocation_sha256"] == read_index(store).allocation_sha256
    assert run("info", str(store), "--json").json["allocation_sha256"] is not None
    (store / "allocation.json").write_text(Path(allocation).read_text().replace("0.5", "0.4"))
    assert "allocation.json is damaged, its SHA-256" in error("check", str(store))
    other = str(tmp_path / "other")
    message = error("pack", opt, other, "--allocation", allocation)
    assert "this allocation is for a llama" in message
    message = error("pack", llama, other, "--allocation", allocation, "--unit", "neuron")
    assert "divides densities of columns" in message
    assert "cannot read the allocation no.json" in error(
        "pack", llama, other, "--allocation", "no.json"
    )
    assert not list(tmp_path.glob("other*"))


def test_errors(error: Error, llama: str, text: str, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    assert "no folder '/of/nobody'" in error("pack", "/of/nobody", store)
    assert "--block must be auto or a number" in error("pack", llama, store, "--block", "x")
    assert "--block 5 does not divide the 48 neurons" in error("pack", llama, store, "--block", "5")
    message = error("pack", llama, store, "--calibration", text)
    assert "--calibration has no effect on records of one neuron" in message
    assert "exists already" in error("pack", llama, str(tmp_path))
    assert "is no store" in error("check", llama)
    assert not list(tmp_path.glob("store*"))


def test_a_damaged_store(run: Run, error: Error, llama: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    run("pack", llama, str(store))
    content = bytearray((store / "records.bin").read_bytes())
    content[700] ^= 4
    (store / "records.bin").write_bytes(content)
    message = error("check", str(store))
    assert message.startswith("record 1 of attn.in of layer 0 in")
    assert "is damaged, 1 of" in message
    assert "is damaged, 1 of" in error("check", str(store), "--json")


def test_an_interruption(
    run: Run, llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dipnet.pack.packing.pack_slab", interrupt)
        stopped = run("pack", llama, str(tmp_path / "store"))
    assert stopped.code == 130
    assert "the same command goes on from there" in stopped.err
    assert json.loads((tmp_path / "store.partial" / "progress.json").read_text())["done"] == 0
    assert run("pack", llama, str(tmp_path / "store")).code == 0
