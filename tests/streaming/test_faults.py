"""Whatever the disk or the user does: one clear error, and the model goes on as it should."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dipnet
from dipnet import _native
from dipnet.errors import InputError
from dipnet.store.geometry import WEIGHTS, Weights
from dipnet.store.index import RECORDS_NAME, REST_NAME, read_index
from dipnet.streaming.engine import Engine, Reader, StoreError
from dipnet.streaming.look_ahead import LookAhead
from tests.streaming.conftest import Stores
from tests.streaming.decoding import decode, decode_alone, load
from tests.streaming.records import Site, write

METHOD = dipnet.DIP(0.5)


@pytest.fixture(params=WEIGHTS)
def store(request: pytest.FixtureRequest, stores: Stores, tmp_path: Path) -> Path:
    """A store to damage."""
    return Path(shutil.copytree(stores("llama", request.param), tmp_path / "store"))


def one_line(error: Exception) -> str:
    assert "\n" not in str(error)
    return str(error)


@pytest.mark.parametrize("backend", ["pread", "auto"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_disk_that_fails(store: Path, backend: str, layer: int) -> None:
    group = read_index(store).group(layer, "mlp.in")
    reader = Reader(backend=backend, faults=[(group.offset, group.end, errno.EIO)])
    model = load(store, METHOD, share=0, reader=reader)
    for _ in range(2):
        with pytest.raises(StoreError, match=f"mlp.in of layer {layer} .*Input/output") as caught:
            decode(model)
        assert len(one_line(caught.value)) < 400


def test_a_disk_that_fails_while_loading(store: Path) -> None:
    group = read_index(store).group(0, "attn.out")
    reader = Reader(faults=[(group.offset, group.offset + 1, errno.EIO)])
    with pytest.raises(StoreError, match=r"record 0 of attn.out of layer 0"):
        load(store, METHOD, reader=reader)


@pytest.mark.parametrize("share", [0, 0.5])
def test_a_bit_that_flips_and_flips_back(store: Path, share: float) -> None:
    """Every record of a group, so that one is wanted; then the right bits, from the same model."""
    expected = decode(load(store, METHOD))
    group = read_index(store).group(1, "mlp.hidden")
    model = load(store, METHOD, share=share)
    flip(store, [group.offset_of(unit) + 3 for unit in range(group.units)])
    with pytest.raises(StoreError, match=r"record \d+ of mlp.hidden of layer 1 .* is damaged"):
        decode(model)
    flip(store, [group.offset_of(unit) + 3 for unit in range(group.units)])
    assert torch.equal(decode(model), expected)


def test_records_that_are_swapped(store: Path) -> None:
    group, file = read_index(store).group(0, "mlp.in"), store / RECORDS_NAME
    content = bytearray(file.read_bytes())
    for first in range(0, group.units - 1, 2):
        a, b = group.offset_of(first), group.offset_of(first + 1)
        size = group.record_bytes
        content[a:b], content[b : b + size] = content[b : b + size], content[a:b]
    file.write_bytes(content)
    with pytest.raises(StoreError, match="is damaged"):
        decode(load(store, METHOD, share=0))


def test_a_file_that_is_cut_off_while_open(store: Path) -> None:
    expected = decode(load(store, METHOD))
    model, file = load(store, METHOD, share=0.5), store / RECORDS_NAME
    content = file.read_bytes()
    os.truncate(file, read_index(store).group(0, "mlp.in").offset)
    with pytest.raises(StoreError, match="cannot be read"):
        decode(model)
    with file.open("r+b") as opened:
        opened.write(content)
    assert torch.equal(decode(model), expected)


def test_a_damaged_rest(store: Path) -> None:
    size = (store / REST_NAME).stat().st_size
    flip(store, [size - 5], REST_NAME)
    with pytest.raises(InputError, match=r"rest.safetensors is damaged") as caught:
        load(store, METHOD)
    one_line(caught.value)


def test_scales_that_are_wrong(stores: Stores) -> None:
    store = stores("llama", "int4")
    index = read_index(store)
    slots = {group.key: 0 for group in index.groups}
    right = {group.scale_name: torch.ones(group.channels) for group in index.groups}
    bad: list[Any] = [torch.ones(3), -torch.ones(24)]
    for scale in [*bad, torch.full((24,), torch.nan)]:
        with pytest.raises(StoreError, match=r"scales of mlp.in of layer 1") as caught:
            Engine(store, index, right | {"scale.1.mlp.in": scale}, slots, "lru")
        one_line(caught.value)
    del right["scale.1.mlp.in"]
    with pytest.raises(StoreError, match=r"scales of mlp.in of layer 1"):
        Engine(store, index, right, slots, "lru")


@pytest.mark.parametrize("call", range(0, 36, 3))
def test_an_interrupt(stores: Stores, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C between the begin and the end of a product, wherever it is in the model."""
    weights: Weights = WEIGHTS[call % 3]
    store = stores("llama", weights)
    expected = decode_alone(load(store, METHOD))
    model, calls, finish = load(store, METHOD, share=0.3), 0, Engine.finish

    def interrupted(self: Engine, key: Any, tokens: int) -> Any:
        nonlocal calls
        calls += 1
        if calls == call + 1:
            raise KeyboardInterrupt
        return finish(self, key, tokens)

    monkeypatch.setattr(Engine, "finish", interrupted)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)  # a call sets one thread: one before would hide that it stays
    with pytest.raises(KeyboardInterrupt):
        decode_alone(model)
    assert torch.get_num_threads() == before + 1
    torch.set_num_threads(before)
    assert torch.equal(decode_alone(model), expected)


def test_an_interrupt_while_looking_ahead(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    store = stores("llama", "int4")
    model, during = load(store, METHOD, share=0.3), LookAhead.during

    def interrupted(self: LookAhead) -> None:
        during(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(LookAhead, "during", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decode_alone(model)
    monkeypatch.setattr(LookAhead, "during", during)
    assert torch.equal(decode_alone(model), decode_alone(load(store, METHOD)))


def test_not_a_number(stores: Stores) -> None:
    """NaN in the residual stream reaches the logits, and the next sequence is as ever."""
    store = stores("llama", "int8")
    expected = decode_alone(load(store, METHOD))
    model = load(store, METHOD, share=0.3)
    norm = model.model.layers[0].input_layernorm.weight
    kept = norm.data.clone()
    norm.data[3] = torch.nan
    assert decode_alone(model).isnan().all()
    norm.data.copy_(kept)
    assert torch.equal(decode_alone(model), expected)


def test_two_models_of_one_store(stores: Stores) -> None:
    store = stores("llama", "int4")
    expected = decode(load(store, METHOD))
    models = [load(store, METHOD, share=share) for share in (0, 0.4)]
    with torch.no_grad():
        for token in range(4):
            outputs = [model(torch.tensor([[token + 5]])).logits for model in models]
            assert torch.equal(*outputs)
    assert all(torch.equal(decode(model), expected) for model in models)


def test_two_threads_on_one_model(stores: Stores) -> None:
    """They take turns: neither sees the other's masks, activations or results."""
    store = stores("llama", "int4")
    expected = [load(store, METHOD)(torch.tensor([[token]])).logits for token in (5, 6)]
    model = load(store, METHOD, share=0.3)
    equal: dict[int, bool] = {}

    def compute(at: int) -> None:
        made = [model(torch.tensor([[5 + at]])).logits for _ in range(30)]
        equal[at] = all(torch.equal(each, expected[at]) for each in made)

    threads = [Thread(target=compute, args=(at,), daemon=True) for at in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert equal == {0: True, 1: True}


SCRIPT = """
import sys, torch, dipnet
model = dipnet.load(sys.argv[1], dipnet.DIP(0.5), cache=0, prefill="sparse")
for _ in range(40):
    with torch.no_grad():
        logits = model(torch.tensor([[7, 8, 9]])).logits
torch.save(logits, sys.argv[2])
"""


def test_two_processes_on_one_store(stores: Stores, tmp_path: Path) -> None:
    store, out = stores("llama", "int8"), tmp_path / "logits"
    other = subprocess.Popen([sys.executable, "-c", SCRIPT, str(store), str(out)])
    model = load(store, METHOD, share=0)
    with torch.no_grad():
        while other.poll() is None:
            logits = model(torch.tensor([[7, 8, 9]])).logits
    assert other.returncode == 0
    assert torch.equal(torch.load(out), logits)


def test_the_smallest_budget_works(stores: Stores) -> None:
    store = stores("llama", "int4")
    with pytest.raises(InputError, match="smallest that works") as caught:
        load(store, METHOD, memory="1MiB")
    found = re.search(r"works is (\d+) MiB", one_line(caught.value))
    assert found
    decode(load(store, METHOD, memory=f"{found[1]}MiB"))


@pytest.mark.parametrize("size", ["", "4 quux", "-1", "nan", "1e9", "9" * 400, "0x10", None])
def test_sizes_that_are_none(stores: Stores, size: Any) -> None:
    if size is None:
        size = ["4GiB"]
    with pytest.raises(InputError) as caught:
        load(stores("llama", "int4"), METHOD, memory=size)
    one_line(caught.value)


def flip(store: Path, offsets: list[int], name: str = RECORDS_NAME) -> None:
    """Turn one bit over in each of the bytes."""
    with (store / name).open("r+b") as file:
        for offset in offsets:
            file.seek(offset)
            (byte,) = file.read(1)
            file.seek(offset)
            file.write(bytes([byte ^ 16]))


# --- the native core alone ---


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("slots", [0, 10, 40])
def test_other_records_of_a_failing_disk(tmp_path: Path, kind: Weights, slots: int) -> None:
    records = write(tmp_path / "records", kind, 40, 200)
    at = 4096 + 17 * records.record_bytes
    good = Site(records, slots)
    site = Site(records, slots, threads=2, faults=((at, at + 1, errno.EIO),))
    rng = np.random.default_rng(0)
    failures = 0
    for _ in range(30):
        masks = rng.random((2, 40)) < 0.4
        x = rng.standard_normal((2, 40)).astype(np.float32)
        if masks[:, 17].any():
            with pytest.raises(_native.RecordError, match="record 17 of site 0: Input"):
                site.multiply(x, masks)
            failures += 1
            continue
        # Neighbours of the record are read alone when it is not wanted.
        np.testing.assert_array_equal(site.multiply(x, masks), good.multiply(x, masks))
    assert 0 < failures < 30


def test_requests_out_of_order(tmp_path: Path) -> None:
    records = write(tmp_path / "records", "int4", 40, 200)
    site, y = Site(records, 10), np.empty((1, 200), np.float32)
    mask, x = np.ones(40, np.bool_), np.ones((1, 40), np.float32)
    for call in (site.native.finish, site.native.partial):
        with pytest.raises(RuntimeError):
            call(y)
    site.native.begin(0, x, mask[None])
    site.native.prefetch(0, mask, np.ones(40, np.float32), True)  # gives the request up
    with pytest.raises(RuntimeError):
        site.native.finish(y)
    site.native.begin(0, x, mask[None])
    site.native.access(0, mask)  # and so does this
    with pytest.raises(RuntimeError):
        site.native.finish(y)
    expected = records.expected(x, mask[None])
    np.testing.assert_array_equal(site.multiply(x, mask[None]), expected)
    for number in (1, 2**40):
        with pytest.raises(IndexError):
            site.native.begin(number, x, mask[None])
    with pytest.raises(IndexError):
        site.native.resident(7)


def test_arrays_of_the_wrong_size(tmp_path: Path) -> None:
    records = write(tmp_path / "records", "int8", 40, 200)
    native = Site(records, 10).native
    x, masks, scores = np.ones((2, 40), np.float32), np.ones((2, 40), np.bool_), np.ones(40, "f4")
    wrong: list[Any] = [
        lambda: native.begin(0, x[:, :39].copy(), masks),
        lambda: native.begin(0, x, masks[:1]),
        lambda: native.begin(0, x[:0], masks[:0]),
        lambda: native.access(0, masks[0, :39].copy()),
        lambda: native.prefetch(0, masks[0], scores[:-1].copy(), True),
        lambda: native.begin(-1, x, masks),
    ]
    for call in wrong:
        with pytest.raises((ValueError, TypeError)):
            call()
    native.begin(0, x, masks)
    for shape in ((2, 199), (1, 200), (2, 201)):
        with pytest.raises(ValueError, match=r"y is \(tokens, rows\)"):
            native.finish(np.empty(shape, np.float32))
    with pytest.raises(TypeError):
        native.finish(np.empty((2, 200), np.float64))  # type: ignore[arg-type]
    native.finish(np.empty((2, 200), np.float32))


def test_a_pool_that_is_gone_before_it_began(tmp_path: Path) -> None:
    records = write(tmp_path / "records", "int8", 4, 20)
    for size in (0, 100, 2**40, 2**56, 2**63):
        for _ in range(20):
            with pytest.raises(ValueError, match="record"):
                _native.Engine(
                    str(records.path), depth=1, backend="pread", threads=8, frame_bytes=0,
                    largest_record=size,
                )  # fmt: skip
    for threads in (0, 10**6):
        with pytest.raises(ValueError, match="threads"):
            Site(records, 1, threads=threads)


NUMBERS = st.one_of(
    st.integers(0, 300),
    st.sampled_from([512, 1024, 4096, 65536, 2**31 - 128, 2**31, 2**32, 2**62, 2**63, 2**64 - 1]),
    st.integers(0, 2**64 - 1),
)


@settings(max_examples=400, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_layout(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Any numbers give a ValueError, or a site that multiplies or finds its records damaged."""
    kind = data.draw(st.sampled_from(WEIGHTS))
    folder = tmp_path_factory.getbasetemp() / f"fuzz-{kind}"
    if not folder.exists():
        folder.mkdir()
        write(folder / "records", kind, 12, 150, 2)
    records = write(folder / "again", kind, 12, 150, 2)
    native = Site(records, 3).native
    layout = records.layout | {"slots": 3, "policy": "lru"}
    for name in data.draw(st.sets(st.sampled_from(sorted(layout.keys() - {"scale", "kind"})))):
        policy = st.sampled_from(["lru", "lfu", ""])
        layout[name] = data.draw(policy if name == "policy" else NUMBERS)
    if data.draw(st.booleans()):
        layout["scale"] = np.ones(data.draw(st.integers(0, 300)), np.float32)
    try:
        site = native.add(**layout)
    except (ValueError, TypeError, MemoryError):
        return
    channels, units = layout["channels"], layout["channels"] // layout["block"]
    if channels > 10**6:
        return
    masks = np.ones((2, units), np.bool_)
    native.access(site, masks[0])
    try:
        native.begin(site, np.ones((2, channels), np.float32), masks)
        native.finish(np.empty((2, layout["rows"]), np.float32))
    except _native.RecordError as error:
        damaged = error.args
    else:
        return
    assert damaged[0] == site
    assert "checksum" in damaged[3]
