"""The lm-evaluation-harness runs our models: log-likelihoods, rolling ones, generation."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dipnet
from dipnet.errors import InputError

harness = pytest.importorskip(
    "lm_eval", reason="lm-eval weighs 270 MB with what it needs: pip install -e '.[lm-eval]'"
)

from lm_eval.tasks import TaskManager  # noqa: E402

from dipnet.eval.lm_eval import DipnetLM, requested  # noqa: E402

ROWS = [
    {"text": "The ship sailed into the", "choices": [" harbour", " of of"], "gold": 0},
    {"text": "She opened the door and", "choices": [" xq zz", " went in"], "gold": 1},
]
TASKS = {
    "tiny_choice": """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "tiny_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
""",
    "tiny_generation": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6}
metric_list: [{metric: exact_match}]
""",
}
ARGUMENTS = "pretrained=demo-swiglu,method=dip,density=0.5,split=1.2,device=cpu,dtype=float32"


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of tasks on two rows of their own; nothing is downloaded."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, task in TASKS.items():
        where = f"dataset_kwargs: {{data_files: {{test: {rows}}}}}"
        head = f"task: {name}\ndataset_path: json\n{where}\ntest_split: test"
        (tmp_path / f"{name}.yaml").write_text(head + task)
    return tmp_path


def evaluate(folder: Path, name: str, arguments: str = ARGUMENTS) -> dict[str, Any]:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    made = harness.simple_evaluate(
        model="dipnet", model_args=arguments, tasks=[name], task_manager=manager, bootstrap_iters=0
    )
    assert made is not None
    return made


def reference(text: str, continuation: str) -> tuple[float, bool]:
    """The continuation's log-likelihood under the masks, and whether it is the likeliest."""
    loaded = dipnet.load_model("demo-swiglu", device="cpu", dtype="float32")
    before = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = loaded.tokenizer(text + continuation, add_special_tokens=False)["input_ids"]
    assert whole[: len(before)] == before
    with dipnet.sparsify(loaded.model, dipnet.DIP(0.5, split=1.2)) as model, torch.no_grad():
        logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    places = range(len(before) - 1, len(whole) - 1)
    total = sum(float(logits[i, whole[i + 1]]) for i in places)
    return total, all(int(logits[i].argmax()) == whole[i + 1] for i in places)


def test_log_likelihoods_are_the_sparse_models(tasks: Path) -> None:
    made = evaluate(tasks, "tiny_choice")
    for row, sample in zip(ROWS, made["samples"]["tiny_choice"], strict=True):
        for choice, found in zip(row["choices"], sample["filtered_resps"], strict=True):
            total, likeliest = reference(str(row["text"]), choice)
            assert found[0] == pytest.approx(total, abs=1e-3)
            assert bool(found[1]) == likeliest
    about = made["config"]["dipnet"]
    assert about["method"].startswith("dip:density=0.5")
    assert 0.45 < about["density"]["mlp"] < 0.55


def test_rolling_log_likelihoods(tasks: Path) -> None:
    """Every token of a text counts, the first after the token that texts begin with."""
    found = evaluate(tasks, "tiny_rolling")["samples"]["tiny_rolling"]
    loaded = dipnet.load_model("demo-swiglu", device="cpu", dtype="float32")
    with dipnet.sparsify(loaded.model, dipnet.DIP(0.5, split=1.2)) as model, torch.no_grad():
        for row, sample in zip(ROWS, found, strict=True):
            text = loaded.tokenizer(str(row["text"]), add_special_tokens=False)["input_ids"]
            whole = [loaded.tokenizer.bos_token_id, *text]
            logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            total = sum(float(logits[i, token]) for i, token in enumerate(text))
            assert sample["resps"][0][0] == pytest.approx(total, abs=1e-3)


def test_generation(tasks: Path) -> None:
    samples = evaluate(tasks, "tiny_generation")["samples"]["tiny_generation"]
    loaded = dipnet.load_model("demo-swiglu", device="cpu", dtype="float32")
    with dipnet.sparsify(loaded.model, dipnet.DIP(0.5, split=1.2)) as model:
        for row, sample in zip(ROWS, samples, strict=True):
            asked = loaded.tokenizer(str(row["text"]), return_tensors="pt")
            made = model.generate(**asked, max_new_tokens=6, do_sample=False)[0]
            text = loaded.tokenizer.decode(made[asked["input_ids"].shape[1] :])
            assert text.startswith(sample["resps"][0][0])


def test_a_store(tasks: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    from dipnet.pack.packing import pack

    pack("demo-swiglu", store, "int8")
    made = evaluate(tasks, "tiny_choice", f"pretrained={store},method=dip,density=0.5,cache=8MiB")
    assert made["config"]["dipnet"]["density"]["mlp"] == pytest.approx(0.5, abs=0.01)


def test_options_stand_beside_the_method() -> None:
    asked = requested("dip:split=1.2", 0.4, {"hidden_block": 2})
    assert asked == dipnet.DIP(0.4, split=1.2, hidden_block=2)
    assert requested("dip", None, {}) == dipnet.DIP(0.5)
    assert requested("dense", None, {}) == dipnet.Dense()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "dpi"}, "Did you mean 'dip'"),
        ({"splt": 1.2}, "no option of dip"),
        ({"density": 1.5}, r"density must be in \(0, 1\]"),
        ({"method": "cats"}, "cats has to be calibrated"),
        ({"weights": "int4", "device": "cuda"}, "device has no effect on a packed model"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DipnetLM("demo-swiglu", **arguments)


def test_the_command_line_says_errors_in_one_line() -> None:
    asked = ["--model", "dipnet", "--model_args", "method=nope", "--tasks", "arc_easy"]
    command = [sys.executable, "-m", "dipnet.eval.lm_eval", *asked]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "dipnet: error: unknown method 'nope'" in done.stderr
    assert "Traceback" not in done.stderr
