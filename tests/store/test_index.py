"""An index is read whole and right, or refused in one line."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dipnet.errors import InputError
from dipnet.store.index import parse_index, read_index


def edit(store: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((store / "index.json").read_text())
    change(content)
    (store / "index.json").write_text(json.dumps(content))


def set_group(number: int, **values: object) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["groups"][number].update(values)


def set_groups(name: str, **values: object) -> Callable[[dict[str, Any]], None]:
    """Change the group of that name in every layer."""

    def change(content: dict[str, Any]) -> None:
        for group in content["groups"]:
            if group["name"] == name:
                group.update(values)

    return change


WRONG: dict[str, tuple[Callable[[dict[str, Any]], object], str | None]] = {
    "format": (lambda c: c.update(format="zip"), "no index of a dipnet store"),
    "version": (lambda c: c.update(version=3), "of version 3 and this dipnet reads 1 and 2"),
    "unit": (lambda c: c.update(version=2), "2 layers need 7 groups"),
    "weights": (lambda c: c.update(weights="int3"), "'int3'; known: int4, int8, bf16"),
    "missing": (lambda c: c.pop("layers"), "layers: Field required"),
    "text": (lambda c: c.update(layers="2"), "layers: Input should be a valid integer"),
    "float": (lambda c: c.update(layers=2.0), "layers: Input should be a valid integer"),
    "truth": (lambda c: c.update(layers=True), "layers: Input should be a valid integer"),
    "layers": (lambda c: c.update(layers=3), "3 layers need 13 groups"),
    "order": (lambda c: c["groups"].reverse(), "group 0 is head, out of its place"),
    "lost": (lambda c: c["groups"].pop(3), "2 layers need 9 groups"),
    "negative": (set_group(1, offset=-4096), "groups.1.offset: Input should be greater"),
    "huge": (set_group(1, channels=2**40), "groups.1.channels: Input should be less"),
    "none": (set_group(1, channels=0), "groups.1.channels: Input should be greater"),
    "endless": (set_group(1, offset=10**400), "groups.1.offset"),
    "aligned": (set_group(1, offset=512), "offset is no multiple of 4096"),
    "overlap": (set_group(1, offset=0), "attn.out of layer 0 overlaps the group before"),
    "outside": (set_group(8, offset=1 << 40), "head ends at .*, behind the end of records.bin"),
    "stride": (set_group(2, stride=192), "mlp.in of layer 0: stride is 192, must be 128"),
    "record": (set_group(2, record_bytes=1024), "record_bytes is 1024, must be 512"),
    "outputs": (set_group(2, outputs=256), "outputs is 256, must be 128"),
    "block": (set_group(3, block=5), "blocks of 5 do not divide 52"),
    "misplaced": (set_group(2, block=2), "mlp.in of layer 0 cannot have blocks"),
    "matrices": (set_group(0, matrices={"q": 4}), "cannot hold the matrices q"),
    "width": (set_group(8, channels=23), None),  # the head may have an embedding's own width
    "layer": (set_group(4, channels=23), "attn.in of layer 1 has another shape"),
    "digest": (lambda c: c.update(rest_sha256="0"), "rest_sha256: String should match"),
    "allocation": (lambda c: c.update(allocation_sha256=1), "allocation_sha256: Input should be"),
    "sizes": (lambda c: c.update(rest_bytes=7), "rest.safetensors has .* its index says 7"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong(store: Path, wrong: str) -> None:
    change, message = WRONG[wrong]
    edit(store, change)
    if message is None:
        read_index(store)
        return
    with pytest.raises(InputError, match=message) as error:
        read_index(store)
    assert str(store / "index.json") in str(error.value) or "sizes" in wrong
    assert "\n" not in str(error.value)


NEURONS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "unit": (lambda c: c.update(version=1), "2 layers need 9 groups"),
    "name": (set_group(2, name="mlp.hidden"), "group 2 is mlp.hidden of layer 0, out of its place"),
    "matrices": (set_group(2, matrices={"down": 24}), "cannot hold the matrices down"),
    "order": (
        set_group(2, matrices={"up": 52, "gate": 52, "down": 24}),
        "cannot hold the matrices up, gate, down",
    ),
    "block": (set_group(2, block=2), "mlp.neuron of layer 0 cannot have blocks"),
    "stride": (set_group(2, stride=192), "stride is 192, must be 128"),
    "record": (set_group(2, record_bytes=1024), "record_bytes is 1024, must be 512"),
    "outputs": (set_group(2, outputs=256), "outputs is 256, must be 128"),
    "rows": (
        set_groups("mlp.neuron", matrices={"gate": 52, "up": 48, "down": 24}),
        "mlp.neuron takes other channels than its matrices give",
    ),
    "neurons": (
        set_groups("mlp.neuron", channels=48),
        "mlp.neuron takes other channels than its matrices give",
    ),
    "width": (
        set_groups("mlp.neuron", matrices={"gate": 52, "up": 52, "down": 20}),
        "disagree about the model's width",
    ),
}


@pytest.mark.parametrize("wrong", NEURONS)
def test_wrong_neurons(neurons: Path, wrong: str) -> None:
    change, message = NEURONS[wrong]
    edit(neurons, change)
    with pytest.raises(InputError, match=message) as error:
        read_index(neurons)
    assert "\n" not in str(error.value)


def test_shapes_of_neurons(neurons: Path) -> None:
    index = read_index(neurons)
    group = index.neurons
    assert (index.version, index.unit) == (2, "neuron")
    assert [each.name for each in index.first_layer] == ["attn.in", "attn.out", "mlp.neuron"]
    assert group.matrices == {"gate": 52, "up": 52, "down": 24}
    assert (group.rows, group.units, group.columns, group.input_rows) == (24, 52, 3, 2)
    assert [group.shape(matrix) for matrix in group.matrices] == [(52, 24), (52, 24), (24, 52)]
    assert group.record_bytes == 512 >= 3 * group.stride + 8


@pytest.mark.parametrize("number", range(4))
def test_groups_that_do_not_fit_each_other(store: Path, number: int) -> None:
    def change(content: dict[str, Any]) -> None:
        for layer in range(2):
            content["groups"][4 * layer + number]["channels"] -= 4

    edit(store, change)
    with pytest.raises(InputError, match=r"disagree about|takes other channels"):
        read_index(store)


def test_unknown_keys_are_ignored(store: Path) -> None:
    before = read_index(store)
    edit(store, lambda content: content.update(remark="kept"))
    assert read_index(store) == before


def test_no_store(tmp_path: Path, store: Path) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        read_index(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"is no store, it has no index.json: make one with"):
        read_index(tmp_path)
    for content in (b"", b"{", b"[]", b"\xff", b'{"format": 1}', b"[" * 100_000):
        (store / "index.json").write_bytes(content)
        with pytest.raises(InputError, match=r"index.json is damaged: .*; pack the model again"):
            read_index(store)


def test_shapes(packed: Path) -> None:
    index = read_index(packed)
    group = index.group(1, "attn.in")
    assert index.position(1, "attn.in") == 4
    assert group.output_rows("k") == slice(24, 32)
    assert (group.rows, group.outputs, group.units) == (40, 128, 24)
    assert group.offset_of(2) == group.offset + 2 * group.record_bytes
    with pytest.raises(KeyError):
        group.output_rows("gate")


values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-1, 1000),
    st.sampled_from([2**31, 2**62, 2**63, 2**64, 10**30]),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, item in inner:
        found.append((*path, key))
        if isinstance(item, dict | list):
            found += places(item, (*path, key))
    return found


@settings(max_examples=400)
@given(st.data())
def test_mutated(packed: Path, data: st.DataObject) -> None:
    """A changed index is the same index, another sound one, or an InputError of one line."""
    content = copy.deepcopy(json.loads((packed / "index.json").read_text()))
    for _ in range(data.draw(st.integers(1, 3))):
        *way, last = data.draw(st.sampled_from(places(content)))
        target = content
        for key in way:
            target = target[key]
        if data.draw(st.booleans()):
            target[last] = data.draw(values)
        else:
            del target[last]
    check_refused_or_sound(json.dumps(content).encode())


@settings(max_examples=200)
@given(st.data())
def test_changed_bytes(packed: Path, data: st.DataObject) -> None:
    content = bytearray((packed / "index.json").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    check_refused_or_sound(bytes(content))


def check_refused_or_sound(content: bytes) -> None:
    refusal = None
    try:
        index = parse_index(content)
    except InputError as error:
        refusal = str(error)
    if refusal:
        assert "\n" not in refusal
        assert len(refusal) < 1000
        return
    end = 0
    for group in index.groups:
        assert group.offset >= end
        assert group.block * group.stride + 8 <= group.record_bytes
        end = group.end
    assert end <= index.records_bytes
