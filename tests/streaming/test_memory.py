"""The budget holds for what it was divided for, and what is beyond it is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import dipnet
from dipnet.errors import InputError
from dipnet.pack.packing import pack
from tests.checkpoints import save_llama

CONTEXT = 1024
# One layer that is wide where a long prompt costs memory: in the MLP.
WIDE = {
    "vocab_size": 256,
    "hidden_size": 512,
    "intermediate_size": 16384,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}
PEAK = """
import json, re, sys, torch, dipnet
from dipnet.streaming.stats import process_bytes
store, tokens = sys.argv[1], int(sys.argv[2])
method = dipnet.RandomMasks(mlp_density=0.5) if "neuron" in store else dipnet.DIP(0.5)
options = {"context": 1024, "prefill": "dense"}
try:
    dipnet.load(store, method, memory="1MiB", **options)
except dipnet.InputError as error:
    smallest = int(re.search(r"works is (\\d+) MiB", str(error))[1])
model = dipnet.load(store, method, memory=f"{smallest}MiB", **options)
with torch.no_grad():
    model(torch.randint(0, 256, (1, tokens)), use_cache=True, logits_to_keep=1)
print(json.dumps([smallest << 20, process_bytes("VmHWM")]))
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    save_llama(folder / "model")  # its tokenizer
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**WIDE))
    model.save_pretrained(folder / "model")
    pack(str(folder / "model"), folder / "store", "int4")
    pack(str(folder / "model"), folder / "neurons", "int4", unit="neuron")
    return folder / "store"


@pytest.mark.parametrize("store", ["store", "neurons"])
@pytest.mark.parametrize("tokens", [1, CONTEXT - 1])
def test_the_smallest_budget_holds_for_any_prompt(wide: Path, tokens: int, store: str) -> None:
    command = [sys.executable, "-c", PEAK, str(wide.with_name(store)), str(tokens)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    budget, peak = json.loads(out.splitlines()[-1])
    assert peak <= budget


def test_more_than_the_budget_was_divided_for(wide: Path) -> None:
    model = dipnet.load(wide, dipnet.DIP(0.5), memory="16GiB", context=32)
    with torch.no_grad():
        model(torch.ones(2, 16, dtype=torch.long), use_cache=True)
        with pytest.raises(InputError, match=r"3 x 11 tokens need more memory .* context"):
            model(torch.ones(3, 11, dtype=torch.long), use_cache=True)
        with pytest.raises(InputError, match="load the model with a larger context"):
            model.generate(torch.ones(1, 30, dtype=torch.long), max_new_tokens=8)
        unbounded = dipnet.load(wide, dipnet.DIP(0.5), cache="1MiB", context=32)
        unbounded(torch.ones(3, 11, dtype=torch.long), use_cache=True)
