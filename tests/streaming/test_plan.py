"""Plans as files, and models that are loaded as they say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import dipnet
from dipnet.errors import InputError
from dipnet.pack.packing import pack
from dipnet.store.index import read_index
from dipnet.streaming.attach import streamed
from dipnet.streaming.plan import Plan, Settings, open_plan
from tests.checkpoints import save_llama, save_opt
from tests.plans import content


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores of a model in two kinds of weights and two sizes of records, and of other models."""
    made = tmp_path_factory.mktemp("plans")
    save_llama(made / "llama")
    save_opt(made / "opt")
    for name, weights, block in (("int8", "int8", 1), ("int4", "int4", 1), ("blocks", "int8", 2)):
        pack(str(made / "llama"), made / name, weights, block)  # type: ignore[arg-type]
    pack(str(made / "opt"), made / "other", "int8")
    return made


def written(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def refused(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_plan(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_file_comes_back(folder: Path, tmp_path: Path) -> None:
    made = content(folder / "int8")
    found = open_plan(written(tmp_path / "plan.json", made))
    assert json.loads(found.model_dump_json()) == json.loads(json.dumps(made))
    assert found.chosen == dipnet.DIP(0.5, cache_aware=0.2)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": "dipnet-device"}, "has no format 'dipnet-plan'"),
        ({"version": 2}, "a plan of version 2 and this dipnet reads 1"),
        ({"speed": 1}, "speed: Extra inputs"),
        ({"memory": -1, "cache": None}, "memory: "),
        ({"memory": 1 << 30}, "memory and cache cannot both be bounded"),
        ({"policy": "belady"}, "policy: "),
        ({"cache_split": "mine"}, "cache_split: "),
        ({"weights": "int2"}, "weights: "),
        ({"block": 0}, "block: "),
        ({"context": 0}, "context: "),
        ({"max_increase": -0.1}, "max_increase: "),
        ({"method": "dpi:density=0.5"}, "unknown method 'dpi'"),
        ({"method": "dip:density=2"}, "density must be in (0, 1]"),
        ({"method": "dip:pace=2"}, "is no option of dip"),
        ({"method": "dip"}, "dip takes either density"),
        ({"method": "glu"}, "lacks its density"),
        ({"text": {}}, "text.name: "),
    ],
)
def test_what_cannot_be(folder: Path, tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    message = refused(written(tmp_path / "plan.json", content(folder / "int8", **changes)))
    assert reason in message
    assert "dipnet plan MODEL --out FILE" in message


@pytest.mark.parametrize("text", ["", "plan", "[1, 2]", "{}", "\0" * 100, '{"format": [1]}'])
def test_what_is_no_plan(tmp_path: Path, text: str) -> None:
    refused(written(tmp_path / "plan.json", text))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "nothing.json")
    assert "Is a directory" in refused(tmp_path)
    large = tmp_path / "large.json"
    large.write_bytes(b" " * (1 << 21))
    assert "is larger than any plan" in refused(large)


@pytest.mark.parametrize(
    ("store", "changes", "reason"),
    [
        ("other", {}, "the plan is for"),
        ("blocks", {}, "int8 weights in blocks of 1, and"),
        ("int4", {}, "holds its weights as int4"),
        ("int8", {"block": 4}, "in blocks of 4, and"),
    ],
)
def test_plans_for_something_else(
    folder: Path, tmp_path: Path, store: str, changes: dict[str, Any], reason: str
) -> None:
    file = written(tmp_path / "plan.json", content(folder / "int8", **changes))
    with pytest.raises(InputError) as caught:
        dipnet.load(folder / store, plan=file)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_model_of_the_same_shapes(folder: Path, tmp_path: Path) -> None:
    made = content(folder / "int8")
    made["model"]["rest_sha256"] = "f" * 64
    with pytest.raises(InputError, match="another model of the same shapes"):
        dipnet.load(folder / "int8", plan=written(tmp_path / "plan.json", made))


@pytest.mark.parametrize("held", [None, "f" * 64])
def test_a_store_with_another_allocation(folder: Path, tmp_path: Path, held: str | None) -> None:
    store = Path(shutil.copytree(folder / "int8", tmp_path / "store"))
    index = json.loads((store / "index.json").read_text())
    (store / "index.json").write_text(json.dumps({**index, "allocation_sha256": "e" * 64}))
    made = content(store)
    made["model"]["allocation_sha256"] = held
    with pytest.raises(InputError, match="is for a store with another allocation, or without one"):
        dipnet.load(store, plan=written(tmp_path / "plan.json", made))


def test_a_plan_from_before_there_were_any(folder: Path, tmp_path: Path) -> None:
    made = content(folder / "int8")
    del made["model"]["allocation_sha256"]
    assert open_plan(written(tmp_path / "plan.json", made)).model.allocation_sha256 is None


def test_loaded_as_the_plan_says(folder: Path) -> None:
    plan = Plan.model_validate(content(folder / "int8"))
    how: dict[str, Any] = {"cache": 4096, "policy": "lru", "cache_split": "even", "context": 32}
    by_plan = dipnet.load(folder / "int8", plan=plan)
    by_hand = dipnet.load(folder / "int8", dipnet.DIP(0.5, cache_aware=0.2), **how)
    engine = streamed(by_plan).engine
    assert engine.slots == streamed(by_hand).engine.slots
    assert engine.policy == "lru"
    usual = dipnet.load(folder / "int8", dipnet.DIP(0.5), **{**how, "cache_split": "wanted"})
    assert engine.slots != streamed(usual).engine.slots
    words = torch.arange(3, 9)[None]
    made = [model.generate(words, max_new_tokens=8) for model in (by_plan, by_hand)]
    assert torch.equal(*made)


def test_a_checkpoint_is_packed_as_the_plan_says(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIPNET_CACHE", str(tmp_path))
    plan = Plan.model_validate(content(folder / "blocks", block=2))
    dipnet.load(folder / "llama", plan=plan)
    (store,) = tmp_path.iterdir()
    assert read_index(store).group(0, "mlp.hidden").block == 2
    usual = Plan.model_validate(content(folder / "int8"))
    dipnet.load(folder / "llama", weights="int8")
    dipnet.load(folder / "llama", plan=usual)
    assert len(list(tmp_path.iterdir())) == 2  # the usual one is of one neuron already


AGREEING: tuple[dict[str, Any], ...] = (
    {"method": dipnet.DIP(0.5, cache_aware=0.2)},
    {"cache": "4KiB"},
    {"policy": "lru", "cache_split": "even"},
    {"weights": "int8"},
)
CONTRADICTING: tuple[dict[str, Any], ...] = (
    {"method": dipnet.DIP(0.5)},
    {"cache": "8KiB"},
    {"memory": "4GiB"},
    {"policy": "lfu"},
    {"cache_split": "wanted"},
    {"weights": "int4"},
)


@pytest.mark.parametrize("given", AGREEING)
def test_what_agrees_with_a_plan(folder: Path, given: dict[str, Any]) -> None:
    plan = Plan.model_validate(content(folder / "int8"))
    assert plan.settings(Settings(**given)) == plan.settings(Settings())


@pytest.mark.parametrize("given", CONTRADICTING)
def test_what_contradicts_a_plan(folder: Path, given: dict[str, Any]) -> None:
    plan = Plan.model_validate(content(folder / "int8"))
    (name,) = given
    with pytest.raises(InputError, match=f"{name} contradicts the plan, which says"):
        dipnet.load(folder / "int8", plan=plan, **given)


def test_the_context_is_the_callers(folder: Path) -> None:
    plan = Plan.model_validate(content(folder / "int8"))
    assert plan.settings(Settings(context=50)).context == 50
    assert plan.settings(Settings()).context == 32
