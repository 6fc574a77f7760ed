"""``dipnet plan``, and ``dipnet run`` with what it wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dipnet.cli import planned
from dipnet.eval import probe
from dipnet.sim.device import load_device
from dipnet.streaming.plan import open_plan
from tests.cli.conftest import Run
from tests.plans import content

Error = Callable[..., str]
SHORT = ("--prompt", "The ship lay at anchor", "--max-new-tokens", "6")
CHEAP = ("--window", "16", "--windows", "3", "--device", "phone", "--max-ppl-increase", "50%")


@pytest.fixture
def packed(run: Run, llama: str, tmp_path: Path) -> str:
    assert run("pack", llama, str(tmp_path / "store"), "--weights", "int8").code == 0
    return str(tmp_path / "store")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "plan.json"


def test_a_plan_is_run(run: Run, packed: str, text: str, file: Path) -> None:
    arguments = ("plan", packed, "--cache", "4KiB", "--text", text, *CHEAP, "--out", str(file))
    shown = run(*arguments)
    assert shown.code == 0, shown.err
    assert "→" in shown.out
    assert "dense" in shown.out
    assert "about" in shown.err
    plan = open_plan(file)
    assert (plan.cache, plan.memory, plan.weights, plan.device) == (4096, None, "int8", "phone")
    assert plan.expected.increase_at_most <= plan.max_increase == 0.5
    assert plan.expected.tokens_per_second > plan.expected.dense_tokens_per_second
    found = run("run", packed, *SHORT, "--plan", str(file), "--json").json
    assert found["method"] == plan.method
    assert found["streaming"]["cache"] == 4096
    assert found["streaming"]["policy"] == plan.policy
    again = run("run", packed, *SHORT, "--plan", str(file), "--method", plan.method, "--json").json
    assert again["text"] == found["text"]


def test_json_is_the_plan(run: Run, packed: str, text: str, file: Path) -> None:
    arguments = ("plan", packed, "--text", text, *CHEAP, "--out", str(file), "--json")
    assert run(*arguments).json == json.loads(file.read_text())
    plan = open_plan(file)
    assert (plan.cache, plan.memory) == (None, None)
    assert plan.expected.bytes_per_token == 0


def test_a_checkpoint_and_its_blocks(
    run: Run, llama: str, text: str, file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("DIPNET_CACHE", str(cache))
    result = run("plan", llama, "--cache", "3KiB", "--text", text, *CHEAP, "--out", str(file))
    assert result.code == 0, result.err
    plan = open_plan(file)
    assert plan.weights == "int4"
    assert len(list(cache.iterdir())) == (1 if plan.block == 1 else 2)  # the others are removed
    assert run("run", llama, *SHORT, "--plan", str(file)).code == 0


def test_this_machine_is_measured(
    run: Run, packed: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[Path] = []

    def measured(folder: Path, name: str, _: object) -> object:
        folders.append(folder)
        return load_device("phone").model_copy(update={"name": name})

    monkeypatch.setattr(probe, "probe", measured)
    options = [option for option in CHEAP if option not in ("--device", "phone")]
    found = run("plan", packed, "--text", text, *options, "--json").json
    assert found["device"] == "this machine"
    assert folders == [Path(packed).parent]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--max-ppl-increase", "little"), "--max-ppl-increase little: write a share"),
        (("--max-ppl-increase", "-1%"), "write a share such as 1%"),
        (("--device", "fone"), "Did you mean 'phone'?"),
        (("--memory", "much"), "is no size in memory"),
        (("--memory", "1MiB"), "is too small for this model: the smallest that works is"),
        (("--memory", "4GiB", "--cache", "1MiB"), "either --memory"),
        (("--weights", "int4"), "holds its weights as int8"),
        (("--window", "65"), "longer than the context"),
        (("--window", "64", "--windows", "3"), "planning needs 3"),
        (("--out", "nowhere/plan.json"), "the folder nowhere does not exist"),
        (("--context", "1000"), "context must be between 1 and"),
    ],
)
def test_what_cannot_be_planned(
    error: Error,
    packed: str,
    tmp_path: Path,
    options: tuple[str, ...],
    reason: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    capsys.readouterr()
    words = tmp_path / "words.txt"
    words.write_text("The ship lay at anchor. " * 10)
    assert reason in error("plan", packed, "--text", str(words), *options)
    assert not list(tmp_path.glob("*.json"))


def test_no_text(error: Error, llama: str, file: Path) -> None:
    assert "what shall" in error("plan", llama, "--out", str(file))
    assert not file.exists()


def test_an_error_leaves_neither_plan_nor_stores(
    run: Run, llama: str, text: str, file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("DIPNET_CACHE", str(cache))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(planned.Stores, "keep", interrupted)
    options = ("--cache", "3KiB", "--text", text, *CHEAP, "--out", str(file))
    assert run("plan", llama, *options).code == 130
    assert not file.exists()
    assert len(list(cache.iterdir())) == 1


@pytest.fixture
def plan(packed: str, file: Path) -> str:
    file.write_text(json.dumps(content(Path(packed))))
    return str(file)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--density", "0.99"), "--method contradicts the plan, which says dip:density="),
        (("--method", "dense"), "--method contradicts the plan"),
        (("--memory", "4GiB"), "--memory contradicts the plan, which says no bound"),
        (("--cache", "8KiB"), "--cache contradicts the plan, which says 4 KiB"),
        (("--weights", "int4"), "--weights contradicts the plan, which says int8"),
    ],
)
def test_options_that_contradict_a_plan(
    error: Error,
    packed: str,
    plan: str,
    options: tuple[str, ...],
    reason: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    capsys.readouterr()
    assert reason in error("run", packed, *SHORT, "--plan", plan, *options)


def test_a_plan_for_another_model(
    error: Error,
    run: Run,
    opt: str,
    plan: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = str(tmp_path / "opt")
    assert run("pack", opt, other, "--weights", "int8").code == 0
    capsys.readouterr()
    assert "the plan is for" in error("run", other, *SHORT, "--plan", plan)
    assert "no plan" in error("run", other, *SHORT, "--plan", str(Path(other) / "config.json"))
